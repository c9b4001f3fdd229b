"""The regularizers that compare the codes of a batch, against closed forms and against all images at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, MultivariateNormal, Normal

from vae_cli.axes.regularizer import DIP, KL, MMD, Regularizer, TotalCorrelation
from vae_cli.axes.schedule import Linear
from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.config.build import build_experiment, check_config
from vae_cli.config.claims import FIGURES
from vae_cli.config.instantiate import build
from vae_cli.config.objective import NAMES, PARTS
from vae_cli.core.errors import UserError
from vae_cli.model import aggregate
from vae_cli.model.aggregate import NormalDensities, Similarity, covariance, log_densities, mean_discrepancy
from vae_cli.model.distributions import Delta
from vae_cli.model.inference import Inference
from vae_cli.model.loss import loss_and_terms
from vae_cli.model.scales import Standard, diagonal_normal
from vae_cli.runs.folder import RunDir
from vae_cli.training.validation import evaluate_split

Compose = Callable[..., dict[str, Any]]

PAIRING = ["mmd", "total_correlation", "dip"]
KERNELS = ["imq", "rbf"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def standard(dimensions: int, dtype: torch.dtype = torch.float32) -> Distribution:
    zeros, ones = torch.zeros(dimensions, dtype=dtype), torch.ones(dimensions, dtype=dtype)
    return Standard(zeros, ones)


def normals(images: int, dimensions: int, dtype: torch.dtype = torch.float64) -> Distribution:
    """Return posteriors of different locations and scales."""
    loc = torch.randn(images, dimensions, dtype=dtype)
    return diagonal_normal(loc, (0.4 * torch.randn(images, dimensions, dtype=dtype) - 0.5).exp())


def inferred(posterior: Distribution, prior: Distribution | None = None, z: Tensor | None = None) -> Inference:
    """Return the result of a forward pass of a model whose images and pixels do not matter."""
    loc = posterior.mean
    unused = torch.zeros(len(loc), 1, 1, 1, dtype=loc.dtype)
    z = posterior.rsample() if z is None else z
    likelihood = Independent(Normal(unused, 1.0, validate_args=False), 3)
    return Inference(unused, posterior, z, prior or standard(loc.shape[1], loc.dtype), likelihood)


def rows(posterior: Distribution, chosen: Sequence[int]) -> Distribution:
    """Return the posteriors of some images."""
    base: Any = posterior.base_dist  # type: ignore[attr-defined]
    given = {name: getattr(base, name)[list(chosen)] for name in base.arg_constraints}
    return Independent(type(base)(**given), 1)


# Densities of the aggregate posterior ---------------------------------------------------------------------------------


def laplaces(images: int, dimensions: int) -> Distribution:
    base: Any = normals(images, dimensions).base_dist  # type: ignore[attr-defined]
    return Independent(Laplace(base.loc, base.scale), 1)


@pytest.mark.parametrize("family", [normals, laplaces])
@pytest.mark.parametrize("batch", [2, 3, 5, 6])
def test_the_estimated_density_is_unbiased(family: Callable[..., Distribution], batch: int) -> None:
    """Its mean over all batches that contain an image is q(z) of all N images, exactly, in each dimension, too."""
    images = 6
    posterior = family(images, 3)
    z = posterior.sample()
    log_q = posterior.base_dist.log_prob(z[:, None])  # type: ignore[attr-defined]
    exact, exact_single = log_q.sum(-1).exp().mean(1), log_q.exp().mean(1)
    whole, single = torch.zeros_like(exact), torch.zeros_like(exact_single)
    for chosen in combinations(range(images), batch):
        found, each = log_densities(rows(posterior, chosen), z[list(chosen)], images)
        whole[list(chosen)] += found.exp()
        single[list(chosen)] += each.exp()
    batches = math.comb(images - 1, batch - 1)  # that contain a given image
    torch.testing.assert_close(whole / batches, exact, rtol=1e-10, atol=0)
    torch.testing.assert_close(single / batches, exact_single, rtol=1e-10, atol=0)


def test_the_image_of_a_code_has_the_weight_of_one_image() -> None:
    """The posteriors are so narrow that only a code's own image contributes to its density."""
    posterior = diagonal_normal(torch.arange(4.0)[:, None].expand(4, 2) * 1000, torch.ones(4, 2))
    z = posterior.rsample()
    own = posterior.log_prob(z)
    for images in (4, 100, 60_000):
        joint, single = log_densities(posterior, z, images)
        torch.testing.assert_close(joint, own - math.log(images))
        torch.testing.assert_close(single.sum(-1), own - 2 * math.log(images))


def test_one_image_and_more_images_in_a_batch_than_in_training() -> None:
    posterior = normals(5, 2)
    z = posterior.rsample()
    for chosen, images in (([2], 100), ([2], 1), ([0, 1, 2, 3, 4], 1)):
        some = rows(posterior, chosen)
        joint, single = log_densities(some, z[chosen], images)
        torch.testing.assert_close(joint, some.log_prob(z[chosen]))
        torch.testing.assert_close(single.sum(-1), some.log_prob(z[chosen]))
    joint, _ = log_densities(posterior, z, 3)
    assert joint.isfinite().all()


def test_several_draws_per_image_are_as_many_batches() -> None:
    posterior = normals(5, 2)
    z = posterior.rsample(torch.Size([3, 2]))
    joint, single = log_densities(posterior, z, 50)
    for i, k in ((0, 0), (2, 1)):
        torch.testing.assert_close(joint[i, k], log_densities(posterior, z[i, k], 50)[0])
        torch.testing.assert_close(single[i, k], log_densities(posterior, z[i, k], 50)[1])


def test_the_densities_of_normals_have_the_values_and_gradients_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior: Any = normals(4, 3)
    loc, scale = posterior.mean.requires_grad_(), posterior.stddev.requires_grad_()
    z = posterior.sample().requires_grad_()
    weights = torch.randn(4, 4, dtype=torch.float64).log_softmax(1)
    log_q = Normal(loc, scale).log_prob(z[:, None])
    for numbers in (1, 40, 1 << 18):  # one dimension, two or all of them at a time
        monkeypatch.setattr(aggregate, "NUMBERS_IN_CACHE", numbers)
        product, sums = NormalDensities.apply(z, loc, scale, weights)
        torch.testing.assert_close(product, log_q.sum(-1))
        torch.testing.assert_close(sums, (log_q + weights[..., None]).logsumexp(1))
        assert torch.autograd.gradcheck(NormalDensities.apply, (z, loc, scale, weights))


def test_a_posterior_that_is_no_product_over_dimensions_is_refused() -> None:
    posterior = MultivariateNormal(torch.zeros(4, 2), torch.eye(2))
    with pytest.raises(UserError, match=r"MultivariateNormal is not\. Type sigma=learned, or regularizer=kl"):
        log_densities(posterior, posterior.sample())


# Total correlation ----------------------------------------------------------------------------------------------------


def test_the_total_correlation_of_a_gaussian_is_that_of_its_correlation_matrix() -> None:
    """-1/2 ln det of the correlations, if the codes of all images are normally distributed."""
    cov = torch.tensor([[1.5, 0.9, 0.2], [0.9, 1.0, 0.4], [0.2, 0.4, 0.8]])
    noise = 0.1
    loc = MultivariateNormal(torch.zeros(3), cov - noise * torch.eye(3)).sample((4000,))
    posterior = diagonal_normal(loc, torch.full((4000, 3), noise**0.5))
    regularizer = TotalCorrelation()
    regularizer.start(4000)
    inference = inferred(posterior)
    regularizer(inference)
    spread = cov.diagonal().sqrt()
    exact = -0.5 * torch.logdet(cov / spread / spread[:, None])
    found = inference.parts["total_correlation"]
    error = found.std() / len(found) ** 0.5
    assert abs(float(found.mean() - exact)) < 4 * float(error) + 0.02
    assert float(exact) > 0.5
    information = 0.5 * torch.logdet(cov / noise)
    found = inference.parts["index_code_mi"]
    assert abs(float(found.mean() - information)) < 4 * float(found.std()) / len(found) ** 0.5 + 0.02
    dimension = 0.5 * (cov.diagonal() - 1 - cov.diagonal().log()).sum()
    found = inference.parts["dimension_kl"]
    assert abs(float(found.mean() - dimension)) < 4 * float(found.std()) / len(found) ** 0.5 + 0.02


def test_the_parts_add_up_to_the_rate_and_equal_weights_give_the_kl() -> None:
    posterior = normals(50, 4)
    for weight in (1.0, 0.5):
        inference = inferred(posterior, diagonal_normal(torch.full((4,), 0.3).double(), torch.full((4,), 1.3).double()))
        penalty = TotalCorrelation(weight, weight, weight)(inference)
        torch.testing.assert_close(torch.stack([*inference.parts.values()]).sum(0), inference.rate)
        torch.testing.assert_close(penalty, KL(weight)(inference))
    parts = {name: float(part.mean()) for name, part in inference.parts.items()}
    expected = 2 * parts["index_code_mi"] + 3 * parts["total_correlation"] + 5 * parts["dimension_kl"]
    assert float(TotalCorrelation(2.0, 3.0, 5.0)(inference).mean()) == pytest.approx(expected)


def test_the_parts_are_the_means_over_all_images() -> None:
    """With the whole training set as the batch, MI <= ln N, and the dimension-wise KL is the one of the marginals."""
    posterior = normals(6, 2)
    inference = inferred(posterior, z=posterior.rsample(torch.Size([40_000])))
    TotalCorrelation()(inference)
    edges = torch.linspace(-12, 12, 8001, dtype=torch.float64)
    q = posterior.base_dist.log_prob(edges[:, None, None]).exp().mean(1)  # type: ignore[attr-defined]
    p = Normal(0.0, 1.0).log_prob(edges)[:, None]
    exact = (q * (q.clamp_min(1e-300).log() - p)).sum() * (edges[1] - edges[0])
    assert float(inference.parts["dimension_kl"].mean()) == pytest.approx(float(exact), abs=0.02)
    assert 0 < float(inference.parts["index_code_mi"].mean()) < math.log(6)


def test_validation_counts_as_many_images_as_training(compose: Compose) -> None:
    experiment = build_experiment(compose("regularizer=total_correlation", "latent=3", "epochs=1"))
    found: Any = experiment.regularizer
    assert found.images == len(experiment.splits.train)


def test_a_weight_on_the_dimension_wise_kl_is_needed_to_learn_a_prior(compose: Compose) -> None:
    check_config(compose("regularizer=total_correlation", "prior=scaled_normal"))
    with pytest.raises(UserError, match="would not train the prior's parameters; type prior=standard_normal"):
        check_config(compose("regularizer=total_correlation", "prior=scaled_normal", "regularizer.gamma=0"))
    check_config(compose("regularizer=total_correlation", "regularizer.gamma=0"))
    with pytest.raises(UserError, match=r"total_correlation .* prior=mixture: a dimension-wise KL needs a prior"):
        check_config(compose("regularizer=total_correlation", "prior=mixture"))
    with pytest.raises(UserError, match=r"total_correlation .* sigma=deterministic: the mutual information"):
        check_config(compose("regularizer=total_correlation", "sigma=deterministic"))


# Maximum mean discrepancy ---------------------------------------------------------------------------------------------


def kernel_of(name: str, one: Tensor, other: Tensor, widths: Sequence[float]) -> Tensor:
    distance = (one[:, None] - other).square().sum(-1)
    if name == "imq":
        return torch.stack([width / (width + distance) for width in widths]).sum(0)
    return torch.stack([(-distance / width).exp() for width in widths]).sum(0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mmd_is_the_u_statistic_of_its_definition(kernel: Any) -> None:
    prior = diagonal_normal(torch.full((3,), 0.5).double(), torch.tensor([0.5, 1.0, 2.0]).double())
    z, scales = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0.1, 1.0, 10.0]).double()
    torch.manual_seed(1)
    found = mean_discrepancy(z, prior, kernel, scales)
    torch.manual_seed(1)
    y = prior.sample(torch.Size([8]))
    widths = [float(t) * 2 * (0.25 + 1 + 4) for t in scales]
    expected = 0.0
    for i in range(8):
        for j in range(8):
            if i != j:
                expected += (
                    float(kernel_of(kernel, z[[i]], z[[j]], widths) + kernel_of(kernel, y[[i]], y[[j]], widths)) / 56
                )
            expected -= 2 * float(kernel_of(kernel, z[[i]], y[[j]], widths)) / 64
    assert float(found) == pytest.approx(expected, rel=1e-10)
    assert float(mean_discrepancy(z.expand(4, 8, 3), prior, kernel, scales)) != float(found)  # other draws of the prior


def gaussian_kernel_mean(difference: Tensor, variance: float, width: float) -> float:
    """Return E exp(-|d|^2 / width) for d ~ N(difference, variance * I)."""
    ratio = 1 + 2 * variance / width
    return float(ratio ** (-len(difference) / 2) * math.exp(-float(difference.square().sum()) / (width * ratio)))


def test_the_mmd_of_gaussians_is_their_closed_form_on_average() -> None:
    """q = N(m, s^2 I), p = N(0, I); an inverse multiquadratic is the integral of w e^(-u w) e^(-u d^2) over u."""
    m, s, scales = torch.tensor([0.6, -0.3]), 0.7, [0.5, 2.0]
    zero = torch.zeros(2)

    def exact(width: float) -> float:
        means = [gaussian_kernel_mean(*pair, width) for pair in ((zero, 2 * s * s), (m, s * s + 1), (zero, 2.0))]
        return means[0] - 2 * means[1] + means[2]

    u = (torch.arange(4000) + 0.5) / 4000 * 12
    expected = {
        "rbf": sum(exact(4 * t) for t in scales),
        "imq": sum(float(sum(exact(4 * t / float(x)) * math.exp(-x) for x in u)) * 12 / 4000 for t in scales),
    }
    for kernel in ("rbf", "imq"):
        torch.manual_seed(0)
        codes = m + s * torch.randn(1500, 10, 2)
        found = torch.stack([mean_discrepancy(z, standard(2), kernel, torch.tensor(scales)) for z in codes])  # type: ignore[arg-type]
        assert abs(float(found.mean()) - expected[kernel]) < 4 * float(found.std()) / len(found) ** 0.5
        assert expected[kernel] > 4 * float(found.std()) / len(found) ** 0.5  # so it is not 0 by chance
        draws = torch.randn(1500, 10, 2)
        found = torch.stack([mean_discrepancy(z, standard(2), kernel, torch.tensor(scales)) for z in draws])  # type: ignore[arg-type]
        assert abs(float(found.mean())) < 4 * float(found.std()) / len(found) ** 0.5
        assert float(found.min()) < 0  # unbiased


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_a_kernel_is_that_of_its_formula(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    distance = (3 * torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    widths = torch.tensor([0.3, 2.0, 5.0]).double()
    for numbers in (1, 1 << 18):
        monkeypatch.setattr(aggregate, "NUMBERS_IN_CACHE", numbers)
        assert torch.autograd.gradcheck(lambda d: Similarity.apply(d, widths, kernel), (distance,))


def test_the_mmd_does_not_depend_on_the_unit_of_the_code() -> None:
    z = torch.randn(20, 3)
    found = []
    for unit in (1.0, 100.0):
        torch.manual_seed(0)
        prior = diagonal_normal(torch.zeros(3), torch.full((3,), unit))
        found.append(mean_discrepancy(unit * z, prior, "imq", torch.tensor([0.1, 1.0])))
    torch.testing.assert_close(*found)


def test_a_prior_without_a_variance_uses_that_of_its_draws() -> None:
    class NoVariance(Normal):
        @property
        def variance(self) -> Tensor:
            raise NotImplementedError

    prior = Independent(NoVariance(torch.zeros(3), torch.ones(3)), 1)
    scales = torch.tensor([1.0])
    with_variance, without = (mean_discrepancy(torch.ones(2000, 3), p, "rbf", scales) for p in (standard(3), prior))
    torch.testing.assert_close(with_variance, without, rtol=0.1, atol=0)


@pytest.mark.parametrize("sigma", [sigma for sigma in catalog.groups()["sigma"].choices if sigma != "power_spherical"])
def test_without_a_kl_term_mmd_does_not_learn_a_prior(compose: Compose, sigma: str) -> None:
    check_config(compose("regularizer=mmd", f"sigma={sigma}"))
    for prior in ("scaled_normal", "mixture"):
        with pytest.raises(UserError, match=f"prior={prior}"):
            check_config(compose("regularizer=mmd", f"sigma={sigma}", f"prior={prior}"))
        if sigma != "deterministic":
            check_config(compose("regularizer=mmd", f"sigma={sigma}", f"prior={prior}", "regularizer.beta=0.5"))
    warm = MMD(beta=Linear(0.0, 1.0, 10))
    assert warm.needs == ()


def test_a_weight_of_0_does_not_compute_the_divergence() -> None:
    """The energy of codes far from the prior overflows, and 0 times infinity is NaN."""
    for regularizer in (MMD(), DIP(beta=0.0)):
        inference = inferred(Delta(torch.full((4, 2), 1e30)))
        regularizer(inference)
        assert "kl" not in vars(inference)
        assert not inference.kl.isfinite().any()


def test_the_loss_of_infovae_is_a_choice_of_weights() -> None:
    """(1 - alpha) KL + (alpha + lambda - 1) MMD^2."""
    alpha, lam = 0.3, 20.0
    posterior = normals(10, 2, torch.float32)
    inference = inferred(posterior)
    torch.manual_seed(0)
    found = MMD(weight=alpha + lam - 1, beta=1 - alpha, kernel="rbf", scales=[1.0])(inference)
    torch.manual_seed(0)
    mmd = mean_discrepancy(inference.z, inference.prior, "rbf", torch.tensor([1.0]))
    torch.testing.assert_close(found, (1 - alpha) * inference.kl + (alpha + lam - 1) * mmd)


def test_mmd_needs_a_width() -> None:
    with pytest.raises(UserError, match=r"regularizer.scales=\[\] is not allowed"):
        MMD(scales=[])


# DIP-VAE --------------------------------------------------------------------------------------------------------------


def test_dip_penalizes_the_covariance_of_the_codes() -> None:
    loc, noise = torch.randn(30, 3) @ torch.randn(3, 3), 0.4 * torch.rand(30, 3) + 0.1
    posterior = diagonal_normal(loc, noise)
    for version in ("I", "II"):
        cov = torch.cov(loc.T)
        if version == "II":
            cov = cov + noise.square().mean(0).diag()
        off = sum(float(cov[i, j]) ** 2 for i in range(3) for j in range(3) if i != j)
        away = sum((float(cov[i, i]) - 1) ** 2 for i in range(3))
        inference = inferred(posterior)
        penalty = DIP(version, lambda_od=2.0, lambda_d=3.0, beta=0.5)(inference)  # type: ignore[arg-type]
        torch.testing.assert_close(penalty, 0.5 * inference.kl + 2 * off + 3 * away)
        assert float(inference.parts["dip_off_diagonal"]) == pytest.approx(off, rel=1e-4)
        assert float(inference.parts["dip_diagonal"]) == pytest.approx(away, rel=1e-4)


def test_the_versions_of_dip_are_equal_for_a_point_mass() -> None:
    point = Delta(torch.randn(20, 3))
    found = [DIP(version)(inferred(point)) for version in ("I", "II")]  # type: ignore[arg-type]
    assert torch.equal(*found)
    assert found[0].isfinite().all()
    torch.testing.assert_close(DIP(lambda_od=0.0, lambda_d=0.0)(inferred(point)), KL()(inferred(point)))


def test_white_codes_cost_nothing() -> None:
    loc = torch.randn(500, 4, dtype=torch.float64)
    loc = loc - loc.mean(0)
    white = loc @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(loc.T))).mT
    inference = inferred(diagonal_normal(white, torch.ones(500, 4).double()))
    torch.testing.assert_close(covariance(white), torch.eye(4).double())
    DIP("I")(inference)
    assert all(float(part) < 1e-20 for part in inference.parts.values())
    inference = inferred(diagonal_normal(white * 0.6, torch.full((500, 4), 0.8, dtype=torch.float64)))
    DIP("II")(inference)
    assert all(float(part) < 1e-20 for part in inference.parts.values())


def test_dip_takes_the_covariance_of_a_posterior_with_correlated_noise() -> None:
    noise = torch.tensor([[0.5, 0.2], [0.2, 0.3]])
    loc = torch.randn(40, 2)
    inference = inferred(MultivariateNormal(loc, noise), MultivariateNormal(torch.zeros(2), torch.eye(2)))
    DIP("II")(inference)
    cov = torch.cov(loc.T) + noise
    assert float(inference.parts["dip_off_diagonal"]) == pytest.approx(2 * float(cov[0, 1]) ** 2, rel=1e-4)


# What all of them have in common --------------------------------------------------------------------------------------


def built(compose: Compose, choice: str, *words: str) -> Regularizer:
    regularizer: Regularizer = build(
        compose(f"regularizer={choice}", *words)["regularizer"], "regularizer", Regularizer
    )
    return regularizer


@pytest.mark.parametrize("choice", PAIRING)
def test_a_batch_of_one_image_has_a_defined_penalty(compose: Compose, choice: str) -> None:
    regularizer = built(compose, choice, *(["regularizer.beta=1"] if choice == "mmd" else []))
    regularizer.start(1000)
    posterior = normals(1, 3, torch.float32)
    loc = posterior.mean.requires_grad_()
    inference = inferred(diagonal_normal(loc, posterior.stddev))
    penalty = regularizer(inference)
    torch.testing.assert_close(penalty, inference.kl)
    penalty.sum().backward()
    torch.testing.assert_close(loc.grad, loc.detach())


@pytest.mark.parametrize("choice", PAIRING)
def test_batches_of_one_image_are_refused(compose: Compose, choice: str) -> None:
    with pytest.raises(UserError, match=f"regularizer={choice} .* batch_size=1 is not allowed; type batch_size=2"):
        check_config(compose(f"regularizer={choice}", "batch_size=1"))
    check_config(compose(f"regularizer={choice}", "batch_size=2"))


@pytest.mark.parametrize("choice", list(catalog.groups()["regularizer"].choices))
def test_the_parts_that_a_regularizer_names_are_terms_of_the_loss(compose: Compose, choice: str) -> None:
    experiment = build_experiment(compose(f"regularizer={choice}", "network.hidden=[8]", "latent=3"))
    x = experiment.splits.train.batch(torch.arange(12))
    _, terms = loss_and_terms(experiment.model, experiment.regularizer, x)
    extra = [name for name in terms if name in PARTS]
    assert tuple(extra) == experiment.regularizer.parts
    assert {name for name in terms if name not in PARTS} == {
        *("loss", "distortion", "penalty", "rate", "rate_loc"),  # with_derived adds rate_scale and elbo
    }
    assert all(term.shape == (12,) and not term.requires_grad for term in terms.values())
    measured = evaluate_split(experiment.model, experiment.regularizer, experiment.splits.test, 0, experiment.device)
    assert measured.keys() >= set(extra)
    assert {f"{split}/{name}" for split in ("train", "validation", "test") for name in extra} <= set(NAMES)
    assert set(extra) <= {figure.name for figure in FIGURES}


@pytest.mark.parametrize("choice", PAIRING)
def test_the_order_of_the_images_in_a_batch_does_not_matter(compose: Compose, choice: str) -> None:
    regularizer = built(compose, choice)
    regularizer.start(100)
    posterior = normals(20, 3, torch.float32)
    z, order = posterior.sample(), torch.randperm(20)
    penalties = []
    for chosen in (torch.arange(20), order):
        torch.manual_seed(0)
        penalties.append(regularizer(inferred(rows(posterior, chosen.tolist()), z=z[chosen])))
    torch.testing.assert_close(penalties[0][order], penalties[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", PAIRING)
def test_no_step_reads_a_value_of_a_tensor(compose: Compose, choice: str) -> None:
    """Tensors on `meta` have no values, so a step that depends on one, which no CUDA graph can contain, fails."""
    regularizer = built(compose, choice).to("meta")
    regularizer.start(100)
    with torch.device("meta"):
        loc = torch.zeros(16, 3, requires_grad=True)
        penalty = regularizer(inferred(diagonal_normal(loc, torch.ones(16, 3))))
        penalty.mean().backward()
    assert penalty.shape == (16,)
    assert loc.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("choice", PAIRING)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"regularizer={choice}", "network.hidden=[16]", "latent=3", "batch_size=433"]  # the last batch: 1 image
    train([*words, "epochs=4", "run_name=whole"])
    train([*words, "epochs=2", "run_name=parts"])
    train([*words, "epochs=4", "run_name=parts"])
    whole, parts = (RunDir(Path("runs") / name) for name in ("whole", "parts"))
    for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    weights = [torch.load(folder.checkpoint_file, weights_only=True)["model"] for folder in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    names = {name for record in whole.metrics() for name in record}
    parts_of = {"mmd": MMD.parts, "total_correlation": TotalCorrelation.parts, "dip": DIP.parts}[choice]
    assert {f"{split}/{name}" for split in ("train", "validation") for name in parts_of} <= names
    assert set(parts_of) <= whole.summary()["test"].keys()
