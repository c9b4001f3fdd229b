"""`vae train --repeat RUN`: identical bits, or a report of what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vae_cli.commands.train import train
from vae_cli.core.errors import UserError
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.repeat import repeat_run


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train(["epochs=2", "network.hidden=[16]", "run_name=once"])
    return tmp_path / "runs/once"


def test_the_same_bits_in_another_process(trained: Path) -> None:
    words = [sys.executable, "-m", "vae_cli", "train", "--repeat", "once"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=trained.parent.parent, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "bit-identical: all weights and all" in done.stdout
    again = trained.with_name("once_repeat")
    first, second = (load_checkpoint(run / "checkpoint.pt") for run in (trained, again))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert RunDir(again).summary()["test"] == RunDir(trained).summary()["test"]


def test_differences_are_reported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    name = next(iter(saved["model"]))
    saved["model"][name].flatten()[0] += 0.5
    torch.save(saved, trained / "checkpoint.pt")
    summary = json.loads((trained / "summary.json").read_text())
    summary["test"]["loss"] += 1
    summary["versions"]["torch"] = "1.0"
    (trained / "summary.json").write_text(json.dumps(summary))
    train(repeat="once")
    said = capsys.readouterr().out
    assert "not identical: weights differ by up to 0.5, and 1 of" in said
    assert "test/loss" in said
    assert "versions.torch" in said
    train(repeat="once")  # it is not trained a third time
    assert "not identical" in capsys.readouterr().out


def test_a_repetition_whose_replacement_was_killed_is_put_back_and_compared(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeat_run(str(trained), [])
    second = RunDir(trained.with_name(f"{trained.name}_repeat"))
    second.set_aside()  # by `--repeat ... overwrite=true`, which was then killed
    capsys.readouterr()
    repeat_run(str(trained), [])
    assert "bit-identical" in capsys.readouterr().out
    assert not second.replaced.exists()


def test_the_summary_has_everything_needed_to_repeat_a_run(trained: Path) -> None:
    summary = RunDir(trained).summary()
    assert {"config", "versions", "git_commit", "device", "threads", "processes", "determinism"} <= summary.keys()
    assert summary["config"] == RunDir(trained).config()


@pytest.mark.parametrize(
    ("run", "words", "flags", "said"),
    [
        ("once", ["latent=3"], {}, "does not accept 'latent=3'"),
        ("once", ["devise=cpu"], {}, "device"),
        ("once", [], {"multirun": True}, "leave out --multirun"),
        ("nothing", [], {}, "There is no run 'nothing'"),
        ("begun", [], {}, "is not finished"),
    ],
)
def test_refused(trained: Path, run: str, words: list[str], flags: dict[str, bool], said: str) -> None:
    begun = RunDir(trained.with_name("begun"))
    begun.write_config(RunDir(trained).config())
    with pytest.raises(UserError, match=said):
        train(words, repeat=run, **flags)
    assert not trained.with_name("once_repeat").exists()
