"""Codes from a file as a run that metrics can measure: encoding an image looks up its code.

The prior is N(0, I). Without the decoder of the codes, the likelihood is not known, and figures that need it are not
defined.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.axes.dataset import Split, Splits
from vae_cli.axes.likelihood import Gaussian, Likelihood
from vae_cli.axes.prior import StandardNormal
from vae_cli.axes.sigma import Sigma
from vae_cli.core.errors import UserError
from vae_cli.core.rng import derive_seed, evaluating, numpy_generator
from vae_cli.metrics.base import MeasuredRun
from vae_cli.metrics.given_decoder import Decode, GivenDecoder
from vae_cli.model.distributions import Delta
from vae_cli.model.scales import diagonal_normal
from vae_cli.model.vae import VAE
from vae_cli.runs.codes_file import LEAST, SPLITS, CodesFile

LOOKED_UP = 500  # images that are looked up together
INTEGERS = 1 << 22  # in one intermediate tensor: 32 MiB
ROUNDING = 1e-5  # difference between codes that counts as none, relative to the largest code of the dimension
LEAST_SCALE = 1e-3  # of the likelihood, as in training: an exact decoder would make it 0

NO_DECODER = "no decoder was given: add --decoder MODULE:FUNCTION"
NO_IMAGES = "the file has no images to compare decoded images with"


class StoredPosterior(Sigma):
    """N(loc, scale^2) for raw (B, 2 * D), the D locations, then the D scales; without noise, a point mass at raw."""

    def __init__(self, has_noise: bool) -> None:
        super().__init__()
        if not has_noise:
            self.provides = frozenset()  # type: ignore[misc]

    def forward(self, raw: Tensor) -> Distribution:
        if not self.provides:
            return Delta(raw)
        loc, scale = raw.chunk(2, -1)
        return diagonal_normal(loc, scale)


class CodeTable(nn.Module):
    """A table that maps images x (B, C, H, W) to their rows in `codes` (N, raw).

    Equal images all get the code of the first of them. `shared` is the number of images whose own code differs from it
    by more than rounding, and `copies` (N,) counts the earlier images that are equal to each image.

    An image is found by a key, sum_p w_p b_p modulo 2^64 for its pixels' bits b_p and random odd weights w_p: integers
    are summed exactly in any order, so the keys are the same on every device.
    """

    weights: Tensor
    keys: Tensor
    rows: Tensor
    codes: Tensor

    def __init__(self, images: Split, codes: Tensor) -> None:
        super().__init__()
        pixels = math.prod(images.images.shape[1:])
        for salt in itertools.count():
            generator = torch.Generator().manual_seed(derive_seed(salt, "image keys"))
            weights = torch.randint(-(2**62), 2**62, (pixels,), generator=generator) * 2 + 1
            parts = [image_keys(images.batch(part), weights) for part in images.in_order(LOOKED_UP)]
            keys, rows = torch.cat(parts).sort(stable=True)
            places = torch.searchsorted(keys, keys)
            first = rows[places]
            pairs = torch.stack([rows, first], 1)[rows != first]
            if all(torch.equal(*(images.batch(side) for side in part.T)) for part in pairs.split(LOOKED_UP)):
                break  # only equal images have equal keys
        away = (codes[pairs[:, 0]] - codes[pairs[:, 1]]).abs() > ROUNDING * codes.abs().amax(0)
        self.shared = int(away.any(1).sum())
        self.copies = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows)) - places)
        for name, value in {"weights": weights, "keys": keys, "rows": rows, "codes": codes}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        keys = image_keys(x, self.weights)
        places = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        if not torch.equal(self.keys[places], keys):
            raise UserError("A metric encodes images that are not in the file of codes. Leave it out with --metrics.")
        return self.codes[self.rows[places]]


def image_keys(x: Tensor, weights: Tensor) -> Tensor:
    """Return the keys, int64 (B,), of images x (B, C, H, W) float32 for weights int64 (C * H * W,) (see CodeTable)."""
    bits = x.contiguous().flatten(1).view(torch.int32)
    return torch.cat([(part.long() * weights).sum(1) for part in bits.split(max(1, INTEGERS // len(weights)))])


def told_apart(images: Tensor, copies: Tensor) -> Tensor:
    """Return images (N, C, H, W) as float32, equal ones of which differ in the last bits of a few pixels.

    copies (N,) numbers the images that are equal: 0, 1, 2 ... The digits of this number, in the smallest base for which
    there are enough pixels, are added to the bits of the first pixels, or subtracted if a pixel is 1/2 or more. In base
    b, a pixel thus changes by at most (b - 1) 2^-24, and stays in [0, 1].
    """
    x = (images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.clone()).flatten(1)
    base = next(base for base in itertools.count(2) if base ** min(x.shape[1], 64) > int(copies.max()))
    for pixel in x.T:
        digit = torch.where(pixel < 0.5, copies % base, -(copies % base))
        pixel.copy_((pixel.contiguous().view(torch.int32) + digit.to(torch.int32)).view(torch.float32))
        copies = copies // base
        if not copies.any():
            break
    return x.reshape(images.shape)


class NoDecoder(nn.Module):
    """The decoder of codes that were given without one: it leaves codes as they are, for NoLikelihood."""

    def forward(self, z: Tensor) -> Tensor:
        return z


class NoLikelihood(Likelihood):
    """The likelihood of codes that were given without a decoder: no density is a number, and there is no mean image."""

    def forward(self, raw: Tensor) -> Distribution:
        return Unknown(raw.shape[:-1], validate_args=False)


class Unknown(Distribution):
    """A distribution of which nothing is known but its batch shape."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_full(self.batch_shape, math.nan)

    @property
    def mean(self) -> Tensor:
        raise UserError("A metric decodes codes: add --decoder MODULE:FUNCTION, or leave it out with --metrics.")


class CodesRun:
    """Codes from a file, with those parts of a Run that metrics read.

    no_decoder  the reason why codes cannot be decoded; empty if there is a decoder
    notes       sentences on what the figures depend on
    """

    def __init__(
        self,
        file: CodesFile,
        device: torch.device,
        seed: int = 0,
        decoder: tuple[str, Decode] | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        self.device = device
        self.folder = NoFolder()
        latent: Any = file.code[0] if len(file.code) == 1 else list(file.code)
        self.config = {"latent": latent, "data_dir": None if data_dir is None else str(data_dir)}
        self.no_decoder = ""
        self.notes: list[str] = []
        if decoder is None:
            self.no_decoder = NO_DECODER if file.images is not None else f"{NO_IMAGES}, and {NO_DECODER}"
        elif file.images is None:
            raise UserError(
                f"--decoder {decoder[0]} cannot be used, because {NO_IMAGES}. Add the array images (N, C, H, W) to the "
                "file, or leave out --decoder."
            )
        self.splits = _splits(file, seed)
        if file.split is None:
            sizes = ", ".join(f"{len(getattr(self.splits, name)):,} {name}" for name in SPLITS)
            self.notes.append(f"The file has no split, so it was divided at random with seed {seed}: {sizes} codes.")
        codes = file.loc if file.scale is None else torch.cat([file.loc, file.scale], 1)
        table = CodeTable(_all(self.splits), codes)
        if table.shared:
            images = told_apart(self.splits.train.images, table.copies)
            parts = {name: replace(getattr(self.splits, name), images=images) for name in SPLITS}
            self.splits = self.splits._replace(**parts)
            table = CodeTable(_all(self.splits), codes)
        self.shape: tuple[int, ...] = tuple(self.splits.train.images.shape[1:])
        given = None if decoder is None else GivenDecoder(*decoder, file.code, self.shape)
        likelihood: Likelihood = NoLikelihood() if given is None else Gaussian(1.0)
        prior = StandardNormal(math.prod(file.code))
        self.model = VAE(table, StoredPosterior(file.scale is not None), given or NoDecoder(), likelihood, prior)
        self.model.to(device).eval()
        if given is not None:
            given.check(file.loc[self.splits.train.index[:LOOKED_UP]].to(device))

    def fit_likelihood(self, subject: MeasuredRun) -> float:
        """Set the scale of the likelihood to its maximum-likelihood value over the training images, and return it.

        It is the root mean squared error of the images that are decoded from one drawn code per training image.
        """
        total, count = 0.0, 0
        codes = subject.codes("train").z
        with evaluating(self.model, subject.stream("likelihood"), self.device):
            for x, rows in subject.batches("train"):
                total += float((x - subject.decode(codes[rows])).square().mean()) * x.numel()
                count += x.numel()
        scale = max((total / count) ** 0.5, LEAST_SCALE)
        self.model.likelihood = Gaussian(scale).to(self.device)
        self.notes.append(
            f"The likelihood is Gaussian with scale {scale:.4g}, the root mean squared error of the decoded training "
            "images."
        )
        return scale


def _all(splits: Splits) -> Split:
    """Return all images as one split."""
    return Split(splits.train.images, None, torch.arange(len(splits.train.images)))


class NoFolder:
    """Stands in for the folder of a run: codes from a file have no record of their training."""

    def metrics(self) -> list[dict[str, Any]]:
        return []


def _splits(file: CodesFile, seed: int) -> Splits:
    """Return the images of a file, or row numbers (N, 1, 1, 1) that stand for them, divided as it says or at random."""
    count = len(file.loc)
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None] if file.images is None else file.images
    split = file.split
    if split is None:
        test, validation = max(LEAST, round(count / 5)), count // 10
        order = numpy_generator(derive_seed(seed, "evaluate", "split")).permutation(count)
        split = torch.zeros(count, dtype=torch.int64)
        split[torch.from_numpy(order[:test])] = 2
        split[torch.from_numpy(order[test : test + validation])] = 1
    train, held_out, test_split = (
        Split(images, file.labels, (split == number).nonzero().flatten(), factors=file.factors) for number in range(3)
    )
    # The labels are part of the digest, because the feature net is stored under it.
    digest = hashlib.blake2b(images.numpy().data, digest_size=16)
    if file.labels is not None:
        digest.update(file.labels.numpy().data)
    return Splits(train, held_out, test_split, None, digest=digest.hexdigest(), factors=file.kinds)
