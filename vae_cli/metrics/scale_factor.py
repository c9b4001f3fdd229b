"""The factor by which a second stage, such as a latent diffusion model, multiplies the codes of a first stage."""

from __future__ import annotations

import torch
from torch import Tensor

from vae_cli.metrics.base import BATCH, Figure, Metric, measured, standard_error, undefined

ROUNDING = 1e-6  # standard deviation that counts as none, relative to the largest number


class ScaleFactor(Metric):
    """One over the standard deviation of z, and the mean to subtract, over one drawn code of each training image.

    scale_factor                1 / std of all numbers of all codes about their common mean: one factor for the whole
                                code
    scale_factor_per_dimension  1 / std of each latent dimension or, for codes of the shape (C, h, w), of each channel
    code_mean_per_dimension     the mean of each dimension or channel

    The standard errors are over images, by the delta method, and include the spread of the draws. The numbers of one
    image are one observation, so they may depend on each other. The relative bias of a factor is of order 1/N. A factor
    is not defined if the numbers that it is for do not vary. Rombach et al., High-Resolution Image Synthesis with
    Latent Diffusion Models, CVPR 2022.
    """

    claim = "second_stage"

    def compute(self) -> dict[str, Figure]:
        z, channels = self.subject.codes("train").z, self.subject.channels
        count = len(z)
        figures = {"scale_factor": undefined("all numbers of all codes are equal")}
        _, scale, parts = standardization(z, 1)
        if bool(scale.isfinite()):
            figures["scale_factor"] = measured(float(scale), "", parts[:, 0])
        mean, scale, parts = standardization(z, z.shape[1] if channels is None else channels)
        kind = "dimensions" if channels is None else "channels"
        note = "" if channels is None else f"one value for each of {channels} channels"
        constant = int((~scale.isfinite()).sum())
        each = undefined(f"the code does not vary in {constant} of {len(scale)} {kind}")
        if not constant:
            errors = (parts.square().sum(0) * count / (count - 1)).sqrt().tolist() if count > 1 else None
            each = Figure(scale.tolist(), "", count, errors, note)
        by_image = z.cpu().unflatten(1, (len(mean), -1)).mean(2, dtype=torch.float64)
        means = Figure(mean.tolist(), "", count, standard_error(by_image), note)
        return figures | {"scale_factor_per_dimension": each, "code_mean_per_dimension": means}


def standardization(z: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and 1 / std of groups of consecutive dimensions of codes z (N, D), float64 (groups,) each, and
    how much each image moves 1 / std, (N, groups).

    1 / std is infinite for a group that varies only by rounding.
    """
    batches = [part.unflatten(1, (groups, -1)) for part in z.cpu().split(BATCH)]
    mean = torch.cat([part.mean(2, dtype=torch.float64) for part in batches]).mean(0)
    squares = torch.cat([(part.double() - mean[:, None]).square().mean(2) for part in batches])
    variance = squares.mean(0)
    largest = torch.stack([part.abs().amax((0, 2)) for part in batches]).amax(0)
    scale = torch.where(variance.sqrt() > ROUNDING * largest, variance.rsqrt(), torch.inf)
    # The derivative of 1 / std with respect to the mean is 0, so an image moves it only by its squares.
    return mean, scale, -scale / 2 * (squares / variance - 1) / len(z)
