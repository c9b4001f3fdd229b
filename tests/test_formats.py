"""Runs in every checkpoint format that was released, in formats/<number>/<run>/. Their files never change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vae_cli import load_run
from vae_cli.axes.regularizer import Regularizer
from vae_cli.axes.schedule import Schedule
from vae_cli.config.instantiate import build
from vae_cli.config.naming import flatten
from vae_cli.runs.checkpoint import CHECKPOINT_FORMAT, load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.validation import evaluate_split

Ask = Callable[..., Any]

FORMATS = Path(__file__).parent / "formats"
RUNS = sorted(path.parent.relative_to(FORMATS) for path in FORMATS.rglob("checkpoint.pt"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with copies of all these runs in runs/."""
    shutil.copytree(FORMATS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def overrides(config: dict[str, Any]) -> list[str]:
    """Return the overrides that a user would type for this configuration: its choices and all settings."""
    words = [f"{'+' * ('@' in group)}{group}={choice}" for group, choice in config["choices"].items()]
    for key, value in flatten({key: value for key, value in config.items() if key != "choices"}).items():
        if not key.endswith("_target_"):
            words.append(f"{key}={json.dumps(value)}")
    return words


def test_there_is_a_run_in_every_format() -> None:
    assert {path.parts[0] for path in RUNS} == {str(number + 1) for number in range(CHECKPOINT_FORMAT)}
    for path in RUNS:
        assert load_checkpoint(FORMATS / path / "checkpoint.pt")["format"] == int(path.parts[0])


def test_every_choice_of_sigma_and_a_schedule_are_among_the_runs() -> None:
    choices = [RunDir(FORMATS / path).config()["choices"] for path in RUNS]
    assert {words["sigma"] for words in choices} == {"learned", "shared", "fixed", "deterministic"}
    assert any("schedule@regularizer.beta" in words for words in choices)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_weights_keep_their_meaning(path: Path, here: Path) -> None:
    run = load_run(f"runs/{path}", device="cpu")
    summary = RunDir(run.path).summary()
    regularizer = build(run.config["regularizer"], "regularizer", Regularizer)
    for module in regularizer.modules():
        if isinstance(module, Schedule):
            module.advance(summary["epoch"] * (summary["step"] - 1) / summary["step"])  # as before the last step
    measured = evaluate_split(run.model, regularizer, run.splits.test, run.config["seed"], run.device)
    written = summary["test"]
    assert set(written) <= set(measured)
    for name in ("distortion", "penalty", "loss"):
        assert measured[name] == pytest.approx(written[name], rel=1e-4)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_command_still_reads_it(path: Path, here: Path, ask: Ask) -> None:
    run = f"runs/{path}"
    for words in (
        ["sample", run, "--count", "4"],
        ["interpolate", run],
        ["evaluate", run, "--quick"],
        ["runs", "runs"],
    ):
        found = ask(*words)
        assert found.code == 0, (words, found.err)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_it_is_finished_and_can_be_trained_further(path: Path, here: Path, ask: Ask) -> None:
    typed = [*overrides(RunDir(here / "runs" / path).config()), f"run_name={path}"]
    found = ask("train", *typed)
    assert found.code == 0, found.err
    assert f"runs/{path} is finished; skipped" in found.out
    found = ask("train", *typed, "epochs=3")
    assert found.code == 0, found.err
    assert f"Resuming runs/{path} at step 42" in found.err
    assert RunDir(here / "runs" / path).summary()["epoch"] == 3


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_repeating_it_gives_the_same_weights(path: Path, here: Path, ask: Ask) -> None:
    """On another machine the last bits may differ."""
    found = ask("train", "--repeat", f"runs/{path}")
    assert found.code == 0, found.err
    repeated = RunDir(here / f"runs/{path}_repeat").summary()
    assert repeated["test"]["loss"] == pytest.approx(RunDir(FORMATS / path).summary()["test"]["loss"], rel=1e-2)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_it_can_be_compared_with_a_new_run(path: Path, here: Path, ask: Ask) -> None:
    typed = overrides(RunDir(here / "runs" / path).config())
    found = ask("train", *typed, "seed=1", "run_name=today")
    assert found.code == 0, found.err
    found = ask("compare", f"runs/{path}", "runs/today", "--profile", "quick")
    assert found.code == 0, found.err
    assert f"{RunDir(FORMATS / path).config()['choices']['sigma']}" in found.out


def test_runs_of_one_likelihood_can_be_compared(here: Path, ask: Ask) -> None:
    by_likelihood: dict[str, list[Path]] = {}
    for path in RUNS:
        by_likelihood.setdefault(RunDir(FORMATS / path).config()["choices"]["likelihood"], []).append(path)
    groups = [[f"runs/{path}" for path in group] for group in by_likelihood.values() if len(group) > 1]
    assert groups
    for number, runs in enumerate(groups):
        found = ask("compare", *runs, "--profile", "quick", "--out", f"report{number}")
        assert found.code == 0, found.err
    found = ask("compare", *(f"runs/{group[0]}" for group in by_likelihood.values()))
    assert found.code == 2
    assert "cannot be compared" in found.err


def test_a_newer_format_is_refused_with_a_message(here: Path, ask: Ask) -> None:
    import torch

    run = here / "runs" / RUNS[0]
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "format": CHECKPOINT_FORMAT + 1}, run / "best.pt")
    found = ask("sample", str(run))
    assert found.code == 1
    assert f"can read formats up to {CHECKPOINT_FORMAT}. Install a newer version of vae" in found.err
