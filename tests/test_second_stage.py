"""Second stages: models of a run's codes, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from vae_cli.metrics.base import BUDGETS, MeasuredRun, compute_metrics
from vae_cli.metrics.evaluate_codes import load_codes
from vae_cli.metrics.price import AggregateFit
from vae_cli.metrics.quality import frechet
from vae_cli.metrics.second_stage import STAGES, TRAINED, SecondStage, from_nearest, velocity_variance
from vae_cli.model.flow_matching import FlowMatching
from vae_cli.runs import second_stage as module
from vae_cli.runs.export_codes import export_codes
from vae_cli.runs.run import Run
from vae_cli.runs.second_stage import build_stage, second_stage

Ask = Callable[..., Any]


def random_flow(latent: int, hidden: int = 16) -> FlowMatching:
    """Return a flow with random weights in every layer."""
    torch.manual_seed(0)
    flow = FlowMatching(latent, hidden, layers=3)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow


# Flow matching -------------------------------------------------------------------------------------------------------


def test_the_divergence_is_the_trace_of_the_jacobian() -> None:
    flow = random_flow(4)
    x, t = torch.randn(5, 4), torch.rand(5, 1)
    v, divergence = flow.velocity_and_divergence(x, t)
    torch.testing.assert_close(v, flow.velocity(x, t))
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda p, r=row: flow.velocity(p[None], t[r : r + 1])[0], x[row])
        torch.testing.assert_close(divergence[row], jacobian.trace())


def test_a_new_flow_is_the_standard_normal() -> None:
    flow = FlowMatching(3)
    z = torch.randn(50, 3)
    exact = -z.square().sum(1) / 2 - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(z, 200), exact, atol=1e-3, rtol=0)
    torch.manual_seed(0)
    drawn = flow.draw(20_000)
    torch.testing.assert_close(drawn.T.cov(), torch.eye(3), atol=0.05, rtol=0)


def test_the_density_of_a_flow_integrates_to_one() -> None:
    flow = random_flow(1)
    z = torch.linspace(-12, 12, 4001)[:, None]
    assert float(flow.log_prob(z, 200).exp().sum() * 24 / 4000) == pytest.approx(1, abs=5e-3)


def test_the_draws_of_a_flow_follow_its_density() -> None:
    flow = random_flow(1)
    torch.manual_seed(0)
    drawn = flow.draw(20_000, steps=200)
    z = torch.linspace(-12, 12, 4001)[:, None]
    mass = flow.log_prob(z, 200).exp().squeeze() * 24 / 4000
    for threshold in (-1.0, 0.0, 1.0):
        expected = float(mass[z.squeeze() <= threshold].sum())
        assert float((drawn <= threshold).float().mean()) == pytest.approx(expected, abs=0.015)


def test_heuns_steps_are_more_accurate_than_eulers() -> None:
    flow = random_flow(2)

    def drawn(steps: int, solver: Any) -> Tensor:
        torch.manual_seed(0)
        return flow.draw(500, steps=steps, solver=solver)

    exact = drawn(1000, "heun")
    error = {solver: float((drawn(20, solver) - exact).norm()) for solver in ("euler", "heun")}
    assert error["heun"] < error["euler"] / 5
    assert float((drawn(40, "euler") - exact).norm()) == pytest.approx(error["euler"] / 2, rel=0.2)  # first order


def fit(stage: module.SecondStage, codes: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    stage.standardize(codes)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(codes), (256,))
        loss = stage.loss(codes[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_a_second_stage_learns_a_gaussian(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean, covariance and negative log-likelihood of correlated Gaussian codes far from the origin."""
    monkeypatch.setattr(module, "HIDDEN", [64, 64, 64])
    monkeypatch.setattr(module, "VAE_HIDDEN", [64, 64])
    torch.manual_seed(0)
    truth = MultivariateNormal(torch.tensor([10.0, -3.0]), torch.tensor([[4.0, 0.9], [0.9, 0.3]]))
    codes = truth.sample((20_000,))
    stage = build_stage(kind, 2)
    fit(stage, codes, 1500)
    drawn, held_out = stage.draw(20_000), truth.sample((1000,))
    unit = codes.std(0)
    torch.testing.assert_close(drawn.mean(0) / unit, truth.mean / unit, atol=0.1, rtol=0)
    torch.testing.assert_close((drawn / unit).T.cov(), (codes / unit).T.cov(), atol=0.15, rtol=0)
    excess = float((truth.log_prob(held_out) - stage.log_prob(held_out)).mean())  # a KL divergence, estimated
    assert -0.02 < excess < 0.1


@pytest.mark.slow
def test_the_frechet_distance_of_a_flow_tends_to_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor is the distance between two samples of the same Gaussian, of the same size."""
    monkeypatch.setattr(module, "HIDDEN", [64, 64, 64])
    torch.manual_seed(0)
    truth = MultivariateNormal(torch.zeros(4), torch.full((4, 4), 0.8) + 0.2 * torch.eye(4))
    codes, held_out, others = (truth.sample((20_000,)) for _ in range(3))
    distances = []
    for steps in (0, 100, 2000):
        stage = build_stage("flow", 4)
        fit(stage, codes, steps)
        distances.append(frechet(stage.draw(20_000), held_out))
    floor = frechet(others, held_out)
    assert distances[0] > 1 > distances[1] > distances[2]
    assert floor < distances[2] < 10 * floor < 0.005


# Keeping them with the run -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A small run, whose second stages take three blocks of 20 steps to train."""
    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "BLOCKS", 3)
    assert ask("train", "epochs=1", "latent=3", "network.hidden=[16]", "run_name=small").code == 0
    return Run(Path("runs/small"), device="cpu")


def weights(run: Run, kind: Any = "flow") -> dict[str, Tensor]:
    return second_stage(run, kind).state_dict()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_second_stage_is_trained_once(trained: Run, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    before = second_stage(trained, kind, said.append)
    assert len(said) == 1
    monkeypatch.setattr(module.SecondStage, "loss", None)  # training again would fail
    after = second_stage(trained, kind, said.append)
    assert len(said) == 1
    assert_equal(before.state_dict(), after.state_dict())
    assert not any(parameter.requires_grad for parameter in after.parameters())


def test_other_weights_get_another_second_stage(trained: Run, ask: Ask) -> None:
    before = weights(trained)
    assert ask("train", "epochs=2", "latent=3", "network.hidden=[16]", "run_name=small").code == 0
    after = weights(Run(Path("runs/small"), device="cpu"))
    assert not torch.equal(before["center"], after["center"])


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_an_interrupted_training_goes_on_bit_for_bit(
    trained: Run, kind: Any, interrupted_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = weights(trained, kind)
    (trained.path / "second_stage" / f"{kind}.pt").unlink()
    save, saved = module.save_checkpoint, []

    def interrupt(*given: Any) -> None:
        save(*given)
        saved.append(given)
        if len(saved) == interrupted_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        second_stage(trained, kind)
    assert_equal(weights(trained, kind), uninterrupted)
    assert len(saved) == module.BLOCKS


def test_a_damaged_second_stage_is_trained_again(trained: Run) -> None:
    before = weights(trained)
    (trained.path / "second_stage" / "flow.pt").write_bytes(b"nonsense")
    assert_equal(weights(trained), before)


def test_a_read_only_folder_does_not_prevent_a_second_stage(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(trained)

    def refuse(*given: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "locked", refuse)
    assert_equal(weights(trained), before)


def test_training_a_second_stage_leaves_random_numbers_alone(trained: Run) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    second_stage(trained, "vae")
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_the_weights_with_the_lowest_held_out_loss_are_kept(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", 50.0)  # every block makes the loss worse, beginning with the first
    monkeypatch.setattr(module, "PATIENCE", 2)
    weights(trained)
    kept = torch.load(trained.path / "second_stage" / "flow.pt", weights_only=True)
    assert kept["blocks"] - kept["since_best"] >= 1
    assert set(kept) >= {"model", "is_done"}
    assert not {"current", "average", "optimizer"} & set(kept)


@pytest.mark.parametrize("source", TRAINED)
def test_vae_sample_draws_from_a_second_stage(trained: Run, ask: Ask, source: str) -> None:
    first = ask("sample", "small", "--from", source, "--count", "4")
    assert first.code == 0
    assert f"({source})" in first.out
    again = ask("sample", "small", "--from", source, "--count", "4", "--seed", "1")
    assert again.code == 0
    assert f"({source})" not in again.out


def test_the_solver_belongs_to_the_flow(trained: Run, ask: Ask) -> None:
    assert ask("sample", "small", "--from", "flow", "--count", "4", "--steps", "5", "--solver", "euler").code == 0
    assert Path("runs/small/samples/flow_count-4_steps-5_solver-euler.png").exists()
    refused = ask("sample", "small", "--from", "prior", "--steps", "5")
    assert refused.code == 2
    assert "--steps has no effect with --from prior" in refused.err


# What is measured ----------------------------------------------------------------------------------------------------


def test_every_figure_is_defined_for_a_noisy_code(trained: Run) -> None:
    subject = MeasuredRun(trained, BUDGETS["quick"])
    found = compute_metrics(subject, [SecondStage, AggregateFit])
    figures = found["SecondStage"]
    assert all(figure.value is not None for figure in figures.values())
    for stage in (*STAGES, *TRAINED):
        assert figures[f"novelty_{stage}"].value > 0  # type: ignore[operator]
        rate, nll = figures[f"rate_{stage}"].value, figures[f"nll_{stage}"].value
        assert isinstance(rate, float)
        assert isinstance(nll, float)
    # A Gaussian as the prior: the rate differs from the run's by the gain of the refitted prior.
    posterior_entropy = figures["nll_aggregate"].value - figures["rate_aggregate"].value  # type: ignore[operator]
    for stage in (*STAGES, *TRAINED):
        other = figures[f"nll_{stage}"].value - figures[f"rate_{stage}"].value  # type: ignore[operator]
        assert other == pytest.approx(posterior_entropy)


def test_the_rate_of_a_point_mass_is_undefined(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "BLOCKS", 1)
    assert ask("train", "epochs=1", "latent=3", "sigma=deterministic", "run_name=point").code == 0
    figures = compute_metrics(MeasuredRun(Run(Path("runs/point"), device="cpu"), BUDGETS["quick"]), [SecondStage])
    undefined = {name for name, figure in figures["SecondStage"].items() if figure.value is None}
    assert undefined == {f"rate_{stage}" for stage in (*STAGES, *TRAINED)}


def test_copies_have_no_novelty() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(200, 8).double(), torch.randn(100, 8).double()
    assert float(from_nearest(train[:50], train).max()) < 1e-6
    expected = torch.stack([(train - point).norm(dim=1).min() for point in test])
    torch.testing.assert_close(from_nearest(test, train), expected)


def test_the_velocity_variance_of_gaussian_classes_has_its_closed_value() -> None:
    """Classes N(m_c, C): each standardized covariance is C / (the total variances), whose eigenvalues are known."""
    torch.manual_seed(0)
    classes, dimensions, count = 5, 3, 40_000
    means, within = 2 * torch.randn(classes, dimensions).double(), torch.tensor([1.0, 0.25, 4.0]).double()
    labels = torch.arange(classes).repeat_interleave(count)
    codes = means[labels] + within.sqrt() * torch.randn(classes * count, dimensions).double()
    total = within + means.var(0, correction=0)
    expected = math.pi / 2 * float((within / total).sqrt().sum())
    assert velocity_variance(codes, labels) == pytest.approx(expected, rel=0.01)
    scaled = velocity_variance(codes * torch.tensor([7.0, 0.1, 3.0]) + 2, labels)
    assert scaled == pytest.approx(velocity_variance(codes, labels))  # the units of z do not matter
    assert velocity_variance(torch.randn(3, 2).double(), torch.arange(3)) is None


def test_codes_from_a_file_have_second_stages_too(trained: Run, tmp_path: Path) -> None:
    file, _ = export_codes(trained, tmp_path / "codes")
    stored = MeasuredRun(load_codes(file, device="cpu"), BUDGETS["quick"])  # type: ignore[arg-type]
    own = compute_metrics(MeasuredRun(trained, BUDGETS["quick"]), [SecondStage])["SecondStage"]
    found = compute_metrics(stored, [SecondStage])["SecondStage"]
    assert found.keys() == own.keys()
    for name, figure in found.items():
        if name.startswith(("nll", "rate")):
            assert figure.value == pytest.approx(own[name].value, rel=1e-2)
        else:
            assert figure.value is None
            assert figure.reason.startswith("no decoder was given")
