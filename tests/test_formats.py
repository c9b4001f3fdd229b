"""Runs of every format that was ever released: formats/<number>/<run>/ stay as they were written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vae_cli import load_run
from vae_cli.axes.regularizer import KL
from vae_cli.runs.checkpoint import CHECKPOINT_FORMAT, load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.validation import evaluate_split

FORMATS = Path(__file__).parent / "formats"
RUNS = sorted(path.parent.relative_to(FORMATS) for path in FORMATS.rglob("checkpoint.pt"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds copies of all these runs, in which one stands."""
    shutil.copytree(FORMATS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_a_run_of_every_format() -> None:
    assert {path.parts[0] for path in RUNS} == {str(number + 1) for number in range(CHECKPOINT_FORMAT)}
    for path in RUNS:
        assert load_checkpoint(FORMATS / path / "checkpoint.pt")["format"] == int(path.parts[0])


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_its_weights_still_mean_the_same(path: Path, here: Path) -> None:
    run = load_run(f"runs/{path}", device="cpu")
    measured = evaluate_split(run.model, KL(), run.splits.test, run.config["seed"], run.device)
    written = RunDir(run.path).summary()["test"]
    assert measured["distortion"] == pytest.approx(written["distortion"], rel=1e-4)
    assert measured["loss"] == pytest.approx(written["loss"], rel=1e-4)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_command_still_reads_it(path: Path, here: Path, ask: Callable) -> None:  # type: ignore[type-arg]
    run = f"runs/{path}"
    for words in (
        ["sample", run, "--count", "4"],
        ["interpolate", run],
        ["evaluate", run, "--quick"],
        ["runs", "runs"],
        ["train", "--repeat", run],
    ):
        found = ask(*words)
        assert found.code == 0, (words, found.err)
    # The run goes on, and a repetition of it comes to the same weights on any machine, but for the last bits.
    sigma = RunDir(here / run).config()["choices"]["sigma"]
    found = ask("train", f"run_name={path}", "epochs=3", "network.hidden=[4]", "latent=2", f"sigma={sigma}")
    assert found.code == 0, found.err
    assert "Going on at step" in found.err
    assert RunDir(here / run).summary()["epoch"] == 3
    repeated = json.loads((here / f"{run}_repeat" / "summary.json").read_text())
    assert repeated["test"]["loss"] == pytest.approx(RunDir(FORMATS / path).summary()["test"]["loss"], rel=1e-2)


def test_a_newer_format_is_refused_in_words(here: Path, ask: Callable) -> None:  # type: ignore[type-arg]
    import torch

    run = here / "runs" / RUNS[0]
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "format": CHECKPOINT_FORMAT + 1}, run / "best.pt")
    found = ask("sample", str(run))
    assert found.code == 1
    assert f"knows formats up to {CHECKPOINT_FORMAT}. Install a newer vae" in found.err
