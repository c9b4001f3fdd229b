"""Synthetic images of sprites with known factors of variation."""

from __future__ import annotations

from math import pi
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_cli.axes.dataset.split import Dataset, Factor, Split, Splits, partition
from vae_cli.core.rng import numpy_generator
from vae_cli.core.values import Count, Interval, Natural
from vae_cli.machine.memory import refuse_oversize

SHAPES = ("square", "ellipse", "heart")
PERIODS = (pi / 2, pi, 2 * pi)  # smallest angle by which each sprite can be turned without changing its image
# In coordinates of the image, which go from -1 to 1:
MARGIN = 0.4  # a sprite's center is between -MARGIN and MARGIN
RADIUS = 0.5  # of the circle around a sprite of scale 1, so no sprite is cut off
IMAGES_PER_STEP = 512

# A heart is a square of side 1 standing on a corner, with a half disc on each of its two upper sides. HEART_RISE is the
# height of its centroid above the square's center, HEART_REACH the distance from the centroid to the heart's tip, its
# farthest point.
HEART_RISE = (2**0.5 / 8 * pi + 1 / 6 * 2**0.5) / (1 + pi / 4) / 2
HEART_REACH = 0.5**0.5 + HEART_RISE

FACTORS = (
    Factor("shape", "categorical"),
    Factor("scale", "continuous"),
    Factor("orientation", "circular"),
    Factor("x", "continuous"),
    Factor("y", "continuous"),
)

Array = NDArray[np.float32]


class Shapes(Dataset):
    """White squares, ellipses and hearts on black, anti-aliased.

    They follow dSprites (Matthey et al. 2017), but with continuous factors of variation.

    factors is float32 (N, 5), with one row for each image in `Split.images`; the factors of a split's own images are
    `factors[split.index]`. The columns are independent and uniform:

    shape        0, 1 or 2, which is also the label
    scale        0.5 to 1
    orientation  0 to 2 pi, counterclockwise
    x, y         center of mass, 0 to 1 across the middle 40 % of the image, from left to right and from top to bottom

    A square after a quarter turn and an ellipse after half a turn look the same as before, so no code can tell how
    often they were turned. `vae evaluate` therefore measures codes against `identifiable(factors)`, in which the
    orientation is the part that the image shows.
    """

    provides = frozenset({"unit_interval", "levels", "labels"})
    factor_names = tuple(factor.name for factor in FACTORS)

    def __init__(
        self,
        *,
        side: Annotated[int, Interval(8, 128)] = 32,
        images: Count = 10000,
        test: Count = 1000,
        validation: Natural = 1000,
        split_seed: Natural = 0,
    ) -> None:
        self.side = side
        # Peak memory, in bytes, of drawing the factors and rendering the images.
        refuse_oversize(
            (images + test) * (side**2 + 120),
            f"dataset.images={images} with dataset.test={test}",
            "give smaller numbers",
        )
        self._train_rows, self._validation_rows, _ = partition(images, validation, split_seed)
        # Two random streams, so that the number of training images does not change the test images.
        draws = np.concatenate([numpy_generator(split_seed, part).rand(n, 5) for part, n in enumerate((images, test))])
        low, high = np.array([0, 0.5, 0, 0, 0]), np.array([len(SHAPES), 1, 2 * pi, 1, 1])
        factors = low + (high - low) * draws
        factors[:, 0] = np.floor(factors[:, 0])
        self.factors: Tensor = torch.from_numpy(factors.astype(np.float32))
        self._test_rows = torch.arange(images, images + test)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.side, self.side

    def load(self) -> Splits:
        images = torch.from_numpy(render(self.factors.numpy(), self.side))
        labels = self.factors[:, 0].to(torch.int64)
        rows = (self._train_rows, self._validation_rows, self._test_rows)
        factors = identifiable(self.factors)
        train, validation, test = (Split(images, labels, part, factors=factors) for part in rows)
        return Splits(train, validation, test, SHAPES, factors=FACTORS)


def identifiable(factors: Tensor) -> Tensor:
    """Return factors (N, 5) in which the orientation is a fraction of the sprite's period, 0 to 1, float32 (N, 5).

    The period is 90 degrees for a square, 180 for an ellipse and 360 for a heart. Sprites with different values look
    different, except that 1 is the same as 0. Like the angle, the fraction is uniform and independent of the shape; the
    angle reduced to its period in degrees would not be.

    >>> quarter_turn = torch.tensor([[shape, 1, pi / 2 + 0.01, 0.5, 0.5] for shape in range(3)])
    >>> identifiable(quarter_turn)[:, 2]
    tensor([0.0064, 0.5032, 0.2516])
    """
    period = torch.tensor(PERIODS)[factors[:, 0].long()]
    fraction = (factors[:, 2] / period).remainder(1)
    return torch.cat([factors[:, :2], fraction[:, None], factors[:, 3:]], 1)


def render(factors: Array, side: int) -> NDArray[np.uint8]:
    """Render the sprites with these factors (N, 5) as images uint8 (N, 1, side, side): 255 times each pixel's coverage.

    A pixel's coverage, the fraction of it that the sprite covers, is computed from the distance between the pixel's
    center and the sprite's edge, as if the edge were straight.

    >>> square = np.array([[0, 1, 0, 0.5, 0.5]], dtype=np.float32)
    >>> render(square, 8)[0, 0, 4].tolist()
    [0, 0, 106, 255, 255, 106, 0, 0]
    """
    images = np.zeros((len(factors), 1, side, side), np.uint8)
    pixel = 2 / side
    # Most of an image is black: only a window around the sprite is drawn.
    window = min(side, int(2 * RADIUS / pixel) + 4)
    for kind, distance in enumerate((_square, _ellipse, _heart)):
        for rows in np.split(
            np.flatnonzero(factors[:, 0] == kind), range(IMAGES_PER_STEP, len(factors), IMAGES_PER_STEP)
        ):
            _, scale, angle, x, y = (column[:, None, None] for column in factors[rows].T)
            center_x, center_y = (MARGIN * (2 * place - 1) for place in (x, y))
            left, top = (
                np.clip(np.floor((center + 1) / pixel - window / 2).astype(np.int64), 0, side - window)
                for center in (center_x, center_y)
            )
            columns, lines = left + np.arange(window), top + np.arange(window)[:, None]
            right = ((columns + 0.5) * pixel - 1).astype(np.float32) - center_x
            up = center_y - ((lines + 0.5) * pixel - 1).astype(np.float32)
            radius = RADIUS * scale
            u = (np.cos(angle) * right + np.sin(angle) * up) / radius
            v = (np.cos(angle) * up - np.sin(angle) * right) / radius
            coverage = np.clip(0.5 - distance(u, v) * (radius / pixel), 0, 1)
            images[rows[:, None, None], 0, lines, columns] = np.rint(255 * coverage).astype(np.uint8)
    return images


# These functions return the signed distance of a point (u, v) from the edge of a sprite, negative inside. The
# farthest point of the sprite is at distance 1 from the origin.


def _square(u: Array, v: Array) -> Array:
    return _box(u, v, np.float32(0.5**0.5))


def _ellipse(u: Array, v: Array) -> Array:
    # Semi-axes 1 and 1/2. The distance f / |grad f| is exact to first order at the edge.
    value = np.maximum(np.hypot(u, 2 * v), 1e-6)
    slope = np.maximum(np.hypot(u, 4 * v), 1e-6)
    return value * (value - 1) / slope


def _heart(u: Array, v: Array) -> Array:
    u, v = np.abs(u) * np.float32(HEART_REACH), v * np.float32(HEART_REACH) + np.float32(HEART_RISE)
    half = np.float32(0.5**0.5)
    square = _box(half * (u + v), half * (v - u), np.float32(0.5))
    disc = np.hypot(u - half / 2, v - half / 2) - np.float32(0.5)
    return np.minimum(square, disc) / np.float32(HEART_REACH)


def _box(u: Array, v: Array, half: np.float32) -> Array:
    u, v = np.abs(u) - half, np.abs(v) - half
    return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0)
