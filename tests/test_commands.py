"""`vae sample`, `vae interpolate` and `vae runs` on runs of every sigma mode, and the same from Python."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vae_cli import load_run
from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.core.errors import Failure, UserError
from vae_cli.model.distributions import Delta, location
from vae_cli.runs import pictures
from vae_cli.runs.codes import between
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import RunDir
from vae_cli.runs.mixture import fit_mixture

MODES = list(catalog.groups()["sigma"].choices)
Vae = Callable[..., int]


def chosen(sigma: str) -> list[str]:
    """Return the overrides for a choice of sigma; codes on a sphere need a prior of their own."""
    return [f"sigma={sigma}", *(["prior=sphere"] if sigma == "power_spherical" else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a short run of each sigma mode and return the folder above runs/."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for sigma in MODES:
            train([*chosen(sigma), "epochs=3", "network.hidden=[32]", "latent=5", f"run_name={sigma}"])
    return folder


@pytest.fixture
def vae(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Vae:
    monkeypatch.chdir(runs)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vae", *words])
        return run_command()

    return call


@pytest.mark.parametrize("sigma", MODES)
@pytest.mark.parametrize("source", ["prior", "posterior", "aggregate", "mixture"])
def test_sample(vae: Vae, runs: Path, sigma: str, source: str, tmp_path: Path) -> None:
    asked = {"posterior": ["--images", "0,2-3", "--draws", "4"], "mixture": ["--count", "9", "--components", "3"]}
    words = ["sample", sigma, "--from", source, *asked.get(source, ["--count", "9"])]
    assert vae(*words, "--out", str(tmp_path / "one.png")) == 0
    assert vae(*words, "--out", str(tmp_path / "two")) == 0
    Image.open(tmp_path / "one.png").verify()
    arrays = np.load(tmp_path / "one.npz", allow_pickle=False)
    again = np.load(next((tmp_path / "two").glob(f"{source}_*.npz")), allow_pickle=False)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    if source == "posterior":
        assert arrays["images"].shape == (3, 4, 1, 8, 8)
        assert list(arrays["index"]) == [0, 2, 3]
        assert (np.ptp(arrays["z"], axis=1).max() > 0) == (sigma != "deterministic")
    else:
        assert arrays["z"].shape == (9, 5)
        assert arrays["images"].shape == (9, 1, 8, 8)
        run = load_run(runs / "runs" / sigma)
        torch.testing.assert_close(run.decode(torch.from_numpy(arrays["z"])).mean.numpy(), arrays["images"])


def test_samples_without_noise_come_from_a_mixture(vae: Vae, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("sample", "deterministic") == 0
    assert "mixture.png" in capsys.readouterr().out
    assert vae("sample", "fixed") == 0
    assert "prior.png" in capsys.readouterr().out


def test_temperature_and_draw(vae: Vae, tmp_path: Path) -> None:
    for name, flags in {"cold": ["--temperature", "0"], "mean": [], "draw": ["--draw"]}.items():
        assert vae("sample", "learned", "--count", "6", "--out", str(tmp_path / f"{name}.png"), *flags) == 0
    cold, mean, draw = (np.load(tmp_path / f"{name}.npz") for name in ("cold", "mean", "draw"))
    assert np.ptp(cold["images"], axis=0).max() == 0
    assert np.array_equal(mean["z"], draw["z"])
    assert not np.array_equal(mean["images"], draw["images"])


@pytest.mark.parametrize("sigma", MODES)
@pytest.mark.parametrize("path", ["linear", "slerp", "norm-corrected"])
def test_interpolate(vae: Vae, runs: Path, sigma: str, path: str, tmp_path: Path) -> None:
    words = [
        "--pair",
        "0,1",
        "--pair",
        "5,2",
        "--path",
        path,
        "--steps",
        "7",
        "--gif",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert vae("interpolate", sigma, *words) == 0
    arrays = np.load(tmp_path / "x.npz", allow_pickle=False)
    assert arrays["images"].shape == (2, 7, 1, 8, 8)
    run = load_run(runs / "runs" / sigma)
    ends = location(run.encode(run.splits.test.batch(torch.tensor([0, 1, 5, 2])))).reshape(2, 2, -1).numpy()
    np.testing.assert_allclose(arrays["z"][:, [0, -1]], ends, rtol=1e-4, atol=1e-5)
    assert Image.open(tmp_path / "x.gif").n_frames >= 7


def test_other_ways_to_interpolate(vae: Vae, runs: Path, tmp_path: Path) -> None:
    assert vae("interpolate", "learned", "--classes", "3,8", "--count", "2", "--out", str(tmp_path / "a.png")) == 0
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 11, 1, 8, 8)
    test = load_run(runs / "runs/learned").splits.test
    rows = {
        image.numpy().tobytes(): int(n)
        for image, n in zip(
            test.batch(torch.arange(len(test))), test.batch_labels(torch.arange(len(test))), strict=True
        )
    }
    assert [[rows[end.tobytes()] for end in pair] for pair in np.load(tmp_path / "a.npz")["ends"]] == [[3, 8], [3, 8]]
    assert vae("interpolate", "learned", "--grid", "0,1,2,3", "--steps", "4", "--out", str(tmp_path / "b.png")) == 0
    assert np.load(tmp_path / "b.npz")["images"].shape == (4, 4, 1, 8, 8)
    for sigma in MODES:
        assert vae("interpolate", sigma, "--traverse", "--steps", "5", "--out", str(tmp_path / "c.png")) == 0
        assert np.load(tmp_path / "c.npz")["images"].shape == (5, 5, 1, 8, 8)
    Image.fromarray(np.full((30, 20, 3), 200, np.uint8)).save(tmp_path / "mine.jpg")
    words = ["--file", str(tmp_path / "mine.jpg"), "--file", str(tmp_path / "a.png"), "--out", str(tmp_path / "d.png")]
    assert vae("interpolate", "fixed", *words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "nowhere"], "There is no run 'nowhere'"),
        (["sample", "fixd"], "Did you mean 'fixed'"),
        (["sample", "e"], "matches"),
        (["sample", "."], f"contains {len(MODES)} runs"),
        (["sample", "fixed", "--from", "posterior", "--images", "0,x"], "--images 0,x is not a list"),
        (["sample", "fixed", "--from", "posterior", "--images", "297"], "there are 297 test images"),
        (["sample", "fixed", "--from", "mixture", "--components", "5000"], "5000"),
        (["sample", "fixed", "--from", "priors"], "priors"),
        (["sample", "fixed", "--count", "0"], "--count"),
        (["interpolate", "fixed", "--pair", "0"], "give exactly 2"),
        (["interpolate", "fixed", "--pair", "0,1", "--traverse"], "cannot be combined"),
        (["interpolate", "fixed", "--grid", "0,1"], "give exactly 4"),
        (["interpolate", "fixed", "--classes", "3,11"], "no class '11'"),
        (["interpolate", "fixed", "--classes", "3"], "give exactly two"),
        (["interpolate", "fixed", "--file", "no.png", "--file", "no.png"], "no.png"),
        (["interpolate", "fixed", "--file", "no.png"], "each pair needs two images"),
        (["interpolate", "fixed", "--steps", "1"], "--steps"),
        (["sample", "fixed", "--device", "cuda:9"], "cuda:9"),
        (["runs", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(vae: Vae, runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    before = sorted(runs.rglob("*"))
    assert vae(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_vae_runs_lists_all_runs(vae: Vae, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("runs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(name in lines[0] for name in ("run", "status", "epochs", "distortion", "rate", "elbo", "seconds"))
    assert sorted(line.split()[0] for line in lines[1:] if line.strip()) == sorted(MODES)
    assert all("finished" in line for line in lines[1:] if line.strip())


def test_rows_are_labeled_in_pictures_and_animations(
    vae: Vae, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[Any] = []

    def grid(images: torch.Tensor, columns: int, **options: Any) -> Any:
        labels.append(options.get("row_labels"))
        return whole(images, columns, **options)

    whole = pictures.grid
    monkeypatch.setattr(pictures, "grid", grid)
    for name in ("1", "2", "a" * 40):
        Image.new("L", (8, 8), 99).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("1", "2", "1", "a" * 40)]
    flags = [word for file in files for word in ("--file", file)]
    assert vae("interpolate", "fixed", *flags, "--out", str(tmp_path / "x")) == 0
    assert labels == [["1 to 2", f"1 to {'a' * 23}…"]]
    labels.clear()
    assert vae("interpolate", "fixed", "--traverse", "--steps", "5", "--gif", "--out", str(tmp_path / "y")) == 0
    assert len(labels) == 6  # five frames and the picture
    assert all(one == labels[0] and len(one) == 5 and one[0].startswith("z") for one in labels)


def test_runs_are_sorted_and_selected(vae: Vae, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*words: str) -> list[str]:
        assert vae("runs", *words) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    test = {name: RunDir(runs / "runs" / name).summary()["test"] for name in MODES}
    elbo = sorted((name for name in MODES if "elbo" in test[name]), key=lambda name: -test[name]["elbo"])
    without = sorted(set(MODES) - set(elbo))
    assert listed("--sort", "elbo") == [*elbo, *without]
    assert listed("--sort", "elbo", "--reverse") == [*elbo[::-1], *without[::-1]]
    assert listed("--sort", "distortion") == sorted(MODES, key=lambda name: test[name]["distortion"])
    assert listed("--where", "sigma=fixed") == ["fixed"]
    assert listed("--where", "latent=5.0", "--where", "status=finished", "--where", "network.hidden=[32]") == MODES
    for condition, said in {
        "sigmma=fixed": "no run has a setting 'sigmma'. Did you mean 'sigma'?",
        "sigma=fixd": f"Did you mean 'fixed'? Values of sigma: {', '.join(sorted(MODES))}",
        "sigma": "for example --where sigma=fixed",
    }.items():
        assert vae("runs", "--where", condition) == 2
        assert said in capsys.readouterr().err
    assert vae("runs", "--where", "sigma=learned", "--where", "sigma.value=1.0") == 2
    assert "No run has all of these settings: sigma=learned, sigma.value=1.0" in capsys.readouterr().err


def test_folders_that_cannot_be_read_are_named(
    vae: Vae, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(folder: Path, onerror: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", f"{folder}/secret\x1b[31m"))
        yield from [(str(folder / "fixed"), [], ["config.yaml"])]

    monkeypatch.setattr("vae_cli.runs.find.os.walk", walk)
    assert vae("runs") == 0
    output = capsys.readouterr()
    assert "fixed" in output.out
    assert output.err == "warning: runs/secret\\x1b[31m cannot be read: Permission denied\n"


def test_runs_are_listed_on_two_lines_if_the_terminal_is_narrow(
    vae: Vae, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "network.hidden-32_sigma-fixed_optimizer.weight-decay-0.5"
    shutil.copytree(runs / "runs" / "fixed", tmp_path / name)
    for variable, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(variable, value)
    assert vae("runs", str(tmp_path)) == 0
    first, second = (re.sub(r"\x1b\[[\d;]*m", "", line) for line in capsys.readouterr().out.splitlines())
    assert first == name
    assert re.fullmatch(r"  finished  epochs 3  distortion \S+  rate \S+  elbo \S+  seconds \S+", second)
    monkeypatch.setenv("COLUMNS", "200")
    assert vae("runs", str(tmp_path)) == 0
    assert name in capsys.readouterr().out.splitlines()[1].split()[0]


def test_damaged_and_unfinished_runs(vae: Vae, runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, damage in {
        "empty": b"",
        "cut": (runs / "runs/fixed/checkpoint.pt").read_bytes()[:2000],
        "text": b"no",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_bytes((runs / "runs/fixed/config.yaml").read_bytes())
        (folder / "checkpoint.pt").write_bytes(damage)
        assert vae("sample", str(folder)) == 1
        assert "damaged" in capsys.readouterr().err
    (folder / "checkpoint.pt").unlink()
    assert vae("sample", str(folder)) == 2
    assert "To train the run, repeat its vae train command" in capsys.readouterr().err
    (folder / "config.yaml").write_text("a: [")
    assert vae("sample", str(folder)) == 1
    (folder / "summary.json").write_text("{")
    assert vae("runs", str(tmp_path)) == 0
    assert "damaged" in capsys.readouterr().out
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert vae("sample", str(empty)) == 2


def test_a_newer_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((runs / "runs/fixed/config.yaml").read_bytes())
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(Failure, match="format 99"):
        load_run(tmp_path)


@pytest.mark.parametrize("sigma", MODES)
def test_from_python(runs: Path, sigma: str) -> None:
    run = load_run(sigma, runs_dir=runs / "runs", device="cpu")
    x = run.splits.test.batch(torch.arange(4))
    posterior = run.encode(x)
    assert posterior.batch_shape == (4,)
    assert posterior.event_shape == (5,)
    assert isinstance(posterior, Delta) == (sigma == "deterministic")
    likelihood = run.decode(posterior.sample())
    assert likelihood.mean.shape == x.shape
    assert likelihood.log_prob(x).shape == (4,)
    assert torch.equal(run.sample(7), run.sample(7))
    assert run.sample(7).shape == (7, 1, 8, 8)
    with pytest.raises(UserError, match="0 or more, not -1"):
        run.sample(-1)
    eight_bit = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(run.encode(eight_bit).mean, posterior.mean)


def test_find_run(runs: Path) -> None:
    assert find_run("shar", runs / "runs") == runs / "runs/shared"
    assert find_run(str(runs / "runs/shared"), Path("nowhere")) == runs / "runs/shared"
    newest = find_run("latest", runs / "runs")
    assert newest == runs / "runs" / MODES[-1]
    with pytest.raises(UserError, match="Train one first"):
        find_run("latest", runs / "nothing")


@pytest.mark.parametrize("components", [1, 3])
def test_a_mixture_recovers_the_distribution_of_its_codes(components: int) -> None:
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 0.9]])[:components]
    codes = centers[torch.arange(6000) % components] + torch.randn(6000, 2) @ torch.tensor([[0.1, 0.05], [0.0, 0.01]])
    fitted = fit_mixture(codes, components)
    torch.testing.assert_close(fitted.weights, torch.full((components,), 1 / components).double(), atol=0.01, rtol=0)
    drawn = fitted.draw(60_000)
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.3, rtol=0.02)
    torch.testing.assert_close(drawn.T.cov(), codes.T.cov(), atol=2e-3, rtol=0.05)
    at_means = fitted.draw(100, temperature=0.0)
    assert len(at_means.unique(dim=0)) <= components


def test_paths() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), 2 * torch.randn(3, 8)
    for path in ("linear", "slerp", "norm-corrected"):
        z = between(a, b, 5, path)  # type: ignore[arg-type]
        assert z.shape == (5, 3, 8)
        torch.testing.assert_close(z[0], a)
        torch.testing.assert_close(z[-1], b)
    torch.testing.assert_close(between(a, b, 3, "linear")[1], (a + b) / 2)
    middle = between(a, b, 3, "norm-corrected")[1]
    torch.testing.assert_close(middle.norm(dim=1), (a.norm(dim=1) + b.norm(dim=1)) / 2)
    turned = between(a, b, 3, "slerp")[1]
    cosines = [torch.cosine_similarity(turned, end) for end in (a, b)]
    torch.testing.assert_close(cosines[0], cosines[1])
    torch.testing.assert_close(between(a, a, 4, "slerp")[2], a)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "fixed", "--draws", "3"], "--draws has no effect with --from prior"),
        (["sample", "fixed", "--from", "posterior", "--count", "3"], "--count has no effect"),
        (["sample", "fixed", "--from", "aggregate", "--components", "3"], "--components has no effect"),
        (["interpolate", "fixed", "--pair", "0,1", "--count", "3"], "--count has no effect with --pair"),
        (["interpolate", "fixed", "--span", "2"], "--span has no effect without --traverse"),
        (["interpolate", "fixed", "--traverse", "--path", "slerp"], "--path has no effect with --traverse"),
        (["interpolate", "fixed", "--steps", "100000"], "--steps 100000: must be less than or equal to 1000"),
        (["sample", "fixed", "--count", "100000000000"], "--count 100000000000 would need"),
        (["sample", "fixed", "--from", "poserior"], "Did you mean 'posterior'?"),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(
    vae: Vae, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vae(*words) == 2
    assert said in capsys.readouterr().err


def test_other_options_do_not_overwrite_earlier_output(vae: Vae, tmp_path: Path) -> None:
    questions = [
        ["sample", "fixed"],
        ["sample", "fixed", "--seed", "1"],
        ["sample", "fixed", "--temperature", "0.5", "--draw"],
        ["interpolate", "fixed", "--pair", "0,1"],
        ["interpolate", "fixed", "--pair", "0,2"],
        ["interpolate", "fixed", "--classes", "3,8"],
        ["interpolate", "fixed", "--traverse"],
    ]
    for words in questions:
        assert vae(*words, "--out", str(tmp_path)) == 0
    assert len(list(tmp_path.glob("*.png"))) == len(questions)


def test_one_draw_differs_from_the_mean_code(vae: Vae, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("sample", "fixed", "--from", "posterior", "--draws", "1", "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "one decoded draw from its posterior" in said
    assert float(said.partition("decoded mean by ")[2].split()[0]) > 0.001


def test_a_malformed_file_does_not_hide_the_other_runs(
    vae: Vae, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    odd = ['{"epoch": 1}', "[]", "\udcff", "3"]
    for run, text in zip(MODES, odd, strict=False):
        (tmp_path / "runs" / run / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "runs" / "fixed" / "summary.json").write_text('{"test": {"rate": "high"}}')
    assert vae("runs") == 0
    assert capsys.readouterr().out.count("damaged") == 1


def test_missing_best_weights_are_reported(
    vae: Vae, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "fixed" / "best.pt").unlink()
    with pytest.raises(Failure, match=r"best\.pt is missing\. To load the newest weights instead, type --weights last"):
        load_run(tmp_path / "runs" / "fixed")
    load_run(tmp_path / "runs" / "fixed", weights="last")


def test_brackets_in_a_name_are_printed_literally(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vae", "train", "epochs=1", "network.hidden=[8]", 'run_name="y[/red]"'])
    assert run_command() == 0
    assert "runs/y[/red]" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["vae", "runs"])
    assert run_command() == 0
    assert "y[/red]" in capsys.readouterr().out
