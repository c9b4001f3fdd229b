"""Files that are whole or not there: nothing half-written ever stands in place of a good one."""

from __future__ import annotations

import errno
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, flush it to the disk, and only then give it its name.

    Raises OSError, and leaves what stood there before as it was, where it cannot be written.
    """
    with blaming(path):
        # The first part of the name alone: TensorBoard reads whatever has tfevents in its name.
        descriptor, beside = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem.partition('.')[0]}.", suffix=".part"
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
def blaming(path: Path) -> Iterator[None]:
    """Have errors of the system name the file that a person knows of: a full disk names none at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_folder(folder: Path) -> None:
    """Make new names in a folder survive a power failure, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # what some network file systems answer
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file; numbers that JSON has no word for are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_text(path: Path, most: int = 64_000_000) -> str:
    """The text of a file. Raises OSError, ValueError where it is no text, or is so large that it cannot be what it is
    taken for: a device and a pipe, which have no end, are none."""
    stat = path.stat()
    if S_ISDIR(stat.st_mode):
        raise ValueError("it is a folder, not a file")
    if not S_ISREG(stat.st_mode) or stat.st_size > most:
        raise ValueError("it is no file of its kind" if stat.st_size <= most else f"it has {stat.st_size:,} bytes")
    return path.read_text(encoding="utf-8")


def plain(value: object, depth: int = 20) -> bool:
    """Whether what a file has held can be shown as it is: no text in it steers a terminal, and no part of it lies
    deeper than a screen could show."""
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
                inside += [item for item in part if not isinstance(item, float)]  # curves are long
        level = inside
    text = "".join(texts)
    return not level and (text.isprintable() or text.replace("\n", "").replace("\t", "").isprintable())


@contextmanager
def reading_many() -> Iterator[None]:
    """Read many files without the garbage collector, which would look through all that they hold again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made if need be, and give True; or without waiting give False where another
    process holds it. The system takes the lock back from a process that has died, however it died.

    On systems without such locks (Windows), and file systems without them, it is always given.
    """
    with open(file, "ab") as lock:
        yield _lock(lock, wait)


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of a file; nothing is made or changed."""
    if not file.is_file():  # nothing, or what is none of ours: a pipe would keep us waiting
        return False
    with open(file, "rb") as lock:
        return not _lock(lock, wait=False)


def _lock(file: IO[bytes], wait: bool) -> bool:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return True
    try:
        flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
