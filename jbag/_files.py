"""Files: written whole or not at all, and refused by one kind of error if broken."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# What a reader may allocate for numbers that the file declares and doesn't hold.
_FREE_BYTES = 1 << 26
_FREE_MULTIPLE = 64


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file, which replaces `path` when the block ends.

    The new file lies in the same directory. It is flushed to the disk before it takes
    the place of the old one, in one step: whatever fails, and whenever the process
    ends, `path` is the old file or the new one, whole. A link at `path` is followed,
    and the mode of the old file is kept. Of several writers at once, the last one wins.

    Args:
      path: of the file.

    Raises:
      OSError: the file can't be written; the old one is as it was. What the block
        raises is passed on.

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
        if not stat.S_ISREG(mode):  # a pipe or a device, which nothing can replace
            yield target
            return
    temporary = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        # Made here: a failure to do so should name the directory, not a library.
        temporary.open("xb").close()
        yield temporary
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        _flush(temporary, os.O_RDWR)
        temporary.replace(target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = os.fspath(path), None  # for its message
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # where the name of a file is flushed with its directory
        _flush(target.parent, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], finding: str) -> Iterator[None]:
    """Turn whatever a parser raises into a ValueError: the path, a finding and a cause.

    An ImportError, and an OSError that names the file itself, are passed on.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # parsers of other libraries raise some thirty kinds
        if isinstance(error, OSError) and error.filename is not None:
            raise
        why = str(error) or type(error).__name__
        raise ValueError(f"{os.fspath(path)} {finding}: {why}") from error


def check_declared(num_bytes: int, file_size: int, what: str) -> None:
    """Raise ValueError if a small file declares many bytes that it doesn't hold."""
    most = _FREE_BYTES + _FREE_MULTIPLE * file_size
    if num_bytes > most:
        raise ValueError(
            f"{what} would take {num_bytes} bytes; for a file of {file_size} bytes at "
            f"most {most} are taken"
        )
