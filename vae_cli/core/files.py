"""Files: written atomically, checked when read, and locked between processes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

from vae_cli.core.errors import Failure, UserError

# The errors of file systems without locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name in its folder, flush it to the disk, then rename it.

    A reader sees either the old file or the complete new one. Raises OSError if the new file cannot be written; the
    old file is then unchanged.
    """
    with reporting_path(path):
        # Only the first part of the name: TensorBoard reads every file that has tfevents in its name.
        descriptor, beside = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name.lstrip('.').partition('.')[0]}.", suffix=".part"
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o666 & ~_umask())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


@contextmanager
def reporting_path(path: Path) -> Iterator[None]:
    """Make every OSError name this path: the error for a full disk names no file, and others name a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_folder(folder: Path) -> None:
    """Make new or renamed files in a folder survive a power failure, if the system supports it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # from network file systems without fsync
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, in UTF-8 (see replace_file). Bytes of names that are not UTF-8 are escaped."""
    replace_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write or replace a JSON file (see replace_file). Raises ValueError for NaN and infinity, which JSON forbids."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading.

    Raises OSError if it cannot be opened, and ValueError if it is a folder, a pipe or a device, or a link to one:
    opening or reading a pipe or a device may never end.
    """
    _check_kind(path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_kind(os.fstat(descriptor).st_mode)  # another file may have taken its place
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_kind(mode: int) -> None:
    if S_ISDIR(mode):
        raise ValueError("it is a folder, not a file")
    if not S_ISREG(mode):
        raise ValueError("it is not a regular file")


def read_text(path: Path, max_bytes: int = 64_000_000) -> str:
    """Return the text of a UTF-8 file.

    Raises OSError if the file cannot be read, and ValueError if it is not UTF-8 text, is not a regular file or is
    larger than max_bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""  # files in /proc have size 0
    if size > max_bytes or len(content) > max_bytes:
        raise ValueError(f"it has {max(size, len(content)):,} bytes, more than {max_bytes:,}")
    return content.decode()


def is_printable(value: object, depth: int = 20) -> bool:
    r"""Return whether a value read from a file is safe to print.

    It is safe if its strings contain no control characters (newlines and tabs are allowed) and it is nested at most
    `depth` levels deep.

    >>> is_printable({"name": ["a", "b"]}), is_printable({"name": "\x1b[2J"})
    (True, False)
    """
    texts, level = [], [value]
    for _ in range(depth + 1):
        inside: list[object] = []
        for part in level:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict):
                inside += part  # its keys
                inside += part.values()
            elif isinstance(part, list):
                inside += [item for item in part if not isinstance(item, float)]  # curves are long lists of floats
        level = inside
    text = "".join(texts)
    return not level and (text.isprintable() or text.replace("\n", "").replace("\t", "").isprintable())


def expand_home(path: str | Path, setting: str) -> Path:
    """Return a path with a leading ~ or ~name replaced by the home folder.

    Raises UserError, which names the setting, if the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{setting}={path}: this home folder is unknown. Give the full path.") from None


def refuse_unwritable(folder: Path, advice: str) -> None:
    """Raise UserError if a folder is a file or lies in one, Failure if it is read-only; messages end with `advice`.

    Called before a long computation, whose results would be lost.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{folder} cannot be written to: {there} is a file. {advice}")
    if not os.access(there, os.W_OK):
        raise Failure(f"{folder} cannot be written to: {there} is read-only. {advice}")


def digest(path: Path) -> str:
    """Return a hash of a file's contents, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, created if missing, and yield True.

    With wait=False, yield False at once if another process holds the lock. The system releases the lock of a process
    that dies. On file systems without locks, True is always yielded.
    """
    from filelock import FileLock, Timeout

    lock, is_ours = FileLock(file, thread_local=False), True
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        is_ours = False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    try:
        yield is_ours
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """Return whether a process holds the lock of a file. No file is created or, except on Windows, opened to write."""
    if not file.is_file():  # missing, or something else: opening a pipe would block
        return False
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock  # the lock that filelock holds; asking needs no permission to write
    except ImportError:
        with locked(file, wait=False) as is_free:
            return not is_free
    with open(file, "rb") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
