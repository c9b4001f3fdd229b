"""`vae explain` explains every word that it offers, without heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vae_cli.config import catalog, glossary
from vae_cli.config.claims import CLAIMS, FIGURES
from vae_cli.core.errors import UserError
from vae_cli.metrics.record import metric_words

GROUPS = catalog.groups()
CHOICES = [f"{group.name}={choice}" for group in GROUPS.values() for choice in group.choices]
OWN = [
    (group.name, choice)
    for group in GROUPS.values()
    for choice in group.choices.values()
    if choice.target.startswith("vae_cli.")
]


@pytest.mark.parametrize("word", [*CHOICES, *GROUPS, *CLAIMS, *catalog.settings(), "hydra/launcher=joblib"])
def test_a_choice_a_group_a_claim_and_a_setting_are_explained(word: str) -> None:
    for meaning in glossary.explain_word(word):
        assert meaning.name
        assert meaning.text or meaning.tables


@pytest.mark.parametrize("word", metric_words())
def test_a_metric_is_explained(word: str, ask: Callable[..., Any]) -> None:
    answer = ask("explain", word)
    assert answer.code == 0
    assert len(answer.out) > 100


def test_the_usage_contains_the_settings_without_a_default() -> None:
    facts = dict(glossary.explain_word("schedule=steps")[0].facts)
    typed = "vae train +schedule@regularizer.beta=steps regularizer.beta.values=VALUE regularizer.beta.epochs=VALUE"
    assert facts["usage"] == typed
    facts = dict(glossary.explain_word("dataset=image_folder")[0].facts)
    assert facts["usage"] == "vae train dataset=image_folder dataset.path=VALUE"
    facts = dict(glossary.explain_word("sigma=power_spherical")[0].facts)
    assert facts["usage"] == "vae train sigma=power_spherical prior=sphere"


def test_every_word_that_is_offered_is_explained() -> None:
    offered = glossary.words()
    assert {"rate", "bits", "sigma", "sigma=fixed", "fixed", "sigma.value", "batch_size"} <= set(offered)
    for word in offered:
        assert glossary.explain_word(word)


@pytest.mark.parametrize(("group", "choice"), OWN, ids=lambda value: getattr(value, "name", value))
def test_a_choice_is_explained_by_the_docstring_of_its_class(group: str, choice: catalog.Choice) -> None:
    (meaning,) = glossary.explain_word(f"{group}={choice.name}")
    assert glossary.documentation(choice.target)
    assert glossary.documentation(choice.target) in meaning.text
    assert ">>>" not in meaning.text  # doctests would be wrapped like prose
    shown = dict(row for _, rows in meaning.tables for row in rows)
    for key, setting in choice.settings.items():
        default = "VALUE" if setting.default == "???" else setting.default
        typed = f"{group}.{key}={default}" if default else f"{group}.{key}"
        assert shown.get(typed) == setting.comment


@pytest.mark.parametrize(
    "word",
    [
        *("rate", "Rate", " rate ", "train/rate", "validation/rate", "evaluation/rate", "vae evaluate/rate"),
        *("curves/rate/train", "curves/rate/validation", "parameters/rate"),
    ],
)
def test_a_figure_is_found_by_its_identifier_title_and_tags(word: str) -> None:
    facts = dict(glossary.explain_word(word)[0].facts)
    assert facts["identifier"] == "rate"
    assert facts["formula"].startswith("KL(q(z|x) || p(z))")
    assert facts["unit"] == "nats"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("sigma=", "sigma"),
        ("+schedule@regularizer.beta=linear", "schedule=linear"),
        ("hydra.launcher.n_jobs", "hydra.launcher.n_jobs"),
        ("sigma.value=0.5", "sigma.value"),
    ],
)
def test_a_word_may_be_an_override(word: str, name: str) -> None:
    assert glossary.explain_word(word)[0].name == name


def test_a_bound_is_explained_for_its_own_number_of_draws() -> None:
    (meaning,) = glossary.explain_word("iw_bound_k64")
    assert meaning.name == "Importance-weighted bound, K = 64"
    assert "64 draws" in meaning.text


def test_a_word_with_several_meanings_shows_all_of_them() -> None:
    kinds = [(meaning.kind, meaning.name) for meaning in glossary.explain_word("linear")]
    assert kinds == [("choice", "network=linear"), ("choice", "schedule=linear")]
    assert {meaning.kind for meaning in glossary.explain_word("beta")} == {"figure", "setting"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sigma=fixd", "'fixd' is not a choice of sigma. Did you mean 'fixed'?"),
        ("sigam", "Did you mean 'sigma'?"),
        ("free_bit", "Did you mean 'free_bits'?"),
        ("", "Type vae explain to list"),
        ("../../x", "is not a figure, a claim, a choice or a setting"),
        ("iw_bound_k0", "is not a figure"),
    ],
)
def test_an_unknown_word_gets_one_message_with_the_nearest(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        glossary.explain_word(word)
    assert said in str(caught.value)


def test_the_command_prints_an_entry_and_an_overview(ask: Callable[..., Any]) -> None:
    found = ask("explain", "sigma=fixed")
    assert found.code == 0, found.err
    assert "sigma.value=1.0" in found.out
    assert "\x1b" not in found.out
    overview = " ".join(ask("explain").out.split())  # long titles are wrapped
    for claim in CLAIMS.values():
        assert claim.title in overview
    for figure in FIGURES:
        assert figure.title in overview
    for group in GROUPS.values():
        for choice in group.choices:
            assert choice in overview
    wrong = ask("explain", "sigam")
    assert wrong.code == 2
    assert "Did you mean 'sigma'?" in wrong.err


@pytest.mark.parametrize("word", ["bits", "sigma", "sigma=fixed", "cv_vae_loss", "network.width", "schedule=linear"])
def test_no_line_is_padded_and_one_blank_line_separates_the_parts(ask: Callable[..., Any], word: str) -> None:
    printed = ask("explain", word).out
    assert "\n\n\n" not in printed
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_the_users_own_choices_are_explained(ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "sigma").mkdir()
    (tmp_path / "sigma" / "loud.yaml").write_text("# noise that grows\n_target_: mine.Loud\nfactor: 0.5 # of loc\n")
    found = ask("explain", "loud", "--config-dir", str(tmp_path))
    assert found.code == 0, found.err
    assert "noise that grows." in found.out
    assert "mine.Loud" in found.out
    assert "sigma.factor=0.5" in found.out
    assert ask("explain", "loud").code == 2
    assert "does not exist" in ask("explain", "--config-dir", str(tmp_path / "no")).err


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom vae_cli.cli import run\nsys.argv = ['vae', 'explain', 'rate']\nassert run() == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "KL divergence" in ended.stdout


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("word", ["", "rate", "bits", "free_bits", "dataset=mnist", "experiment=cv_vae_loss"])
def test_the_output_fits_the_terminal(word: str, columns: int) -> None:
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vae_cli", "explain", *([word] if word else [])]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert max(map(len, printed.splitlines())) <= columns
    assert "\n\n\n" not in printed
    assert not [line for line in printed.splitlines() if line != line.rstrip()]
