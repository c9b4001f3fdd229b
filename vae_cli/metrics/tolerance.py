"""Metrics for claim 1 (bits): how much noise and quantization a code tolerates, measured for every sigma mode."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vae_cli.metrics.base import Figure, Metric, curve_figure, mean_figure, measured, parts_of_mean, undefined

NOISE_LEVELS = torch.logspace(math.log10(0.01), math.log10(3), 16, dtype=torch.float64).tolist()
BIT_DEPTHS = range(1, 13)
NOISE_DRAWS = 4  # noise vectors per test image and noise level; a few suffice, since there are many images
TOLERATED = 0.1  # tolerated rise in distortion, relative to the rise if another image's code is decoded
ALLOWED_NATS = 1.0  # rise in distortion that quantization may cause


class NoiseProbe(Metric):
    """How much noise can be added to a code before the decoded image degrades: defined for every sigma mode, including
    a point mass, and in the same units.

    noise_probe_t           noise levels t: 0, then 16 levels from 0.01 to 3, evenly spaced on a log scale
    noise_probe_distortion  -ln p(x | loc + t a epsilon) at each t, nats; a_j is the standard deviation of the aggregate
                            posterior in dimension j, and epsilon ~ N(0, I) is the same at every t
    noise_probe_stranger    the distortion of an image at the loc of another image, nats
    noise_probe_tolerance   the t at which noise raises the distortion by a tenth as much as another image's code does

    Distortions are averaged over several draws (or several other images) for each test image, then over test images.
    They are unbiased, with standard errors over images. The tolerance is the t at which the mean distortion first
    reaches the tolerated level, interpolated linearly in ln t between noise levels; its error is computed from the
    slope of the curve at that t. A convex curve lies below the interpolating line, so the tolerance is underestimated
    by up to 4 %. It is not defined if another image's code is not worse than the image's own by more than two standard
    errors, or if the tolerated level is not reached within the range of t. In the latter case, the reason says at
    which end. The end itself is not returned, because averaged over runs it would look like a measurement.
    """

    claim = "bits"
    decodes = ("noise_probe_t", "noise_probe_distortion", "noise_probe_stranger", "noise_probe_tolerance")

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        loc = subject.codes("test").loc
        shifts = range(1, min(NOISE_DRAWS, len(loc) - 1) + 1)
        curve, other_code = [], []
        for x, rows in subject.batches("test"):
            noise = subject.spread * torch.randn(NOISE_DRAWS, *loc[rows].shape, device=loc.device)
            columns = [subject.distortion(x, loc[rows])]
            for t in NOISE_LEVELS:
                columns.append(torch.stack([subject.distortion(x, loc[rows] + t * e) for e in noise]).mean(0))
            curve.append(torch.stack(columns, 1).cpu().double())
            if shifts:
                # The images are in random order, so the next ones are random other images.
                index = torch.arange(rows.start, rows.stop, device=loc.device)
                others = [subject.distortion(x, loc[(index + step) % len(loc)]) for step in shifts]
                other_code.append(torch.stack(others).mean(0).cpu().double())
        values = torch.cat(curve)
        figures = {
            "noise_probe_t": Figure([0.0, *NOISE_LEVELS], "aggregate standard deviations"),
            "noise_probe_distortion": curve_figure(values, "nats"),
        }
        if not other_code:
            alone = undefined("there is only one test image, so there is no other image's code to compare with")
            return figures | dict.fromkeys(("noise_probe_stranger", "noise_probe_tolerance"), alone)
        figures["noise_probe_stranger"] = mean_figure(torch.cat(other_code), "nats")
        figures["noise_probe_tolerance"] = self.tolerance_at_crossing(values, torch.cat(other_code))
        return figures

    @staticmethod
    def tolerance_at_crossing(values: Tensor, other_code: Tensor) -> Figure:
        """Return the noise level at which the mean distortion has risen by the tolerated amount.

        values (N, 1 + levels) are each image's distortions without noise and at each noise level; other_code (N,) are
        the distortions with another image's code.
        """
        difference = mean_figure(other_code - values[:, 0])
        assert isinstance(difference.value, float)
        assert isinstance(difference.error, float)  # there are at least two images
        if difference.value <= 2 * difference.error:
            return undefined("another image's code is no worse than the image's own")
        over = values - torch.lerp(values[:, 0], other_code, TOLERATED)[:, None]
        reached = (over.mean(0) >= 0).nonzero().flatten().tolist()
        if not reached:
            return undefined(
                f"up to t = {NOISE_LEVELS[-1]:g}, noise raises the distortion by less than a tenth as much as another "
                "image's code does"
            )
        if reached[0] == 1:
            return undefined(
                f"even at t = {NOISE_LEVELS[0]:g}, noise raises the distortion by more than a tenth as much as another "
                "image's code does"
            )
        before, after = NOISE_LEVELS[reached[0] - 2], NOISE_LEVELS[reached[0] - 1]
        share, moves = crossing(over[:, reached[0] - 1], over[:, reached[0]])
        ratio = math.log(after / before)
        t = before * math.exp(share * ratio)
        return measured(t, "aggregate standard deviations", t * ratio * moves)


class Quantization(Metric):
    """How many bits of loc the decoder needs: defined for every sigma mode, including a point mass.

    quantization_bits                b = 1 to 12, the number of bits per active dimension of loc
    quantization_distortion          -ln p(x | loc quantized to b bits), nats
    quantization_unquantized         -ln p(x | loc), nats
    quantization_total_bits          b times the number of active dimensions, bits per image
    quantization_bits_within_1_nat   bits per image at which quantization raises the distortion by 1 nat

    Each active dimension is assigned to one of 2^b cells of equal width w and replaced by the middle of its cell; an
    idle dimension is replaced by its mean over the training images. Inside the cells no code moves by more than w / 2,
    and the mean squared error w^2 / 12 falls as 4^-b. (Cells of equal mass would be wide in the tails, which would
    dominate the error.) The cells span the loc values of the training images, except for a share 4^-(b + 1) at each
    end. This share falls as fast as the error inside the cells; with few bits, no cells are wasted on outliers. For a
    normal distribution, the error is at most 18 % above the lowest error possible with cells of equal width, and at
    6 bits it is a third of the error with cells of equal mass.

    All are means over test images, with standard errors over images. quantization_bits_within_1_nat is interpolated
    linearly in 4^-b between the largest b that costs more than 1 nat and b + 1; at b = 0, every code is replaced by the
    mean code. It is not defined if 12 bits are not enough. It measures this quantizer; other codes can need fewer bits,
    since here every active dimension gets the same number of bits, however little information it carries. For a normal
    distribution, an optimal code needs about 1 bit less per dimension at b = 5; a code that exploits dependence between
    dimensions needs even fewer.
    """

    claim = "bits"
    decodes = (
        *("quantization_bits", "quantization_distortion", "quantization_unquantized", "quantization_total_bits"),
        "quantization_bits_within_1_nat",
    )

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        train = subject.codes("train").loc.cpu().double()
        codes, active = subject.codes("test").loc.cpu().double(), subject.active.cpu()
        dimensions = int(active.sum())
        tails = [4.0 ** -(b + 1) for b in BIT_DEPTHS]
        low = torch.from_numpy(np.quantile(train.numpy(), tails, axis=0))
        high = torch.from_numpy(np.quantile(train.numpy(), [1 - tail for tail in tails], axis=0))
        mean = train.mean(0).expand_as(codes)
        kept = [torch.where(active, quantize(codes, *span), mean) for span in zip(low, high, BIT_DEPTHS, strict=True)]
        # Add the unquantized code, and the mean code, which carries no information.
        every = [code.float().to(subject.device) for code in (codes, mean, *kept)]
        rows_of_values = [
            torch.stack([subject.distortion(x, code[rows]) for code in every], 1).cpu().double()
            for x, rows in subject.batches("test")
        ]
        values = torch.cat(rows_of_values)
        total = [float(b * dimensions) for b in BIT_DEPTHS]
        return {
            "quantization_bits": Figure([float(b) for b in BIT_DEPTHS], "bits"),
            "quantization_distortion": curve_figure(values[:, 2:], "nats"),
            "quantization_unquantized": mean_figure(values[:, 0], "nats"),
            "quantization_total_bits": Figure(total, "bits"),
            "quantization_bits_within_1_nat": self._needed(values[:, 1:] - values[:, :1] - ALLOWED_NATS, dimensions),
        }

    @staticmethod
    def _needed(over: Tensor, dimensions: int) -> Figure:
        """Return the bits per image at which the distortion has risen by ALLOWED_NATS.

        over (N, 1 + len(BIT_DEPTHS)) is the rise in distortion minus ALLOWED_NATS, with 0 bits and at each bit depth.
        """
        costly = (over.mean(0) > 0).nonzero().flatten().tolist()
        if not costly:
            return Figure(0.0, "bits", len(over), note="replacing every code by the mean code costs less than 1 nat")
        b = costly[-1]
        if b == BIT_DEPTHS[-1]:
            return undefined(
                f"with {b} bits for each of the {dimensions} active dimensions, quantization still raises the "
                "distortion by more than 1 nat"
            )
        share, moves = crossing(over[:, b], over[:, b + 1])
        power = 4.0**-b * (1 - 0.75 * share)
        slope = 0.75 * 4.0**-b / (power * math.log(4))
        return measured(-math.log(power, 4) * dimensions, "bits", slope * dimensions * moves)


def quantize(codes: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return codes (N, D), each dimension moved to the middle of its cell; 2^bits equal cells span low to high (D,)."""
    width = ((high - low) / 2**bits).clamp_min(torch.finfo(codes.dtype).tiny)
    cell = ((codes - low) / width).floor().clamp(0, 2**bits - 1)
    return low + (cell + 0.5) * width


def crossing(before: Tensor, after: Tensor) -> tuple[float, Tensor]:
    """Return where the mean curve crosses zero between two points, interpolated linearly, and how much each image moves
    the crossing, (N,).

    before and after (N,) are the values of each image at the two points. The crossing is 0 at the first point and 1 at
    the second.
    """
    fall = float(before.mean() - after.mean())
    share = float(before.mean()) / fall
    return share, parts_of_mean(torch.lerp(before, after, share)) / fall
