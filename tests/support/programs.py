"""Programs of the examples, loaded from their files."""

import contextlib
import importlib.util
import io
import sys


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, so that progress is shown."""

    def isatty(self):
        return True


@contextlib.contextmanager
def load_program(path):
    """Load a program as a module, and forget it afterwards.

    As when it is run, its folder is on the path.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, and so Flax, look up the module of a class by its name.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[path.stem]
