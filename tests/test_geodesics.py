"""Geodesics of the decoder: laws of their shape and length, and `vae interpolate --path geodesic`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vae_cli import load_run
from vae_cli.commands.train import train
from vae_cli.config.build import build_model
from vae_cli.model import geodesics as module
from vae_cli.model.geodesics import Geodesics, geodesics
from vae_cli.runs import pictures

Ask = Callable[..., Any]


def as_images(points: Tensor) -> Tensor:
    return points[:, None, None]


def projected(z: Tensor) -> Tensor:
    """z -> z / |z|, onto the unit sphere."""
    return as_images(z / z.norm(dim=1, keepdim=True))


def globe(z: Tensor) -> Tensor:
    """Latitude and longitude -> a point of the unit sphere. A straight line of codes is no great circle."""
    latitude, longitude = z.unbind(1)
    east = latitude.cos()
    return as_images(torch.stack([east * longitude.cos(), east * longitude.sin(), latitude.sin()], 1))


def speeds(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return the distances between consecutive decoded codes, (P, steps - 1) for codes (P, steps, D)."""
    return decode(z.flatten(0, 1)).flatten(1).unflatten(0, z.shape[:2]).diff(dim=1).norm(dim=2)


def random_decoder(activation: type[nn.Module], latent: int = 6) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(latent, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 30)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2 / math.sqrt(layer.in_features))
    return nn.Sequential(*layers, nn.Unflatten(1, (1, 5, 6))).requires_grad_(False)


def check(decode: Callable[[Tensor], Tensor], found: Geodesics, a: Tensor, b: Tensor) -> None:
    """Check what holds for every decoder: fixed ends, even spacing, and the order of the lengths."""
    for path in (found.shortest, found.straight):
        assert torch.equal(path.z[:, 0], a)
        assert torch.equal(path.z[:, -1], b)
        steps = speeds(decode, path.z)
        assert (steps.sum(1) <= path.length * (1 + 1e-4)).all()  # a chord is not longer than its arc
        assert (steps.amax(1) <= path.length / steps.shape[1] * (1 + 1e-3)).all()
    assert (found.shortest.length <= found.straight.length).all()
    assert (found.distance <= found.shortest.length * (1 + 1e-5)).all()


def test_under_a_linear_decoder_it_is_the_straight_line_at_constant_speed(compose: Callable[..., Any]) -> None:
    """The mean of a Gaussian likelihood is the decoder's output, so network=linear is linear from code to image."""
    model = build_model(compose("network=linear", "latent=5"), (1, 8, 8)).eval()
    torch.manual_seed(0)
    a, b = 3 * torch.randn(2, 4, 5)

    def decode(z: Tensor) -> Tensor:
        return model.decode(z).mean

    found = geodesics(decode, a, b, 9)
    check(decode, found, a, b)
    line = torch.lerp(a, b, torch.linspace(0, 1, 9)[:, None, None]).transpose(0, 1)
    torch.testing.assert_close(found.shortest.z, line, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.straight.z, line, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.shortest.length, found.distance, rtol=1e-5, atol=0)
    assert found.reached.all()


@pytest.mark.parametrize("angle", [0.3, 1.5, 2.8])
def test_on_a_sphere_it_is_a_great_circle_whose_length_is_the_angle(angle: float) -> None:
    a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.5 * math.cos(angle), 0.5 * math.sin(angle), 0.0]])
    found = geodesics(projected, a, b, 7)
    check(projected, found, a, b)
    assert float(found.shortest.length) == pytest.approx(angle, rel=1e-3)
    assert float(found.distance) == pytest.approx(2 * math.sin(angle / 2), rel=1e-5)
    turned = projected(found.shortest.z[0]).flatten(1)
    angles = torch.linspace(0, angle, 7)
    expected = torch.stack([angles.cos(), angles.sin(), torch.zeros(7)], 1)
    torch.testing.assert_close(turned, expected, atol=2e-3, rtol=0)


def test_on_the_globe_it_leaves_the_straight_line_for_the_great_circle() -> None:
    """At 60 degrees north, the great circle over 120 degrees of longitude passes close to the pole."""
    a, b = torch.tensor([[math.pi / 3, 0.0]]), torch.tensor([[math.pi / 3, 2 * math.pi / 3]])
    found = geodesics(globe, a, b, 11)
    check(globe, found, a, b)
    ends = globe(torch.cat([a, b])).flatten(1)
    angle = float((ends[0] @ ends[1]).acos())
    assert float(found.straight.length) == pytest.approx(math.pi / 3, rel=1e-4)  # cos(60 degrees) * 120 degrees
    assert float(found.shortest.length) == pytest.approx(angle, rel=2e-3)
    points = globe(found.shortest.z[0]).flatten(1)
    normal = torch.linalg.cross(ends[0], ends[1])
    assert (points @ normal / normal.norm()).abs().max() < 5e-3  # all on one plane through the center
    assert found.reached.all()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
def test_it_is_shorter_than_the_straight_line(activation: type[nn.Module]) -> None:
    decode = random_decoder(activation)
    a, b = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    found = geodesics(decode, a, b, 12)
    check(decode, found, a, b)
    assert (found.shortest.length < 0.98 * found.straight.length).all()
    again = geodesics(decode, a[1:2], b[1:2], 12)  # pairs are independent, and nothing is random
    assert torch.equal(again.shortest.z[0], found.shortest.z[1])
    assert torch.equal(again.shortest.length[0], found.shortest.length[1])


def test_there_is_no_shorter_path_nearby() -> None:
    """Every smooth change of a geodesic that keeps its ends makes the decoded path longer."""
    decode = random_decoder(nn.Tanh)
    a, b = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(2))
    z = geodesics(decode, a, b, 200).shortest.z
    least = float(speeds(decode, z).sum())
    bump = torch.linspace(0, math.pi, 200).sin()[:, None]
    for direction in torch.randn(20, 6, generator=torch.Generator().manual_seed(3)):
        assert float(speeds(decode, z + 0.1 * bump * direction).sum()) > least * (1 - 1e-4)


def test_with_many_latent_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the metric, the search takes longer but ends at about the same length."""
    decode = random_decoder(nn.Tanh)
    a, b = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    usual = geodesics(decode, a, b, 5)
    monkeypatch.setattr(module, "METRIC_DIMENSIONS", 5)
    found = geodesics(decode, a, b, 5)
    check(decode, found, a, b)
    torch.testing.assert_close(found.shortest.length, usual.shortest.length, rtol=0.02, atol=0)


@pytest.mark.parametrize("steps", [2, 3, 100])
def test_the_length_does_not_depend_on_the_number_of_steps(steps: int) -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    found = geodesics(globe, a, b, steps)
    assert found.shortest.z.shape == (1, steps, 2)
    assert torch.equal(found.shortest.length, geodesics(globe, a, b, 10).shortest.length)


def test_without_any_distance_the_path_is_the_straight_line() -> None:
    a, b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 4.0], [1.0, 1.0]])
    found = geodesics(lambda z: torch.ones(len(z), 1, 2, 2) + 0 * z.sum(), a, b, 5)  # a decoder that ignores the code
    assert found.shortest.length.tolist() == found.distance.tolist() == [0, 0]
    torch.testing.assert_close(found.shortest.z[0], torch.lerp(a[0], b[0], torch.linspace(0, 1, 5)[:, None]))
    same = geodesics(globe, a[1:], a[1:], 4)
    assert torch.equal(same.shortest.z, a[1:].expand(1, 4, 2))
    assert float(same.shortest.length) == 0


def test_a_search_that_is_cut_short_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = random_decoder(nn.ReLU)
    a, b = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "ROUNDS", 1)
    found = geodesics(decode, a, b, 12)
    assert not found.reached.any()
    check(decode, found, a, b)


# The command ----------------------------------------------------------------------------------------------------------

RUNS = {
    "mlp": ["sigma=learned"],
    "point": ["sigma=deterministic", "likelihood=bernoulli"],
    "conv": ["network=conv", "network.width=4", "network.hidden=16", "prior=scaled_normal", "likelihood=laplace"],
    "resnet": ["network=resnet", "network.width=4", "likelihood=discretized_logistic", "prior=mixture"],
    "linear": ["network=linear", "likelihood=continuous_bernoulli"],
    "low": ["precision=bfloat16", "sigma=fixed", "prior=vamp", "prior.components=5"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a short run of each kind and return the folder above runs/."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in RUNS.items():
            hidden = ["network.hidden=[32]"] if not any("network=" in word for word in words) else []
            train([*words, *hidden, "epochs=2", "latent=4", f"run_name={name}"])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, runs: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    words = ["interpolate", name, "--path", "geodesic", "--pair", "0,1", "--pair", "5,2", "--steps", "6", "--gif"]
    found = ask(*words, "--out", str(tmp_path / "x.png"))
    assert found.code == 0, found.err
    assert "did not converge" not in found.out
    arrays = np.load(tmp_path / "x.npz", allow_pickle=False)
    run = load_run(name, device="cpu")
    ends = run.encode(run.splits.test.batch(torch.tensor([0, 1, 5, 2]))).mean.reshape(2, 2, -1).numpy()
    for prefix in ("", "straight_"):
        np.testing.assert_allclose(arrays[f"{prefix}z"][:, [0, -1]], ends, rtol=1e-4, atol=1e-5)
        assert arrays[f"{prefix}images"].shape == (2, 6, 1, 8, 8)
        decoded = run.decode(torch.from_numpy(arrays[f"{prefix}z"].reshape(12, -1))).mean.reshape(2, 6, 1, 8, 8)
        # A batch of another size may be rounded differently.
        np.testing.assert_allclose(arrays[f"{prefix}images"], decoded, atol=0.02 if name == "low" else 1e-5)
    assert (arrays["distance"] <= arrays["length"] * (1 + 1e-5)).all()
    assert (arrays["length"] <= arrays["straight_length"]).all()
    for pair, numbers in {"0 to 1": 0, "5 to 2": 1}.items():
        lengths = [arrays[key][numbers] for key in ("length", "straight_length", "distance")]
        assert " ".join([pair, *(f"{length:.3f}" for length in lengths)]) in " ".join(found.out.split())
    with Image.open(tmp_path / "x.png") as picture, Image.open(tmp_path / "x.gif") as animation:
        assert picture.height > 4 * 64  # two rows per pair
        assert animation.n_frames >= 6
    ask(*words, "--out", str(tmp_path / "y.png"))
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()


def test_a_search_in_float32_leaves_the_precision_of_the_run(runs: Path) -> None:
    run = load_run("low", device="cpu", runs_dir=runs / "runs")
    rendered = pictures.geodesic_strips(run, pictures.ends_in_test_set(run, [[0, 1]]), 4, 0, gif=False)
    assert run.model.precision == "bfloat16"
    run.model.precision = "float32"
    images = run.decode(rendered.arrays["z"][0]).mean.double().flatten(1)
    assert images.diff(dim=0).norm(dim=1).sum() <= float(rendered.arrays["length"]) * (1 + 1e-4)
    steps = images.diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, steps.mean().expand(3), rtol=0.05, atol=0)


def test_other_ways_to_choose_images(runs: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    Image.new("L", (8, 8), 99).save(tmp_path / "mine.png")
    file = ["--file", str(tmp_path / "mine.png")]
    for words in (["--count", "2"], ["--classes", "3,8", "--count", "2"], [*file, *file]):
        found = ask("interpolate", "linear", "--path", "geodesic", "--steps", "3", *words)
        assert found.code == 0, found.err
        assert "geodesic_" in found.out
        assert "ends" in found.out


def test_what_it_cannot_be_combined_with(runs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    found = ask("interpolate", "mlp", "--path", "geodesic", "--grid", "0,1,2,3")
    assert found.code == 2
    assert "--grid cannot be combined with --path geodesic" in found.err
    assert "choose --path linear, slerp or norm-corrected" in found.err
    assert ask("interpolate", "mlp", "--path", "geodesic", "--traverse").code == 2


def test_a_search_that_is_cut_short_is_said(
    runs: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)  # of which no round falls short
    found = ask("interpolate", "mlp", "--path", "geodesic", "--pair", "0,1",
                "--steps", "3", "--out", str(tmp_path))  # fmt: skip
    assert found.code == 0, found.err
    assert "did not converge for 0 to 1" in found.out


def test_the_picture_shows_as_many_pairs_as_fit(
    runs: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr("vae_cli.runs.pictures.COMPARED", 20)
    words = ["--path", "geodesic", "--count", "3", "--steps", "3", "--out", str(tmp_path / "x")]
    found = ask("interpolate", "linear", *words)
    assert "The picture shows 2 of 3 pairs" in found.out
    assert len(np.load(next(tmp_path.glob("x/*.npz")))["images"]) == 3
