"""Claim 1, bits: what a code tolerates before the decoder is misled, measured in every mode."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vae_cli.metrics.base import Figure, Metric, curve_figure, mean_figure, standard_error, undefined

LADDER = torch.logspace(math.log10(0.01), math.log10(3), 16, dtype=torch.float64).tolist()
BITS = range(1, 13)
DRAWS = 4  # codes drawn for each test image and step of the ladder; the images are many, so a few do
LOST = 0.1  # of the way from an image's own code to a stranger's
SPARE = 1.0  # nats that quantization may cost


class NoiseProbe(Metric):
    """How much noise on the code an image withstands, in the same units for every sigma mode, a point mass included.

    noise_probe_t           the ladder of t: 0, then from 0.01 to 3 in equal ratios
    noise_probe_distortion  -ln p(x | loc + t a epsilon) at each t, nats: a_j is the standard deviation of the aggregate
                            posterior in dimension j, epsilon ~ N(0, I) the same at every t
    noise_probe_stranger    the distortion of an image at the loc of another one, nats
    noise_probe_tolerance   the t at which a tenth of the way from the distortion at t = 0 to the stranger's is lost

    Means over test images of means over some draws (some strangers), unbiased, with standard errors over images; that
    of the tolerance is propagated through the slope at it. The tolerance is where the mean curve, drawn straight over
    ln t between the steps of the ladder, first crosses; a curve that bends upwards lies below that line, which makes it
    read low by up to 4 %. It is not defined where a stranger's code is no worse than the image's own (by more than two
    standard errors), or where the crossing lies outside the ladder: an end of the ladder would pass for a measurement
    in a mean over runs, so the reason says on which side instead.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        loc = subject.codes("test").loc
        strangers = range(1, min(DRAWS, len(loc) - 1) + 1)
        curve, stranger = [], []
        for x, rows in subject.batches("test"):
            noise = subject.spread * torch.randn(DRAWS, *loc[rows].shape, device=loc.device)
            columns = [subject.distortion(x, loc[rows])]
            for t in LADDER:
                columns.append(torch.stack([subject.distortion(x, loc[rows] + t * e) for e in noise]).mean(0))
            curve.append(torch.stack(columns, 1).cpu().double())
            if strangers:
                # The images come in a random order, so the next ones are random others.
                index = torch.arange(rows.start, rows.stop, device=loc.device)
                others = [subject.distortion(x, loc[(index + step) % len(loc)]) for step in strangers]
                stranger.append(torch.stack(others).mean(0).cpu().double())
        values = torch.cat(curve)
        figures = {
            "noise_probe_t": Figure([0.0, *LADDER], "aggregate standard deviations"),
            "noise_probe_distortion": curve_figure(values, "nats"),
        }
        if not stranger:
            alone = undefined("there is no other image whose code could be taken")
            return figures | dict.fromkeys(("noise_probe_stranger", "noise_probe_tolerance"), alone)
        figures["noise_probe_stranger"] = mean_figure(torch.cat(stranger), "nats")
        figures["noise_probe_tolerance"] = self._tolerance(values, torch.cat(stranger))
        return figures

    @staticmethod
    def _tolerance(values: Tensor, stranger: Tensor) -> Figure:
        """Of distortions (N, 1 + steps) along the ladder, and (N,) at a stranger's code."""
        way = mean_figure(stranger - values[:, 0])
        assert isinstance(way.value, float)
        assert isinstance(way.error, float)  # a stranger makes two images
        if way.value <= 2 * way.error:
            return undefined("a stranger's code is no worse for an image than its own")
        over = values - torch.lerp(values[:, 0], stranger, LOST)[:, None]
        reached = (over.mean(0) >= 0).nonzero().flatten().tolist()
        if not reached:
            return undefined(f"less than a tenth of the way to a stranger's code is lost up to t = {LADDER[-1]:g}")
        if reached[0] == 1:
            return undefined(f"more than a tenth of the way to a stranger's code is lost at t = {LADDER[0]:g} already")
        before, after = LADDER[reached[0] - 2], LADDER[reached[0] - 1]
        share, error = crossing(over[:, reached[0] - 1], over[:, reached[0]])
        ratio = math.log(after / before)
        t = before * math.exp(share * ratio)
        return Figure(t, "aggregate standard deviations", len(values), error and t * ratio * error)


class Quantization(Metric):
    """How many bits of loc the decoder needs, for every sigma mode, a point mass included.

    quantization_bits                b = 1 to 12, the bits kept of each active dimension of loc
    quantization_distortion          -ln p(x | loc kept to b bits), nats
    quantization_unquantized         -ln p(x | loc), nats
    quantization_total_bits          b times the number of active dimensions, bits per image
    quantization_bits_within_1_nat   bits per image at which the distortion is 1 nat above the unquantized

    Each active dimension falls into one of 2^b cells of equal width w, and becomes the middle of its cell; an idle one
    becomes its mean over the training images. In cells of equal width no code is moved further than w / 2, and the mean
    squared error is w^2 / 12, which falls as 4^-b; cells of equal mass are wide at the tails, where most of their error
    is. The cells span the central range of the training images' loc, all but a share 4^-(b + 1) at either end: as the
    error inside falls, so does what is cut off, and few bits are not spent on outliers. For a normal the error is
    within 18 % of that of the best cells of equal width, and at 6 bits a third of that of cells of equal mass.

    Means over test images with standard errors over images. The bits within 1 nat are found between the last b that
    costs more and the next, on a line over 4^-b; without any bits a code is the mean one. They are not defined where 12
    bits do not do. They are bits of this quantizer and no limit: every active dimension has the same number of them,
    however little it carries; the best code for a normal needs about 1 bit less at 5 bits; and one that knows how the
    dimensions depend on each other needs less still.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        train = subject.codes("train").loc.cpu().double()
        codes, active = subject.codes("test").loc.cpu().double(), subject.active.cpu()
        dimensions = int(active.sum())
        tails = [4.0 ** -(b + 1) for b in BITS]
        low = torch.from_numpy(np.quantile(train.numpy(), tails, axis=0))
        high = torch.from_numpy(np.quantile(train.numpy(), [1 - tail for tail in tails], axis=0))
        mean = train.mean(0).expand_as(codes)
        kept = [torch.where(active, quantize(codes, *span), mean) for span in zip(low, high, BITS, strict=True)]
        # Beside them all that there is of a code, and nothing.
        every = [code.float().to(subject.device) for code in (codes, mean, *kept)]
        rows_of_values = [
            torch.stack([subject.distortion(x, code[rows]) for code in every], 1).cpu().double()
            for x, rows in subject.batches("test")
        ]
        values = torch.cat(rows_of_values)
        total = [float(b * dimensions) for b in BITS]
        return {
            "quantization_bits": Figure([float(b) for b in BITS], "bits"),
            "quantization_distortion": curve_figure(values[:, 2:], "nats"),
            "quantization_unquantized": mean_figure(values[:, 0], "nats"),
            "quantization_total_bits": Figure(total, "bits"),
            "quantization_bits_within_1_nat": self._needed(values[:, 1:] - values[:, :1] - SPARE, dimensions),
        }

    @staticmethod
    def _needed(over: Tensor, dimensions: int) -> Figure:
        """Of distortions (N, 1 + len(BITS)) above what is allowed, with no bits and with those of each step."""
        costly = (over.mean(0) > 0).nonzero().flatten().tolist()
        if not costly:
            return Figure(0.0, "bits", len(over), note="the mean code is within 1 nat")
        b = costly[-1]
        if b == BITS[-1]:
            return undefined(f"{b} bits for each of {dimensions} active dimensions are not within 1 nat")
        share, error = crossing(over[:, b], over[:, b + 1])
        power = 4.0**-b * (1 - 0.75 * share)
        slope = 0.75 * 4.0**-b / (power * math.log(4))
        return Figure(-math.log(power, 4) * dimensions, "bits", len(over), error and slope * error * dimensions)


def quantize(codes: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Codes (N, D), each moved to the middle of its cell among 2^bits of equal width from low (D,) to high (D,)."""
    width = ((high - low) / 2**bits).clamp_min(torch.finfo(codes.dtype).tiny)
    cell = ((codes - low) / width).floor().clamp(0, 2**bits - 1)
    return low + (cell + 0.5) * width


def crossing(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """How far from one point to the next, 0 to 1, the mean curve crosses zero on a straight line, and the standard
    error of that, from values (N,) at either point for each image."""
    share = float(before.mean() / (before.mean() - after.mean()))
    error = standard_error(torch.lerp(before, after, share)[:, None])
    return share, error[0] / abs(float(before.mean() - after.mean())) if error else None
