"""A dataset of the user's own images, from a folder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from vae_cli.axes.dataset.pack import (
    Chunk,
    Pack,
    cannot_write,
    data_folder,
    exclusive,
    in_threads,
    is_reading_only,
    open_pack,
    pack_folder,
    refuse_oversize_pack,
    write_pack,
)
from vae_cli.axes.dataset.split import Dataset, Split, Splits, partition
from vae_cli.core.errors import UserError, visible
from vae_cli.core.files import expand_home, open_regular
from vae_cli.core.images import UNREADABLE, to_pixels
from vae_cli.core.listing import File, changed_images, list_images
from vae_cli.core.values import Count, Interval, Natural
from vae_cli.core.white import Values, find_whites, is_deep, values_of

NAMED = 5  # at most this many files are named in a message

Fraction = Annotated[float, Interval(0, 1, open_low=True)]


class ImageFolder(Dataset):
    """All images in a folder and its subfolders, cropped and resized to squares of one size.

    Images can have any size, color mode and format that Pillow can read. The largest centered square of each is resized
    to `side` x `side` pixels. `range` is the value of white in images with more than 8 bits per channel; auto finds it
    from the values of all of them. Runs and comparisons in the folder are left out. If every image is in a subfolder,
    the top-level subfolders are the classes. `test` and `validation` are the sizes of the test set and the validation
    set: numbers of images, or fractions of all images. The images are packed once into a memory-mapped array in the
    data folder, and again whenever the image folder changes.

    Raises UserError if the folder is missing, has too few images or, unless skip_corrupt is true, has unreadable ones,
    and if the value of white is unknown.
    Raises Failure if the packed images cannot be written.
    """

    provides = frozenset({"unit_interval", "levels"})

    def __init__(
        self,
        *,
        path: str | None,
        side: Annotated[int, Interval(1, 4096)] = 64,
        channels: Literal[1, 3] = 3,
        background: Literal["white", "black"] = "white",
        test: Count | Fraction = 0.1,
        validation: Natural | Fraction = 0.1,
        split_seed: Natural = 0,
        skip_corrupt: bool = False,
        range: Literal["auto", 1, 255, 4095, 65535] = "auto",
        data_dir: str | None = None,
    ) -> None:
        if not path:
            raise UserError("dataset=image_folder needs the folder of your images: add dataset.path=<folder>.")
        self.path = expand_home(path, "dataset.path").absolute()
        self._shape = (channels, side, side)
        self.background = background
        self.test = test
        self.validation = validation
        self.split_seed = split_seed
        self.skip_corrupt = skip_corrupt
        self.range = range
        self.data_dir = data_dir

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def check(self) -> None:
        self._files()

    def fingerprint_of_files(self) -> str:
        return _fingerprint(self._files())

    def load(self) -> Splits:
        files = self._files()
        data = data_folder(self.data_dir)
        settings = {
            "path": str(self.path),
            "shape": self._shape,
            "background": self.background,
            "skip_corrupt": self.skip_corrupt,
            "range": self.range,
        }
        folder = pack_folder(data, self.path.name, settings)
        fingerprint = _fingerprint(files)
        pack = open_pack(folder, fingerprint)
        if pack is None:
            self._counts(len(files))  # raises UserError before the images are packed
            if is_reading_only() and any(folder.glob("*/about.json")):
                raise UserError(
                    f"The images in {self.path} have changed since they were packed into {folder}. If the run was "
                    "trained on the images as they are now, type --data-dir FOLDER, to pack them into another folder; "
                    "otherwise, restore the images."
                )
            self._refuse_changed(files)
            refuse_oversize_pack(folder, len(files), self._shape)
            pack = self._pack(folder, fingerprint, files)
        count = len(pack.images)
        test, validation = self._counts(count)
        rows = partition(count, validation, self.split_seed, test=test)
        train, held_out, tested = (Split(pack.images, pack.labels, part, pack.mapped) for part in rows)
        return Splits(train, held_out, tested, pack.classes, fingerprint, pack.digest)

    def _counts(self, images: int) -> tuple[int, int]:
        """Return the numbers of test and validation images. Raises UserError if no training image is left."""
        sizes = (self.test, self.validation)
        test, validation = (size if isinstance(size, int) else max(1, round(size * images)) for size in sizes)
        if images < test + validation + 1:
            raise UserError(
                f"{self.path} holds {images} image{'s' * (images != 1)}, too few for a test set of {test}, a "
                f"validation set of {validation} and at least one training image. "
                + ("Type dataset.test=1 dataset.validation=0." if images > 1 else "At least two images are needed.")
            )
        return test, validation

    def _files(self) -> list[File]:
        if not self.path.is_dir():
            what = "is a file, not a folder" if self.path.exists() else "does not exist"
            raise UserError(f"dataset.path={self.path} {what}. Give the folder that contains your images.")
        files, others = list_images(self.path)
        if not files:
            found = f"none of its {others} files is an image" if others else "it is empty"
            raise UserError(
                f"dataset.path={self.path} has no images: {found}. Give a folder that contains images, such as .jpg or "
                f".png files, directly or in its subfolders."
            )
        return files

    def _refuse_changed(self, files: list[File]) -> None:
        """Raise UserError if listed images have changed: the runs of a sweep must see the same images."""
        if changed := changed_images(self.path, files):
            named = ", ".join(map(visible, changed[:NAMED])) + (" and others" if len(changed) > NAMED else "")
            raise UserError(
                f"Images in {self.path} have changed or were removed since this command started: {named}. Type the "
                "command again to train on the images as they are now."
            )

    def _pack(self, folder: Path, fingerprint: str, files: Sequence[File]) -> Pack:
        tops = [Path(file.name).parts[0] if len(Path(file.name).parts) > 1 else None for file in files]
        folders = sorted({top for top in tops if top is not None}) if None not in tops else []
        label = {name: number for number, name in enumerate(folders)}
        labels = [label[top] for top in tops if top is not None] if folders else None
        classes = [visible(name) for name in folders] or None  # names that are not UTF-8 cannot be stored as text
        try:
            with exclusive(folder):
                return open_pack(folder, fingerprint) or write_pack(
                    folder, fingerprint, self._shape, self._chunks(files, labels), classes
                )
        except OSError as error:
            raise cannot_write(folder, error) from error

    def _chunks(self, files: Sequence[File], labels: Sequence[int] | None) -> Generator[Chunk, None, None]:
        from PIL import Image, UnidentifiedImageError

        whites = self._whites(files)

        def read(number: int) -> NDArray[np.uint8] | str:
            """Return the pixels or, if the image cannot be read, the file's name and the reason."""
            name = files[number].name
            try:
                with open_regular(self.path / name) as file, Image.open(file) as image:
                    white = whites.get(image.mode == "F")
                    return to_pixels(image, self._shape, background=self.background, white=white)
            except Image.DecompressionBombError:
                return f"{name} (too many pixels to open safely: make it smaller)"
            except UNREADABLE as error:
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
                return f"{name} ({getattr(error, 'strerror', None) or reason})"

        done, good, corrupt = 0, 0, list[str]()
        for results in in_threads(read, len(files), self._shape, f"Packing {self.path.name}"):
            pixels, rows = [], []
            for number, result in enumerate(results, start=done):
                if isinstance(result, str):
                    corrupt.append(result)
                else:
                    pixels.append(result)
                    rows.append(number)
            done += len(results)
            good += len(pixels)
            if len(corrupt) > NAMED and not self.skip_corrupt:
                break
            if pixels:
                yield Chunk(np.stack(pixels), None if labels is None else [labels[row] for row in rows])
        if corrupt and not (self.skip_corrupt and good):
            named = ", ".join(" ".join(visible(one).split()) for one in corrupt[:NAMED])
            named += " and others" if len(corrupt) > NAMED else ""
            advice = "Repair or remove them, or skip them with dataset.skip_corrupt=true."
            if not good and done == len(files):
                advice = "No image in the folder can be read."
            raise UserError(f"Cannot read these images in {self.path}: {named}. {advice}")

    def _whites(self, files: Sequence[File]) -> dict[bool, float]:
        """Return the value of white in floating-point images (True) and in integers of 16 bits or more (False)."""
        from PIL import Image

        if self.range != "auto":
            return {True: self.range, False: self.range}

        def read(number: int) -> Values | None:
            try:
                with open_regular(self.path / files[number].name) as file, Image.open(file) as image:
                    return values_of(image) if is_deep(image) else None
            except (Image.DecompressionBombError, *UNREADABLE):
                return None  # reported when the pixels are read

        found: dict[str, Values] = {}
        start = 0
        for results in in_threads(read, len(files), self._shape, f"Reading the range of {self.path.name}"):
            found |= {files[number].name: values for number, values in enumerate(results, start) if values is not None}
            start += len(results)
        return find_whites(found, "Type dataset.range=1, 255, 4095 or 65535, the value of white in your images.")


def _fingerprint(files: Sequence[File]) -> str:
    listing = "\n".join(f"{file.name}\t{file.size}\t{file.modified}" for file in files)
    return sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
