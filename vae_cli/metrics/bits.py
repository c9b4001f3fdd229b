"""Claim 1, bits: how much the noise lets through, as information where it is defined, and as what a code withstands."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from vae_cli.metrics.base import Figure, Metric, Subject, mean_figure, undefined
from vae_cli.model.inference import Inference
from vae_cli.model.scales import diagonal_normal

LADDER = torch.logspace(math.log10(0.01), math.log10(3), 16, dtype=torch.float64).tolist()
BITS = range(1, 13)
DRAWS = 4  # codes drawn for each test image and step of the ladder; the images are many, so a few do
LOST = 0.1  # of the way from an image's own code to a stranger's
SPARE = 1.0  # nats that quantization may cost
CELLS = 1 << 22  # numbers in one intermediate tensor

NO_RATE = "the KL divergence of a point mass from the prior is infinite"
NO_PARTS = "this posterior and this prior are not normals of independent dimensions"
NO_NOISE = "a point mass has no noise to compare its signal with"
NO_BOUND = "without noise the information in a code has no bound"


class Rate(Metric):
    """The rate KL(q(z|x) || p(z)) of the test images, and its parts.

    rate                nats per image; rate_bits = rate / ln 2
    rate_loc            what the locations cost, between N(m, s^2) and N(a, t^2): sum_j ((m_j - a_j) / t_j)^2 / 2, nats
    rate_scale          what the scales cost: sum_j (r_j - 1 - ln r_j) / 2 with r_j = s_j^2 / t_j^2, nats
    rate_per_dimension  nats, one for each latent dimension in their order; they sum to the rate
    active_units        dimensions in which Var_x(loc_j) exceeds 0.01 of E_x(scale_j^2)

    Means over images, unbiased, each with its standard error std / sqrt(N). A point mass has none of them; the parts
    are defined where posterior and prior are normals of independent dimensions. The rate is an upper bound on I(x; z):
    Alemi et al., Fixing a Broken ELBO, ICML 2018. Active units: Burda et al., Importance Weighted Autoencoders, 2016.
    """

    claim = "bits"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.rates: list[Tensor] = []
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, inference: Inference) -> None:
        if inference.rate is not None:
            self.rates.append(inference.rate.cpu())
            if inference.normal_kl_parts is not None:
                self.parts.append((inference.normal_kl_parts[0].cpu(), inference.normal_kl_parts[1].cpu()))

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        codes = subject.codes("test")
        figures = dict.fromkeys(("rate", "rate_bits"), undefined(NO_RATE))
        figures |= dict.fromkeys(
            ("rate_loc", "rate_scale", "rate_per_dimension"), undefined(NO_PARTS if self.rates else NO_RATE)
        )
        if self.rates:
            rate = torch.cat(self.rates)
            figures["rate"] = mean_figure(rate, "nats")
            figures["rate_bits"] = mean_figure(rate.double() / math.log(2), "bits")
        if self.parts:
            loc, scale = (torch.cat(part).double() for part in zip(*self.parts, strict=True))
            figures["rate_loc"] = mean_figure(loc.sum(1), "nats")
            figures["rate_scale"] = mean_figure(scale.sum(1), "nats")
            figures["rate_per_dimension"] = curve_figure(loc + scale, "nats")
        figures["active_units"] = undefined(NO_NOISE)
        if codes.scale is not None:
            figures["active_units"] = Figure(float(subject.active.sum()), count=len(codes.loc))
        return figures


class SignalToNoise(Metric):
    """The signal-to-noise ratio of each latent dimension, and the capacity of the Gaussian channel that has it.

    snr_per_dimension   SNR_j = Var_x(loc_j) / E_x(scale_j^2), over the test images
    channel_bound_bits  sum_j 1/2 log2(1 + SNR_j)

    What it bounds: z_j has variance Var(loc_j) + E(scale_j^2), and no law of that variance has more entropy than the
    normal one, so that for normal noise I(x; z) = h(z) - h(z|x) <= sum_j 1/2 ln(E(scale_j^2) (1 + SNR_j)) -
    E sum_j 1/2 ln scale_j^2. For scales that do not vary with x this is the channel bound, whatever the law of loc and
    however its dimensions depend on each other, with equality where loc is normal and its dimensions independent. For
    scales that vary with x the bound is larger by sum_j 1/2 (ln E scale_j^2 - E ln scale_j^2) >= 0, without which the
    figure is no bound but a description; the note then says how much it is.

    Plug-in estimates from N images: SNR has the relative bias -1/N, and standard errors come from each image's
    influence on the ratio. A point mass has no noise, so neither figure. Cover and Thomas, Elements of Information
    Theory, chapter 9.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        codes = self.subject.codes("test")
        if codes.scale is None:
            return dict.fromkeys(("snr_per_dimension", "channel_bound_bits"), undefined(NO_NOISE))
        loc, square = codes.loc.cpu().double(), codes.scale.cpu().double().square()
        signal, noise = loc.var(0, correction=0), square.mean(0)
        snr = signal / noise
        # The derivative of the ratio, times how far each image lies from the means that it is a ratio of.
        influence = ((loc - loc.mean(0)).square() - signal - snr * (square - noise)) / noise
        error = standard_error(influence)
        bound = float((1 + snr).log2().sum() / 2)
        bound_error = standard_error((influence / (1 + snr)).sum(1, keepdim=True) / (2 * math.log(2)))
        gap = float((noise.log() - square.log().mean(0)).sum() / (2 * math.log(2)))
        note = f"the scales vary with the image: what bounds I(x; z) is {gap:.3g} bits more" if gap > 1e-3 else ""
        return {
            "snr_per_dimension": Figure(snr.tolist(), count=len(loc), error=error),
            "channel_bound_bits": Figure(bound, "bits", len(loc), bound_error[0] if bound_error else None, note),
        }


class MutualInformation(Metric):
    """The information I(x; z) between the code and which of N training images it is the code of.

    mutual_information               mean over draws z ~ q(z|x_n) of ln q(z|x_n) - ln q(z), with the aggregate posterior
                                     q(z) = 1/N sum_i q(z|x_i) over all N images whose codes are at hand, nats
    mutual_information_bits          the same divided by ln 2
    mutual_information_ceiling_bits  log2 N
    marginal_kl                      KL(q(z) || p(z)) = rate - I, over the same draws and images, nats

    The draws take the images in turn, in their random order. For the empirical distribution of these N images all are
    unbiased, with the standard error std / sqrt(draws). For the law that the images come from I is biased low, being at
    most ln N, and marginal_kl as much high, an upper bound in expectation. The average over the other N - 1 images in
    the place of q(z) is biased the other way, so that the truth lies between; where the two differ by more than the
    error the note gives the other end. Where the probability that z came from its own image, r = q(z|x_n) / (N q(z)),
    has a mean over 1/2, a code mostly names its image, and the figures are noted as saturated: more images would raise
    them. Where I is within 5 % of ln N this holds for any N up to 2^20, since mean(r) >= exp(mean(ln r)) =
    exp(I - ln N).

    For independent normals the densities come from a matrix product in doubles; other posteriors are asked for theirs.
    A point mass has none. Hoffman and Johnson, ELBO surgery, 2016; Poole et al., On Variational Bounds of Mutual
    Information, ICML 2019, for the two ends.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        subject, names = self.subject, ("mutual_information", "mutual_information_bits")
        if not subject.has_noise:
            return dict.fromkeys((*names, "mutual_information_ceiling_bits", "marginal_kl"), undefined(NO_BOUND))
        x, _ = next(subject.batches("train", most=1))
        own, others, rate = (self._normal if is_normal(subject.model.encode(x)) else self._any)()
        count = len(subject.codes("train").loc)
        information = own - torch.logaddexp(own, others) + math.log(count)
        ceiling = math.log2(count)
        figures = {
            "mutual_information": mean_figure(information, "nats"),
            "mutual_information_bits": mean_figure(information / math.log(2), "bits"),
            "mutual_information_ceiling_bits": Figure(ceiling, "bits", count),
            "marginal_kl": mean_figure(rate - information, "nats"),
        }
        if float((information - math.log(count)).exp().mean()) > 0.5:
            note = f"saturated at its ceiling log2 N = {ceiling:.2f} bits"
            kl_note = "I(x; z) is saturated: an upper bound on the true marginal KL"
            notes = dict(zip(figures, (note, note, "", kl_note), strict=True))
        else:
            other_end = own - others + math.log(count - 1)
            error = float(information.std()) / math.sqrt(len(information))
            if float((other_end - information).mean()) < max(2 * error, 0.01):
                return figures
            ends = (other_end.mean(), other_end.mean() / math.log(2), None, (rate - other_end).mean())
            notes = {
                name: "" if end is None else f"the law that the images come from has between this and {end:.2f}"
                for name, end in zip(figures, ends, strict=True)
            }
        return {name: replace(figure, note=notes[name]) for name, figure in figures.items()}

    def _normal(self) -> tuple[Tensor, Tensor, Tensor]:
        """ln q(z|x_n), ln of the sum of q(z|x_i) over all other images, and KL(q(z|x_n) || p(z)), each (draws,), of
        posteriors that are independent normals."""
        subject = self.subject
        codes = subject.codes("train")
        assert codes.scale is not None
        # Apple's GPUs know no doubles.
        device = torch.device("cpu") if subject.device.type == "mps" else subject.device
        loc, scale = codes.loc.to(device).double(), codes.scale.to(device).double()
        rows = torch.arange(subject.budget.draws, device=device) % len(loc)
        epsilon = torch.randn(len(rows), loc.shape[1], dtype=torch.float64, device=device)
        own = -(epsilon.square() / 2 + scale[rows].log() + math.log(2 * math.pi) / 2).sum(1)
        others = log_others(loc[rows] + scale[rows] * epsilon, rows, loc, scale)
        rate = kl_divergence(diagonal_normal(codes.loc, codes.scale), subject.model.prior())
        return own, others, rate.to(device)[rows]

    def _any(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of posteriors of any kind, by their own log_prob: one pass to draw, and one to sum the densities."""
        subject, prior = self.subject, self.subject.model.prior()
        count, draws = len(subject.codes("train").loc), subject.budget.draws
        turns = math.ceil(draws / count)
        drawn = []
        for x, _ in subject.batches("train"):
            posterior = subject.model.encode(x)
            z = posterior.rsample(torch.Size((turns,)))
            rate = kl_divergence(posterior, prior)
            drawn.append((z, posterior.log_prob(z), rate.expand(turns, -1)))
        z, own, rate = (torch.cat(part, 1).flatten(0, 1)[:draws] for part in zip(*drawn, strict=True))
        image = torch.arange(draws, device=z.device) % count
        others = torch.full((draws,), -torch.inf, device=z.device)
        for x, rows in subject.batches("train"):
            posterior = subject.model.encode(x)
            size = max(1, CELLS // (len(x) * z.shape[1]))
            own_rows = torch.arange(rows.start, rows.stop, device=z.device)
            densities = [
                posterior.log_prob(part[:, None]).masked_fill(part_image[:, None] == own_rows, -torch.inf).logsumexp(1)
                for part, part_image in zip(z.split(size), image.split(size), strict=True)
            ]
            others = torch.logaddexp(others, torch.cat(densities))
        return own.cpu().double(), others.cpu().double(), rate.cpu().double()


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


def log_others(z: Tensor, rows: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """ln sum_i N(z; loc_i, diag(scale_i^2)), (M,), over all i but rows (M,), of codes z (M, D), loc and scale (N, D),
    all in doubles.

    Squares are expanded into a matrix product, (z - m)^2 / s^2 = z^2 / s^2 - 2 z m / s^2 + m^2 / s^2, whose terms are
    much larger than their sum where scales are small. Where rounding could at worst cost a hundredth of a nat, the
    squares of the differences are summed dimension by dimension, which takes longer. Memory: a few tensors of CELLS
    doubles, or of N.
    """
    center = loc.mean(0)
    z, loc = z - center, loc - center
    norm = -scale.log().sum(1) - loc.shape[1] * math.log(2 * math.pi) / 2
    precision = scale.square().reciprocal()
    weight = torch.cat([-precision / 2, loc * precision], 1).T
    reach = torch.maximum(z.abs().amax(0), loc.abs().amax(0)) / scale.amin(0)
    expand = float(reach.square().sum()) * 4 * loc.shape[1] * torch.finfo(torch.float64).eps < 1e-2
    columns = list(zip(loc.T.contiguous(), (1 / scale).T.contiguous(), strict=True))
    found = []
    # Sums by dimension pass over a tensor again and again, and are quicker where it stays in the processor's cache.
    size = max(1, (CELLS if expand else CELLS >> 4) // len(loc))
    for part, own in zip(z.split(size), rows.split(size), strict=True):
        if expand:
            density = torch.cat([part.square(), part], 1) @ weight + (norm - (loc.square() * precision).sum(1) / 2)
        else:
            density = norm.repeat(len(part), 1)
            for values, (column, inverse) in zip(part.T, columns, strict=True):
                difference = (values[:, None] - column).mul_(inverse)
                density.addcmul_(difference, difference, value=-0.5)
        found.append(density.scatter_(1, own[:, None], -torch.inf).logsumexp(1))
    return torch.cat(found)


def is_normal(posterior: Distribution) -> bool:
    """Whether a posterior is a normal of independent dimensions."""
    return isinstance(posterior, Independent) and isinstance(posterior.base_dist, Normal)


def quantize(codes: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Codes (N, D), each moved to the middle of its cell among 2^bits of equal width from low (D,) to high (D,)."""
    width = ((high - low) / 2**bits).clamp_min(torch.finfo(codes.dtype).tiny)
    cell = ((codes - low) / width).floor().clamp(0, 2**bits - 1)
    return low + (cell + 0.5) * width


def standard_error(values: Tensor) -> list[float] | None:
    """The standard error over images of the mean of values (N, K), of each of the K; None for a single image."""
    return (values.std(0) / math.sqrt(len(values))).tolist() if len(values) > 1 else None


def curve_figure(values: Tensor, unit: str) -> Figure:
    """The means over images of values (N, K), a curve of K points, with their standard errors."""
    values = values.double()
    return Figure(values.mean(0).tolist(), unit, len(values), standard_error(values))


def crossing(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """How far from one point to the next, 0 to 1, the mean curve crosses zero on a straight line, and the standard
    error of that, from values (N,) at either point for each image."""
    share = float(before.mean() / (before.mean() - after.mean()))
    error = standard_error(torch.lerp(before, after, share)[:, None])
    return share, error[0] / abs(float(before.mean() - after.mean())) if error else None
