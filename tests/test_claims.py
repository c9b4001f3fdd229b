"""The register of figures has an entry for everything that is measured, and the entries match the measurements."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from vae_cli.cli import run as run_command
from vae_cli.config import catalog
from vae_cli.config.claims import CLAIMS, FIGURES, entry, headlines
from vae_cli.config.objective import MEASURED, PARTS, POSTERIOR, TERMS, better_direction

MODES = list(catalog.groups()["sigma"].choices)
TRAINED = (*TERMS, *PARTS, *MEASURED, *POSTERIOR, "learning_rate")


def chosen(sigma: str) -> list[str]:
    """Return the overrides for a choice of sigma; codes on a sphere need a prior of their own."""
    return [f"sigma={sigma}", *(["prior=sphere"] if sigma == "power_spherical" else [])]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The evaluation of a short run of each sigma mode."""
    folder = tmp_path_factory.mktemp("claims")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for sigma in MODES:
            for words in (
                ["train", *chosen(sigma), "epochs=2", "network.hidden=[8]", "latent=3", f"run_name={sigma}"],
                ["evaluate", sigma, "--quick"],
            ):
                patch.setattr(sys, "argv", ["vae", *words])
                assert run_command() == 0
            found[sigma] = json.loads((folder / "runs" / sigma / "evaluation" / "metrics.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sigma", MODES)
def test_every_measured_figure_has_a_fitting_entry(sigma: str, evaluations: dict[str, dict[str, Any]]) -> None:
    evaluation = evaluations[sigma]
    for name, figure in {**evaluation["figures"], **evaluation["left_out"]}.items():
        found = entry(name)
        assert found.definition, name
        assert found.claim == figure["claim"], name
        if "value" in figure and figure["value"] is not None:
            assert found.unit == figure.get("unit", ""), name


@pytest.mark.parametrize("name", TRAINED)
def test_every_term_of_training_has_an_entry(name: str) -> None:
    assert entry(name).definition


def test_titles_are_words_and_no_two_are_equal() -> None:
    titles = [figure.title for figure in FIGURES]
    assert len(set(titles)) == len(titles)
    for figure in FIGURES:
        assert figure.title[:1].isupper(), figure
        assert not re.search(r"_|\b[a-z]+[A-Z]", figure.title), figure
        assert figure.definition.endswith("."), figure
        assert not figure.definition.startswith(figure.name), figure
        assert "{" not in figure.definition.replace("{k}", ""), figure


def test_every_claim_has_headlines_and_not_too_many() -> None:
    for claim in CLAIMS:
        assert 1 <= len(headlines(claim)) <= 5
    assert [claim.number for claim in CLAIMS.values()] == [1, 2, 3, 4, 5]


def test_a_users_own_figure_has_its_name_in_plain_words_as_title() -> None:
    assert entry("loudness_of_codes").title == "Loudness of codes"
    assert entry("iw_bound_k5000").title == "Importance-weighted bound, K = 5000"


def test_only_figures_with_a_better_direction_can_be_searched_for() -> None:
    better = {name: better_direction(f"validation/{name}") for name in (*MEASURED, *POSTERIOR)}
    assert {name: way for name, way in better.items() if way} == {
        "elbo": "maximize",
        "loss": "minimize",
        "distortion": "minimize",
    }
