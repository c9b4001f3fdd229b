"""Laws of the choices of sigma that are not tested by those of all choices: bounds, densities, codes on a sphere, and
the length of a dithered code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, Uniform, kl_divergence

from vae_cli.axes.schedule import Constant, Linear, Schedule
from vae_cli.axes.sigma import (
    Bounded,
    Fixed,
    Interpolated,
    Isotropic,
    Learned,
    PowerSpherical,
    Preserving,
    Random,
    Sigma,
)
from vae_cli.axes.sigma import Uniform as UniformNoise
from vae_cli.config.build import build_experiment, check_config
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import BUDGETS, MeasuredRun, compute_metrics
from vae_cli.metrics.dither import Dither, dithered, log_mass
from vae_cli.metrics.information import MutualInformation, Rate, SignalToNoise
from vae_cli.metrics.price import AggregateFit, RefittedPrior
from vae_cli.model.bessel import log_bessel_k
from vae_cli.model.distributions import UniformFactors, location
from vae_cli.model.inference import Inference, unbiased_divergence
from vae_cli.model.mixtures import InterpolatedNormal, ScaleMixture
from vae_cli.model.scales import diagonal_normal
from vae_cli.model.sphere import PowerSphericalDistribution, UniformOnSphere, log_area

Compose = Callable[..., dict[str, Any]]
Double = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=Double)


def standard(latent: int) -> Distribution:
    return diagonal_normal(torch.zeros(latent, dtype=Double), torch.ones(latent, dtype=Double))


def monte_carlo(posterior: Distribution, prior: Distribution, draws: int) -> tuple[Tensor, Tensor]:
    """Return the mean of log q(z|x) - log p(z) over draws of the posterior, (B,), and its standard error."""
    z = posterior.rsample(torch.Size((draws,)))
    values = posterior.log_prob(z) - prior.log_prob(z)
    return values.mean(0), values.std(0) / draws**0.5


# --- Normal noise ---


@pytest.mark.parametrize("level", [1e-3, 0.082, 0.5, 0.99])
def test_preserving_noise_keeps_the_variance_at_1_and_has_a_known_mean_rate(level: float) -> None:
    raw = (3 * numbers(400, 5) + 7) * torch.tensor([1e-2, 0.1, 1, 10, 100], dtype=Double)
    posterior = Preserving(5, level).double()(raw)
    second = posterior.mean.square().mean(0) + posterior.variance.mean(0)
    torch.testing.assert_close(second, torch.ones(5, dtype=Double), rtol=1e-4, atol=0)
    torch.testing.assert_close(posterior.mean.mean(0), torch.zeros(5, dtype=Double), rtol=0, atol=1e-8)
    rate = kl_divergence(posterior, standard(5)).mean()
    assert float(rate) == pytest.approx(-5 * math.log(level), rel=1e-4)


def test_moving_averages_find_the_moments_of_the_images() -> None:
    sigma = Preserving(3, 0.1).double()
    raw = numbers(4000, 3) * torch.tensor([0.5, 1.0, 4.0], dtype=Double) + 2
    sigma(raw[:100])
    mean, deviation = raw[:100].mean(0), raw[:100].std(0)
    sigma.eval()
    found = sigma(raw[:7]).mean / math.sqrt(1 - 0.1**2)
    torch.testing.assert_close(found, (raw[:7] - mean) / deviation)  # the first batch replaces the start values
    sigma.train()
    for batch in raw[100:].split(100):
        sigma(batch)
    before = sigma(raw[:1]).mean  # a batch of one image is standardized by the moving averages
    sigma.eval()
    torch.testing.assert_close(before, sigma(raw[:1]).mean, rtol=1e-2, atol=1e-2)
    everything = sigma(raw).mean / math.sqrt(1 - 0.1**2)
    torch.testing.assert_close(everything.mean(0), torch.zeros(3, dtype=Double), rtol=0, atol=0.05)
    torch.testing.assert_close(everything.std(0), torch.ones(3, dtype=Double), rtol=0.05, atol=0)


def test_a_dimension_that_is_the_same_for_all_images_stays_finite() -> None:
    raw = torch.full((6, 2), 3.0, requires_grad=True)
    posterior = Preserving(2, 0.5)(raw)
    posterior.rsample().sum().backward()
    assert torch.equal(posterior.mean, torch.zeros(6, 2))
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_an_isotropic_scale_is_the_mean_of_the_log_scales() -> None:
    raw = numbers(7, 8)
    posterior = Isotropic()(raw)
    torch.testing.assert_close(posterior.mean, raw[:, :4])
    torch.testing.assert_close(posterior.stddev.log(), raw[:, 4:].mean(1, keepdim=True).expand(7, 4))
    equal = torch.cat([raw[:, :4], raw[:, 4:5].expand(7, 4)], 1)  # then it is a learned scale
    for kind in (Isotropic(), Learned()):
        torch.testing.assert_close(kind(equal).stddev, raw[:, 4:5].exp().expand(7, 4))
    torch.testing.assert_close(*(kl_divergence(kind(equal), standard(4)) for kind in (Isotropic(), Learned())))


@pytest.mark.parametrize("most", [0.3, 0.9, 0.999])
def test_a_bounded_scale_stays_in_its_bounds_and_commits_a_rate(most: float) -> None:
    raw = 5 * numbers(100, 8)
    posterior = Bounded(0.01, most)(raw)
    assert float(posterior.stddev.min()) >= 0.01
    assert float(posterior.stddev.max()) <= most
    committed = (most**2 - 1 - math.log(most**2)) / 2
    assert (kl_divergence(posterior, standard(4)) >= 4 * committed).all()
    extreme = Bounded(0.01, most)(torch.tensor([[0.0, 50.0], [0.0, -50.0]], dtype=Double))
    torch.testing.assert_close(extreme.stddev[:, 0], torch.tensor([most, 0.01], dtype=Double))
    idle = kl_divergence(extreme, standard(1))[0]
    assert float(idle) == pytest.approx(committed, rel=1e-6)


# --- Uniform noise ---


def test_uniform_noise_costs_a_known_number_of_nats_more_than_normal_noise() -> None:
    loc, prior = numbers(6, 5), diagonal_normal(numbers(5, seed=1), numbers(5, seed=2).exp())
    for level in (1e-3, 0.3, 2.0):
        value = torch.tensor(level, dtype=Double)
        uniform = Independent(UniformFactors(loc, value), 1)
        normal = diagonal_normal(loc, value)
        gap = kl_divergence(uniform, prior) - kl_divergence(normal, prior)
        expected = torch.full((6,), 5 * math.log(2 * math.pi * math.e / 12) / 2, dtype=Double)
        torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-9)
        half = math.sqrt(3) * value
        torch.testing.assert_close(
            kl_divergence(uniform, prior), kl_divergence(Independent(Uniform(loc - half, loc + half), 1), prior)
        )
        torch.testing.assert_close(uniform.stddev, normal.stddev)


def test_the_rate_of_uniform_noise_is_a_sum_over_dimensions() -> None:
    posterior, prior = UniformNoise(0.5)(numbers(6, 3).float()), diagonal_normal(torch.zeros(3), torch.ones(3))
    unused = torch.zeros(6, 1, 1, 1)
    inference = Inference(unused, posterior, posterior.rsample(), prior, Independent(Normal(unused, 1.0), 3))
    assert inference.normal_kl_parts is None
    assert inference.rate_per_dimension is not None
    torch.testing.assert_close(inference.rate_per_dimension.sum(1), inference.rate)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_every_draw_of_uniform_noise_has_a_density(size: float) -> None:
    """Rounding may move a draw out of the support."""
    posterior = UniformNoise(1e-3)(size * numbers(500, 4).float())
    assert posterior.log_prob(posterior.rsample((200,))).isfinite().all()
    away = 0.6 * math.sqrt(12) * 1e-3 + 1e-5 * size
    assert (posterior.log_prob(posterior.mean + away) == -torch.inf).all()


# --- A random noise level ---


@pytest.mark.parametrize("order", [0, 0.5, 1, 1.5, 7, 19.5, 20.5, 50])
def test_the_bessel_function_is_its_integral(order: float) -> None:
    """K_n(x) = int_0^inf exp(-x cosh t) cosh(n t) dt."""
    x = torch.tensor([1e-3, 0.1, 1.0, 7.0, 100.0], dtype=Double, requires_grad=True)
    t = torch.linspace(0, 25, 200_001, dtype=Double)
    log_cosh = order * t + torch.log1p(torch.exp(-2 * order * t)) - math.log(2)
    exact = torch.logsumexp(-x.detach()[:, None] * torch.cosh(t) + log_cosh + math.log(t[1] - t[0]), 1)
    torch.testing.assert_close(log_bessel_k(order, x), exact, rtol=1e-4, atol=2e-3 if order == 0 else 1e-4)
    assert torch.autograd.gradcheck(lambda x: log_bessel_k(order, x), x, eps=1e-7, atol=1e-4, rtol=1e-5)
    rough = log_bessel_k(order, x.detach().float())
    torch.testing.assert_close(rough.double(), log_bessel_k(order, x.detach()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("latent", [1, 2, 3, 8, 33, 64])
def test_the_density_with_a_random_scale_is_its_integral_over_scales(latent: int) -> None:
    posterior = ScaleMixture(numbers(5, latent), torch.tensor(0.7, dtype=Double))
    z = posterior.rsample((3,))
    s = torch.logspace(-9, 1.5, 20_001, dtype=Double)
    step = math.log(s[1] / s[0])  # of ln s
    level = Normal(0.0, 0.7).log_prob(s) + math.log(2) + s.log() + math.log(step)
    square = (z - posterior.mean).square().sum(-1)[..., None]
    at_level = -square / (2 * s.square()) - latent * (s.log() + math.log(2 * math.pi) / 2)
    torch.testing.assert_close(posterior.log_prob(z), (level + at_level).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("latent", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_density_with_an_interpolated_code_is_its_integral_over_levels(latent: int, scale: float) -> None:
    code, gamma = 2 * numbers(4, latent), torch.tensor(scale, dtype=Double)
    posterior = InterpolatedNormal(code, gamma)
    z = torch.cat([posterior.rsample((20,)), (code + 0.01)[None], (1.5 * code)[None], -code[None]])
    # ln(1/t) from 0 on, evenly spaced in its own logarithm first
    edges = torch.cat([torch.zeros(1), torch.logspace(-9, -2, 20_001), torch.linspace(0.01, 40, 80_001)[1:]]).double()
    u, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    for image in range(4):
        away, m = z[:, image] - code[image], code[image]
        square, product, rest = away.square().sum(1), away @ m, m.square().sum()
        distance = square[:, None] * (2 * u).exp() + 2 * product[:, None] * u.exp() + rest
        at_level = latent * (u - math.log(2 * math.pi * scale**2) / 2) - distance / (2 * scale**2)
        exact = (at_level - u + width.log()).logsumexp(1)
        torch.testing.assert_close(posterior.log_prob(z)[:, image], exact, rtol=1e-4, atol=1e-4)
    rough = InterpolatedNormal(code.float(), gamma.float())
    torch.testing.assert_close(
        rough.log_prob(z.float()).double(),
        InterpolatedNormal(code.float().double(), gamma).log_prob(z.float().double()),
        rtol=1e-5,
        atol=1e-5,
    )


def mixtures(latent: int) -> list[Any]:
    code = numbers(3, latent)
    return [ScaleMixture(code, torch.tensor(0.8, dtype=Double)), InterpolatedNormal(code, torch.tensor(1.2).double())]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("latent", [1, 2])
def test_a_density_with_random_noise_integrates_to_1(kind: int, latent: int) -> None:
    """In polar coordinates around the code, where the density is infinite."""
    posterior = mixtures(latent)[kind]
    log_r = torch.linspace(math.log(1e-12), math.log(30), 1001, dtype=Double)
    angle = torch.tensor([0.0, math.pi], dtype=Double)
    if latent == 2:
        angle = torch.linspace(0, 2 * math.pi, 181, dtype=Double)[:-1]
    direction = torch.stack([angle.cos(), angle.sin()], 1)[:, :latent]
    z = location(posterior) + (log_r.exp()[:, None, None] * direction)[:, :, None]
    of_angle = 1.0 if latent == 1 else 2 * math.pi / len(angle)
    volume = of_angle * (log_r[1] - log_r[0]) * (latent * log_r).exp()
    total = (posterior.log_prob(z).exp() * volume[:, None, None]).sum((0, 1))
    torch.testing.assert_close(total, torch.ones(3, dtype=Double), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_rate_with_random_noise_is_the_mean_over_levels_and_a_bound(kind: int) -> None:
    torch.manual_seed(0)
    posterior = mixtures(4)[kind]
    prior = diagonal_normal(numbers(4, seed=1), numbers(4, seed=2).mul(0.3).exp())
    levels = torch.rand(400_000, 1, 1, dtype=Double)
    if kind == 0:
        levels = 0.8 * torch.randn(400_000, 1, 1, dtype=Double).abs()
        at_level = diagonal_normal(posterior.loc.expand(len(levels), -1, -1), levels)
    else:
        at_level = diagonal_normal((1 - levels) * posterior.location, 1.2 * levels)
    rates = kl_divergence(at_level, prior)
    bound = kl_divergence(posterior, prior)
    assert ((bound - rates.mean(0)).abs() < 5 * rates.std(0) / len(rates) ** 0.5).all()
    exact, error = monte_carlo(posterior, prior, 400_000)
    assert (bound > exact + 5 * error).all()
    z = posterior.rsample((400_000,))
    assert ((unbiased_divergence(posterior, prior, z) - exact).abs() < 7 * error).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_random_noise_has_the_stated_moments_and_gradients(kind: int) -> None:
    torch.manual_seed(0)
    posterior = mixtures(3)[kind]
    z = posterior.rsample((400_000,))
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - posterior.mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), posterior.variance, rtol=0.03, atol=0)
    whole = getattr(posterior, "covariance_matrix", None)
    drawn = torch.stack([z[:, image].mT.cov() for image in range(3)])
    expected = torch.diag_embed(posterior.variance) if whole is None else whole
    torch.testing.assert_close(drawn, expected, rtol=0.03, atol=0.01)
    code, z = location(posterior).clone().requires_grad_(), z[:4].clone().requires_grad_()

    def density(code: Tensor, z: Tensor) -> Tensor:
        if kind == 0:
            return ScaleMixture(code, posterior.scale).log_prob(z)
        return InterpolatedNormal(code, posterior.gamma).log_prob(z)

    assert torch.autograd.gradcheck(density, (code, z), atol=1e-4, rtol=1e-4)


def test_the_code_without_noise_is_the_location() -> None:
    raw = numbers(5, 3).float()
    for sigma, factor in ((Interpolated(2.0), 0.5), (Random(), 1.0), (Fixed(), 1.0), (UniformNoise(), 1.0)):
        assert torch.equal(location(sigma(raw)), raw)
        torch.testing.assert_close(sigma(raw).mean, factor * raw)


# --- Codes on a sphere ---


def on_sphere(latent: int, *concentrations: float) -> PowerSphericalDistribution:
    directions = torch.nn.functional.normalize(numbers(len(concentrations), latent), dim=-1)
    return PowerSphericalDistribution(directions, torch.tensor(concentrations, dtype=Double))


@pytest.mark.parametrize("latent", [2, 3])
@pytest.mark.parametrize("concentration", [0.01, 1.0, 40.0, 3000.0])
def test_the_power_spherical_density_and_rate_are_integrals(latent: int, concentration: float) -> None:
    posterior, prior = on_sphere(latent, concentration), UniformOnSphere(torch.zeros(latent, dtype=Double))
    n = 400_000
    angle = (torch.arange(n, dtype=Double) + 0.5) * math.pi / n  # from location
    side = torch.zeros(latent, dtype=Double).index_fill_(0, torch.tensor(0), 1.0)
    side = torch.nn.functional.normalize(side - side @ posterior.location[0] * posterior.location[0], dim=0)
    z = angle.cos()[:, None] * posterior.location[0] + angle.sin()[:, None] * side
    measure = (2.0 if latent == 2 else 2 * math.pi * angle.sin()) * math.pi / n
    log_q = posterior.log_prob(z)
    assert float((log_q.exp() * measure).sum()) == pytest.approx(1, abs=1e-5)
    rate = (log_q.exp() * (log_q - prior.log_prob(z)) * measure).sum()
    assert float(kl_divergence(posterior, prior)[0]) == pytest.approx(float(rate), abs=1e-5, rel=1e-5)
    single = PowerSphericalDistribution(posterior.location.float(), posterior.concentration.float())
    rough = kl_divergence(single, UniformOnSphere(torch.zeros(latent)))
    torch.testing.assert_close(rough.double(), kl_divergence(posterior, prior), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("latent", [2, 3, 10, 100])
def test_draws_on_the_sphere_have_the_stated_moments_and_rate(latent: int) -> None:
    torch.manual_seed(0)
    posterior = on_sphere(latent, 0.3, 10.0, 1e5)
    z = posterior.rsample((60_000,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(60_000, 3, dtype=Double))
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - posterior.mean).abs() < 5 * error).all()
    for image, whole in enumerate(posterior.covariance_matrix):
        torch.testing.assert_close(z[:, image].mT.cov(), whole, rtol=0.1, atol=0.02 * float(whole.diagonal().max()))
    torch.testing.assert_close(posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1), posterior.variance)
    exact, error = monte_carlo(posterior, UniformOnSphere(torch.zeros(latent, dtype=Double)), 60_000)
    rate = kl_divergence(posterior, UniformOnSphere(torch.zeros(latent, dtype=Double)))
    assert ((rate - exact).abs() < 5 * error).all()


def test_the_gradient_of_draws_on_the_sphere_is_that_of_their_mean() -> None:
    """E z = concentration / (D - 1 + concentration) location."""
    torch.manual_seed(0)
    raw, concentration = torch.randn(1, 5, dtype=Double), torch.tensor([3.0], dtype=Double)
    gradients = []
    for is_drawn in (True, False):
        leaves = raw.clone().requires_grad_(), concentration.clone().requires_grad_()
        posterior = PowerSphericalDistribution(torch.nn.functional.normalize(leaves[0], dim=-1), leaves[1])
        mean = posterior.rsample((400_000,)).mean(0) if is_drawn else posterior.mean
        (mean @ torch.arange(1.0, 6.0, dtype=Double)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.01)


def test_a_learned_concentration_sets_the_mean_cosine() -> None:
    raw = 2 * numbers(6, 8)
    posterior = PowerSpherical(4)(raw)
    cosine = (posterior.mean * location(posterior)).sum(-1)
    torch.testing.assert_close(cosine, raw[:, 4:].mean(1).sigmoid())
    torch.testing.assert_close(location(posterior), raw[:, :4] / raw[:, :4].norm(dim=1, keepdim=True))
    fixed = PowerSpherical(4, 7.0)
    assert fixed.raw_size == 1
    torch.testing.assert_close(fixed(raw[:, :4]).concentration, torch.full((6,), 7.0, dtype=Double))
    extreme = PowerSpherical(4)(torch.tensor([[1.0, 0, 0, 0, *[99.0] * 4], [1, 0, 0, 0, *[-99] * 4]]))
    rates = kl_divergence(extreme, UniformOnSphere(torch.zeros(4)))
    assert rates.isfinite().all()
    assert float(rates[1]) == pytest.approx(0, abs=1e-6)
    assert extreme.rsample((1000,)).isfinite().all()


def test_the_uniform_distribution_on_a_sphere() -> None:
    torch.manual_seed(0)
    prior = UniformOnSphere(torch.zeros(5, dtype=Double))
    z = prior.rsample((100_000,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(100_000, dtype=Double))
    torch.testing.assert_close(z.var(0), prior.variance, rtol=0.02, atol=0)
    assert float(prior.log_prob(z[0])) == pytest.approx(-log_area(5))
    assert math.exp(log_area(4)) == pytest.approx(2 * math.pi**2)


# --- The length of a dithered code ---


class ArithmeticCoder:
    """An arithmetic coder with exact integers. A symbol is given by its interval [low, high) of `total` = 2^40."""

    total = 1 << 40

    def __init__(self) -> None:
        self.low, self.width, self.scale = 0, 1, 1

    def narrow(self, low: int, high: int) -> None:
        """Narrow the interval [low, low + width) / scale to the part of a symbol."""
        self.low = self.low * self.total + self.width * low
        self.width *= high - low
        self.scale *= self.total

    def bits(self) -> str:
        """Return the shortest string whose dyadic interval lies within the interval of the sequence."""
        length = 1
        while True:
            first = -((-self.low << length) // self.scale)
            if (first + 1) * self.scale <= (self.low + self.width) << length:
                return format(first, f"0{length}b")
            length += 1

    def symbol(self, bits: str, edges: list[int]) -> int:
        """Return the position of the next symbol, whose intervals have these edges, and narrow the interval to it."""
        sent = int(bits, 2) * self.scale * self.total

        def is_above(edge: int) -> bool:
            return (self.low * self.total + self.width * edge) << len(bits) > sent

        place = next(n for n in range(len(edges) - 1) if is_above(edges[n + 1]))
        self.narrow(edges[place], edges[place + 1])
        return place


def edges_of(u: float, width: float, reach: int) -> list[int]:
    """Return the edges of the intervals of the integers -reach ... reach under N(0, 1), given the shared noise u. Each
    interval has at least one unit."""
    k = np.arange(-reach, reach + 2)
    mass = torch.special.ndtr(torch.from_numpy((k - 0.5) * width + u)).numpy()
    mass[0], mass[-1] = 0, 1
    units = ArithmeticCoder.total - len(k)
    return [int(share * units) + place for place, share in enumerate(mass)]


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_an_arithmetic_coder_sends_a_noisy_code_in_the_stated_number_of_bits(level: float) -> None:
    width, reach = math.sqrt(12) * level, 60
    loc = numbers(20, 4)
    u = width * (torch.rand(20, 4, dtype=Double, generator=torch.Generator().manual_seed(1)) - 0.5)
    k, z = dithered(loc, u, torch.tensor(width, dtype=Double))
    assert ((z - loc).abs() <= width / 2 + 1e-12).all()
    sender = ArithmeticCoder()
    for sent, shared in zip(k.flatten().tolist(), u.flatten().tolist(), strict=True):
        edges = edges_of(shared, width, reach)
        sender.narrow(edges[int(sent) + reach], edges[int(sent) + reach + 1])
    bits = sender.bits()
    receiver = ArithmeticCoder()
    found = [receiver.symbol(bits, edges_of(shared, width, reach)) - reach for shared in u.flatten().tolist()]
    received = torch.tensor(found, dtype=Double).view(20, 4) * width + u
    assert torch.equal(received, z)
    zero, one = torch.zeros(4, dtype=Double), torch.ones(4, dtype=Double)
    ideal = -float(log_mass(z, torch.tensor(width, dtype=Double), zero, one).sum()) / math.log(2)
    assert ideal - 1e-6 <= len(bits) <= ideal + 2.001


def test_the_masses_of_cells_add_up_to_1_also_far_from_the_mean() -> None:
    z = 0.3 + 0.5 * torch.arange(-200, 200, dtype=Double)
    width, mean, scale = torch.tensor(0.5, dtype=Double), torch.tensor(1.0).double(), torch.tensor(2.0).double()
    assert float(log_mass(z, width, mean, scale).exp().sum()) == pytest.approx(1)
    far = log_mass(torch.tensor([121.0, -119.0], dtype=Double), width, mean, scale)
    torch.testing.assert_close(far[0], far[1])
    edge = 60 - 0.125  # the tail of N(0, 1) from there on
    assert float(far[0]) == pytest.approx(-(edge**2) / 2 - math.log(edge * math.sqrt(2 * math.pi)), abs=1e-3)


# --- Figures ---


def subject(compose: Compose, *overrides: str) -> MeasuredRun:
    """Return an untrained run on the digits, whose encoder spreads the codes of different images."""
    experiment = build_experiment(compose("network=linear", "latent=3", "device=cpu", *overrides))
    encoder: Any = experiment.model.encoder
    with torch.no_grad():
        encoder[1].weight.mul_(3)
    run: Any = type("", (), {"model": experiment.model, "device": experiment.device, "splits": experiment.splits})()
    return MeasuredRun(run, BUDGETS["quick"])


NON_NORMAL = ["sigma=uniform", "sigma=random", "sigma=interpolated", "sigma=power_spherical prior=sphere"]


@pytest.mark.parametrize("words", [*NON_NORMAL, "sigma=bounded", "sigma=preserving"])
def test_the_moments_of_all_codes_are_those_of_their_draws(compose: Compose, words: str) -> None:
    of = subject(compose, *words.split())
    codes = of.codes("test")
    of.model.eval()
    torch.manual_seed(0)
    drawn = []
    for x, _ in of.batches("test"):
        with torch.no_grad():
            drawn.append(of.model.encode(x).rsample((2000,)).flatten(0, 1))
    z = torch.cat(drawn).double()
    torch.testing.assert_close(of.spread.double(), z.std(0), rtol=0.01, atol=0)
    found = compute_metrics(of, [AggregateFit])["AggregateFit"]
    torch.testing.assert_close(torch.tensor(found["aggregate_variance"].value).double(), z.var(0), rtol=0.02, atol=0)
    spectrum = torch.linalg.eigvalsh(z.mT.cov()).flip(0)
    torch.testing.assert_close(torch.tensor(found["aggregate_spectrum"].value).double(), spectrum, rtol=0.02, atol=0)
    assert (codes.noise is None) == (words not in NON_NORMAL[2:])


@pytest.mark.parametrize("words", NON_NORMAL)
def test_figures_for_normal_noise_only_are_left_out(compose: Compose, words: str) -> None:
    found = compute_metrics(subject(compose, *words.split()), [Rate, SignalToNoise, Dither, RefittedPrior])
    assert found["Rate"]["rate_loc"].value is None
    assert (found["Rate"]["rate_per_dimension"].value is None) == (words != "sigma=uniform")
    assert found["SignalToNoise"]["channel_bound_bits"].value is None
    assert found["SignalToNoise"]["snr_per_dimension"].value is not None
    assert (found["Dither"]["dithered_bits"].value is None) == (words != "sigma=uniform")
    assert (found["RefittedPrior"]["elbo_gaussian_prior"].value is None) == ("sphere" in words)
    is_bound = words in ("sigma=random", "sigma=interpolated")
    assert ("upper bound" in found["Rate"]["rate"].note) == is_bound


@pytest.mark.parametrize("words", ["sigma=random", "sigma=interpolated"])
def test_figures_do_not_contain_the_slack_of_the_bound(compose: Compose, words: str) -> None:
    of = subject(compose, words)
    measured = compute_metrics(of, [Rate, MutualInformation, RefittedPrior])
    found = {name: figure for each in measured.values() for name, figure in each.items()}
    exact = []
    torch.manual_seed(0)
    for x, _ in of.batches("test"):
        with torch.no_grad():
            posterior = of.model.encode(x)
            z = posterior.rsample((200,))
            exact.append(unbiased_divergence(posterior, of.model.prior(), z))
    rate = torch.cat(exact)
    both: Any = found["marginal_kl"].value, found["mutual_information"].value, found["marginal_kl"].error
    assert both[0] + both[1] == pytest.approx(float(rate.mean()), abs=5 * both[2] + 0.1)
    bound: Any = found["rate"].value
    assert bound > float(rate.mean()) + 0.3
    # KL(q(z) || p(z)) is at least the gain of any other prior, and about the gain of a good one.
    assert found["elbo_gaussian_prior_gain"].value <= both[0] + 5 * both[2] + 0.1


def test_a_dithered_code_is_as_long_as_the_rate_if_the_noise_is_small(compose: Compose) -> None:
    for level, apart in (("0.02", 0.01), ("1.0", 1.0)):
        found = compute_metrics(subject(compose, "sigma=uniform", f"sigma.value={level}"), [Rate, Dither])
        length, rate = found["Dither"]["dithered_bits"].value, found["Rate"]["rate_bits"].value
        assert length == pytest.approx(rate, abs=apart)
    mixed = compute_metrics(subject(compose, "sigma=uniform", "prior=mixture"), [Dither])["Dither"]["dithered_bits"]
    assert "prior that is normal" in mixed.reason


# --- What is refused ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sigma=power_spherical", "type sigma=power_spherical prior=sphere"),
        ("prior=sphere", "type sigma=power_spherical prior=sphere"),
        ("sigma=power_spherical prior=sphere latent=1", "latent=2 or more"),
        *(
            (f"sigma=power_spherical prior=sphere regularizer={name}", "type .*regularizer=kl")
            for name in ("energy", "dip", "factor", "free_bits", "total_correlation")
        ),
        ("sigma=uniform prior=vamp", "density of 0 between them"),
        ("sigma=preserving prior=vamp", "pseudo-inputs are not images"),
        ("sigma=uniform regularizer=total_correlation", "has no gradient"),
        ("sigma=uniform regularizer=importance_weighted regularizer.gradient=doubly_reparameterized", "positive every"),
        ("sigma=random regularizer=total_correlation", "product over dimensions"),
        ("sigma=interpolated regularizer=free_bits", "not a sum over dimensions"),
        ("sigma=preserving sigma.value=1", "between 1e-06 and 0.999999"),
        ("sigma=preserving sigma.value=0", "type sigma=deterministic"),
        ("sigma=bounded sigma.least=1 sigma.most=0.5", "sigma.least must be below sigma.most"),
        ("sigma=bounded sigma.least=0", "must be between 1e-06 and 1e"),
        ("sigma=random sigma.value=-1", "between 1e-06"),
        ("sigma=power_spherical prior=sphere sigma.concentration=0", "a number between 1e-06 and 1e.* or learned"),
    ],
)
def test_what_is_not_defined_is_refused_with_what_to_type(compose: Compose, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(compose(*words.split()))


def test_regularizers_that_suit_uniform_noise_or_a_sphere_are_accepted(compose: Compose) -> None:
    for name in ("kl", "importance_weighted", "capacity", "mmd", "gradient_penalty", "none"):
        check_config(compose("sigma=power_spherical", "prior=sphere", f"regularizer={name}"))
    check_config(compose("sigma=uniform", "regularizer=free_bits"))
    check_config(compose("sigma=uniform", "regularizer=importance_weighted"))


@pytest.mark.parametrize("schedule", [Constant(1), Constant(0.3), Linear(0.5, 1, 10)], ids=["1", "0.3", "linear"])
def test_a_schedule_multiplies_by_its_current_number(schedule: Schedule) -> None:
    quantity = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for epoch in (0.0, 4.0, 10.0):
        schedule.advance(epoch)
        assert torch.equal(schedule.times(quantity), schedule() * quantity)


def test_noise_levels_can_be_schedules() -> None:
    for kind in (Fixed, Random, Interpolated, UniformNoise, lambda value: Preserving(3, value)):
        sigma: Sigma = kind(Linear(0.5, 0.1, 10))
        schedule: Any = sigma.value
        spreads = []
        for epoch in (0.0, 10.0):
            schedule.advance(epoch)
            spreads.append(float(sigma(torch.zeros(4, 3)).stddev.mean()))
        assert spreads[0] == pytest.approx(5 * spreads[1], rel=1e-5)
    with pytest.raises(UserError, match=r"goes from 0\.1 to 1, .*stop=0\.5"):
        Preserving(3, Linear(0.1, 1, 10))
