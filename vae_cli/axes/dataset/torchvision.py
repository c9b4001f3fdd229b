"""Image datasets of torchvision, specified in configuration files."""

from __future__ import annotations

import inspect
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_cli.axes.dataset.pack import (
    Chunk,
    Pack,
    cannot_write,
    data_folder,
    exclusive,
    in_threads,
    open_pack,
    pack_folder,
    refuse_oversize_pack,
    write_pack,
)
from vae_cli.axes.dataset.split import Dataset, Split, Splits, partition
from vae_cli.core.errors import Failure, UserError, first_line, nearest
from vae_cli.core.images import center_box, to_pixels
from vae_cli.core.values import Count, Natural

MOST_IMAGES = 100_000_000  # more than any dataset has; FakeData makes up as many as a configuration asks for
PACKED = "complete"  # the fingerprint of every pack: published datasets do not change
RESIZED_TOGETHER = 4096  # images that are resized at once, to limit memory


class Torchvision(Dataset):
    """A dataset of torchvision.datasets, which torchvision downloads and verifies.

    source       name of the class in torchvision.datasets
    train, test  arguments of the class for the training and the test images
    shape        channels (1 or 3), height and width to which the images are resized
    files        files to put into the data folder by hand if they cannot be downloaded
    labels       whether the targets of the dataset are integer class labels
    transpose    whether to swap rows and columns
    crop         side of the centered square that is kept before resizing; None keeps the largest centered part with the
                 aspect ratio of `shape`

    If the class loads its images into memory, they are cropped and resized there; if it reads them one by one, they are
    packed once into a memory-mapped array. Files that are already complete are not downloaded again. Raises
    UserError for arguments that the class does not accept, Failure if the files can neither be read nor downloaded.
    """

    def __init__(
        self,
        *,
        source: str,
        train: dict[str, Any],
        test: dict[str, Any],
        shape: Sequence[Count],
        files: Sequence[str] = (),
        labels: bool = True,
        transpose: bool = False,
        crop: Count | None = None,
        validation: Natural = 5000,
        split_seed: Natural = 0,
        data_dir: str | None = None,
    ) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(
                f"dataset.shape={list(shape)} must list channels (1 or 3), height and width, for example [1,28,28]."
            )
        channels, height, width = shape
        self._shape = (channels, height, width)
        self.provides = frozenset({"unit_interval", "levels"} | ({"labels"} if labels else set()))
        self.source = source
        self.train, self.test = train, test
        self.files = files
        self.labels = labels
        self.transpose = transpose
        self.crop = crop
        self.validation = validation
        self.split_seed = split_seed
        self.data_dir = data_dir

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def load(self) -> Splits:
        train = self._part(self.train)
        train_rows, validation_rows, _ = partition(len(train.images), self.validation, self.split_seed)
        test = self._part(self.test)
        return Splits(
            Split(train.images, train.labels, train_rows, train.mapped),
            Split(train.images, train.labels, validation_rows, train.mapped),
            Split(test.images, test.labels, torch.arange(len(test.images)), test.mapped),
            train.classes,
        )

    def _part(self, arguments: dict[str, Any]) -> Pack:
        """Return the images and labels of torchvision's dataset with these arguments, packed or in memory."""
        data = data_folder(self.data_dir)
        name = "-".join([self.source, *(str(value) for value in arguments.values() if isinstance(value, str))])
        settings = {key: getattr(self, key) for key in ("source", "shape", "labels", "transpose", "crop")} | {
            "arguments": arguments
        }
        folder = pack_folder(data, name, settings)
        if pack := open_pack(folder, PACKED):
            return pack
        source = self._open(data, arguments)
        classes = getattr(source, "classes", None) if self.labels else None
        classes = None if classes is None else tuple(str(name) for name in classes)
        images = _array(source)
        if images is None:
            self._check_size(folder, source, arguments)
            try:
                with exclusive(folder):
                    return open_pack(folder, PACKED) or write_pack(
                        folder, PACKED, self._shape, self._chunks(source, arguments), classes
                    )
            except OSError as error:
                raise cannot_write(folder, error) from error
        labels = getattr(source, "targets", getattr(source, "labels", None)) if self.labels else None
        if labels is not None:
            labels = torch.as_tensor(labels)
        if self.labels and (labels is None or labels.ndim != 1 or labels.is_floating_point()):
            raise self._no_labels()
        return Pack(self._fit(images), None if labels is None else labels.to(torch.int64), classes)

    def _open(self, data: Path, arguments: dict[str, Any]) -> Any:
        """Return torchvision's dataset; download its files first, unless they already exist and are complete."""
        import torchvision.datasets

        make = getattr(torchvision.datasets, self.source, None)
        if self.source not in torchvision.datasets.__all__ or not isinstance(make, type):
            near = nearest(self.source, torchvision.datasets.__all__)
            raise UserError(f"dataset.source={self.source} is not a class of torchvision.datasets.{near}")
        takes = inspect.signature(make).parameters
        any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())

        def attempt(**more: object) -> Any:
            known = {key: value for key, value in more.items() if key in takes or any_key}
            try:
                return make(**known, **arguments)
            except ValueError as error:
                if str(error).startswith("Unknown value"):  # torchvision's message for a split that does not exist
                    raise self._refused(arguments, error) from error
                raise
            except _file_errors():
                raise
            except Exception as error:  # whatever its code raises for arguments that it does not expect
                raise self._refused(arguments, error) from error

        try:
            return attempt(root=data, download=False)
        except _file_errors():
            pass  # missing, incomplete, or being written by another process
        try:
            with exclusive(data):
                return attempt(root=data, download=True)
        except _file_errors() as error:
            raise self._unavailable(data, error) from error

    def _refused(self, arguments: dict[str, Any], error: Exception) -> UserError:
        given = str(arguments) if len(str(arguments)) <= 100 else f"{str(arguments)[:100]}..."
        return UserError(f"torchvision's {self.source} cannot be created with {given}: {first_line(error)}.")

    def _check_size(self, folder: Path, source: Any, arguments: dict[str, Any]) -> None:
        """Raise UserError if the number of images is impossible, Failure if their pack does not fit on the disk."""
        try:
            count = len(source)
        except Exception as error:  # for example, FakeData returns whatever size it was given, even a text
            raise self._refused(arguments, error) from error
        if count > MOST_IMAGES:
            raise self._refused(arguments, ValueError(f"it would have {count:,} images, more than {MOST_IMAGES:,}"))
        refuse_oversize_pack(folder, count, self._shape)

    def _unavailable(self, data: Path, error: BaseException) -> Failure:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."
        unpacked = " (as downloaded or unpacked)" if any(name.endswith((".gz", ".zip")) for name in self.files) else ""
        remains = any(
            path.is_file() and not path.name.startswith(".") and "packed" not in path.relative_to(data).parts
            for path in data.rglob("*")
        )
        damaged = " Existing files are incomplete or damaged: remove them." if remains else ""
        files = f"{', '.join(self.files)}{unpacked}" if self.files else "its files"
        return Failure(
            f"Cannot read {self.source} from {data} or download it ({reason}). Put {files} there by hand, or "
            f"give the folder that contains them: data_dir=<folder>.{damaged} dataset=digits needs no download."
        )

    def _fit(self, images: Tensor) -> Tensor:
        """Return images (N, H, W), (N, C, H, W) or (N, H, W, C) cropped and resized to `shape`."""
        channels, height, width = self._shape
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif images.shape[1] != channels and images.shape[3] == channels:
            images = images.movedim(3, 1)
        if images.shape[1] != channels:
            found = min(images.shape[1], images.shape[3])
            raise UserError(
                f"dataset.shape={list(self._shape)} has {channels} channels, but {self.source} has {found}: "
                f"type dataset.shape=[{found},{height},{width}]."
            )
        if self.transpose:
            images = images.transpose(2, 3)
        top, left, rows, columns = center_box(images.shape[2], images.shape[3], self._shape, self.crop)
        images = images[:, :, top : top + rows, left : left + columns]
        if (rows, columns) != (height, width):
            images = torch.cat([_resize(part, height, width) for part in images.split(RESIZED_TOGETHER)])
        return images.contiguous()

    def _chunks(self, source: Any, arguments: dict[str, Any]) -> Generator[Chunk, None, None]:
        def read(number: int) -> tuple[NDArray[np.uint8], int]:
            image, target = source[number][:2]
            pixels = to_pixels(image, self._shape, self.crop)
            if not self.labels:
                return pixels, -1
            if not isinstance(target, (int, np.integer)) and not (isinstance(target, Tensor) and target.numel() == 1):
                raise self._no_labels()
            return pixels, int(target)

        try:
            for results in in_threads(read, len(source), self._shape, f"Packing {self.source}"):
                pixels, labels = zip(*results, strict=True)
                images = np.stack(pixels)
                images = images.swapaxes(2, 3) if self.transpose else images
                yield Chunk(images, labels if self.labels else None)
        except (OSError, SyntaxError, EOFError) as error:
            # torchvision does not notice if the unpacking of an archive was interrupted.
            raise self._unavailable(data_folder(self.data_dir), error) from error
        except UserError:
            raise
        except Exception as error:  # for example, from a transform that cannot be called
            raise self._refused(arguments, error) from error

    def _no_labels(self) -> UserError:
        return UserError(f"The targets of {self.source} are not class labels: type dataset.labels=false.")


def _array(source: Any) -> Tensor | None:
    """Return the images that a torchvision dataset has in memory, or None if it reads them one by one."""
    images = getattr(source, "data", None)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim not in (3, 4):
        return None
    return images if len(images) == len(source) else None


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _file_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that torchvision raises if files are missing, damaged or cannot be downloaded."""
    gdown = getattr(sys.modules.get("gdown.exceptions"), "FileURLRetrievalError", OSError)
    return (
        OSError,
        RuntimeError,
        ValueError,
        AssertionError,
        EOFError,
        HTTPException,
        pickle.UnpicklingError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        gdown,
    )
