"""Completion of overrides and runs, called directly and as the shells call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vae_cli.config import catalog


def words(*typed: str) -> list[str]:
    *before, word = typed
    return [text for text, _ in catalog.complete(before, word)]


def test_names_of_groups_and_settings() -> None:
    assert {"sigma=", "dataset=", "latent=", "overwrite="} <= set(words(""))
    assert not any("." in word for word in words(""))
    # With values listed next to the only matching key, shells do not append a space to it.
    assert words("sig") == ["sigma=", *(f"sigma={name}" for name in catalog.groups()["sigma"].choices)]
    assert words("lat") == ["latent=", "latent=16"]


def test_choices_and_values() -> None:
    assert words("sigma=") == [f"sigma={name}" for name in catalog.groups()["sigma"].choices]
    assert words("sigma=fi") == ["sigma=fixed"]
    assert words("overwrite=") == ["overwrite=true", "overwrite=false"]
    assert words("nothing=") == []


def test_keys_of_the_chosen_choices_only() -> None:
    assert words("sigma.") == []
    assert "sigma.value=" in words("sigma=fixed", "sigma.")
    assert "sigma.value=" in words("-m", "sigma=learned,fixed", "sigma.v")
    assert "optimizer.lr=" in words("optimizer.")


def test_values_already_in_a_list_are_not_offered_again() -> None:
    assert words("sigma=learned,fi") == ["sigma=learned,fixed"]
    assert "sigma=learned,learned" not in words("sigma=learned,")


def test_schedules() -> None:
    assert "+schedule@regularizer.beta=" in words("+")
    assert "+schedule@sigma.value=" in words("sigma=fixed", "+sch")
    assert words("+schedule@regularizer.beta=li") == ["+schedule@regularizer.beta=linear"]


def complete(shell: str, typed: list[str], folder: Path) -> list[str]:
    """Call the program as a shell's completion script does, with the words as that shell splits them."""
    environment = {**os.environ, "_VAE_COMPLETE": f"complete_{shell}", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"COMP_WORDS": "\n".join(typed), "COMP_CWORD": str(len(typed) - 1)}
    environment |= {"_TYPER_COMPLETE_ARGS": " ".join(typed), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-m", "vae_cli"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["sigma", "=", "fi"], ["fixed"]),
        (["sigma", "="], sorted(catalog.groups()["sigma"].choices)),
        (["sigma", "=", "fixed", "sigma.v"], ["sigma.value=", "sigma.value=1.0"]),
        (["-m", "sigma", "=", "learned,fi"], ["learned,fixed"]),
        (["+schedule", "@", "regularizer.beta", "=", "li"], ["linear"]),
        (["+schedule", "@", "regul"], ["regularizer.beta="]),
        (["sigma=fi"], ["sigma=fixed"]),  # if COMP_WORDBREAKS has no '='
    ],
)
def test_bash_gets_only_what_follows_its_last_break(typed: list[str], expected: list[str], tmp_path: Path) -> None:
    assert complete("bash", ["vae", "train", *typed], tmp_path)[: len(expected)] == expected


def test_a_new_word_after_an_equals_sign_is_a_new_word(tmp_path: Path) -> None:
    assert "sigma=" in complete("bash", ["vae", "train", "sigma", "=", ""], tmp_path)


def test_zsh_and_fish_get_whole_words(tmp_path: Path) -> None:
    assert complete("fish", ["vae", "train", "sigma=fi"], tmp_path)[0].split("\t")[0] == "sigma=fixed"
    assert '"sigma=fixed"' in "".join(complete("zsh", ["vae", "train", "sigma=fi"], tmp_path))


def test_choices_of_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "sigma").mkdir()
    (tmp_path / "sigma" / "mine.yaml").write_text("# my own\n_target_: my.Sigma\n")
    typed = ["vae", "train", "--config-dir", str(tmp_path), "sigma=mi"]
    assert complete("fish", typed, tmp_path)[0].split("\t")[0] == "sigma=mine"


def test_runs(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "default" / "config.yaml").touch()
    for command in ("sample", "interpolate", "export"):
        assert complete("bash", ["vae", command, ""], tmp_path) == ["latest", "runs/digits/default"]
    assert complete("bash", ["vae", "sample", "runs/d"], tmp_path) == ["runs/digits/default"]


def test_metrics(tmp_path: Path) -> None:
    for command in ("evaluate", "compare"):
        typed = ["vae", command, "runs/a", "--metrics", "rate,noise_p"]
        assert complete("bash", typed, tmp_path) == ["rate,noise_probe"]
    assert complete("bash", ["vae", "explain", "velocity_var"], tmp_path) == ["velocity_variance"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "vae"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vae_cli "$@"\n')
    program.chmod(0o755)
    script = """
    source <(_VAE_COMPLETE=source_bash vae)
    complete -p vae >/dev/null || exit 1
    COMP_WORDS=(vae train sigma = fi) COMP_CWORD=4
    _vae_completion vae
    echo "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fixed"]
