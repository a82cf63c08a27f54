"""Atomic writes of files, and the errors of readers."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# A reader may allocate this many bytes, plus this multiple of the size of the file, for
# arrays whose shapes the file declares.
_MAX_DECLARED_BYTES = 1 << 26
_MAX_DECLARED_RATIO = 64


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` when the block ends.

    The temporary file is in the directory of `path`. It is flushed to disk and then
    renamed, so after a crash or an error `path` is the complete old file or the
    complete new one. Symbolic links are followed, and the mode of the old file is kept.
    With concurrent writers, the last one wins.

    Args:
      path: the path of the file.

    Yields:
      The path of the temporary file.

    Raises:
      OSError: the file can't be written; the old file is unchanged. Exceptions of the
        block propagate.

    Example:
      >>> path = directory / "figures.json"
      >>> with jbag.atomic_write(path) as temporary:
      ...     _ = temporary.write_text("[1, 2]")
      >>> path.read_text()
      '[1, 2]'
    """
    target = Path(os.path.realpath(path))
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{os.fspath(path)} is a directory, not a file.")
        if not stat.S_ISREG(mode):  # a pipe or a device, which must not be replaced
            yield target
            return
    temporary = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        # Created here, so that a failure raises an OSError with the path.
        temporary.open("xb").close()
        yield temporary
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        _flush(temporary, os.O_RDWR)
        temporary.replace(target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = os.fspath(path), None
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # a rename is durable once the directory is flushed
        _flush(target.parent, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], finding: str) -> Iterator[None]:
    """Convert the exceptions of a parser to ValueErrors: path, finding and cause.

    An ImportError, and an OSError with a file name, propagate.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # the parsers of other libraries raise many types
        if isinstance(error, OSError) and error.filename is not None:
            raise
        why = str(error) or type(error).__name__
        raise ValueError(f"{os.fspath(path)} {finding}: {why}") from error


def check_declared(num_bytes: int, file_size: int, what: str) -> None:
    """Raise ValueError if a file declares arrays that are far larger than the file."""
    limit = _MAX_DECLARED_BYTES + _MAX_DECLARED_RATIO * file_size
    if num_bytes > limit:
        raise ValueError(
            f"{what} would take {num_bytes} bytes; the limit for a file of {file_size} "
            f"bytes is {limit}"
        )
