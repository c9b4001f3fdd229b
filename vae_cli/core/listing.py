"""Lists of the image files in a folder, which stay the same for all runs of a sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from vae_cli.core.files import read_text, write_json

NAME = "images.json"  # in the folder of a sweep
MAX_BYTES = 1_000_000_000
# Formats that Pillow recognizes but cannot read without a plug-in.
STUBS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})
# Files by which the folder of a run, or of a comparison, is recognized; a copied run may lack its hidden files.
WRITTEN_BY_VAE = (
    {"config.yaml", ".lock"},
    {"config.yaml", "metrics.jsonl", "summary.json"},
    {"report.html", "compare.json"},
)


class File(NamedTuple):
    """An image file: its path relative to the folder, size in bytes and modification time in nanoseconds.

    If any of these changes, the images are packed again.
    """

    name: str
    size: int
    modified: int


class Listing(NamedTuple):
    """The files with an image extension in a folder and its subfolders, sorted by path, and the number of others."""

    images: list[File]
    others: int


_listings: ContextVar[dict[str, Listing] | None] = ContextVar("listings", default=None)


@contextmanager
def listing_once(sweep: Path | None = None) -> Iterator[None]:
    """Inside this context, list the images of a folder only once, however often they are asked for.

    If the folder of a sweep is given, start with the lists that were saved there. Raises ValueError or OSError if they
    cannot be read.
    """
    token = _listings.set({} if sweep is None else _read(sweep))
    try:
        yield
    finally:
        _listings.reset(token)


def has_listings() -> bool:
    """Return whether images have been listed in this context."""
    return bool(_listings.get())


def save_listings(sweep: Path) -> None:
    """Save all lists of this context in the folder of a sweep, for its jobs in other processes."""
    sweep.mkdir(parents=True, exist_ok=True)
    write_json(sweep / NAME, _listings.get() or {})


def _read(sweep: Path) -> dict[str, Listing]:
    try:
        saved = json.loads(read_text(sweep / NAME, MAX_BYTES))
    except FileNotFoundError:
        return {}
    return {root: Listing([File(*image) for image in images], others) for root, (images, others) in saved.items()}


def list_images(root: Path) -> Listing:
    """Return the images in a folder (see Listing), from the list of this context if there is one."""
    listings = _listings.get()
    if listings is None:
        return _list(root)
    if str(root) not in listings:
        listings[str(root)] = _list(root)
    return listings[str(root)]


def changed_images(root: Path, images: list[File]) -> list[str]:
    """Return the names of the listed images that have changed since they were listed, or are gone."""
    return [image.name for image in images if _stamped(root / image.name, image.name) != image]


def _list(root: Path) -> Listing:
    """List the images in a folder.

    Hidden files and folders are ignored: they are usually thumbnails or temporary files of other programs. So are the
    folders of runs and of comparisons, whose pictures would otherwise become images.
    """
    from PIL import Image

    Image.init()
    endings = {end for end, name in Image.EXTENSION.items() if name in Image.OPEN and name not in STUBS}
    images, others, seen = [], 0, set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may form a cycle
            folders.clear()
            continue
        seen.add(real)
        if folder != str(root) and any(marks <= {*files} for marks in WRITTEN_BY_VAE):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() not in endings:
                others += 1
                continue
            file = Path(folder, name)
            images.append(_stamped(file, file.relative_to(root).as_posix()))
    return Listing(sorted(images), others)


def _stamped(file: Path, name: str) -> File:
    try:
        stat = file.stat()
    except OSError:  # a broken link, which is reported when it is read
        return File(name, 0, 0)
    return File(name, stat.st_size, stat.st_mtime_ns)
