"""Codes with positions, latent=[C,h,w]: the network knows the shape, all else sees a vector of D = C h w numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_cli import load_run
from vae_cli.axes.network import Conv, Network, ResNet
from vae_cli.config.build import build_experiment, build_model
from vae_cli.core.errors import UserError
from vae_cli.machine.memory import training_memory
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.runs.export import export

Compose = Callable[..., dict[str, Any]]
Ask = Callable[..., Any]

SMALL = {"conv": ["network.width=4", "network.hidden=16"], "resnet": ["network.width=4", "network.max_width=8"]}
CONV, RESNET = (["network=conv", *SMALL["conv"]], ["network=resnet", *SMALL["resnet"]])
NORMALIZED = [*CONV, "network.normalization=group"], [*CONV, "network.normalization=batch"]
NETWORKS = [CONV, *NORMALIZED, RESNET]
REACHED = {
    (8, 8): [(4, 4)],
    (28, 28): [(14, 14), (7, 7), (3, 3)],
    (29, 13): [(14, 6), (7, 3)],
    (32, 64): [(16, 32), (8, 16), (4, 8)],
}


def built(kind: str, **settings: Any) -> Network:
    return Conv(width=4, hidden=16, **settings) if kind == "conv" else ResNet(width=4, max_width=8, **settings)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(("size", "positions"), [(size, one) for size, found in REACHED.items() for one in found])
def test_networks_map_images_to_codes_with_positions_and_back(
    kind: str, size: tuple[int, int], positions: tuple[int, int]
) -> None:
    network: Any = built(kind)
    latent = (3, *positions)
    count = 3 * positions[0] * positions[1]
    raw = network.encoder((2, *size), latent, 2)(torch.rand(5, 2, *size))
    assert raw.shape == (5, 2 * count)
    assert network.decoder(latent, torch.zeros(4, *size))(torch.randn(5, count)).shape == (5, 4, *size)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("size", REACHED)
def test_other_positions_are_refused_with_those_that_the_network_reaches(kind: str, size: tuple[int, int]) -> None:
    network: Any = built(kind)
    typed = ", ".join(f"'latent=[3,{height},{width}]'" for height, width in REACHED[size])
    for positions in (size, (5, 5), (1, 4), (4, 1), (2, 2), REACHED[size][0][::-1]):
        if positions in REACHED[size]:
            continue
        with pytest.raises(UserError) as refused:
            network.encoder((1, *size), (3, *positions), 2)
        assert f"Type {typed}, or latent=" in str(refused.value)
        with pytest.raises(UserError, match=f"network={kind} halves images"):
            network.decoder((3, *positions), torch.zeros(1, *size))


@pytest.mark.parametrize("network", ["mlp", "linear", "conv", "resnet"])
@pytest.mark.parametrize(
    "words", ["sigma=shared prior=mixture", "regularizer=factor regularizer.hidden=16", "prior=flow"]
)
def test_one_position_is_a_vector(compose: Compose, network: str, words: str) -> None:
    found = []
    for latent in ("6", "[6,1,1]"):
        choice = [f"network={network}", *SMALL.get(network, []), *words.split(), f"latent={latent}"]
        experiment = build_experiment(compose(*choice))
        torch.manual_seed(0)
        for _ in range(2):
            experiment.optimizer.zero_grad()
            inference = experiment.model(experiment.splits.train.batch(torch.arange(32)))
            (inference.distortion + experiment.regularizer(inference)).mean().backward()
            experiment.optimizer.step()
        found.append({**experiment.model.state_dict(), "distortion": inference.distortion, "rate": inference.kl})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# Neighborhoods --------------------------------------------------------------------------------------------------------

STEPS = 2  # halvings of the images below: 32x32 pixels to 8x8 positions
LATENT = (2, 8, 8)


def neighborhood(position: int) -> tuple[int, int]:
    """The first pixel that a position depends on, and the pixel after the last, along an axis of the image.

    A 3x3 convolution maps the positions i - 1 to i + 1 to i, and a 4x4 convolution with stride 2 and padding 1 maps the
    pixels 2 i - 1 to 2 i + 2 to position i.
    """
    first, last = max(0, position - 1), min(7, position + 1)
    for _ in range(STEPS):
        first, last = 2 * first - 1, 2 * last + 2
    return max(0, first), min(32, last + 1)


def mask(row: int, column: int) -> Tensor:
    """The pixels around a position, (32, 32)."""
    found = torch.zeros(32, 32, dtype=torch.bool)
    found[slice(*neighborhood(row)), slice(*neighborhood(column))] = True
    return found


POSITIONS = [(0, 0), (3, 5), (7, 2)]


@pytest.mark.parametrize(("row", "column"), POSITIONS)
@pytest.mark.parametrize("channel", range(LATENT[0]))
def test_a_position_of_the_code_changes_the_pixels_around_it_and_no_others(row: int, column: int, channel: int) -> None:
    torch.manual_seed(0)
    decoder = Conv(width=4, hidden=16, activation="gelu").decoder(LATENT, torch.zeros(1, 32, 32)).double()
    z = torch.randn(1, 128, dtype=torch.float64)
    other = z.clone()
    other[0, (channel * 8 + row) * 8 + column] += 1
    changed = (decoder(other) != decoder(z))[0, 0]
    assert torch.equal(changed, mask(row, column))


@pytest.mark.parametrize(("row", "column"), POSITIONS)
def test_a_position_of_the_code_depends_on_the_pixels_around_it_and_no_others(row: int, column: int) -> None:
    torch.manual_seed(0)
    encoder = Conv(width=4, hidden=16, activation="gelu").encoder((1, 32, 32), LATENT, 2).double()
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    for part in encoder(x).chunk(2, -1):  # locations, log scales
        for channel in range(LATENT[0]):
            (gradient,) = torch.autograd.grad(part[0, (channel * 8 + row) * 8 + column], x, retain_graph=True)
            assert torch.equal(gradient[0, 0] != 0, mask(row, column))


@torch.no_grad()
def test_the_decoder_treats_all_positions_alike() -> None:
    """Codes shifted by one position decode to images shifted by 2^STEPS pixels, except at the border."""
    torch.manual_seed(0)
    decoder = Conv(width=4, hidden=16).decoder(LATENT, torch.zeros(1, 32, 32))
    z = torch.randn(1, *LATENT)
    image, shifted = (decoder(code.flatten(1)) for code in (z, z.roll(1, 3)))
    inside = slice(12, 24)
    torch.testing.assert_close(shifted[..., inside], image[..., 8:20], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(shifted[..., inside], image[..., inside], atol=1e-3)


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS, ids=" ".join)
@pytest.mark.parametrize(
    "words", ["sigma=learned", "sigma=shared prior=scaled_normal", "prior=vamp prior.components=9"]
)
def test_every_parameter_gets_a_gradient(compose: Compose, network: list[str], words: str) -> None:
    experiment = build_experiment(compose(*network, *words.split(), "latent=[2,4,4]"))
    inference = experiment.model(experiment.splits.train.batch(torch.arange(64)))
    (inference.distortion + experiment.regularizer(inference)).mean().backward()
    assert inference.z.shape == inference.posterior.mean.shape == (64, 32)
    for name, parameter in experiment.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("network", NETWORKS, ids=" ".join)
def test_state_survives_saving_and_loading(compose: Compose, network: list[str], tmp_path: Path) -> None:
    config = compose(*network, "network.spectral_norm=true", "sigma=shared", "latent=[2,4,4]")
    model = build_model(config, (1, 8, 8))
    with torch.no_grad():
        model(torch.rand(32, 1, 8, 8))  # running statistics
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1, "shape": [1, 8, 8], "model": model.state_dict()})
    again = build_model({**config, "seed": 1}, (1, 8, 8))
    again.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt")["model"])
    x = torch.rand(8, 1, 8, 8)
    means = [one.eval().decode(one.encode(x).mean).mean for one in (model, again)]
    assert torch.equal(*means)


@pytest.mark.parametrize("initialization", ["default", "glorot"])
@pytest.mark.parametrize("network", [CONV, RESNET], ids=" ".join)
@torch.no_grad()
def test_the_initial_locations_are_the_same_for_every_sigma(
    compose: Compose, network: list[str], initialization: str
) -> None:
    x = torch.rand(4, 1, 8, 8)
    learned, fixed = (
        build_model(compose(*network, sigma, f"network.initialization={initialization}", "latent=[2,4,4]"), (1, 8, 8))
        for sigma in ("sigma=learned", "sigma=fixed")
    )
    torch.testing.assert_close(learned.encode(x).mean, fixed.encode(x).mean)


@pytest.mark.parametrize("network", [CONV, RESNET], ids=" ".join)
def test_the_output_bias_is_that_of_a_vector_code(compose: Compose, network: list[str]) -> None:
    biases = []
    for latent in ("16", "[2,4,4]"):
        decoder: Any = build_experiment(compose(*network, f"latent={latent}")).model.decoder
        biases.append(decoder[-1].bias.detach())
    assert torch.equal(*biases)
    assert biases[0].abs().min() > 0


@pytest.mark.parametrize("network", [CONV, RESNET], ids=" ".join)
def test_the_memory_estimate_needs_no_values(compose: Compose, network: list[str]) -> None:
    config = compose(*network, "latent=[2,4,4]")
    estimates = []
    for place in ("cpu", "meta"):
        with torch.device(place):
            model = build_model(config, (1, 8, 8))
        estimates.append([training_memory(model, (1, 8, 8), images) for images in (1, 100)])
    assert estimates[0] == estimates[1]
    assert estimates[0][1] > estimates[0][0] > 0


def test_an_absurd_number_of_channels_is_refused(compose: Compose) -> None:
    words = ["network=conv", "latent=[6000,4,4]", "prior=mixture", "prior.components=10000000"]
    with pytest.raises(UserError, match=r"latent=\[6000, 4, 4\] .* would need"):
        build_experiment(compose(*words))


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep over two shapes and sigma, with network=conv, and a run with network=resnet."""
    from vae_cli.commands.train import train

    folder = tmp_path_factory.mktemp("spatial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep = ["latent=[2,4,4],[3,4,4]", "sigma=learned,fixed", "seed=0,1", "network=conv", "network.width=4"]
        train([*sweep, "epochs=2"], multirun=True)
        train(["latent=[2,4,4]", "network=resnet", "network.width=4", "epochs=1", "run_name=resnet"])
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_the_name_of_a_run_contains_the_shape(here: Path, ask: Ask) -> None:
    names = {path.name for path in (here / "runs/digits").iterdir()}
    assert {name.partition("_")[0] for name in names} == {"latent-2x4x4", "latent-3x4x4"}
    assert len(names) == 8
    listed = ask("runs", "--where", "latent=[2,4,4]").out
    assert listed.count("latent-2x4x4") == 4
    assert "latent-3x4x4" not in listed


@pytest.mark.parametrize("name", ["latent-2x4x4_network-conv_network.width-4", "resnet"])
def test_python_decodes_codes_of_both_shapes(here: Path, name: str) -> None:
    run = load_run(next((here / "runs").rglob(name)), device="cpu")
    x = run.splits.test.batch(torch.arange(6))
    z = run.encode(x).mean
    assert z.shape == (6, 32)
    shaped = z.unflatten(-1, run.config["latent"])
    assert torch.equal(run.decode(shaped).mean, run.decode(z).mean)
    assert run.decode(shaped.expand(3, *shaped.shape)).mean.shape == (3, 6, 1, 8, 8)
    assert run.sample(2).shape == (2, 1, 8, 8)
    for wrong in (z[0], shaped[0]):
        with pytest.raises(UserError, match=r"\(B, 32\) or \(B, 2, 4, 4\), .*pass z\[None\]"):
            run.decode(wrong)
    with pytest.raises(UserError, match=r"expects a batch of codes"):
        run.decode(torch.zeros(6, 2, 4, 5))
    assert "latent   2x4x4" in repr(run)


@pytest.mark.parametrize("name", ["latent-2x4x4_network-conv_network.width-4", "resnet"])
def test_the_exported_programs_equal_the_model(here: Path, name: str) -> None:
    run = load_run(next((here / "runs").rglob(name)), device="cpu")
    _, differences, _ = export(run, ["pt2"])
    assert max(differences.values()) <= 1e-5


@pytest.mark.parametrize(
    "words",
    [
        ["sample"],
        ["sample", "--from", "posterior"],
        ["sample", "--from", "mixture"],
        ["interpolate"],
        ["interpolate", "--traverse"],
        ["interpolate", "--path", "geodesic"],
        ["export", "--format", "pt2"],
    ],
    ids=" ".join,
)
def test_commands_accept_a_run_with_positions(here: Path, ask: Ask, words: list[str]) -> None:
    found = ask(words[0], "resnet", *words[1:])
    assert found.code == 0, found
    assert found.err == ""


STORED = {
    "[2, 4, 4]": "codes have no positions",
    "[1, 1, 1]": "does not match",
    "[1000000000, 1, 1]": "a product of at most 100000",
    **dict.fromkeys(["[2, 1]", "[0, 4, 4]", "[-2, -1, 1]", "['2', 1, 1]", "[true, 2, 1]", "[[2], 1, 1]"], "is damaged"),
    **dict.fromkeys([f"[0x1{9000 * '0'}, 1, 1]", "2x1x1"], "is damaged"),
}


@pytest.mark.parametrize("latent", STORED, ids=lambda latent: latent[:20])
def test_a_stored_shape_that_is_not_the_models_is_refused(place: Path, ask: Ask, latent: str) -> None:
    file = place / "runs/digits/a/config.yaml"
    text = file.read_text()
    assert text.count("latent: 2\n") == 2
    file.write_text(text.replace("latent: 2\n", "latent: [2, 1, 1]\n"))
    assert ask("sample", "a").code == 0
    file.write_text(text.replace("latent: 2\n", f"latent: {latent}\n"))
    for words in (["sample", "a"], ["compare", "runs/digits", "--reference", "nowhere"]):
        found = ask(*words)
        assert found.code in (1, 2), found
        assert found.err.count("vae: ") == 1, found
        assert "Traceback" not in found.err
        assert words[0] == "compare" or STORED[latent] in found.err
    assert ask("runs").code == 0


@pytest.mark.slow
def test_runs_with_different_shapes_are_compared(here: Path, ask: Ask) -> None:
    found = ask("compare", "runs/digits", "--profile", "quick", "--jobs", "1")
    assert found.code == 0, found
    assert "2x4x4" in found.out
    assert "3x4x4" in found.out
