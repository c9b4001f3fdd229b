"""Codes from a file: closed forms, the figures of a run from its exported codes, and messages for wrong input."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vae_cli import load_run
from vae_cli.axes.dataset import Split
from vae_cli.axes.likelihood import Gaussian
from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import BUDGETS, Figure, MeasuredRun, Metric, compute_metrics
from vae_cli.metrics.evaluate import USUAL
from vae_cli.metrics.information import AggregateDensity, MutualInformation, Rate, SignalToNoise, log_aggregate
from vae_cli.metrics.neighbours import Jacobian, NeighbourLabels
from vae_cli.metrics.price import RefittedPrior
from vae_cli.metrics.scale_factor import ScaleFactor, standardization
from vae_cli.metrics.scales import PullOverTraining
from vae_cli.metrics.shortcuts import Collapse, Probes, Reidentification
from vae_cli.metrics.stored_codes import CodesRun, CodeTable, image_keys
from vae_cli.runs.codes_file import read_codes
from vae_cli.runs.export_codes import codes_of, export_codes

QUICK = BUDGETS["quick"]
RECORDED = {"loc_std_growth", "training_epochs", "training_rate_scale", "training_rate_loc", "training_scale_mean"} | {
    "training_loc_std"
}  # figures of a run's training, which a file of codes knows nothing about
Arrays = dict[str, Any]


def measured(file: Path, seed: int = 0, decoder: Any = None, budget: Any = QUICK) -> MeasuredRun:
    """Return the codes in a file as a run to measure."""
    run: Any = CodesRun(read_codes(file), torch.device("cpu"), seed, decoder)
    return MeasuredRun(run, budget, seed)


def figures(subject: MeasuredRun, kind: type[Metric]) -> dict[str, Figure]:
    return compute_metrics(subject, [kind])[kind.__name__]


def number(figure: Figure) -> float:
    assert isinstance(figure.value, float), figure
    return figure.value


def near(figure: Figure, expected: float, bias: float = 0.0) -> None:
    """Assert that a figure is within four of its own standard errors of the expected value."""
    assert isinstance(figure.error, float), figure
    assert abs(number(figure) - expected) < 4 * figure.error + bias, (figure, expected)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays to a file of codes, and return its path."""

    def write(**arrays: Any) -> Path:
        np.savez(tmp_path / "codes.npz", **arrays)
        return tmp_path / "codes.npz"

    return write


def normals(count: int = 5000, seed: int = 0) -> Arrays:
    """Codes z = loc + scale epsilon with loc_j ~ N(MEANS_j, SPREADS_j^2): one scale for each dimension."""
    draws = np.random.default_rng(seed).normal(size=(count, len(MEANS)))
    return {"loc": MEANS + SPREADS * draws, "scale": np.tile(NOISES, (count, 1))}


MEANS, SPREADS, NOISES = np.array([2.0, -1.0, 0.0]), np.array([3.0, 0.5, 1.0]), np.array([0.4, 0.5, 1.0])
VARIANCES = SPREADS**2 + NOISES**2


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_the_scale_factor_of_normal_codes(save: Callable[..., Path]) -> None:
    found = figures(measured(save(**normals())), ScaleFactor)
    near(found["scale_factor"], float(VARIANCES.mean() + MEANS.var()) ** -0.5)
    for name, expected in (("scale_factor", VARIANCES**-0.5), ("code_mean", MEANS)):
        figure = found[f"{name}_per_dimension"]
        assert isinstance(figure.value, list)
        assert isinstance(figure.error, list)
        assert (np.abs(np.array(figure.value) - expected) < 4 * np.array(figure.error)).all()


def test_the_error_of_a_scale_factor_is_its_spread_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(300):
        # The numbers of one code depend on each other, so they count as one observation.
        z = torch.randn(400, 1, generator=generator) + torch.tensor([0.5, 1.0]) * torch.randn(
            400, 2, generator=generator
        )
        _, scale, parts = standardization(z + 3, 1)
        values.append(float(scale))
        errors.append(float(parts.square().sum().sqrt()))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_standardized_codes_have_mean_0_and_standard_deviation_1(groups: int) -> None:
    z = torch.randn(700, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7) + 100
    mean, scale, parts = standardization(z, groups)
    unit = (z.double().unflatten(1, (groups, -1)) - mean[:, None]) * scale[:, None]
    assert unit.mean((0, 2)).tolist() == pytest.approx([0.0] * groups, abs=1e-9)
    assert unit.std((0, 2), correction=0).tolist() == pytest.approx([1.0] * groups)
    assert parts.sum(0).tolist() == pytest.approx([0.0] * groups, abs=1e-9)


def test_spatial_codes_have_a_scale_factor_for_each_channel(save: Callable[..., Path]) -> None:
    generator = np.random.default_rng(2)
    sizes = np.array([1.0, 5.0, 0.2, 2.0])[:, None, None]
    subject = measured(save(loc=sizes * generator.normal(size=(2000, 4, 2, 3)) + 7))
    found = figures(subject, ScaleFactor)
    assert found["scale_factor_per_dimension"].value == pytest.approx((1 / sizes).flatten().tolist(), rel=0.03)
    assert found["code_mean_per_dimension"].value == pytest.approx([7.0] * 4, abs=0.2)
    assert found["scale_factor_per_dimension"].note == "one value for each of 4 channels"
    overall = standardization(subject.codes("train").z, 1)[1]
    assert number(found["scale_factor"]) == float(overall)


def test_codes_that_do_not_vary_have_no_scale_factor(save: Callable[..., Path]) -> None:
    rounded = 1e4 * (1 + 1e-7 * (np.arange(50) % 2))  # in float32, one unit in the last place
    loc = np.stack([np.arange(50.0), rounded, np.full(50, 0.1)], 1)
    found = figures(measured(save(loc=loc)), ScaleFactor)
    assert number(found["scale_factor"]) > 0
    assert found["scale_factor_per_dimension"].reason == "the code does not vary in 2 of 3 dimensions"
    equal = figures(measured(save(loc=np.full((50, 3), 0.1))), ScaleFactor)
    assert equal["scale_factor"].reason == "all numbers of all codes are equal"


def test_the_information_of_a_normal_channel(save: Callable[..., Path]) -> None:
    arrays = normals(8000)
    subject = measured(save(**arrays), budget=BUDGETS["default"])
    snr = SPREADS**2 / NOISES**2
    capacity = float(np.log2(1 + snr).sum() / 2)
    near(figures(subject, SignalToNoise)["channel_bound_bits"], capacity)
    bias = float(np.prod(1 + snr)) / (2 * 5600) / math.log(2)
    near(figures(subject, MutualInformation)["mutual_information_bits"], capacity - bias, bias)
    rate = float((VARIANCES + MEANS**2 - 1 - np.log(NOISES**2)).sum() / 2)  # E KL(N(loc, scale^2) || N(0, I))
    near(figures(subject, Rate)["rate"], rate)
    marginal = float((VARIANCES + MEANS**2 - 1 - np.log(VARIANCES)).sum() / 2)  # KL(q(z) || N(0, I))
    lower = figures(subject, AggregateDensity)["marginal_kl_lower"]
    assert isinstance(lower.error, float)
    assert marginal - math.log(2) - 4 * lower.error < number(lower) < marginal + 4 * lower.error
    near(figures(subject, RefittedPrior)["elbo_gaussian_prior_gain"], marginal, 0.02)


def test_the_information_of_disjoint_and_of_equal_codes(save: Callable[..., Path]) -> None:
    apart = {"loc": 1e3 * np.random.default_rng(0).normal(size=(400, 4)), "scale": np.full((400, 4), 0.1)}
    subject = measured(save(**apart))
    assert number(figures(subject, MutualInformation)["mutual_information"]) == pytest.approx(math.log(280))
    assert number(figures(subject, Reidentification)["reidentification"]) == 1
    equal = {"loc": np.zeros((400, 4)), "scale": np.full((400, 4), 0.1)}
    found = figures(measured(save(**equal)), MutualInformation)
    assert number(found["mutual_information"]) == pytest.approx(0, abs=1e-9)


def test_a_mixture_of_too_few_codes_is_no_density(save: Callable[..., Path]) -> None:
    loc = np.random.default_rng(0).normal(size=(250, 20))
    subject = measured(save(loc=loc, scale=np.full(loc.shape, 0.5)))
    reason = "a mixture of 10 Gaussians in 20 dimensions needs at least 210 training codes, and 175 are used"
    assert figures(subject, RefittedPrior)["elbo_mixture_prior_gain"].reason == reason
    lower = figures(subject, AggregateDensity)["marginal_kl_lower"]
    z = subject.codes("test").z
    density = log_aggregate(subject, z) - subject.model.prior().log_prob(z).double()
    assert number(lower) == pytest.approx(float(density.mean()))
    enough = measured(save(loc=np.tile(loc, (2, 1)), scale=np.full((500, 20), 0.5)))
    assert figures(enough, RefittedPrior)["elbo_mixture_prior_gain"].value is not None


# From a run to a file and back ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with short runs: of three sigma modes, one with known factors, and one with a flow as prior."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["epochs=2", "network.hidden=[32]", "latent=5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for sigma in ("learned", "fixed", "deterministic"):
            train([*small, f"sigma={sigma}", f"run_name={sigma}"])
        train([*small, "dataset=shapes", "dataset.images=900", "dataset.validation=100", "run_name=shapes"])
        train([*small, "likelihood=bernoulli", "likelihood.binarize=dynamic", "run_name=binary"])
        train([*small, "dataset=linear_gaussian", "dataset.images=300", "dataset.validation=50", "run_name=unbounded"])
    return folder / "runs"


def closely(found: Figure, expected: Figure, name: str) -> None:
    if expected.value is not None:
        assert found.value == pytest.approx(expected.value, rel=1e-5, abs=1e-9), name
    assert found.reason == expected.reason, name
    assert found.count == expected.count, name


@pytest.mark.parametrize("name", ["learned", "fixed", "deterministic", "shapes"])
def test_the_codes_of_a_run_have_the_figures_of_the_run(runs: Path, tmp_path: Path, name: str) -> None:
    run = load_run(runs / name, device="cpu")
    file, notes = export_codes(run, tmp_path)
    assert notes == []
    own, stored = MeasuredRun(run, QUICK), measured(file)
    undecoded = [kind for kind in USUAL if not kind.decodes]
    for kind, expected in compute_metrics(own, undecoded).items():
        found = compute_metrics(stored, [one for one in undecoded if one.__name__ == kind])[kind]
        assert found.keys() == expected.keys()
        for figure in found.keys() - RECORDED:
            if not found[figure].reason.startswith("no decoder was given"):
                closely(found[figure], expected[figure], figure)
            else:
                assert figure in ("elbo_gaussian_prior", "elbo_mixture_prior")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "deterministic"])
def test_with_its_decoder_a_run_has_all_figures(runs: Path, tmp_path: Path, name: str) -> None:
    run = load_run(runs / name, device="cpu")
    file, _ = export_codes(run, tmp_path)
    stored = measured(file, decoder=("own", lambda z: run.model.decode(z).mean))
    given: Any = stored.run
    scale = given.fit_likelihood(stored)
    run.model.likelihood = Gaussian(scale)  # in the run, it is an average over the last batches
    own = MeasuredRun(run, QUICK)
    for kind, expected in compute_metrics(own, USUAL).items():
        (one,) = (one for one in USUAL if one.__name__ == kind)
        found = compute_metrics(stored, [one])[kind]
        assert found.keys() == expected.keys()
        for figure in found.keys() - RECORDED:
            closely(found[figure], expected[figure], figure)
        if one.decodes:
            assert {word.replace("{k}", str(QUICK.samples)) for word in one.decodes} == expected.keys()


def test_the_scale_of_the_likelihood_has_the_highest_likelihood(save: Callable[..., Path]) -> None:
    arrays = normals(300)
    shift = 0.1 * torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0))
    images = np.clip(arrays["loc"][:, :1, None, None].repeat(2, 2).repeat(2, 3) / 20 + 0.5, 0, 1)
    subject = measured(
        save(loc=arrays["loc"], images=images),
        decoder=("mine:decode", lambda z: (z[:, :1, None, None] / 20 + 0.5).expand(-1, 1, 2, 2) + shift),
    )
    run: Any = subject.run
    best = run.fit_likelihood(subject)
    assert best == pytest.approx(float(shift.square().mean().sqrt()), rel=0.1)
    x, rows = next(subject.batches("train"))

    def fit(scale: float) -> float:
        run.model.likelihood = Gaussian(scale)
        return float(-subject.distortion(x, subject.codes("train").z[rows]).mean())

    assert fit(best) > max(fit(0.97 * best), fit(1.03 * best))
    assert "root mean squared error" in run.notes[-1]


def test_images_in_another_range_are_left_out(runs: Path) -> None:
    arrays, notes = codes_of(load_run(runs / "unbounded", device="cpu"))
    assert "images" not in arrays
    assert "not limited to [0, 1]" in notes[0]
    _, notes = codes_of(load_run(runs / "binary", device="cpu"))
    assert "one random binarization" in notes[0]


def test_a_posterior_that_loc_and_scale_do_not_define_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(runs / "fixed", device="cpu")

    class Other(torch.nn.Module):
        def forward(self, raw: Tensor) -> Any:
            return torch.distributions.Independent(torch.distributions.Laplace(raw, torch.ones_like(raw)), 1)

    monkeypatch.setattr(run.model, "sigma", Other())
    with pytest.raises(UserError, match=r"is Laplace .*can hold only posteriors N"):
        codes_of(run)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_without_labels_images_and_split(save: Callable[..., Path]) -> None:
    subject = measured(save(**normals(100)), seed=3)
    run: Any = subject.run
    assert [len(split) for split in subject.splits[:3]] == [70, 10, 20]
    assert run.notes == [
        "The file has no split, so it was divided at random with seed 3: 70 train, 10 validation, 20 test codes."
    ]
    rows = torch.cat([split.index for split in subject.splits[:3]])
    assert sorted(rows.tolist()) == list(range(100))
    other = measured(save(**normals(100)), seed=4)
    assert not torch.equal(other.splits.test.index, subject.splits.test.index)
    assert figures(subject, Probes)["linear_probe_loc"].reason == "the images have no labels"
    assert figures(subject, Jacobian)["jacobian_ratio"].reason.startswith("the file has no images to compare")
    assert figures(subject, Collapse)["collapsed_share"].value == 0
    assert figures(subject, PullOverTraining)["training_epochs"].value is None
    codes = subject.codes("test")
    expected = torch.from_numpy(normals(100)["loc"]).float()[subject.splits.test.index[subject.positions("test")]]
    assert torch.equal(codes.loc, expected)


@pytest.mark.parametrize("kind", ["text", "bytes", "numbers"])
def test_the_split_of_the_file_is_used(save: Callable[..., Path], kind: str) -> None:
    words = np.array(["test", "train", "validation", "train", "test", "train"])
    split = {"text": words, "bytes": words.astype("S"), "numbers": np.array([2, 0, 1, 0, 2, 0])}[kind]
    splits = measured(save(loc=np.arange(12.0).reshape(6, 2), split=split)).splits
    assert [part.index.tolist() for part in splits[:3]] == [[1, 3, 5], [2], [0, 4]]


def test_labels_of_the_file_are_used(save: Callable[..., Path]) -> None:
    loc = np.random.default_rng(0).normal(size=(300, 2))
    subject = measured(save(loc=loc + 20 * (np.arange(300) % 3)[:, None], labels=np.arange(300) % 3))
    assert number(figures(subject, Probes)["linear_probe_loc"]) == 1
    assert number(figures(subject, NeighbourLabels)["neighbour_label_agreement"]) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_has_its_own_code(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 5, 4), generator=generator).to(torch.uint8)
    images[20:40] = images[:20]  # equal images
    images[40:] = images[:20]
    images[40:, 0, 0, 0] ^= 1  # differ from the first ones in a single bit
    split = Split(images if dtype == torch.uint8 else images / 255, None, torch.arange(60))
    codes = torch.randn(60, 2, generator=generator)
    codes[25:40] = codes[5:20]
    table = CodeTable(split, codes)
    expected = torch.cat([codes[:20], codes[:20], codes[40:]])
    order = torch.randperm(60, generator=generator)
    assert torch.equal(table(split.batch(order)), expected[order])
    assert table.shared == 5
    with pytest.raises(UserError, match="not in the file of codes"):
        table(torch.rand(2, 3, 5, 4))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 8, 8)])
def test_equal_images_keep_their_own_codes(save: Callable[..., Path], dtype: str, shape: tuple[int, ...]) -> None:
    for level in (0, 1 if dtype == "float32" else 255):
        arrays = normals(90) | {"images": np.full((90, *shape), level, dtype)}
        subject = measured(save(**arrays))
        rows = subject.splits.test.index[subject.positions("test")]
        assert torch.equal(subject.codes("test").loc, torch.from_numpy(arrays["loc"]).float()[rows])
        x = subject.splits.train.batch(torch.arange(60))
        assert float((x - min(level, 1)).abs().max()) < 1e-6
        assert float(x.max()) <= 1
        assert float(x.min()) >= 0


def test_the_key_of_an_image_does_not_depend_on_its_batch() -> None:
    x = torch.rand(50, 2, 3, 3)
    weights = torch.randint(-(2**62), 2**62, (18,)) * 2 + 1
    keys = image_keys(x, weights)
    assert torch.equal(torch.cat([image_keys(part, weights) for part in x.split(7)]), keys)
    assert len(keys.unique()) == 50


GOOD: Arrays = {"loc": np.arange(20.0).reshape(10, 2)}
IMAGES = np.zeros((10, 1, 4, 4), np.uint8)
WRONG: list[tuple[Arrays, str]] = [
    ({"labels": np.zeros(10, int)}, r"no array 'loc'.* It has labels\. Arrays: loc: codes"),
    ({}, r"no array 'loc'.* It is empty"),
    (GOOD | {"lables": np.zeros(10, int)}, r"unknown array 'lables'\. Did you mean 'labels'\?"),
    ({"loc": np.zeros(10)}, r"loc has the shape \(10,\), but must be \(N, D\) or \(N, C, h, w\)"),
    ({"loc": np.zeros((10, 3, 2))}, r"store loc\.reshape\(len\(loc\), -1\)"),
    ({"loc": np.zeros((10, 0))}, r"loc has the shape \(10, 0\)"),
    ({"loc": np.zeros((3, 2))}, "loc has 3 codes, but between 4 and 16,777,216 are needed"),
    ({"loc": np.full((10, 2), np.nan)}, r"loc is not finite .* in 10 of 10 rows, the first of which is 0"),
    ({"loc": np.full((10, 2), 1e300)}, "loc is not finite"),
    ({"loc": np.full((10, 2), 1e20)}, r"loc has values of up to 1\.0e\+20 in size"),
    ({"loc": np.full((10, 2), "a")}, "loc has the type <U1, but must be real numbers"),
    ({"loc": np.full((10, 2), 1j)}, "loc has the type complex128"),
    ({"loc": np.full((10, 2), None)}, "loc holds Python objects, which could run code"),
    (GOOD | {"labels": np.array([None] * 10)}, "labels holds Python objects, which could run code"),
    (GOOD | {"scale": np.ones(2)}, r"scale has the shape \(2,\), but must have that of loc, \(10, 2\)"),
    (GOOD | {"scale": np.zeros((10, 2))}, "it is a standard deviation, not a variance or its logarithm"),
    (GOOD | {"scale": -np.ones((10, 2))}, "scale has values from -1 to -1"),
    (GOOD | {"labels": np.zeros(9, int)}, r"labels has the shape \(9,\), but must be \(10,\): one for each code"),
    (GOOD | {"labels": np.zeros(10)}, r"labels have the type float64.* store labels\.astype\(int\)"),
    (GOOD | {"labels": np.full(10, -1)}, "labels go from -1 to -1, but must be between 0 and 65,535"),
    (GOOD | {"images": IMAGES[:9]}, "there are 9 images, but 10 codes"),
    (GOOD | {"images": IMAGES[:, 0]}, r"for gray images, store images\[:, None\]"),
    (GOOD | {"images": np.zeros((10, 8, 8, 3), np.uint8)}, r"store images\.transpose\(0, 3, 1, 2\)"),
    (GOOD | {"images": IMAGES.astype(int)}, "images have the type int64, but must be uint8, or float"),
    (GOOD | {"images": IMAGES - 1.0}, r"images have values from -1 to -1.* store \(images \+ 1\) / 2"),
    (GOOD | {"images": IMAGES + 255.0}, r"images have values from 255 to 255, but must be in \[0, 1\]"),
    (GOOD | {"images": np.full((10, 1, 4, 4), np.nan)}, "images is not finite"),
    (GOOD | {"split": np.array(["train"] * 9 + ["tset"])}, "split has the value 'tset', but must consist of train"),
    (GOOD | {"split": np.arange(10)}, "split has the value '3'"),
    (GOOD | {"split": np.zeros(10, int)}, "split has 0 test codes, but at least 2 are needed"),
    (GOOD | {"split": np.zeros(10)}, "split has the type float64"),
    (GOOD | {"factors": np.zeros((10, 1))}, "must be given together, but there is only factors"),
    (
        GOOD | {"factors": np.zeros((10, 1)), "factor_names": np.array(["x"]), "factor_kinds": np.array(["odd"])},
        "factor_kinds has the value 'odd'",
    ),
]


@pytest.mark.parametrize(("arrays", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_a_wrong_file_gets_one_message(save: Callable[..., Path], arrays: Arrays, said: str) -> None:
    file = save(**arrays)
    with pytest.raises(UserError, match=said) as caught:
        read_codes(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def write_truncated(file: Path) -> None:
    np.savez(file, **normals(100))
    file.write_bytes(file.read_bytes()[:2000])


def write_lying(file: Path) -> None:
    np.savez(file, loc=np.zeros((10, 2)))
    content = file.read_bytes()
    assert content.count(b"(10, 2), }") == 1
    file.write_bytes(content.replace(b"(10, 2), }", b"(99, 9), }"))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: file.write_text("not an archive"), "is not an npz file, or is damaged: it is not a zip archive"),
        (lambda file: np.save(file.open("wb"), np.zeros((10, 2))), "is not an npz file"),
        (lambda file: np.save(file.open("wb"), np.array([{}]), allow_pickle=True), "is not an npz file"),
        (write_truncated, "is not an npz file, or is damaged"),
        (write_lying, "is not an npz file, or is damaged"),
        (lambda file: file.mkdir(), "it is a folder, not a file"),
        (lambda file: None, r"There is no file .*codes\.npz"),
    ],
    ids=["text", "npy", "pickle", "truncated", "lying", "folder", "missing"],
)
def test_a_file_that_is_not_an_npz_file_is_refused(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "codes.npz")
    with pytest.raises(UserError, match=said):
        read_codes(tmp_path / "codes.npz")


# Decoders and the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module, mine, with the decoders of the tests."""
    module: Any = ModuleType("mine")
    module.good = lambda z: torch.sigmoid(z.sum(1))[:, None, None, None].expand(-1, 1, 4, 4)
    module.small = lambda z: torch.zeros(len(z), 1, 2, 2)
    module.empty = lambda z: None
    module.signed = lambda z: -torch.ones(len(z), 1, 4, 4)
    module.unknown = lambda z: torch.full((len(z), 1, 4, 4), math.nan)
    module.levels = lambda z: torch.zeros(len(z), 1, 4, 4, dtype=torch.uint8)
    module.broken = lambda z: z @ torch.zeros(7, 7)
    module.constant = 3
    monkeypatch.setitem(sys.modules, "mine", module)
    monkeypatch.setenv("VAE_TRUST", "")  # --trust sets it; this restores it
    return module


@pytest.fixture
def vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in a folder with codes.npz; return the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(1).integers(256, size=(60, 1, 4, 4)).astype(np.uint8)
    np.savez("codes.npz", **normals(60), images=levels, labels=np.arange(60) % 2)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vae", *words])
        code = run_command()
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    return call


EVALUATE = ("evaluate", "--codes", "codes.npz", "--quick")


def test_the_command_measures_codes_and_says_where_it_wrote(vae: Any, tmp_path: Path) -> None:
    code, said = vae(*EVALUATE)
    assert code == 0, said
    assert "Scale factor of the code: " in said
    assert "Rate: " in said
    assert "Distortion: not defined" not in said
    assert "Reason: no decoder was given: add --decoder MODULE:FUNCTION." in said
    assert "The file has no split" in said
    assert "codes-evaluation/metrics.json codes-evaluation/rate_per_dimension.png" in said
    found = json.loads((tmp_path / "codes-evaluation/metrics.json").read_text())
    names = {kind.__name__ for kind in USUAL}
    assert {one["metric"] for part in ("figures", "left_out") for one in found[part].values()} == names
    assert not found["figures"].keys() & found["left_out"].keys()
    assert vae(*EVALUATE, "--out", "elsewhere")[0] == 0
    assert json.loads((tmp_path / "elsewhere/metrics.json").read_text())["figures"] == found["figures"]


def test_figures_are_added_and_not_lost_by_mistake(vae: Any, tmp_path: Path, mine: ModuleType) -> None:
    def metrics() -> set[str]:
        found = json.loads((tmp_path / "codes-evaluation/metrics.json").read_text())
        return {entry["metric"] for entry in found["figures"].values()}

    assert vae(*EVALUATE, "--metrics", "rate")[0] == 0
    assert vae(*EVALUATE, "--metrics", "scale_factor")[0] == 0
    assert metrics() == {"Rate", "ScaleFactor"}
    decoding = ("--decoder", "mine:good", "--trust", "mine")
    code, said = vae(*EVALUATE, "--metrics", "noise_probe", *decoding)
    assert code == 2
    assert "which would be replaced by one with only the metrics you chose" in said
    assert vae(*EVALUATE, "--metrics", "noise_probe", *decoding, "--overwrite")[0] == 0
    assert metrics() == {"NoiseProbe"}
    assert vae("evaluate", "--codes", "codes.npz", "--metrics", "rate", "--overwrite")[0] == 0
    code, said = vae(*EVALUATE)
    assert code == 2
    assert "There is a more thorough evaluation (default) of codes.npz" in said
    np.savez("codes.npz", **normals(50))  # other codes: their evaluation replaces the old one
    assert vae(*EVALUATE, "--metrics", "rate")[0] == 0
    assert vae(*EVALUATE, "--metrics", "rate", "--out", "new")[0] == 0
    np.savez("codes.npz", **normals(40))
    code, said = vae(*EVALUATE, "--metrics", "rate", "--out", "new")
    assert code == 2
    assert "is the evaluation of other codes" in said
    (tmp_path / "new/metrics.json").write_text("precious")
    code, said = vae(*EVALUATE, "--metrics", "rate", "--out", "new")
    assert code == 1
    assert "To replace it type vae evaluate --codes codes.npz --overwrite --out new" in said


def test_a_decoder_of_the_user(vae: Any, tmp_path: Path, mine: ModuleType) -> None:
    code, said = vae(*EVALUATE, "--decoder", "mine:good", "--trust", "mine")
    assert code == 0, said
    assert "The likelihood is Gaussian with scale 0." in said
    found = json.loads((tmp_path / "codes-evaluation/metrics.json").read_text())
    assert found["figures"].keys() >= {"distortion", "elbo", "jacobian_ratio", "frechet_prior", "noise_probe_t"}
    assert "no decoder" not in json.dumps(found["left_out"])


def test_figures_of_a_changed_decoder_are_not_mixed(vae: Any, tmp_path: Path, mine: Any) -> None:
    source = tmp_path / "source.txt"  # not mine.py, which another test could import
    mine.__file__ = str(source)
    words = (*EVALUATE, "--decoder", "mine:good", "--trust", "mine", "--metrics")
    source.write_text("one")
    assert vae(*words, "noise_probe")[0] == 0
    assert vae(*words, "rate")[0] == 0
    source.write_text("two")
    code, said = vae(*words, "rate")
    assert code == 2
    assert "The module of --decoder mine:good has changed since the other figures were measured." in said
    assert vae(*words, "rate", "--overwrite")[0] == 0


DECODERS = [
    (("mine:good",), "is code from outside vae, which runs only with your consent: if you trust it, add --trust mine"),
    (("mine.good", "--trust", "mine"), "is not the name of a function: type --decoder MODULE:FUNCTION"),
    (("mine:god", "--trust", "mine"), "does not exist. Did you mean 'good'?"),
    (("nowhere:good", "--trust", "nowhere"), "there is no module 'nowhere'"),
    (("mine:constant", "--trust", "mine"), "it is not a function"),
    (("mine:small", "--trust", "mine"), "of the shape (8, 1, 2, 2), but must return floats in [0, 1] of the shape of"),
    (
        ("mine:empty", "--trust", "mine"),
        "returns NoneType, but must return images as a tensor of the shape (8, 1, 4, 4)",
    ),
    (("mine:levels", "--trust", "mine"), "returns torch.uint8"),
    (("mine:signed", "--trust", "mine"), "returns values from -1 to -1, but must return images in [0, 1]"),
    (("mine:unknown", "--trust", "mine"), "returns values that are not finite"),
    (("mine:broken", "--trust", "mine"), "fails for codes of the shape (8, 3): RuntimeError: mat1 and mat2"),
]


@pytest.mark.parametrize(("words", "said"), DECODERS, ids=[said[:30] for _, said in DECODERS])
def test_a_wrong_decoder_gets_one_message(
    vae: Any, tmp_path: Path, mine: ModuleType, words: tuple[str, ...], said: str
) -> None:
    code, printed = vae(*EVALUATE, "--decoder", *words)
    assert code == 2
    assert said in printed
    assert not (tmp_path / "codes-evaluation").exists()


def test_spatial_codes_reach_the_decoder_in_their_shape(save: Callable[..., Path]) -> None:
    shapes = set()

    def decode(z: Tensor) -> Tensor:
        shapes.add(tuple(z.shape[1:]))
        return torch.sigmoid(z[:, :1])

    loc = np.random.default_rng(0).normal(size=(40, 2, 4, 3))
    subject = measured(save(loc=loc, images=np.full((40, 1, 4, 3), 0.5)), decoder=("own", decode))
    row = subject.splits.test.index[subject.positions("test")][:1]
    z, code = subject.codes("test").loc[:1], torch.from_numpy(loc[row.numpy()]).float()
    assert torch.equal(z, code.flatten(1))  # channel by channel
    assert torch.equal(subject.decode(z), code[:, :1].sigmoid())
    assert figures(subject, Jacobian)["jacobian_ratio"].value is not None
    assert shapes == {(2, 4, 3)}


def test_a_decoder_without_second_derivatives_has_no_jacobian(save: Callable[..., Path]) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.sigmoid()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    file = save(**normals(40), images=np.full((40, 1, 1, 3), 0.5))
    for function in (Once.apply, torch.no_grad()(torch.sigmoid)):
        subject = measured(file, decoder=("own", lambda z, function=function: function(z)[:, None, None, :]))
        assert figures(subject, Jacobian)["jacobian_ratio"].reason == "the likelihood's mean has no gradient"


def test_attention_in_a_decoder_has_second_derivatives(save: Callable[..., Path]) -> None:
    def decode(z: Tensor) -> Tensor:
        tokens = z.unflatten(1, (1, 4, 8))
        mixed = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return torch.sigmoid(mixed)

    loc = np.random.default_rng(0).normal(size=(40, 32))
    subject = measured(save(loc=loc, images=np.full((40, 1, 4, 8), 0.5)), decoder=("own", decode))
    assert number(figures(subject, Jacobian)["jacobian_norm_codes"]) > 0


def test_a_metric_that_decodes_says_that_it_needs_a_decoder(save: Callable[..., Path]) -> None:
    class Mine(Metric):
        claim = "price"

        def compute(self) -> dict[str, Figure]:
            return {"brightness": Figure(float(self.subject.decode(self.subject.codes().loc).mean()))}

    with pytest.raises(UserError, match="add --decoder MODULE:FUNCTION"):
        figures(measured(save(**normals(40))), Mine)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate",), "There is nothing to evaluate. Name a run (vae evaluate latest), or a file of codes"),
        (
            ("evaluate", "latest", "--codes", "codes.npz"),
            "The run 'latest' and --codes codes.npz cannot be evaluated to",
        ),
        (("evaluate", "latest", "--decoder", "a:b"), "--decoder has no effect on a run, which has its own decoder"),
        ((*EVALUATE, "--weights", "last"), "--weights has no effect on codes from a file"),
        (("evaluate", "--codes", "nowhere.npz"), "There is no file nowhere.npz."),
        ((*EVALUATE, "--out", "codes.npz/x"), "codes.npz is a file. Write the evaluation elsewhere with --out FOLDER."),
        ((*EVALUATE, "--metrics", "rat"), "Did you mean 'rate'?"),
    ],
)
def test_impossible_requests_are_refused_with_a_message(vae: Any, words: tuple[str, ...], said: str) -> None:
    code, printed = vae(*words)
    assert code == 2
    assert said in printed


class Latent(NamedTuple):
    mean: Tensor
    std: Tensor


class StandIn:
    """The documented names of diffusers' AutoencoderKL: codes are means over 2x2 pixels, in [-1, 1]."""

    device = torch.device("cpu")

    @staticmethod
    def from_pretrained(folder: str) -> StandIn:
        return StandIn()

    def eval(self) -> StandIn:
        return self

    def encode(self, x: Tensor) -> Any:
        assert float(x.min()) >= -1
        assert float(x.max()) <= 1
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return SimpleNamespace(latent_dist=Latent(mean, torch.full_like(mean, 0.1)))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=2.0))


def test_the_recipe_of_the_readme(vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "diffusers" in code)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=StandIn))
    monkeypatch.setitem(sys.modules, "kl", None)  # restored afterwards
    monkeypatch.delitem(sys.modules, "kl")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("VAE_TRUST", "")
    images = np.random.default_rng(0).integers(256, size=(50, 3, 8, 8)).astype(np.uint8)
    np.save("images.npy", images)
    Path("kl.py").write_text(recipe)
    runpy.run_path("kl.py", run_name="__main__")
    assert read_codes(Path("codes.npz")).code == (3, 4, 4)
    words = re.findall(r"^vae (evaluate --codes .*)$", readme, flags=re.MULTILINE)
    assert len(words) == 2
    for command in words:
        code, said = vae(*command.split(), "--quick", "--overwrite")
        assert code == 0, said
    assert "Jacobian relative to a linear decoder" in said
    assert "The likelihood is Gaussian" in said


def test_a_decoder_needs_images(vae: Any, mine: ModuleType) -> None:
    np.savez("codes.npz", **normals(60))
    code, said = vae(*EVALUATE, "--decoder", "mine:good", "--trust", "mine")
    assert code == 2
    assert "Add the array images (N, C, H, W) to the file, or leave out --decoder." in said


def test_the_codes_of_a_run_are_exported_and_not_replaced_by_mistake(vae: Any, runs: Path, tmp_path: Path) -> None:
    words = ("export", str(runs / "fixed"), "--codes", "--to", "made")
    code, said = vae(*words)
    assert code == 0, said
    assert said == "made/codes.npz To measure the codes: vae evaluate --codes made/codes.npz"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["codes.npz"]
    content = read_codes(tmp_path / "made/codes.npz")
    run = load_run(runs / "fixed", device="cpu")
    assert content.split is not None
    assert content.images is not None
    assert content.split.bincount().tolist() == [len(split) for split in run.splits[:3]]
    assert torch.equal(content.images[content.split == 2], run.splits.test.images[run.splits.test.index])
    code, said = vae(*words)
    assert code == 2
    assert "made/codes.npz exists. To replace it, add --overwrite" in said
    assert vae(*words, "--overwrite")[0] == 0
    code, said = vae(*words, "--format", "pt2")
    assert code == 2
    assert "--format has no effect with --codes" in said
    code, said = vae("export", str(runs / "fixed"), "--to", "made", "--device", "cpu")
    assert code == 2
    assert "--device has no effect without --codes" in said
