"""Packs (datasets stored as one memory-mapped array of equally sized images) and the data folder that holds them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from hashlib import blake2b, sha256
from math import prod
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_cli.axes.dataset.mapped import BLOCKWISE_ABOVE, Mapped
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import expand_home, flush_folder, locked

FORMAT = 1  # version of the pack format; if it changes, all images are packed again
IMAGES_PER_STEP = 256  # images that are read and written together; fewer if they exceed BYTES_PER_STEP
BYTES_PER_STEP = 1 << 26

T = TypeVar("T")


class Chunk(NamedTuple):
    """Some of the images to be written to a pack, uint8 (n, C, H, W), and their n labels or None."""

    images: NDArray[np.uint8]
    labels: Sequence[int] | None


class Pack(NamedTuple):
    """All images of a dataset, or of one of its published splits.

    images   uint8 (N, C, H, W), memory-mapped or in memory; changes are not written back
    labels   int64 (N,), or None
    classes  the name of each label, or None
    mapped   the file of the images if they may not fit into memory, else None
    digest   a hash of all pixels; None for packs that were written by earlier versions, and for images in memory
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] | None
    mapped: Mapped | None = None
    digest: str | None = None


def data_folder(data_dir: str | None) -> Path:
    """Return the folder that datasets are read from and written to.

    It is data_dir, else $VAE_DATA_DIR, else `vae` in the user's cache folder ($XDG_CACHE_HOME or the system's default).
    Raises UserError if it is a file, or if the home folder is needed but unknown.
    """
    given = data_dir or os.environ.get("VAE_DATA_DIR")
    setting = "data_dir" if data_dir else "VAE_DATA_DIR"
    folder = expand_home(given, setting).absolute() if given else _cache_folder() / "vae"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data_dir={folder} is a file. Give a folder, which is created if it does not exist.")
    return folder


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache
    try:
        home = Path.home()
    except RuntimeError:
        raise UserError("The home folder is unknown. Give a folder for datasets: data_dir=FOLDER") from None
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ".cache"


def pack_folder(data: Path, name: str, settings: Mapping[str, object]) -> Path:
    """Return the folder for packs of a dataset.

    Its name combines `name` with a hash of `settings`, which must contain everything that determines the pixels.
    """
    key = sha256(json.dumps([FORMAT, dict(settings)], sort_keys=True, default=str).encode()).hexdigest()
    plain = re.sub(r"[^\w.-]+", "_", name)[:50]
    return data / "packed" / f"{plain}-{key[:12]}"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock, so that only one of several simultaneous runs downloads or packs the images.

    If the process dies, its lock is released. Raises UserError inside `only_reading`.
    """
    if _only_reads.get():
        raise UserError(
            f"The images are not in {folder}, where the run's configuration expects them. To write them there, or to "
            "read them from a different folder, type --data-dir FOLDER (with vae train --repeat: data_dir=FOLDER)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        yield


_only_reads: ContextVar[bool] = ContextVar("only_reads", default=False)


@contextmanager
def only_reading() -> Iterator[None]:
    """Forbid downloads, packing and new folders inside the block.

    It protects users who load somebody else's run, whose configuration may name any data folder.
    """
    token = _only_reads.set(True)
    try:
        yield
    finally:
        _only_reads.reset(token)


def is_reading_only() -> bool:
    """Return whether this is inside `only_reading`."""
    return _only_reads.get()


def refuse_oversize_pack(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """Raise Failure if a disk has no space for a pack of `count` images."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = count * prod(shape), shutil.disk_usage(there).free
    if needed > free:
        raise Failure(
            f"The {count:,} images need {needed / 1e9:,.1f} GB, but {there} has only {free / 1e9:,.1f} GB of free "
            "space. Give a folder on a larger disk: data_dir=<folder>."
        )


def open_pack(folder: Path, fingerprint: str) -> Pack | None:
    """Return the pack with this fingerprint, or None if the pack is missing or damaged."""
    home = folder / fingerprint
    try:
        about = json.loads((home / "about.json").read_text(encoding="utf-8"))
        # Copy on write, because torch warns about read-only arrays. Nothing writes to these.
        images = np.load(home / "images.npy", mmap_mode="c")
        # Memory-mapped before it is copied: if the file is shorter than its header claims, this fails before memory is
        # allocated.
        labels = torch.from_numpy(np.load(home / "labels.npy", mmap_mode="c")).clone() if about["labels"] else None
        classes = None if about["classes"] is None else tuple(map(str, about["classes"]))
        digest = str(about["digest"]) if about.get("digest") else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # missing
        return None
    except (ValueError, EOFError, KeyError, TypeError, OverflowError, RecursionError):  # damaged
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or (labels is not None and labels.shape != images.shape[:1]):
        return None
    mapped = Mapped(home / "images.npy", images.offset, images.shape) if images.nbytes > BLOCKWISE_ABOVE else None
    return Pack(torch.from_numpy(images) if mapped is None else mapped.images, labels, classes, mapped, digest)


def write_pack(
    folder: Path,
    fingerprint: str,
    shape: tuple[int, int, int],
    chunks: Generator[Chunk, None, None],
    classes: Sequence[str] | None = None,
) -> Pack:
    """Write the images to `<folder>/<fingerprint>/`, remove older packs from `folder` and return the new pack.

    The pack's folder is renamed into place once it is complete, so a killed process leaves only partial files, which
    the next call removes. Call it inside `exclusive`. Raises Failure if the disk is full or cannot be written to.
    """
    try:
        for remains in folder.glob(".partial-*"):
            shutil.rmtree(remains, ignore_errors=True)
        part = folder / f".partial-{token_hex(4)}"  # not from mkdtemp, whose folders other users cannot read
        part.mkdir()
        try:
            write_images(part, shape, chunks, classes)
            flush_folder(part)
            shutil.rmtree(folder / fingerprint, ignore_errors=True)  # a damaged pack
            os.replace(part, folder / fingerprint)
            flush_folder(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for other in folder.iterdir():
            if other.is_dir() and other.name != fingerprint:
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    pack = open_pack(folder, fingerprint)
    if pack is None:
        raise Failure(f"The packed images in {folder} were removed while they were written. Run the command again.")
    return pack


def cannot_write(folder: Path, error: OSError) -> Failure:
    """Return the Failure to raise if a data folder cannot be written to."""
    return Failure(
        f"Cannot write to {folder}: {error.strerror or error}. Give a writable folder with enough space: "
        f"data_dir=<folder>."
    )


def write_images(
    part: Path, shape: tuple[int, int, int], chunks: Generator[Chunk, None, None], classes: Sequence[str] | None
) -> None:
    """Write the images, labels and class names of a pack into the folder `part`, chunk by chunk. Raises OSError."""
    # Plain writes, not a memory map: a full disk makes a write raise an error, but kills a process that uses a map.
    count, labels, digest = 0, list[int](), blake2b(digest_size=16)
    # The generator is closed here: after an error, the traceback would keep it alive, and its progress bar would
    # overwrite the message.
    with closing(chunks), open(part / "images.npy", "wb") as file:
        start = _write_header(file, count, shape)
        for chunk in chunks:
            pixels = chunk.images.tobytes()
            file.write(pixels)
            digest.update(pixels)
            count += len(chunk.images)
            labels += chunk.labels or ()
        file.seek(0)
        if _write_header(file, count, shape) != start:
            raise AssertionError("NumPy no longer leaves room for the count in the header of a .npy file")
        _flush(file)
    if labels:
        with open(part / "labels.npy", "wb") as file:
            np.save(file, np.array(labels, dtype=np.int64))
            _flush(file)
    about = {
        "images": count,
        "labels": bool(labels),
        "classes": None if classes is None else list(classes),
        "digest": digest.hexdigest(),
    }
    with open(part / "about.json", "wb") as file:
        file.write(json.dumps(about).encode())
        _flush(file)


def _write_header(file: BinaryIO, count: int, shape: tuple[int, int, int]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def in_threads(
    read: Callable[[int], T], count: int, shape: tuple[int, int, int], description: str
) -> Generator[list[T], None, None]:
    """Call read(i) for i = 0 ... count - 1 in threads, and yield lists of the results, in order.

    A list has at most IMAGES_PER_STEP items, and fewer if images of this shape would exceed BYTES_PER_STEP. If stderr
    is a terminal, it shows a progress bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        task = bar.add_task(description, total=count)
        step = max(1, min(IMAGES_PER_STEP, BYTES_PER_STEP // prod(shape)))
        for start in range(0, count, step):
            results = list(threads.map(read, range(start, min(start + step, count))))
            bar.advance(task, len(results))
            yield results
