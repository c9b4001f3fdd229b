"""Measured bits and scales equal known values: closed forms of the linear model, of channels and of quantizers.

The linear model's closed forms are those of test_linear_vae.py: lam are the eigenvalues of the data covariance, eta = 1
the decoder's scale, s the encoder's. Here its weights are set to the optimum, and nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.distributions import Independent, Laplace

from vae_cli import Run, load_run
from vae_cli.commands.train import train
from vae_cli.config.build import build_experiment
from vae_cli.metrics.base import (
    RESAMPLINGS,
    Budget,
    Figure,
    MeasuredRun,
    Metric,
    as_plain,
    compute_metrics,
    mean_figure,
    resample,
)
from vae_cli.metrics.information import AggregateDensity, MutualInformation, Rate, SignalToNoise, log_others
from vae_cli.metrics.scales import PullOverTraining, ScaleDistribution
from vae_cli.metrics.tolerance import NOISE_LEVELS, NoiseProbe, Quantization, quantize

Compose = Callable[..., dict[str, Any]]
BUDGET = Budget(2000, 9000, 64, 100, 4000, 16, 20, 500)
LAM = torch.tensor([8.0, 5.0, 3.0, 2.0], dtype=torch.float64)
LEARNED = ["sigma=learned"]
FIXED = ["sigma=fixed", "sigma.value=0.5"]
KINDS: list[type[Metric]] = [
    *(Rate, SignalToNoise, MutualInformation, AggregateDensity, NoiseProbe, Quantization),
    *(ScaleDistribution, PullOverTraining),
]


class Linear(nn.Module):
    """A linear model whose weights are set: W (pixels, D), V (D, pixels), and the scales of a learned sigma (D,)."""

    def __init__(self, compose: Compose, *overrides: str, latent: int = 4) -> None:
        super().__init__()
        self.experiment = build_experiment(
            compose(
                "dataset=linear_gaussian",
                "network=linear",
                "likelihood=gaussian",
                "likelihood.scale=1.0",
                f"latent={latent}",
                "device=cpu",
                *overrides,
            )
        )
        splits = self.experiment.splits
        pixels = splits.test.batch(torch.arange(len(splits.test))).flatten(1).double()
        self.covariance = pixels.T @ pixels / len(pixels)
        # The principal directions, with the largest eigenvalue first.
        self.directions = torch.linalg.eigh(self.covariance).eigenvectors.flip(1)[:, :latent]
        model: Any = self.experiment.model
        self.decoder, self.encoder, self.latent = model.decoder[0], model.encoder[1], latent

    def set(self, decoder: Tensor, encoder: Tensor, scale: Tensor | None = None) -> MeasuredRun:
        """W = directions * decoder, V = encoder * directions^T; the subject is measured with these weights."""
        with torch.no_grad():
            self.decoder.weight.copy_(self.directions * decoder)
            self.decoder.bias.zero_()
            self.encoder.weight.zero_()
            self.encoder.bias.zero_()
            self.encoder.weight[: self.latent] = encoder[:, None] * self.directions.T
            if scale is not None:
                self.encoder.bias[self.latent :] = scale.log()
        folder = SimpleNamespace(metrics=list)
        run: Any = SimpleNamespace(
            model=self.experiment.model, device=self.experiment.device, splits=self.experiment.splits, folder=folder
        )
        return MeasuredRun(run, BUDGET)


def optimum(compose: Compose, overrides: list[str]) -> tuple[MeasuredRun, dict[str, Tensor]]:
    """A linear model at its optimum, and the closed-form values for each of its dimensions, in nats."""
    linear = Linear(compose, *overrides)
    if overrides == LEARNED:
        decoder, shrinkage, scale, s = (LAM - 1).sqrt(), 1 - 1 / LAM, LAM.rsqrt(), None
        information = LAM.log() / 2
        known = {"rate_loc": (1 - 1 / LAM) / 2, "rate": information}
    else:
        s = 0.5
        decoder, shrinkage, scale = ((LAM.sqrt() - s) / s).sqrt(), 1 - s / LAM.sqrt(), None
        information = (LAM.sqrt() / s).log() / 2
        floor = (s * s - 1 - math.log(s * s)) / 2
        known = {"rate_loc": s * s * (LAM.sqrt() / s - 1) / 2}
        known["rate"] = known["rate_loc"] + floor
    known |= {"information": information, "snr": (2 * information).expm1()}
    return linear.set(decoder, shrinkage / decoder, scale), known


def figures(subject: MeasuredRun, kind: type[Metric]) -> dict[str, Any]:
    return compute_metrics(subject, [kind])[kind.__name__]


def near(figure: Figure, expected: float, bias: float = 0.0) -> None:
    """Assert that a figure is within four of its own standard errors of the expected value."""
    assert isinstance(figure.value, float)
    assert isinstance(figure.error, float)
    assert abs(figure.value - expected) < 4 * figure.error + bias, (figure, expected)


@pytest.mark.parametrize("overrides", [LEARNED, FIXED], ids=" ".join)
def test_closed_forms_of_the_linear_model(compose: Compose, overrides: list[str]) -> None:
    subject, known = optimum(compose, overrides)
    rate = figures(subject, Rate)
    # The covariance of the images is exact, and so are means of squares of their codes.
    assert rate["rate"].value == pytest.approx(float(known["rate"].sum()), rel=1e-4)
    assert rate["rate_bits"].value == pytest.approx(float(known["rate"].sum()) / math.log(2), rel=1e-4)
    assert rate["rate_loc"].value == pytest.approx(float(known["rate_loc"].sum()), rel=1e-4)
    assert rate["rate_scale"].value == pytest.approx(float((known["rate"] - known["rate_loc"]).sum()), rel=1e-4)
    assert rate["rate_per_dimension"].value == pytest.approx(known["rate"].tolist(), rel=1e-4)
    assert rate["active_units"].value == 4
    # |loc|^2 of a normal: var = 2 sum Var(loc_j)^2
    assert rate["rate"].error == pytest.approx(math.sqrt(2 * float(known["rate_loc"].square().sum()) / 2000), rel=0.1)

    channel = figures(subject, SignalToNoise)
    assert channel["snr_per_dimension"].value == pytest.approx(known["snr"].tolist(), rel=1e-3)
    information = float(known["information"].sum())
    assert channel["channel_bound_bits"].value == pytest.approx(information / math.log(2), rel=1e-4)
    # The variance of N normal draws has the relative error sqrt(2 / N).
    expected = known["snr"] * math.sqrt(2 / 2000)
    assert channel["snr_per_dimension"].error == pytest.approx(expected.tolist(), rel=0.1)
    slopes = 1 / (1 + known["snr"]) / (2 * math.log(2))
    assert channel["channel_bound_bits"].error == pytest.approx(float((slopes * expected).norm()), rel=0.1)
    assert channel["channel_bound_bits"].note == ""

    mutual = figures(subject, MutualInformation)
    # 9000 of infinitely many images: low by about (prod (1 + snr) - 1) / 2N.
    bias = float((1 + known["snr"]).prod()) / (2 * 9000)
    near(mutual["mutual_information"], information - bias, bias)
    near(mutual["mutual_information_bits"], (information - bias) / math.log(2), bias)
    near(mutual["marginal_kl"], float(known["rate"].sum()) - information + bias, bias)
    assert mutual["mutual_information"].error < 0.04
    truth = float(known["rate"].sum()) - information
    lower = figures(subject, AggregateDensity)["marginal_kl_lower"]
    assert lower.error is not None
    assert truth - 0.75 < lower.value < truth + 4 * lower.error  # at most ln 2 below the better of two densities
    assert "saturated" not in mutual["mutual_information"].note
    assert mutual["mutual_information_ceiling_bits"].value == pytest.approx(math.log2(9000))


def test_the_channel_bound_says_when_scales_vary(compose: Compose) -> None:
    linear = Linear(compose, *LEARNED, latent=1)
    subject = linear.set(torch.ones(1), torch.ones(1), torch.ones(1))
    with torch.no_grad():  # ln s = y / 4 with y ~ N(0, 8): E ln s^2 = 0 and E s^2 = e^(1 / 4 * 8 / 2)
        linear.encoder.weight[1] = linear.directions[:, 0] / 4
    channel = figures(subject, SignalToNoise)
    codes = subject.codes("test")
    assert codes.scale is not None
    gap = math.log2(float(codes.scale.double().square().mean())) / 2
    assert gap == pytest.approx(0.5 / math.log(2), rel=0.15)
    assert f"{gap:.3g} bits higher than this" in channel["channel_bound_bits"].note
    # The jackknife: the ratio without each image in turn.
    y, square = codes.loc.double().flatten(), codes.scale.double().square().flatten()
    n = len(y)
    mean = (y.sum() - y) / (n - 1)
    variance = (y.square().sum() - y.square()) / (n - 1) - mean.square()
    without = variance / ((square.sum() - square) / (n - 1))
    assert channel["snr_per_dimension"].error == pytest.approx([math.sqrt(n) * float(without.std())], rel=0.05)


def test_information_of_disjoint_and_of_identical_codes(compose: Compose) -> None:
    linear = Linear(compose, *LEARNED, "dataset.images=2000")
    ones = torch.ones(4)
    apart = figures(linear.set(ones, 1e4 * ones, ones), MutualInformation)
    assert apart["mutual_information"].value == pytest.approx(math.log(1000), abs=1e-6)  # the rest is held out
    assert apart["mutual_information_bits"].note == "saturated at its upper limit log2 N = 9.97 bits"
    assert "upper bound" in apart["marginal_kl"].note
    same = figures(linear.set(ones, 0 * ones, 0.3 * ones), MutualInformation)
    assert same["mutual_information"].value == pytest.approx(0, abs=1e-9)
    assert same["mutual_information"].note == ""
    floor = (0.3**2 - 1 - math.log(0.3**2)) / 2
    assert same["marginal_kl"].value == pytest.approx(4 * floor, rel=1e-5)


@pytest.mark.parametrize("snr", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_information_of_a_normal_channel(compose: Compose, snr: float, size: float) -> None:
    linear = Linear(compose, *LEARNED, latent=1)
    encoder = size * torch.tensor([math.sqrt(snr / 8)])
    mutual = figures(linear.set(torch.ones(1), encoder, size * torch.ones(1)), MutualInformation)
    near(mutual["mutual_information"], math.log1p(snr) / 2, snr / 18000)


def test_the_information_lies_between_its_two_ends(compose: Compose) -> None:
    linear = Linear(compose, *LEARNED, "dataset.images=1300")
    subject = linear.set(torch.ones(4), LAM.rsqrt() * 5, torch.ones(4))  # SNR 25: 6.52 nats exceed ln 300
    mutual = figures(subject, MutualInformation)
    assert "saturated" in mutual["mutual_information"].note
    subject = linear.set(torch.ones(4), LAM.rsqrt() * 2.5, torch.ones(4))
    true = 2 * math.log1p(2.5**2)
    found = figures(subject, MutualInformation)["mutual_information"]
    end = float(found.note.rpartition(" ")[2])
    assert found.value + 4 * found.error < true < end
    assert end - found.value < 0.7


class Wide(nn.Module):
    """Laplace noise of scale 1 about loc: a posterior that is not normal."""

    provides = frozenset({"noise"})

    def forward(self, raw: Tensor) -> Independent:
        return Independent(Laplace(raw, torch.ones_like(raw)), 1)


def test_information_of_a_channel_that_is_not_normal(compose: Compose) -> None:
    linear = Linear(compose, "sigma=deterministic", latent=1)
    subject = linear.set(torch.ones(1), torch.tensor([0.8]))
    subject.model.sigma = Wide()
    mutual = figures(subject, MutualInformation)

    def known(loc: Tensor) -> float:
        """Return I = h(z) - h(epsilon). The density of z, a mixture over all codes, is integrated on a grid."""
        grid = torch.linspace(-20, 20, 2001, dtype=torch.float64)
        density = ((grid[:, None] - loc.double().flatten()).abs().neg().exp() / 2).mean(1)
        entropy = -float(torch.xlogy(density, density).sum() * (grid[1] - grid[0]))
        return entropy - 1 - math.log(2)

    true = known(subject.codes("train").loc)
    near(mutual["mutual_information"], true, 1e-3)
    # Only a few images, with several draws of each.
    few = MeasuredRun(subject.run, Budget(2000, 20, 1, 1, 9990, 1, 1, 1))
    information = figures(few, MutualInformation)["mutual_information"]
    assert information.count == 9990
    near(information, known(few.codes("train").loc), 1e-3)
    rate = figures(subject, Rate)
    assert rate["rate"].value is not None
    assert rate["rate_loc"].value is None
    assert "is not normal with independent dimensions" in rate["rate_loc"].reason
    assert rate["rate_per_dimension"].value == [pytest.approx(rate["rate"].value)]
    near(mutual["marginal_kl"], rate["rate"].value - true, 0.05)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7])
def test_densities_at_small_scales(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    loc, scale = 3 + torch.randn(50, 5, **draw), size * (0.1 + torch.rand(50, 5, **draw))
    loc[25:] = loc[:25] + scale[:25] * torch.randn(25, 5, **draw)  # each of these has a close neighbor
    rows = torch.arange(120) % 50
    z = loc[rows] + scale[rows] * torch.randn(120, 5, **draw)
    all_ = Independent(torch.distributions.Normal(loc, scale), 1).log_prob(z[:, None])
    expected = all_.masked_fill(torch.arange(50) == rows[:, None], -torch.inf).logsumexp(1)
    torch.testing.assert_close(log_others(z, rows, loc, scale), expected, rtol=1e-9, atol=1e-2 if size < 1 else 1e-9)


def test_noise_probe_of_a_linear_decoder(compose: Compose) -> None:
    """At loc + t a epsilon the distortion is that at loc plus t^2 / 2 sum_j a_j^2 w_j^2."""
    subject, _ = optimum(compose, FIXED)
    probe = figures(subject, NoiseProbe)
    decoder, spread = subject.model.decoder[0].weight.double(), subject.spread.double()
    s = 0.5
    torch.testing.assert_close(spread.square(), s * LAM.sqrt(), rtol=1e-4, atol=0)  # the aggregate variance
    steepness = float((decoder.detach().square().sum(0) * spread.square()).sum() / 2)
    t = probe["noise_probe_t"].value
    curve = probe["noise_probe_distortion"]
    assert t == [0.0, *NOISE_LEVELS]
    assert len(curve.value) == len(curve.error) == 17
    for step, value, error in zip(t, curve.value, curve.error, strict=True):
        expected = curve.value[0] + step**2 * steepness
        assert abs(value - expected) < 4 * error * min(1, step) + 1e-3
    # Another image x' instead of x: E |x - W V x'|^2 = tr C + tr (W V C V' W'), because they are independent.
    noise = 16 * math.log(2 * math.pi) / 2
    covariance = torch.tensor([8, 5, 3, 2, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]).double()
    kept = ((1 - s / LAM.sqrt()).square() * LAM).sum()
    lost = ((s / LAM.sqrt()).square() * LAM).sum() + covariance[4:].sum()
    assert curve.value[0] == pytest.approx(noise + float(lost) / 2, rel=1e-4)
    other_code = noise + float(covariance.sum() + kept) / 2
    near(probe["noise_probe_stranger"], other_code)
    tolerance = probe["noise_probe_tolerance"]
    expected = math.sqrt(0.1 * (other_code - noise - float(lost) / 2) / steepness)
    assert expected * 0.95 < tolerance.value < expected * 1.01
    assert 0 < tolerance.error < 0.02 * expected


def test_no_tolerance_is_given_outside_the_noise_levels(compose: Compose) -> None:
    linear = Linear(compose, "sigma=deterministic")
    ones = torch.ones(4)
    ignored = figures(linear.set(0 * ones, ones), NoiseProbe)
    assert ignored["noise_probe_stranger"].value == pytest.approx(ignored["noise_probe_distortion"].value[0])
    assert "no worse" in ignored["noise_probe_tolerance"].reason
    values = torch.zeros(50, 17, dtype=torch.float64)
    other_code = 100 + torch.arange(50.0, dtype=torch.float64)
    assert "up to t = 3" in NoiseProbe.tolerance_at_crossing(values, other_code).reason
    values[:, 1:] = 50
    assert "even at t = 0.01" in NoiseProbe.tolerance_at_crossing(values, other_code).reason


def test_the_tolerance_is_interpolated_in_the_logarithm_of_t() -> None:
    t = torch.tensor([0.0, *NOISE_LEVELS], dtype=torch.float64)
    values = (50 + 8 * (t / 0.01).clamp_min(1).log()).repeat(30, 1)
    values[:, 0] = 50
    found = NoiseProbe.tolerance_at_crossing(values, 50 + torch.linspace(190, 210, 30, dtype=torch.float64))
    assert found.value == pytest.approx(0.01 * math.exp(20 / 8), rel=1e-9)
    # The mean at another image's code has the error std / sqrt(30); a tenth of it moves the crossing by t / 8 per nat.
    error = 0.1 * float(torch.linspace(190, 210, 30).std()) / math.sqrt(30)
    assert found.error == pytest.approx(found.value * error / 8, rel=1e-4)


def test_quantizer() -> None:
    """The error is w^2 / 12 inside the range and, for a normal, close to that of the best quantizer of equal cells."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)[:, None]
    weight = torch.from_numpy(norm.pdf(x.numpy())) * float(x[1] - x[0])
    for bits in range(1, 9):
        edge = torch.tensor([norm.ppf(1 - 4.0 ** -(bits + 1))])
        inside = x[(x.abs() < edge)][:, None]
        moved = quantize(inside, -edge, edge, bits)
        width = float(2 * edge / 2**bits)
        assert float((moved - inside).square().mean()) == pytest.approx(width**2 / 12, rel=1e-2)
        assert float((moved - inside).abs().max()) <= width / 2 * (1 + 1e-9)
        assert len(moved.unique()) == 2**bits
        found = float((weight * (quantize(x, -edge, edge, bits) - x).square()).sum())
        best = min(
            float((weight * (quantize(x, -e, e, bits) - x).square()).sum()) for e in torch.linspace(1, 4.5, 30).double()
        )
        assert found < 1.18 * best
    flat = torch.full((1,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(quantize(flat[:, None], flat, flat, 3), flat[:, None])


@pytest.mark.parametrize("sigma", ["fixed", "deterministic"])
def test_quantization_of_a_linear_decoder(compose: Compose, sigma: str) -> None:
    encoder = torch.tensor([1.0, 0.5, 3, 1e-2])  # the last dimension carries almost nothing
    decoder = torch.tensor([1.0, 2, 1 / 3, 0.2])  # and the others carry all the variance of their pixels
    subject = Linear(compose, f"sigma={sigma}", "likelihood.scale=0.1").set(decoder, encoder)
    assert subject.active.tolist() == [True, True, True, False]
    found = figures(subject, Quantization)
    assert found["quantization_bits"].value == list(range(1, 13))
    assert found["quantization_total_bits"].value == [3 * b for b in range(1, 13)]
    unquantized = found["quantization_unquantized"].value
    train = subject.codes("train").loc.double().numpy()
    excess = {}
    for b, value in enumerate(found["quantization_distortion"].value, 1):
        low, high = np.quantile(train, [4.0 ** -(b + 1), 1 - 4.0 ** -(b + 1)], axis=0)[:, :3]
        width = torch.from_numpy(high - low) / 2**b
        # Inside the range the error is uniform, outside it is negligible, and dropping the idle dimension adds 0.4.
        excess[b] = 0.4 + float((decoder[:3].double().square() * width.square()).sum() / 24) / 0.1**2
        if 5 <= b <= 8:
            assert value - unquantized == pytest.approx(excess[b], rel=0.1)
    assert found["quantization_distortion"].value[-1] == pytest.approx(unquantized + 0.4, abs=0.05)
    # The bits at which the excess crosses 1 nat, interpolated linearly over 4^-b.
    over = [v - unquantized for v in found["quantization_distortion"].value]
    b = max(b for b, value in enumerate(over, 1) if value > 1)
    share = (over[b - 1] - 1) / (over[b - 1] - over[b])
    within = found["quantization_bits_within_1_nat"]
    assert within.value == pytest.approx(-3 * math.log(4.0**-b + share * (4.0 ** -(b + 1) - 4.0**-b), 4), rel=1e-6)
    assert 3 * b < within.value < 3 * (b + 1)
    assert 0 < within.error < 0.5
    assert 3 * math.log((excess[6] - 0.4) * 4**6 / (1 - 0.4), 4) == pytest.approx(within.value, rel=0.05)


def test_quantization_with_no_bits_and_with_too_few(compose: Compose) -> None:
    linear = Linear(compose, "sigma=deterministic")
    free = figures(linear.set(0 * torch.ones(4), torch.ones(4)), Quantization)["quantization_bits_within_1_nat"]
    assert free.value == 0
    precise = Linear(compose, "sigma=deterministic", "likelihood.scale=1e-3", latent=16).set(
        torch.ones(16), torch.ones(16)
    )
    dear = figures(precise, Quantization)["quantization_bits_within_1_nat"]
    assert dear.value is None
    assert dear.reason == (
        "with 12 bits for each of the 16 active dimensions, quantization still raises the distortion by more than 1 nat"
    )


def test_distribution_of_scales(compose: Compose) -> None:
    linear = Linear(compose, *LEARNED, latent=3)
    subject = linear.set(torch.ones(3), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.01, 0.1, 1.0]))
    found = figures(subject, ScaleDistribution)
    assert found["scale_mean"].value == pytest.approx(0.37, rel=1e-5)
    assert found["scale_median"].value == pytest.approx(0.1, rel=1e-5)
    assert found["scale_min"].value == pytest.approx(0.01, rel=1e-5)
    assert found["scale_max"].value == pytest.approx(1, rel=1e-5)
    assert found["scale_active_quantiles"].value == pytest.approx([0.01, 0.01, 0.055, 0.1, 0.1], rel=1e-5)
    assert found["scale_idle_quantiles"].value == pytest.approx([1] * 5, rel=1e-5)
    edges, active, idle = (found[f"scale_histogram_{name}"].value for name in ("edges", "active", "idle"))
    assert edges == pytest.approx(np.arange(-2.05, 0.06, 0.1).tolist())
    assert len(active) == len(idle) == len(edges) - 1
    assert {n: v for n, v in enumerate(active) if v} == pytest.approx({0: 1 / 3, 10: 1 / 3})
    assert {n: v for n, v in enumerate(idle) if v} == pytest.approx({20: 1 / 3})
    subject = linear.set(torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), torch.ones(3))
    with torch.no_grad():  # ln s = y / 4 with y ~ N(0, 8) in the first dimension, which stays active
        linear.encoder.weight[3] = linear.directions[:, 0] / 4
    quantiles = figures(subject, ScaleDistribution)["scale_active_quantiles"].value
    expected = np.exp(norm.ppf([0.05, 0.25, 0.5, 0.75, 0.95]) * math.sqrt(8) / 4)
    assert quantiles == pytest.approx(expected.tolist(), rel=0.1)


QUICK = ["epochs=2", "network.hidden=[32]"]
SMALL = Budget(100, 300, 8, 20, 700, 4, 5, 50)
NEED_NOISE = {
    "rate", "rate_bits", "rate_loc", "rate_scale", "rate_per_dimension", "active_units", "snr_per_dimension",
    "channel_bound_bits", "mutual_information", "mutual_information_bits", "mutual_information_ceiling_bits",
    "marginal_kl", "scale_mean", "scale_median", "scale_min", "scale_max", "scale_active_quantiles",
    "scale_distance_from_1", "marginal_kl_lower", "scale_idle_quantiles", "scale_histogram_edges",
    "scale_histogram_active", "scale_histogram_idle",
    "training_rate_scale", "training_rate_loc", "training_scale_mean",
}  # fmt: skip
FOR_ALL = {
    "noise_probe_t", "noise_probe_distortion", "noise_probe_stranger", "noise_probe_tolerance", "quantization_bits",
    "quantization_distortion", "quantization_unquantized", "quantization_total_bits", "quantization_bits_within_1_nat",
    "training_epochs", "training_loc_std",
}  # fmt: skip
MAYBE = {"scale_active_quantiles", "scale_idle_quantiles", "noise_probe_tolerance"}  # depends on the trained model


@pytest.mark.parametrize(
    "overrides",
    [
        ["sigma=learned"],
        ["sigma=shared", "dataset.validation=0"],
        ["sigma=fixed", "latent=1"],
        ["sigma=fixed", "prior=scaled_normal"],
        ["sigma=deterministic"],
        ["sigma=learned", "likelihood=bernoulli", "likelihood.binarize=dynamic"],
        ["sigma=deterministic", "likelihood=discretized_logistic"],
    ],
    ids=" ".join,
)
def test_all_figures_of_a_run(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train([*QUICK, *overrides, "run_name=tiny"])
    run: Run = load_run(tmp_path / "runs" / "tiny", device="cpu")
    found = {}
    for named in compute_metrics(MeasuredRun(run, SMALL), KINDS).values():
        for name, figure in named.items():
            assert name not in found
            found[name] = figure
            as_plain(figure)  # refuses what is not finite
            errors = figure.error if isinstance(figure.error, list) else [figure.error or 0.0]
            assert all(math.isfinite(error) for error in errors), name
            assert (figure.value is None) == bool(figure.reason), name
    assert set(found) == NEED_NOISE | FOR_ALL
    missing = {name for name, figure in found.items() if figure.value is None}
    if "sigma=deterministic" in overrides:
        assert NEED_NOISE <= missing <= NEED_NOISE | MAYBE
        return
    assert missing <= MAYBE
    summary = run.folder.summary()
    assert len(found["rate_per_dimension"].value) == run.config["latent"]
    assert sum(found["rate_per_dimension"].value) == pytest.approx(found["rate"].value, rel=1e-5)
    assert found["rate_loc"].value + found["rate_scale"].value == pytest.approx(found["rate"].value, rel=1e-5)
    # The summary is a mean over all 297 test images, this figure over 100 of them.
    assert abs(found["rate"].value - summary["test"]["rate"]) < 5 * found["rate"].error + 1e-3
    assert found["mutual_information"].value <= math.log(300) + 1e-9
    assert sum(found["scale_histogram_active"].value + found["scale_histogram_idle"].value) == pytest.approx(1)
    assert found["training_epochs"].value == [1, 2]
    record = run.folder.metrics()[-1]
    key = "train" if "dataset.validation=0" in overrides else "validation"
    assert found["training_rate_scale"].value[-1] == record[f"{key}/rate_scale"]
    assert found["training_loc_std"].value[-1] == record["posterior/loc_std"]
    assert bool(found["training_rate_loc"].note) == (key == "train")


def test_figures_do_not_depend_on_what_else_is_measured(compose: Compose) -> None:
    linear = Linear(compose, *LEARNED, "dataset.images=2000", "dataset.test=200")
    found = [
        compute_metrics(linear.set(torch.ones(4), torch.ones(4), torch.ones(4)), kinds)["NoiseProbe"]
        for kinds in ([NoiseProbe], [MutualInformation, Quantization, NoiseProbe])
    ]
    assert found[0] == found[1]


def test_resampled_deviations_have_the_variance_of_a_mean() -> None:
    """Their mean square is the squared standard error, also of a difference between runs on the same images."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, generator=generator)
    one, other = (mean_figure(shared + 0.1 * torch.randn(500, generator=generator)) for _ in range(2))
    assert one.parts is not None
    assert other.parts is not None
    first, second = (np.array(resample(figure.parts, 3)) for figure in (one, other))
    assert np.sqrt((first**2).mean()) == pytest.approx(one.error, rel=0.2)
    assert np.sqrt(((first - second) ** 2).mean()) == pytest.approx(0.1 * math.sqrt(2 / 500), rel=0.2)
    assert len(resample(one.parts, 3)) == RESAMPLINGS
    assert resample(one.parts, 3) != resample(one.parts, 4)
