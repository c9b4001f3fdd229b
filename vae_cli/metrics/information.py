"""Metrics for claim 1 (bits): how much information a noisy code carries about its image."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.metrics.base import Figure, MeasuredRun, Metric, curve_figure, mean_figure, standard_error, undefined
from vae_cli.model.inference import Inference, divergence, unbiased_divergence
from vae_cli.model.mixtures import NoiseMixture
from vae_cli.model.scales import LOG_ROOT_2_PI, Factors, diagonal_normal, factors_of, log_densities
from vae_cli.runs.codes import MIXTURE_COMPONENTS

TENSOR_NUMBERS = 1 << 22  # numbers in one intermediate tensor

NO_RATE = "the KL divergence of a point mass from the prior is infinite"
NO_PARTS = "the posterior or the prior is not normal with independent dimensions"
NOT_A_SUM = "the rate has no closed form that is a sum over dimensions"
NO_NOISE = "a point mass has no noise to compare the signal with"
NO_BOUND = "without noise, the information in a code is unbounded"
BOUND = "the mean over noise levels, an upper bound on the rate"
NOT_NORMAL = "the noise is not normal with independent dimensions, so this capacity is no bound on I(x; z)"


class Rate(Metric):
    """The rate KL(q(z|x) || p(z)) of the test images, and its parts.

    rate                nats per image; rate_bits = rate / ln 2
    rate_loc            part due to locations: sum_j ((m_j - a_j) / t_j)^2 / 2 for q = N(m, s^2), p = N(a, t^2), nats
    rate_scale          part due to scales: sum_j (r_j - 1 - ln r_j) / 2 with r_j = s_j^2 / t_j^2, nats
    rate_per_dimension  rate of each latent dimension, in index order, nats; the values sum to the rate
    active_units        number of dimensions in which Var_x(loc_j) > 0.01 E_x(scale_j^2)

    Means over images are unbiased, and each has a standard error, std / sqrt(N). None of these figures is defined for a
    point mass. The parts also need a posterior and a prior that are normal with independent dimensions, and
    rate_per_dimension needs independent dimensions. The rate is an upper bound on I(x; z): Alemi et al., Fixing a
    Broken ELBO, ICML 2018. Active units: Burda et al., Importance Weighted Autoencoders, ICLR 2016.
    """

    claim = "bits"

    def __init__(self, subject: MeasuredRun) -> None:
        super().__init__(subject)
        self.rates: list[Tensor] = []
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.per_dimension: list[Tensor] = []

    def update(self, inference: Inference) -> None:
        if inference.rate is not None:
            self.rates.append(inference.rate.cpu())
            if inference.normal_kl_parts is not None:
                self.parts.append((inference.normal_kl_parts[0].cpu(), inference.normal_kl_parts[1].cpu()))
            if inference.rate_per_dimension is not None:
                self.per_dimension.append(inference.rate_per_dimension.cpu())

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        codes = subject.codes("test")
        figures = dict.fromkeys(("rate", "rate_bits"), undefined(NO_RATE))
        figures |= dict.fromkeys(("rate_loc", "rate_scale"), undefined(NO_PARTS if self.rates else NO_RATE))
        figures["rate_per_dimension"] = undefined(NOT_A_SUM if self.rates else NO_RATE)
        if self.rates:
            rate, note = torch.cat(self.rates), BOUND if rate_is_bound(subject) else ""
            figures["rate"] = mean_figure(rate, "nats", note)
            figures["rate_bits"] = mean_figure(rate.double() / math.log(2), "bits", note)
        if self.parts:
            loc, scale = (torch.cat(part).double() for part in zip(*self.parts, strict=True))
            figures["rate_loc"] = mean_figure(loc.sum(1), "nats")
            figures["rate_scale"] = mean_figure(scale.sum(1), "nats")
        if self.per_dimension:
            figures["rate_per_dimension"] = curve_figure(torch.cat(self.per_dimension).double(), "nats")
        figures["active_units"] = undefined(NO_NOISE)
        if codes.scale is not None:
            figures["active_units"] = Figure(float(subject.active.sum()), count=len(codes.loc))
        return figures


class SignalToNoise(Metric):
    """The signal-to-noise ratio of each latent dimension, and the capacity of Gaussian channels with these ratios.

    snr_per_dimension   SNR_j = Var_x(loc_j) / E_x(scale_j^2), over the test images, with loc = E(z|x)
    channel_bound_bits  sum_j 1/2 log2(1 + SNR_j)

    Why the capacity is a bound on I(x; z): z_j has variance Var(loc_j) + E(scale_j^2), and of all distributions with
    that variance, the normal has the largest entropy. For normal noise, therefore, I(x; z) = h(z) - h(z|x) <= B with
    B = sum_j 1/2 ln(E(scale_j^2) (1 + SNR_j)) - E sum_j 1/2 ln scale_j^2. If the scales do not vary with x, B is equal
    to the capacity, whatever the distribution of loc and the dependence between its dimensions; the bound is tight if
    loc is normal with independent dimensions. If the scales vary with x, B is larger than the capacity by
    sum_j 1/2 (ln E scale_j^2 - E ln scale_j^2) >= 0. channel_bound_bits does not include this term, so it is then not
    a bound on I(x; z); the note of the figure gives the term.

    Plug-in estimates from N images: SNR has a relative bias of -1/N, and standard errors come from each image's
    influence on the ratio. Neither figure is defined for a point mass, which has no noise, and the capacity only for
    normal noise with independent dimensions: other noise with the same variance lets more information through. Cover
    and Thomas, Elements of Information Theory, chapter 9.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        codes = self.subject.codes("test")
        if codes.scale is None:
            return dict.fromkeys(("snr_per_dimension", "channel_bound_bits"), undefined(NO_NOISE))
        loc, square = codes.mean.cpu().double(), codes.scale.cpu().double().square()
        signal, noise = loc.var(0, correction=0), square.mean(0)
        snr = signal / noise
        # The delta method: the derivative of the ratio times each image's deviation from the two means.
        influence = ((loc - loc.mean(0)).square() - signal - snr * (square - noise)) / noise
        error = standard_error(influence)
        bound = float((1 + snr).log2().sum() / 2)
        bound_error = standard_error((influence / (1 + snr)).sum(1, keepdim=True) / (2 * math.log(2)))
        gap = float((noise.log() - square.log().mean(0)).sum() / (2 * math.log(2)))
        note = (
            f"the scales vary with the image, so the bound on I(x; z) is {gap:.3g} bits higher than this"
            if gap > 1e-3
            else ""
        )
        found = Figure(bound, "bits", len(loc), bound_error[0] if bound_error else None, note)
        x, _ = next(self.subject.batches("test", most=1))
        return {
            "snr_per_dimension": Figure(snr.tolist(), count=len(loc), error=error),
            "channel_bound_bits": found if is_normal(self.subject.model.encode(x)) else undefined(NOT_NORMAL),
        }


class MutualInformation(Metric):
    """The mutual information I(x; z) between a code and the index of the training image that it encodes, one of N.

    mutual_information               mean over draws z ~ q(z|x_n) of ln q(z|x_n) - ln q(z), with the aggregate posterior
                                     q(z) = 1/N sum_i q(z|x_i) over all N encoded images, nats
    mutual_information_bits          the same divided by ln 2
    mutual_information_ceiling_bits  log2 N
    marginal_kl                      KL(q(z) || p(z)) = rate - I, over the same draws and images, nats

    Draws cycle through the images in their random order. For the empirical distribution of these N images, all figures
    are unbiased, with standard error std / sqrt(draws). For the distribution that the images were sampled from,
    mutual_information is biased low, since it is at most ln N, and marginal_kl is biased high by the same amount: an
    upper bound in expectation. If q(z) is averaged over the other N - 1 images instead of all N, the biases have the
    opposite sign, so the true value lies between the two estimates. If they differ by more than two standard errors
    (and by at least 0.01 nats), the note gives the second estimate.

    Let r = q(z|x_n) / (N q(z)) be the probability that z came from its own image. If the mean of r exceeds 1/2, a code
    mostly identifies its image, and the note marks the figures as saturated: with more images, mutual_information
    would rise and marginal_kl would fall. This is the case whenever mutual_information is within 5 % of ln N, for any N
    up to 2^20, since mean(r) >= exp(mean(ln r)) = exp(mutual_information - ln N).

    For posteriors that are normal with independent dimensions, densities are computed by a matrix product in double
    precision; for other posteriors, by their own log_prob. Not defined for a point mass. Hoffman and Johnson, ELBO
    surgery, 2016; for the two estimates: Poole et al., On Variational Bounds of Mutual Information, ICML 2019.
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
            note = f"saturated at its upper limit log2 N = {ceiling:.2f} bits"
            kl_note = "I(x; z) is saturated, so this is an upper bound on the true marginal KL"
            notes = dict(zip(figures, (note, note, "", kl_note), strict=True))
        else:
            other_end = own - others + math.log(count - 1)
            error = float(information.std()) / math.sqrt(len(information))
            if float((other_end - information).mean()) < max(2 * error, 0.01):
                return figures
            ends = (other_end.mean(), other_end.mean() / math.log(2), None, (rate - other_end).mean())
            notes = {
                name: ""
                if end is None
                else f"for the distribution that the images are sampled from, the value lies between this and {end:.2f}"
                for name, end in zip(figures, ends, strict=True)
            }
        return {name: replace(figure, note=notes[name]) for name, figure in figures.items()}

    def _normal(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln q(z|x_n), ln sum_{i != n} q(z|x_i) and KL(q(z|x_n) || p(z)), each (draws,), for posteriors that are
        independent normals."""
        subject = self.subject
        codes = subject.codes("train")
        assert codes.scale is not None
        # Apple's GPUs have no double precision.
        device = torch.device("cpu") if subject.device.type == "mps" else subject.device
        loc, scale = codes.loc.to(device).double(), codes.scale.to(device).double()
        rows = torch.arange(subject.budget.draws, device=device) % len(loc)
        epsilon = torch.randn(len(rows), loc.shape[1], dtype=torch.float64, device=device)
        own = -(epsilon.square() / 2 + scale[rows].log() + math.log(2 * math.pi) / 2).sum(1)
        z = loc[rows] + scale[rows] * epsilon
        others = log_others(z, rows, loc, scale)
        posterior = diagonal_normal(codes.loc[rows], codes.scale[rows])
        rate = divergence(posterior, subject.model.prior(), z.to(codes.loc.device, codes.loc.dtype))
        return own, others, rate.to(device)

    def _any(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `_normal`, but for any posterior: densities are computed by its own log_prob.

        The first pass over the images draws the codes. The second sums the densities of each code under the posteriors
        of all other images.
        """
        subject, prior = self.subject, self.subject.model.prior()
        count, draws = len(subject.codes("train").loc), subject.budget.draws
        turns = math.ceil(draws / count)
        drawn = []
        for x, _ in subject.batches("train"):
            posterior = subject.model.encode(x)
            z = posterior.rsample(torch.Size((turns,)))
            # An estimated rate is that of the draw itself, as the information is: their errors cancel.
            rate = torch.stack([unbiased_divergence(posterior, prior, draw) for draw in z])
            drawn.append((z, posterior.log_prob(z), rate))
        z, own, rate = (torch.cat(part, 1).flatten(0, 1)[:draws] for part in zip(*drawn, strict=True))
        image = torch.arange(draws, device=z.device) % count
        others = torch.full((draws,), -torch.inf, device=z.device)
        for x, rows in subject.batches("train"):
            posterior = subject.model.encode(x)
            size = max(1, TENSOR_NUMBERS // (len(x) * z.shape[1]))
            own_rows = torch.arange(rows.start, rows.stop, device=z.device)
            densities = [
                posterior.log_prob(part[:, None]).masked_fill(part_image[:, None] == own_rows, -torch.inf).logsumexp(1)
                for part, part_image in zip(z.split(size), image.split(size), strict=True)
            ]
            others = torch.logaddexp(others, torch.cat(densities))
        return own.cpu().double(), others.cpu().double(), rate.cpu().double()


class AggregateDensity(Metric):
    """A lower bound on KL(q(z) || p(z)), the part of the rate that carries no information about the image, in nats.

    marginal_kl_lower  E[ln r(z) - ln p(z)] over one noisy code of each of budget.draws test images, with a density r
                       that was fitted to training images

    For every density r that does not depend on the test images, E_q ln q >= E_q ln r, so the figure is a lower bound in
    expectation, with a standard error over images. r is the mean of two densities, and thus at most ln 2 nats below the
    better one: the aggregate posterior of the training images, and a mixture of 10 Gaussians fitted to their codes (if
    there are fewer than 10 (D + 1) codes, or if they lie on a sphere, the former alone). marginal_kl is the upper end:
    with few images it is about rate - ln N, whatever the true value. Not defined for a point mass.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        if not subject.has_noise:
            return {"marginal_kl_lower": undefined(NO_RATE)}
        z = subject.codes("test").z[: subject.budget.draws]
        density = log_aggregate(subject, z)
        if not subject.too_few_for(MIXTURE_COMPONENTS) and not subject.is_on_sphere:
            mixture = subject.mixture(MIXTURE_COMPONENTS).log_prob(z.cpu().double())
            density = torch.logaddexp(density, mixture) - math.log(2)
        return {"marginal_kl_lower": mean_figure(density - subject.model.prior().log_prob(z).cpu().double(), "nats")}


def log_aggregate(subject: MeasuredRun, z: Tensor) -> Tensor:
    """Return the log density of codes z (M, D) under the aggregate posterior of the training images, float64 (M,)."""
    codes = subject.codes("train")
    count = len(codes.loc)
    x, _ = next(subject.batches("train", most=1))
    if codes.scale is not None and is_normal(subject.model.encode(x)):
        found = log_others(z.cpu().double(), None, codes.loc.cpu().double(), codes.scale.cpu().double())
    else:
        found = torch.full((len(z),), -torch.inf, dtype=torch.float64)
        for x, _ in subject.batches("train"):
            posterior = subject.model.encode(x)
            parts = z.split(max(1, TENSOR_NUMBERS // (len(x) * z.shape[1])))
            density = torch.cat([posterior.log_prob(part[:, None]).logsumexp(1) for part in parts])
            found = torch.logaddexp(found, density.cpu().double())
    return found - math.log(count)


def log_others(z: Tensor, rows: Tensor | None, loc: Tensor, scale: Tensor) -> Tensor:
    """Return ln sum_i N(z; loc_i, diag(scale_i^2)) for each code z, (M,), over all images i but the code's own.

    z is (M, D), loc and scale are (N, D), all in double precision; rows (M,) are the indices of the codes' own images,
    or None if they are not among the N.
    The densities are a matrix product (see `log_densities`). If its rounding error could exceed a hundredth of a nat,
    because scales are small, the squared differences are summed dimension by dimension instead, which is slower.
    Memory: a few tensors of TENSOR_NUMBERS doubles (or of N doubles if N is larger).
    """
    center = loc.mean(0)
    norm = -(scale.log() + LOG_ROOT_2_PI).sum(1)
    product = log_densities(Factors(loc, scale))
    reach = torch.maximum((z - center).abs().amax(0), (loc - center).abs().amax(0)) / scale.amin(0)
    expand = float(reach.square().sum()) * 4 * loc.shape[1] * torch.finfo(torch.float64).eps < 1e-2
    columns = list(zip(loc.T.contiguous(), (1 / scale).T.contiguous(), strict=True))
    found = []
    # Summing by dimension passes over the tensor many times, which is faster if it stays in the processor's cache.
    size = max(1, (TENSOR_NUMBERS if expand else TENSOR_NUMBERS >> 4) // len(loc))
    for number, part in enumerate(z.split(size)):
        if expand:
            density = product(part)
        else:
            density = norm.repeat(len(part), 1)
            for values, (column, inverse) in zip(part.T, columns, strict=True):
                difference = (values[:, None] - column).mul_(inverse)
                density.addcmul_(difference, difference, value=-0.5)
        if rows is not None:
            density.scatter_(1, rows[number * size :][: len(part), None], -torch.inf)
        found.append(density.logsumexp(1))
    return torch.cat(found)


def is_normal(posterior: Distribution) -> bool:
    """Return whether a posterior is normal with independent dimensions."""
    return factors_of(posterior) is not None


def rate_is_bound(subject: MeasuredRun) -> bool:
    """Return whether the rate of a run is an upper bound: the noise level is random, and the prior normal."""
    x, _ = next(subject.batches("test", most=1))
    return is_noise_mixture(subject.model.encode(x)) and is_normal(subject.model.prior())


def is_noise_mixture(posterior: Distribution) -> bool:
    """Return whether the noise level of a posterior is random, so that its rate under a normal prior is only a bound
    (see NoiseMixture)."""
    return isinstance(posterior, NoiseMixture)
