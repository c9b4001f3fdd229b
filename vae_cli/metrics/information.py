"""Claim 1, bits: how much the noise lets through, as information where it is defined, and as what a code withstands."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from vae_cli.metrics.base import Figure, MeasuredRun, Metric, curve_figure, mean_figure, standard_error, undefined
from vae_cli.model.inference import Inference
from vae_cli.model.scales import diagonal_normal

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

    def __init__(self, subject: MeasuredRun) -> None:
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
