"""Gaussian data with known covariance, for which the optimum of linear models has a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_cli.axes.dataset.split import Dataset, Split, Splits, partition
from vae_cli.core.errors import UserError
from vae_cli.core.rng import numpy_generator
from vae_cli.core.values import Count, Natural, Positive
from vae_cli.machine.memory import refuse_oversize


class LinearGaussian(Dataset):
    """Gaussian images x = U diag(eigenvalues)^(1/2) e, with e ~ N(0, I) and a random orthogonal matrix U.

    Probabilistic PCA and the linear VAE are models of such data. Each split is centered and whitened separately, then
    transformed to the covariance U diag(eigenvalues) U^T. So its mean is 0 and its empirical covariance (normalized by
    its number of images) has exactly these eigenvalues and eigenvectors, up to float32 rounding: closed forms such as
    those of the linear VAE (Lucas et al., Don't Blame the ELBO!, NeurIPS 2019) hold on every split without sampling
    error. Pixel values are continuous and unbounded. An image has d pixels, one per eigenvalue: it is square if d is a
    square number, otherwise a single row.

    eigenvalues: float64 (d,). Raises UserError if a split has fewer than d + 1 images.
    """

    provides: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        eigenvalues: Sequence[Positive],
        images: Count = 10000,
        test: Count = 2000,
        validation: Natural = 1000,
        split_seed: Natural = 0,
    ) -> None:
        if not eigenvalues:
            raise UserError(
                "dataset.eigenvalues is empty: give one positive number per pixel, such as dataset.eigenvalues=[2,1]."
            )
        # 8 bytes per float64 value, times 3 because whitening makes copies.
        needed = 24 * len(eigenvalues) * max(images + test, len(eigenvalues))
        refuse_oversize(needed, f"dataset.images={images} with dataset.test={test}", "give smaller numbers")
        self.eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
        self.split_seed = split_seed
        self._images, self._test = images, test
        self._train_rows, self._validation_rows, _ = partition(images, validation, split_seed)
        sizes = {"training": len(self._train_rows), "validation": validation, "test": test}
        for name, size in sizes.items():
            if size <= len(eigenvalues) and (size or name != "validation"):
                raise UserError(
                    f"{size} {name} images are too few for a covariance with these {len(eigenvalues)} eigenvalues: "
                    f"at least {len(eigenvalues) + 1} images are needed"
                    + (", or type dataset.validation=0." if name == "validation" else ".")
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        pixels = len(self.eigenvalues)
        side = isqrt(pixels)
        return (1, side, side) if side * side == pixels else (1, 1, pixels)

    @property
    def eigenvectors(self) -> Tensor:
        """The orthogonal matrix U, float64 (d, d): column j is the eigenvector of eigenvalues[j]."""
        pixels = len(self.eigenvalues)
        q, r = np.linalg.qr(numpy_generator(self.split_seed, 2).standard_normal((pixels, pixels)))
        # The signs of r's diagonal depend on LAPACK's convention. Multiplied by them, q is unique, and uniform over
        # orthogonal matrices.
        return torch.from_numpy(q * np.sign(np.diag(r)))

    @property
    def covariance(self) -> Tensor:
        """The covariance U diag(eigenvalues) U^T, float64 (d, d)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def load(self) -> Splits:
        pixels = len(self.eigenvalues)
        noise = numpy_generator(self.split_seed, 0).standard_normal((self._images, pixels))
        test_noise = numpy_generator(self.split_seed, 1).standard_normal((self._test, pixels))
        train, validation, test = (
            self._color(part) for part in (noise[self._train_rows], noise[self._validation_rows], test_noise)
        )
        return Splits(train, validation, test, None)

    def _color(self, noise: NDArray[np.float64]) -> Split:
        """Transform noise (n, d) to images with empirical mean 0 and exactly the covariance `self.covariance`."""
        if len(noise):
            noise = noise - noise.mean(0)
            # noise^T noise / n = L L^T, so the covariance of noise L^-T is I.
            factor = np.linalg.cholesky(noise.T @ noise / len(noise))
            noise = np.linalg.solve(factor, noise.T).T
        data = torch.from_numpy(noise) * self.eigenvalues.sqrt() @ self.eigenvectors.T
        return Split(data.to(torch.float32).view(-1, *self.shape), None, torch.arange(len(data)))
