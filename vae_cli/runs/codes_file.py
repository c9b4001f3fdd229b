"""Files of codes (codes.npz): the posteriors that any model gives to its images, and what is known about the images.

numpy.savez writes such a file. Pickled objects are never loaded, since they could run code.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from vae_cli.axes.dataset.split import Factor
from vae_cli.core.errors import UserError, first_line, nearest
from vae_cli.core.files import open_regular
from vae_cli.machine.memory import refuse_oversize

SPLITS = ("train", "validation", "test")
LEAST = 2  # codes in the training set, and in the test set: variances need two
MOST = 1 << 24  # codes: float32 holds every row number up to here exactly
LARGEST = 1e15  # of a location or a scale, whose squares float32 holds; 1 / LARGEST is the smallest scale
LABELS = 1 << 16  # a classifier has an output for each label from 0 to the largest

ARRAYS = {
    "loc": "codes (N, D) or (N, C, h, w)",
    "scale": "standard deviations of their noise, of the same shape as loc",
    "labels": "classes (N,), whole numbers from 0",
    "images": "images (N, C, H, W), uint8 or in [0, 1]",
    "split": "train, validation or test for each code (N,), or 0, 1, 2",
    "factors": "known factors of variation (N, F)",
    "factor_names": "the names of the factors (F,)",
    "factor_kinds": "categorical, continuous or circular for each factor (F,)",
}


@dataclass(frozen=True, eq=False)
class CodesFile:
    """The content of a file of N codes, in its order. Everything but loc is None if the file does not have it.

    code     the shape of a code, (D,) or (C, h, w)
    loc      float32 (N, D), the means of the posteriors; codes of the shape (C, h, w) are flattened, channel by channel
    scale    float32 (N, D), their standard deviations; None for point masses
    labels   int64 (N,)
    images   uint8 or float32 in [0, 1], (N, C, H, W)
    split    int64 (N,), positions in SPLITS
    factors  float32 (N, F), the known factors of variation, described by `kinds`
    """

    code: tuple[int, ...]
    loc: Tensor
    scale: Tensor | None
    labels: Tensor | None
    images: Tensor | None
    split: Tensor | None
    factors: Tensor | None
    kinds: tuple[Factor, ...] | None


def read_codes(path: Path) -> CodesFile:
    """Read and check a file of codes. Raises UserError if the file cannot be read or an array is not as in ARRAYS."""
    arrays = _read_arrays(path)
    try:
        code, loc = _loc(arrays)
        count = len(loc)
        scale = None if "scale" not in arrays else _scale(arrays["scale"], arrays["loc"].shape)
        labels = None if "labels" not in arrays else _labels(arrays["labels"], count)
        images = None if "images" not in arrays else _images(arrays["images"], count)
        split = None if "split" not in arrays else _split(arrays["split"], count)
        factors, kinds = _factors(arrays, count)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    return CodesFile(code, loc, scale, labels, images, split, factors, kinds)


def _read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an npz file by name. Raises UserError if it cannot be read or has unknown arrays."""
    how = "Write it with numpy.savez(FILE, loc=..., scale=..., images=...)."
    try:
        with open_regular(path) as file:
            if not is_zipfile(file):
                raise ValueError("it is not a zip archive, as npz files are")
            file.seek(0)
            found: Any = np.load(file, allow_pickle=False)
            _check_names(path, found.files)
            size = sum(info.file_size for info in found.zip.infolist())
            refuse_oversize(2 * size, f"Reading {path}", "store fewer codes, or images as uint8")
            return {name: _read_array(path, found, name) for name in found.files}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    except (ValueError, BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, MemoryError) as error:
        raise UserError(f"{path} is not an npz file, or is damaged: {first_line(error)}. {how}") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    known = f"Arrays: {'; '.join(f'{name}: {meaning}' for name, meaning in ARRAYS.items())}."
    if "loc" not in names:
        there = f"It has {', '.join(names)}." if names else "It is empty."
        raise UserError(f"{path} has no array 'loc', the codes (N, D) or (N, C, h, w). {there} {known}")
    for name in names:
        if name not in ARRAYS:
            raise UserError(f"{path} has an unknown array '{name}'.{nearest(name, ARRAYS)} Leave it out. {known}")


def _read_array(path: Path, found: Any, name: str) -> Any:
    try:
        array = found[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise UserError(
            f"{path}: {name} holds Python objects, which could run code. Store numbers or text instead, for example "
            f"{name}=numpy.array({name}.tolist())."
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its entry '{name}' is not an array")
    return array


# Checks of arrays: each raises ValueError with a clause that names the array. -----------------------------------------


def _loc(arrays: Mapping[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Return the shape of a code, (D,) or (C, h, w), and the locations (N, D)."""
    array = arrays["loc"]
    if array.ndim not in (2, 4) or 0 in array.shape[1:]:
        hint = "; for other shapes, store loc.reshape(len(loc), -1)" if array.ndim > 2 else ""
        raise ValueError(f"loc has the shape {_shown(array)}, but must be (N, D) or (N, C, h, w){hint}")
    if not 2 * LEAST <= len(array) <= MOST:
        raise ValueError(f"loc has {len(array):,} codes, but between {2 * LEAST} and {MOST:,} are needed")
    values = _numbers("loc", array)
    if (most := float(values.abs().max())) > LARGEST:
        raise ValueError(f"loc has values of up to {most:.1e} in size, but at most {LARGEST:.0e} is allowed")
    return array.shape[1:], values.flatten(1)


def _scale(array: Any, shape: tuple[int, ...]) -> Tensor:
    if array.shape != shape:
        raise ValueError(
            f"scale has the shape {_shown(array)}, but must have that of loc, {shape}; store "
            "numpy.broadcast_to(scale, loc.shape), or leave scale out if the codes have no noise"
        )
    values = _numbers("scale", array)
    least, most = float(values.min()), float(values.max())
    if least < 1 / LARGEST or most > LARGEST:
        raise ValueError(
            f"scale has values from {least:.3g} to {most:.3g}, but must be between {1 / LARGEST:.0e} and "
            f"{LARGEST:.0e}: it is a standard deviation, not a variance or its logarithm. If the codes have no noise, "
            "leave scale out"
        )
    return values.flatten(1)


def _labels(array: Any, count: int) -> Tensor:
    _check_count("labels", array, count)
    if array.dtype.kind not in "iu":
        raise ValueError(f"labels have the type {array.dtype}, but must be whole numbers: store labels.astype(int)")
    if int(array.min()) < 0 or int(array.max()) >= LABELS:
        raise ValueError(f"labels go from {array.min()} to {array.max()}, but must be between 0 and {LABELS - 1:,}")
    return torch.from_numpy(array.astype(np.int64))


def _images(array: Any, count: int) -> Tensor:
    if array.ndim != 4 or 0 in array.shape:
        hint = "; for gray images, store images[:, None]" if array.ndim == 3 else ""
        raise ValueError(f"images have the shape {_shown(array)}, but must be (N, C, H, W){hint}")
    if array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"images have the shape {_shown(array)}, but must be (N, C, H, W): store images.transpose(0, 3, 1, 2)"
        )
    if len(array) != count:
        raise ValueError(f"there are {len(array):,} images, but {count:,} codes")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise ValueError(f"images have the type {array.dtype}, but must be uint8, or float in [0, 1]")
    values = _numbers("images", array)
    least, most = float(values.min()), float(values.max())
    if least < 0 or most > 1:
        hint = "; store (images + 1) / 2" if least >= -1 and most <= 1 else ""
        raise ValueError(f"images have values from {least:.3g} to {most:.3g}, but must be in [0, 1]{hint}")
    return values


def _split(array: Any, count: int) -> Tensor:
    _check_count("split", array, count)
    allowed = "train, validation and test, or 0, 1 and 2"
    if array.dtype.kind not in "USiu":
        raise ValueError(f"split has the type {array.dtype}, but must consist of {allowed}")
    values, places = np.unique(array, return_inverse=True)
    known: dict[Any, int] = {name: number for number, name in enumerate(SPLITS)}
    known |= {number: number for number in range(len(SPLITS))}
    words = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values.tolist()]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"split has the value {str(unknown[0])[:40]!r}, but must consist of {allowed}")
    found = torch.tensor([known[word] for word in words])[torch.from_numpy(places.reshape(-1))]
    for number in (0, 2):
        if (there := int((found == number).sum())) < LEAST:
            raise ValueError(f"split has {there} {SPLITS[number]} codes, but at least {LEAST} are needed")
    return found


def _factors(arrays: Mapping[str, Any], count: int) -> tuple[Tensor | None, tuple[Factor, ...] | None]:
    together = ("factors", "factor_names", "factor_kinds")
    if not (there := [name for name in together if name in arrays]):
        return None, None
    if len(there) < len(together):
        raise ValueError(f"{', '.join(together)} must be given together, but there is only {', '.join(there)}")
    values, names, kinds = (arrays[name] for name in together)
    if values.ndim != 2 or len(values) != count or values.shape[1] == 0:
        raise ValueError(f"factors have the shape {_shown(values)}, but must be ({count}, F)")
    allowed = ("categorical", "continuous", "circular")
    for name, words in (("factor_names", names), ("factor_kinds", kinds)):
        if words.shape != values.shape[1:] or words.dtype.kind != "U":
            raise ValueError(f"{name} must be text of the shape ({values.shape[1]},), one for each factor")
    if wrong := [kind for kind in kinds.tolist() if kind not in allowed]:
        raise ValueError(f"factor_kinds has the value {wrong[0][:40]!r}, but must consist of {', '.join(allowed)}")
    found = _numbers("factors", values)
    for column, kind in zip(found.T, kinds.tolist(), strict=True):
        if kind == "categorical" and not bool((column == column.round()).all()):
            raise ValueError("factors: a categorical factor must consist of whole numbers")
        if kind == "circular" and not bool(((column >= 0) & (column <= 1)).all()):
            raise ValueError("factors: a circular factor must be between 0 and 1")
    return found, tuple(Factor(*pair) for pair in zip(names.tolist(), kinds.tolist(), strict=True))


def _check_count(name: str, array: Any, count: int) -> None:
    if array.shape != (count,):
        raise ValueError(f"{name} has the shape {_shown(array)}, but must be ({count},): one for each code")


def _numbers(name: str, array: Any) -> Tensor:
    """Return an array of real numbers as float32. Raises ValueError if a number is not finite."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} has the type {array.dtype}, but must be real numbers")
    with np.errstate(over="ignore"):  # found below
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    bad = ~values.flatten(1).isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{name} is not finite (NaN, infinity, or too large for float32) in {int(bad.sum()):,} of {len(values):,} "
            f"rows, the first of which is {int(bad.nonzero()[0])}"
        )
    return values


def _shown(array: Any) -> str:
    return str(tuple(array.shape))
