"""The cost of each mode, and the quality of its images, against closed forms.

Linear models on Gaussian data; lam: eigenvalues of the data covariance, eta = 1: the decoder's scale. Learned sigma:
the optimum of Lucas et al., Don't Blame the ELBO!, NeurIPS 2019. Fixed sigma: the same calculation with a constant s.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from vae_cli import Run, load_run
from vae_cli.axes.dataset import Dataset
from vae_cli.commands.train import train
from vae_cli.config.instantiate import build
from vae_cli.metrics import features, price
from vae_cli.metrics.base import Budget, Codes, Figure, MeasuredRun, Metric, as_plain, compute_metrics
from vae_cli.metrics.features import FeatureNet, feature_net
from vae_cli.metrics.price import (
    AggregateFit,
    Bound,
    RefittedPrior,
    curve_steps,
    expected_log_density,
    gaussian,
    group_bound,
)
from vae_cli.metrics.quality import KINDS, SOURCES, Balls, Quality, frechet, kid, neighborhoods
from vae_cli.runs.checkpoint import save_checkpoint
from vae_cli.runs.mixture import fit_mixture

LATENT = 6
BUDGET = Budget(images=1000, train_images=4000, samples=64, iw_images=100, draws=50, points=4, pairs=10, pictures=60)
SMALL = dataclasses.replace(BUDGET, images=100, train_images=300, samples=6, iw_images=20)
Train = Callable[..., Run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs of one epoch, each trained once: `trained("sigma=fixed", "latent=2")`."""
    folder = tmp_path_factory.mktemp("price")

    @cache
    def run(*overrides: str) -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            name = "_".join(overrides).replace("=", "-") or "default"
            train([*overrides, "epochs=1", f"run_name={name}"])
            return load_run(folder / "runs" / name, device="cpu", data_dir=folder / "data")

    return run


def figures(run: Run, kind: type[Metric], budget: Budget = BUDGET) -> dict[str, Figure]:
    return compute_metrics(MeasuredRun(run, budget), [kind])[kind.__name__]


def number(figure: Figure) -> float:
    assert isinstance(figure.value, float), figure
    return figure.value


def curve(figure: Figure) -> Tensor:
    assert isinstance(figure.value, list), figure
    return torch.tensor(figure.value, dtype=torch.float64)


def linear(trained: Train, sigma: str, s: float | None) -> tuple[Run, Tensor]:
    """A linear model with the weights of its optimum in closed form, and the eigenvalues of its data."""
    run = trained("experiment=linear_vae", "dataset.images=4000", "dataset.test=1000", f"sigma={sigma}")
    data: Any = build(run.config["dataset"], "dataset", Dataset)
    lam, axes = data.eigenvalues, data.eigenvectors[:, :LATENT]
    top = lam[:LATENT]
    if s is None:
        w = (top - 1).clamp_min(0).sqrt()
        shrinkage = (1 - 1 / top).clamp_min(0)
    else:
        w = ((top.sqrt() - s).clamp_min(0) / s).sqrt()
        shrinkage = (1 - s / top.sqrt()).clamp_min(0)
    decoder: Any = run.model.decoder
    encoder: Any = run.model.encoder
    with torch.no_grad():
        decoder[0].weight.copy_(axes * w)
        decoder[0].bias.zero_()
        encoder[1].weight.zero_()
        encoder[1].bias.zero_()
        encoder[1].weight[:LATENT] = (axes * torch.where(w > 0, shrinkage / w, 0.0)).T
        if s is None:
            encoder[1].bias[LATENT:] = -0.5 * top.clamp_min(1).log()
    return run, lam


def log_likelihood(lam: Tensor, model: Tensor) -> float:
    """The mean of log N(x; 0, U diag(model) U^T) over data of the covariance U diag(lam) U^T."""
    return float(-0.5 * (model.log() + lam / model + math.log(2 * math.pi)).sum())


def test_bounds_of_an_exact_posterior_are_the_likelihood(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lam = linear(trained, "learned", None)
    model = torch.cat([lam[:LATENT].clamp_min(1), torch.ones(len(lam) - LATENT)])
    budget = dataclasses.replace(BUDGET, samples=20, iw_images=1000)
    monkeypatch.setattr(price, "DECODED_PIXELS", 37 * len(lam))  # parts of a size that divides no other size
    monkeypatch.setattr(price, "HELD_WEIGHTS", 20 * 83)
    together = []

    def decode(self: MeasuredRun, x: Tensor, z: Tensor) -> Tensor:
        together.append(z.shape[:-1].numel())
        return -self.model.decode(z).log_prob(x)

    monkeypatch.setattr(MeasuredRun, "distortion", decode)
    found = figures(run, Bound, budget)
    assert max(size for size in together if size != 500) == 37  # every metric decodes batches of 500
    bound = number(found["iw_bound_k20"])
    assert bound == pytest.approx(log_likelihood(lam, model), abs=1e-3)
    assert number(found["iw_gap"]) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(curve(found["iw_curve"]), torch.full((5,), bound).double(), rtol=0, atol=1e-4)
    assert curve(found["iw_curve_k"]).tolist() == [1, 2, 5, 10, 20]
    assert number(found["effective_sample_size"]) == pytest.approx(20, rel=1e-4)
    elbo = found["elbo"]
    # Only the distortion in the ELBO is estimated from draws, so the ELBO is exact only on average.
    assert number(elbo) == pytest.approx(bound, abs=0.1)
    assert elbo.count == 1000
    # The distortion alone: E_q |x - Wz|^2 / 2 = sum (1 - shrinkage)^2 lam / 2 + sum w^2 s^2 / 2.
    top = lam[:LATENT].clamp_min(1)
    residual = 1 / top.square() * lam[:LATENT] + (top - 1) / top
    expected = 0.5 * (residual.sum() + lam[LATENT:].sum() + len(lam) * math.log(2 * math.pi))
    assert number(found["distortion"]) == pytest.approx(float(expected), abs=0.1)


def test_bound_of_a_constant_scale_rises_to_the_likelihood(trained: Train) -> None:
    run, lam = linear(trained, "fixed", 1.0)
    w_square = (lam[:LATENT].sqrt() - 1).clamp_min(0)
    model = torch.cat([1 + w_square, torch.ones(len(lam) - LATENT)])
    budget = dataclasses.replace(BUDGET, samples=2000, iw_images=1000)
    found = figures(run, Bound, budget)
    rising = curve(found["iw_curve"])
    assert (rising.diff() > 0).all()
    truth = log_likelihood(lam, model)
    size = number(found["effective_sample_size"])
    assert 1 < size < 2000
    assert rising[0] < truth - 0.5
    assert rising[-1] == pytest.approx(truth, abs=0.03)
    assert number(found["iw_gap"]) == pytest.approx(float(rising[-1] - rising[0]), abs=1e-9)
    # The closed form of rate and distortion at the optimum.
    root = lam[:LATENT].sqrt().clamp_min(1)
    rate = ((root - 1) / 2).sum()
    residual = ((lam[:LATENT] / root.square()).sum() + w_square.sum() + lam[LATENT:].sum()) / 2
    elbo = -float(rate + residual + len(lam) * math.log(2 * math.pi) / 2)
    assert number(found["elbo"]) == pytest.approx(elbo, abs=0.1)
    assert float(rising[0]) == pytest.approx(elbo, abs=0.1)
    # The asymptotic gap that the docstring gives, at a k for which it holds.
    k = curve(found["iw_curve_k"]).tolist().index(200.0)
    assert truth - float(rising[k]) == pytest.approx((2000 / size - 1) / 400, rel=0.35)


def test_curve_of_groups() -> None:
    torch.manual_seed(0)
    log_weight = torch.randn(11, 4).double()
    expected = (log_weight[:5].exp().mean(0).log() + log_weight[5:10].exp().mean(0).log()) / 2
    torch.testing.assert_close(group_bound(log_weight, 5), expected)
    torch.testing.assert_close(group_bound(log_weight, 1), log_weight.mean(0))
    torch.testing.assert_close(group_bound(log_weight, 11), log_weight.exp().mean(0).log())
    assert curve_steps(1) == [1]
    assert curve_steps(64) == [1, 2, 5, 10, 20, 50, 64]
    assert curve_steps(100) == [1, 2, 5, 10, 20, 50, 64, 100]


def test_aggregate_of_closed_form(trained: Train) -> None:
    run, lam = linear(trained, "learned", None)
    found = figures(run, AggregateFit)
    ones = torch.ones(LATENT, dtype=torch.float64)
    torch.testing.assert_close(curve(found["aggregate_variance"]), ones, rtol=1e-4, atol=0)
    torch.testing.assert_close(curve(found["aggregate_spectrum"]), ones, rtol=1e-4, atol=0)
    assert number(found["aggregate_mean_norm"]) == pytest.approx(0, abs=1e-4)
    assert number(found["aggregate_kl_gaussian"]) == pytest.approx(0, abs=1e-5)
    for s in (1.0, 0.5):
        run, lam = linear(trained, "fixed", s)
        sigma: Any = run.model.sigma
        sigma.value.value.fill_(s)
        encoder: Any = run.model.encoder
        with torch.no_grad():
            encoder[1].bias.copy_(torch.tensor([3.0, 0, 0, 4, 0, 0]))
        found = figures(run, AggregateFit)
        sigma.value.value.fill_(1.0)
        variance = torch.where(lam[:LATENT].sqrt() > s, s * lam[:LATENT].sqrt(), s * s)
        torch.testing.assert_close(curve(found["aggregate_variance"]), variance, rtol=1e-4, atol=0)
        torch.testing.assert_close(curve(found["aggregate_spectrum"]), variance.sort(descending=True).values)
        assert number(found["aggregate_mean_norm"]) == pytest.approx(5, rel=1e-4)
        kl = (variance - 1 - variance.log()).sum() / 2 + 12.5
        assert number(found["aggregate_kl_gaussian"]) == pytest.approx(float(kl), rel=1e-4)


def test_aggregate_against_another_normal_and_of_a_point_mass(trained: Train) -> None:
    run = trained("experiment=linear_vae", "dataset.images=4000", "dataset.test=1000", "prior=scaled_normal")
    prior: Any = run.model.prior
    with torch.no_grad():
        prior.loc.copy_(torch.linspace(-1, 1, LATENT))
        prior.scale.raw.copy_(torch.linspace(-0.1, 0.05, LATENT))
    subject = MeasuredRun(run, BUDGET)
    codes = subject.codes("test")
    assert codes.scale is not None
    loc = codes.loc.double()
    matched = MultivariateNormal(loc.mean(0), loc.T.cov(correction=0) + codes.scale.double().square().mean(0).diag())
    with torch.no_grad():
        against = MultivariateNormal(prior.loc.double(), prior.scale().double().square().diag())
    found = compute_metrics(subject, [AggregateFit])["AggregateFit"]
    assert number(found["aggregate_kl_gaussian"]) == pytest.approx(float(kl_divergence(matched, against)), rel=1e-5)

    run, lam = linear(trained, "deterministic", 0.5)
    found = figures(run, AggregateFit)
    root = lam[:LATENT].sqrt()
    variance = 0.5 * (root - 0.5)
    torch.testing.assert_close(curve(found["aggregate_variance"]), variance, rtol=1e-4, atol=1e-9)
    kl = (variance - 1 - variance.log()).sum() / 2
    assert number(found["aggregate_kl_gaussian"]) == pytest.approx(float(kl), rel=1e-4)
    encoder: Any = run.model.encoder
    with torch.no_grad():
        encoder[1].weight[2] = encoder[1].weight[0] + encoder[1].weight[1]
    found = figures(run, AggregateFit)
    assert found["aggregate_kl_gaussian"].value is None
    assert "do not span" in found["aggregate_kl_gaussian"].reason
    assert found["aggregate_spectrum"].value is not None


def test_a_refitted_prior_gains_the_divergence_of_the_aggregate_from_the_prior(trained: Train) -> None:
    run, lam = linear(trained, "fixed", 1.0)
    variance = lam[:LATENT].sqrt().clamp_min(1)
    kl = float((variance - 1 - variance.log()).sum() / 2)
    found = figures(run, RefittedPrior)
    gain = found["elbo_gaussian_prior_gain"]
    assert isinstance(gain.error, float)
    assert number(gain) == pytest.approx(kl, abs=5 * gain.error)
    assert gain.error < 0.05 * kl
    assert number(found["elbo_mixture_prior_gain"]) == pytest.approx(kl, abs=5 * gain.error + 0.1)
    elbo = number(figures(run, Bound)["elbo"])
    assert number(found["elbo_gaussian_prior"]) - elbo == pytest.approx(number(gain), rel=1e-6)
    run, _ = linear(trained, "learned", None)
    found = figures(run, RefittedPrior)
    assert number(found["elbo_gaussian_prior_gain"]) == pytest.approx(0, abs=1e-3)  # the prior is the aggregate
    assert number(found["elbo_mixture_prior_gain"]) == pytest.approx(0, abs=0.1)


def test_the_expected_log_density_is_that_of_draws() -> None:
    torch.manual_seed(0)
    m, c, *_ = two_gaussians()
    loc, scale = torch.randn(6, len(m)), torch.rand(6, len(m)) + 0.1
    found = expected_log_density(m, c, Codes(loc, scale, loc, None, loc, None))
    draws = loc + scale * torch.randn(200_000, *loc.shape)
    values = MultivariateNormal(m, c).log_prob(draws.double())
    error = values.std(0) / math.sqrt(len(draws))
    assert ((found - values.mean(0)).abs() < 5 * error).all()


def test_a_mixture_gains_more_than_one_gaussian_on_clusters(trained: Train) -> None:
    """Codes in two clusters at +-9 along an axis: a mixture gains 81 / 2 - ln 2, a single Gaussian much less."""
    run, _ = linear(trained, "fixed", 1.0)
    encoder: Any = run.model.encoder

    class Clusters(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            loc = torch.zeros(len(x), LATENT)
            loc[:, 0] = 9 * x.flatten(1)[:, 0].sign()
            return loc

    run.model.encoder = Clusters()
    try:
        found = figures(run, RefittedPrior)
    finally:
        run.model.encoder = encoder
    # The loc of a code costs 81 / 2 nats under N(0, I), and ln 2 under the mixture, for the choice of its cluster.
    assert number(found["elbo_mixture_prior_gain"]) == pytest.approx(40.5 - math.log(2), abs=0.15)
    assert number(found["elbo_gaussian_prior_gain"]) == pytest.approx(0.5 * (82 - 1 - math.log(82)), abs=0.5)


def test_densities_of_refitted_priors_in_any_units() -> None:
    m, c, *_ = two_gaussians()
    units = torch.tensor([1e-4, 1, 30, 1e3, 1]).double()
    m, c = units * m, units * c * units[:, None]
    z = exact(2000, m, c, 0)
    truth = MultivariateNormal(m, c).log_prob(z)
    torch.testing.assert_close(gaussian(m, c).log_prob(z), truth)
    fitted = fit_mixture(z, 1)
    torch.testing.assert_close(fitted.log_prob(z), truth, rtol=1e-3, atol=0.02)  # its covariance is that over N
    two = fit_mixture(torch.cat([z, z + 100 * units]), 2)
    torch.testing.assert_close(two.log_prob(z), truth - math.log(2), rtol=1e-3, atol=0.02)
    flat = gaussian(m, torch.outer(units, units))  # of rank 1
    assert flat.log_prob(m[None]).isfinite()


MODES = [
    ["sigma=learned"],
    ["sigma=shared"],
    ["sigma=fixed"],
    ["sigma=deterministic"],
    ["sigma=fixed", "prior=scaled_normal", "latent=1"],
    ["likelihood=bernoulli", "likelihood.binarize=dynamic"],
    ["experiment=linear_vae", "dataset.images=4000", "dataset.test=1000", "sigma=shared"],
]
NEED_NOISE = {
    *("elbo", "iw_bound_k6", "iw_gap", "iw_growth", "iw_curve_k", "iw_curve", "effective_sample_size"),
    *("elbo_gaussian_prior", "elbo_gaussian_prior_gain", "elbo_mixture_prior", "elbo_mixture_prior_gain"),
}
NEED_LABELS = {*(f"{k}_{s}" for k in KINDS for s in SOURCES), "frechet_floor", "kid_floor", "feature_accuracy"}
ALWAYS = {"distortion", "aggregate_mean_norm", "aggregate_variance", "aggregate_spectrum", "aggregate_kl_gaussian"}


@pytest.mark.parametrize("overrides", MODES, ids=" ".join)
def test_every_mode_gives_finite_figures_or_reasons(trained: Train, overrides: list[str]) -> None:
    subject = MeasuredRun(trained(*overrides), SMALL)
    kinds: list[type[Metric]] = [Bound, AggregateFit, RefittedPrior, Quality]
    state = torch.get_rng_state()
    found = compute_metrics(subject, kinds)
    again = compute_metrics(subject, [Quality, Bound])
    assert torch.equal(state, torch.get_rng_state())
    assert all(found[name] == again[name] for name in again)
    every = {name: figure for group in found.values() for name, figure in group.items()}
    assert every.keys() == ALWAYS | NEED_NOISE | NEED_LABELS
    missing = (set() if subject.has_noise else NEED_NOISE) | (
        NEED_LABELS if subject.codes("test").labels is None else set()
    )
    missing |= {"iw_growth"}  # K = 6
    assert {name for name, figure in every.items() if figure.value is None} == missing
    for figure in every.values():
        as_plain(figure)  # refuses what is not finite
        assert (figure.value is None) == bool(figure.reason)
        assert figure.value is None or figure.count or figure.unit == "draws"
        assert all(math.isfinite(error) for error in ([figure.error] if isinstance(figure.error, float) else []))


@pytest.fixture(scope="module")
def digits(trained: Train) -> MeasuredRun:
    return MeasuredRun(trained("sigma=fixed"), SMALL)


def test_the_feature_net_is_accurate_and_disturbs_no_random_state(
    digits: MeasuredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "loaded_nets", {})
    state = torch.get_rng_state()
    with torch.no_grad():  # as metrics are computed
        net = feature_net(digits)
    assert torch.equal(state, torch.get_rng_state())
    assert net is not None
    assert not net.training
    assert net.accuracy > 0.97
    test = digits.splits.test
    x = test.batch(torch.arange(len(test)))
    assert net.features(x).shape == (len(test), 64)
    assert float((net.classes(x) == test.batch_labels(torch.arange(len(test)))).double().mean()) == net.accuracy
    assert net.classes(x).dtype == torch.int64
    torch.testing.assert_close(net.features(x[:3]), net.features(x)[:3])  # no statistics of the batch
    assert torch.equal(net.features(3 * x - 1), net.features((3 * x - 1).clamp(0, 1)))

    def refuse(*arguments: object) -> FeatureNet:
        raise AssertionError("trained again")

    monkeypatch.setattr(features, "loaded_nets", {})
    monkeypatch.setattr(features, "train_net", refuse)
    again = feature_net(digits)
    assert again is not None
    assert again is not net
    assert again.accuracy == net.accuracy
    assert torch.equal(again.features(x), net.features(x))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 128, 128), (1, 9, 40), (1, 1, 50)])
def test_a_feature_net_fits_images_of_any_size(shape: tuple[int, int, int]) -> None:
    net = FeatureNet(shape, 3).eval()
    assert net.features(torch.rand(4, *shape)).shape == (4, 64)
    assert net(torch.rand(4, *shape)).shape == (4, 3)
    assert sum(p.numel() for p in net.parameters()) < 500_000


@pytest.fixture
def quick(trained: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[MeasuredRun, list[int]]:
    """A subject whose feature net is not trained yet but trains quickly; the list gets an entry per training."""
    trainings = []
    train = features.train_net

    def counted(*arguments: Any) -> FeatureNet:
        trainings.append(1)
        return train(*arguments)

    monkeypatch.setattr(features, "loaded_nets", {})
    monkeypatch.setattr(features, "IMAGES_SHOWN", 1)
    monkeypatch.setattr(features, "train_net", counted)
    run = trained("sigma=fixed")
    monkeypatch.setitem(run.config, "data_dir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VAE_DATA_DIR", raising=False)
    return MeasuredRun(run, SMALL), trainings


def test_the_feature_net_is_stored_in_the_cache_if_the_data_folder_is_read_only(
    quick: tuple[MeasuredRun, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, trainings = quick
    (tmp_path / "features").write_text("no folder")
    assert feature_net(subject) is not None
    assert len(list((tmp_path / "cache").rglob("net.pt"))) == 1
    monkeypatch.setattr(features, "loaded_nets", {})  # as in a new process
    assert feature_net(subject) is not None
    assert len(trainings) == 1


def test_the_feature_net_stays_in_memory_if_nothing_can_be_written(
    quick: tuple[MeasuredRun, list[int]], tmp_path: Path
) -> None:
    subject, trainings = quick
    (tmp_path / "features").write_text("no folder")
    (tmp_path / "cache" / "vae").mkdir(parents=True)
    (tmp_path / "cache" / "vae" / "features").write_text("no folder either")
    net = feature_net(subject)
    assert net is not None
    assert feature_net(subject) is net
    assert len(trainings) == 1


@pytest.mark.parametrize("damage", ["cut short", "another net", "another checkpoint"])
def test_a_damaged_feature_net_is_trained_again(
    quick: tuple[MeasuredRun, list[int]], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject, trainings = quick
    assert feature_net(subject) is not None
    assert not caplog.records
    (file,) = tmp_path.glob("features/*/net.pt")
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "another net":
        net = FeatureNet((1, 8, 8), 3).state_dict()
        save_checkpoint(file, {"step": 0, "shape": [1, 8, 8], "accuracy": 1.0, "model": net})
    else:
        save_checkpoint(file, {"step": 0, "shape": [1, 8, 8], "model": {}})
    features.loaded_nets.clear()
    assert feature_net(subject) is not None
    assert "trained again" in caplog.text
    features.loaded_nets.clear()
    assert feature_net(subject) is not None
    assert len(trainings) == 2


def test_processes_that_start_together_train_the_feature_net_once(quick: tuple[MeasuredRun, list[int]]) -> None:
    subject, trainings = quick
    threads = [threading.Thread(target=feature_net, args=(subject,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trainings) == 1


def test_no_feature_net_without_labels(trained: Train) -> None:
    run = trained("experiment=linear_vae", "dataset.images=4000", "dataset.test=1000", "sigma=shared")
    assert feature_net(MeasuredRun(run, SMALL)) is None


def exact(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Points with exactly this mean and covariance."""
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise - noise.mean(0)
    noise = torch.linalg.solve_triangular(torch.linalg.cholesky(noise.T.cov()), noise.T, upper=False).T
    return noise @ torch.linalg.cholesky(covariance).T + mean


def two_gaussians(size: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    a, b = torch.randn(2, size, size, dtype=torch.float64)
    return torch.randn(size).double(), a @ a.T + 0.1 * torch.eye(size), torch.randn(size).double(), b @ b.T


def test_frechet_distance_of_two_gaussians() -> None:
    from scipy.linalg import sqrtm

    m1, c1, m2, c2 = two_gaussians()
    truth = float((m1 - m2).square().sum() + (c1 + c2).trace()) - 2 * sqrtm((c1 @ c2).numpy()).trace().real
    assert frechet(exact(100, m1, c1, 0), exact(80, m2, c2, 1)) == pytest.approx(truth, rel=1e-9)
    drawn = [MultivariateNormal(m, c).sample((200_000,)) for m, c in ((m1, c1), (m2, c2))]
    assert frechet(*drawn) == pytest.approx(truth, rel=0.01)
    scales = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    corners = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(5 / 2)  # of covariance I
    assert frechet(corners * scales[0], corners * scales[1] + 1) == pytest.approx(4 + 2.25 + 1 + 3)
    assert frechet(drawn[0], drawn[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 8

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    torch.manual_seed(0)
    a, b = torch.rand(300, 8, 1, 1), torch.rand(200, 8, 1, 1).square()
    theirs = fid.FrechetInceptionDistance(feature=Flat(), normalize=False)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet(a.flatten(1).double(), b.flatten(1).double()) == pytest.approx(float(theirs.compute()), rel=1e-4)


def shares(made: Tensor, real: Tensor) -> dict[str, float]:
    return {kind: float(value.double().mean()) for kind, value in neighborhoods(made, real, Balls(real)).items()}


def test_neighborhoods_of_equal_and_of_disjoint_sets() -> None:
    torch.manual_seed(0)
    points = torch.randn(600, 8).double()
    # Each ball holds its center and 5 neighbors.
    assert shares(points, points) == pytest.approx({"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1})
    far = points + 1000
    assert shares(far, points) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # The decoded images cover half of the real ones.
    found = shares(points, torch.cat([points, far]))
    assert found == pytest.approx({"precision": 1, "recall": 0.5, "density": 6 / 5, "coverage": 0.5})
    # The same image every time.
    found = shares(points[:1].expand(600, -1), points)
    assert found["precision"] == 1
    assert found["recall"] == 1 / 600
    # Equal distributions.
    found = shares(torch.randn(600, 8).double(), points)
    assert found["density"] == pytest.approx(1, abs=0.12)
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)


def test_neighborhoods_match_their_definition() -> None:
    torch.manual_seed(1)
    made, real = torch.randn(300, 3).double(), 0.7 * torch.randn(280, 3).double() + 0.5

    def radius(points: Tensor, k: int) -> list[float]:
        return [sorted((points - point).norm(dim=1).tolist())[k] for point in points]

    def within(points: Tensor, centers: Tensor, radii: list[float]) -> Tensor:
        return torch.stack([(points - c).norm(dim=1) <= r for c, r in zip(centers, radii, strict=True)], 1).double()

    expected = {
        "precision": float(within(made, real, radius(real, 3)).amax(1).mean()),
        "recall": float(within(real, made, radius(made, 3)).amax(1).mean()),
        "density": float(within(made, real, radius(real, 5)).sum(1).mean()) / 5,
        "coverage": float(within(made, real, radius(real, 5)).amax(0).mean()),
    }
    assert shares(made, real) == pytest.approx(expected)


def test_the_kernel_distance_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 3).double(), torch.randn(5, 3).double() + 0.5

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def mean(pairs: list[float]) -> float:
        return sum(pairs) / len(pairs)

    within = [mean([kernel(x, y) for x, y in permutations(points, 2)]) for points in (a, b)]
    across = mean([kernel(x, y) for x in a for y in b])
    assert number(kid(a, b)) == pytest.approx(sum(within) - 2 * across)


def test_the_kernel_distance_is_unbiased_and_the_frechet_distance_is_not() -> None:
    torch.manual_seed(0)
    found = [kid(torch.randn(60, 8).double(), torch.randn(60, 8).double()) for _ in range(300)]
    values, errors = (torch.tensor([getattr(figure, key) for figure in found]) for key in ("value", "error"))
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(300)
    apart = [kid(torch.randn(60, 8).double(), torch.randn(60, 8).double() + 0.4) for _ in range(300)]
    values, errors = (torch.tensor([getattr(figure, key) for figure in apart]) for key in ("value", "error"))
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.25)
    assert frechet(torch.randn(60, 8).double(), torch.randn(60, 8).double()) > 0.3


def test_the_bound_grows_from_64_draws(trained: Train) -> None:
    run, _ = linear(trained, "fixed", 1.0)
    found = figures(run, Bound, dataclasses.replace(BUDGET, samples=500, iw_images=50))
    rise = curve(found["iw_curve"])
    ladder = curve(found["iw_curve_k"]).tolist()
    assert number(found["iw_growth"]) == pytest.approx(float(rise[-1] - rise[ladder.index(64)]), abs=1e-9)
    assert number(found["iw_growth"]) > 0
    assert "only 64 draws" in figures(run, Bound)["iw_growth"].reason


def test_quality_of_a_perfect_decoder(digits: MeasuredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are images and the decoder is the identity: reconstructions equal the test images, and codes drawn from a
    mixture fitted to training images decode to better images than codes drawn from the prior."""
    from types import SimpleNamespace

    splits, model = digits.splits, digits.model
    monkeypatch.setattr(model, "encode", lambda x: SimpleNamespace(mean=x.flatten(1), rsample=lambda: x.flatten(1)))
    monkeypatch.setattr(model, "decode", lambda z: SimpleNamespace(mean=z.unflatten(1, (1, 8, 8))))
    monkeypatch.setattr(MeasuredRun, "has_noise", False)
    monkeypatch.setattr("vae_cli.metrics.quality.prior_codes", lambda run, count: torch.rand(count, 64))
    found = figures(digits.run, Quality, dataclasses.replace(SMALL, images=200, train_images=1000, pictures=200))
    assert number(found["frechet_reconstructions"]) == pytest.approx(0, abs=1e-6)
    for kind in ("precision", "recall", "coverage"):
        assert number(found[f"{kind}_reconstructions"]) == 1
    assert number(found["density_reconstructions"]) == pytest.approx(1.2)
    floor = number(found["frechet_floor"])
    assert 0 < floor < number(found["frechet_mixture"]) < number(found["frechet_prior"])
    assert number(found["precision_prior"]) < number(found["precision_mixture"])
    assert number(found["coverage_prior"]) < number(found["coverage_mixture"])
    assert found["frechet_prior"].count == found["frechet_floor"].count == 200
    assert found["feature_accuracy"].count == len(splits.test)
    few = figures(digits.run, Quality, dataclasses.replace(SMALL, pictures=5))
    assert all(figure.reason for figure in few.values())
