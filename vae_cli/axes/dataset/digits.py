"""The handwritten digits that are included in scikit-learn."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vae_cli.axes.dataset.split import Dataset, Split, Splits, partition
from vae_cli.core.values import Natural

COUNT = 1797
TEST = 297


class Digits(Dataset):
    """1,797 handwritten digits of 8x8 pixels, 297 of them test images. Alpaydin and Kaynak, UCI repository, 1998.

    Their gray levels, 0 to 16, are rescaled to the range 0 to 255. Raises UserError if validation is 1,500 or more.
    """

    provides = frozenset({"unit_interval", "levels", "labels"})

    def __init__(self, *, validation: Natural = 200, split_seed: Natural = 0) -> None:
        self._rows = partition(COUNT, validation, split_seed, test=TEST)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def load(self) -> Splits:
        table = read_digits()
        levels = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(levels.reshape(-1, *self.shape))
        labels = torch.from_numpy(table[:, 64].astype(np.int64))
        train, validation, test = (Split(images, labels, rows) for rows in self._rows)
        return Splits(train, validation, test, tuple("0123456789"))


def read_digits() -> NDArray[np.float64]:
    """Return scikit-learn's table (1797, 65): each row has the 64 gray levels (0 to 16) of an image, then its label."""
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        # Importing sklearn.datasets only to read this file would take a second or more.
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as lines:
                return np.loadtxt(lines, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])
