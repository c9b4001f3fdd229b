"""What a Python user sees: `from vae_cli import load_run`, a run's methods, its repr and its help."""

from __future__ import annotations

import doctest
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vae_cli
from vae_cli import Run, load_run
from vae_cli.core.errors import UserError
from vae_cli.runs import run as run_module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> Path:
    """A folder with the finished run runs/digits/sigma-fixed."""
    folder = tmp_path_factory.mktemp("python")
    assert commands.run("train", "sigma=fixed", "epochs=1", cwd=folder).returncode == 0, commands.err
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def python(code: str) -> str:
    """Run Python in a separate process and return its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    return done.stdout


@pytest.mark.parametrize("module", [vae_cli, run_module], ids=["vae_cli", "vae_cli.runs.run"])
def test_examples_in_docstrings_run(module: Any, here: Path) -> None:
    names = {"torch": torch, "load_run": load_run}
    found = doctest.testmod(module, extraglobs=names)
    assert found.attempted > 0
    assert found.failed == 0


def test_help_shows_what_a_user_needs() -> None:
    text = python("import vae_cli; help(vae_cli)")
    for method in ("load_run", "encode", "decode", "sample", "images"):
        assert f"{method}(" in text
    for needed in ("Load a trained run.", "class Run", "The images of the run"):
        assert needed in text
    assert "__getattr__" not in text


def test_names_are_listed_before_they_are_loaded() -> None:
    code = "import sys, vae_cli; print({'Run', 'load_run'} <= set(dir(vae_cli)), 'torch' in sys.modules)"
    assert python(code) == "True False\n"


def test_a_run_describes_itself(here: Path) -> None:
    run = load_run("sigma-fixed", device="cpu")
    lines = repr(run).splitlines()
    assert lines[0] == "Run runs/digits/sigma-fixed"
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}
    assert said["choices"] == "sigma=fixed sigma.value=1.0"
    assert said["dataset"] == "digits, images 1 x 8 x 8"
    assert said["latent"] == "16"
    assert said["weights"] == f"best: epoch 1 of 1, step {run.step}"
    assert said["test"].startswith("distortion ")
    assert said["test"].endswith("(nats per image)")
    assert said["device"] == "cpu"
    last = repr(load_run("sigma-fixed", weights="last"))
    assert "last: epoch 1 of 1" in last
    assert "(nats per image, of the best weights)" in last


def test_a_description_never_raises(here: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/digits/sigma-fixed", tmp_path / "one")
    run = load_run(tmp_path / "one", device="cpu")
    (tmp_path / "one/summary.json").write_text("{")
    assert "nats" not in repr(run)
    assert "latent   16" in repr(run)
    shutil.rmtree(tmp_path / "one")
    assert repr(run).startswith("Run ")
    del run.config["choices"]
    assert repr(run) == "<Run>"
    assert repr(Run.__new__(Run)) == "<Run>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.encode(torch.zeros(1, 8, 8)), r"\(1, 8, 8\); for a single image, pass x\[None\]"),
        (lambda run: run.encode(torch.zeros(5, 64)), r"\(5, 64\) do not match this run: pass a batch \(B, 1, 8, 8\)"),
        (lambda run: run.decode(torch.zeros(16)), r"codes \(B, 16\), not \(16,\); for a single code, pass z\[None\]"),
        (lambda run: run.decode(torch.zeros(2, 3)), r"codes \(B, 16\), not \(2, 3\)\.$"),
        (
            lambda run: load_run(run.path, weights="newest"),
            r"'newest' .* type weights='best' or weights='last'",
        ),
    ],
)
def test_mistakes_are_answered_with_what_to_type(here: Path, call: Callable[[Run], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(load_run("sigma-fixed", device="cpu"))


def test_8_bit_images_and_arrays_are_accepted(here: Path) -> None:
    run = load_run("sigma-fixed", device="cpu")
    x = run.splits.test.batch(torch.arange(3))
    levels = (x * 255).round().to(torch.uint8)
    assert torch.equal(run.encode(levels).mean, run.encode(x).mean)
    assert torch.equal(run.encode(levels.numpy()).mean, run.encode(x).mean)


@pytest.mark.parametrize("trust", ["mine", ["mine"]])
def test_trust_in_a_users_own_class_is_for_one_run(
    trust: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from vae_cli.axes.dataset.digits import Digits\n"
        "from vae_cli.axes.sigma import Fixed\n"
        "class Loud(Fixed):\n    def __init__(self):\n        super().__init__(2.0)\n"
        "class MyDigits(Digits):\n    pass\n"
    )
    for group, name, target in (("sigma", "loud", "mine.Loud"), ("dataset", "mydigits", "mine.MyDigits")):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / f"{name}.yaml").write_text(f"# my own\n_target_: {target}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("VAE_TRUST", "")
    words = ["sigma=loud", "dataset=mydigits", "epochs=1", "run_name=own", "network.hidden=[4]"]
    found = ask("train", *words, "--config-dir", "own", "--trust", "mine")
    assert found.code == 0, found.err
    monkeypatch.setenv("VAE_TRUST", "")
    with pytest.raises(UserError, match=r"load_run\(\.\.\., trust=\['mine'\]\)"):
        load_run("own")
    run = load_run("own", trust=trust, device="cpu")
    assert "choices  sigma=loud" in repr(run)
    assert run.encode(run.splits.test.batch(torch.arange(2))).stddev.unique().tolist() == [2.0]
    assert os.environ["VAE_TRUST"] == ""
    with pytest.raises(UserError, match="--trust mine"):
        load_run("own")
