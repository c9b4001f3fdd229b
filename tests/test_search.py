"""Searches: the figure that is optimized, what cannot be searched, and a search from its first trial to its table."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from rich.console import Console

from vae_cli.axes.regularizer import Regularizer
from vae_cli.commands.train import train
from vae_cli.config import messages
from vae_cli.config.build import build_experiment, check_config
from vae_cli.config.instantiate import build
from vae_cli.config.objective import NAMES, PARTS, check_objective, figure
from vae_cli.core.errors import Failure, UserError
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps.space import defined_terms, search_space
from vae_cli.training.lifecycle import run_experiment

Compose = Callable[..., dict[str, Any]]

with_optuna = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed: pip install 'vae-cli[optuna]'",
)
TINY = ["epochs=1", "network.hidden=[8]"]


@pytest.mark.parametrize("regularizer", ["kl", "factor", "gradient_penalty"])
@pytest.mark.parametrize("sigma", ["learned", "deterministic"])
def test_the_names_of_objectives_are_the_figures_of_a_summary(
    sigma: str, regularizer: str, compose: Compose, tmp_path: Path
) -> None:
    if (sigma, regularizer) == ("deterministic", "factor"):
        pytest.skip("they cannot be combined")
    small = ["regularizer.hidden=8"] if regularizer == "factor" else []
    config = compose(*TINY, f"sigma={sigma}", f"regularizer={regularizer}", *small)
    summary = run_experiment(build_experiment(config), RunDir(tmp_path / "run"), Console(quiet=True), True)
    splits = ("train", "validation", "test", "posterior")
    there = {f"{split}/{name}" for split in splits for name in summary[split]}
    assert there <= set(NAMES)
    parts = {f"{split}/{part}" for split in splits for part in PARTS}
    assert sigma != "learned" or there - parts == set(NAMES) - parts
    assert bool(there & parts) == (regularizer != "kl")
    for name in NAMES:
        split, _, term = name.partition("/")
        assert figure(summary, name) == summary[split].get(term)
    terms = defined_terms(check_config(config), build(config["regularizer"], "regularizer", Regularizer), (1, 8, 8))
    assert terms == set(summary["test"]) | set(summary["posterior"])
    assert ("elbo" in terms) == (sigma == "learned")


@pytest.mark.parametrize(
    ("name", "near"),
    [("validation/elb", "validation/elbo"), ("elbo", "validation/elbo"), ("test/scale_mean", "posterior/scale_mean")],
)
def test_a_figure_that_no_run_has_is_refused(name: str, near: str, compose: Compose) -> None:
    with pytest.raises(UserError, match=rf"objective={name}: no run has such a figure\. Did you mean '{near}'"):
        check_objective(name)
    with pytest.raises(UserError, match="no run has such a figure"):
        check_config(compose(f"objective={name}"))


def test_the_objective_is_not_part_of_a_run(compose: Compose) -> None:
    from vae_cli.config.naming import hparams, run_name

    one, other = compose(), compose("objective=test/loss")
    assert hparams(one) == hparams(other)
    choices = other.pop("choices")
    assert run_name(other, choices, one) == "default"


def test_typed_overrides_replace_the_axes_of_the_sweeper() -> None:
    words = ["latent=tag(log, int(interval(2, 64)))", "sigma=fixed,shared", "optimizer.lr=interval(0.1,0.2)"]
    assert search_space([*words, "latent=4", "experiment=x"]) == (
        ["latent=4", "experiment=x"],
        {"sigma": ["fixed", "shared"], "optimizer.lr": ["0.1", "0.2"]},
    )
    assert search_space([*words, "latent=range(2,9)"])[1]["latent"] == ["2", "9"]
    assert search_space([*words, "network.hidden=[8],[9]"])[1]["network.hidden"] == ["[8]", "[9]"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("latent=interval(1,0)", "an interval goes from a smaller number to a larger one"),
        ("latent=tag(log, interval(0,1))", "a logarithmic interval must start above 0"),
        ("latent=range(5,5)", "a range goes from a smaller number to a larger one"),
        ("latent=glob(*)", "is not a range that can be searched"),
        ("latent=interval(a,b)", "cannot be read as a range"),
        ("latent=4", "There is nothing to search"),
        ("seed=0,1,2", "would only find the luckiest seed"),
    ],
)
def test_a_sweep_that_is_not_an_axis_is_refused(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        search_space([word])
    assert said in str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(*words: str) -> None:
    train([*TINY, *words], multirun=True)


def test_an_interval_without_a_sweeper_that_searches(here: Path) -> None:
    with pytest.raises(UserError, match="is a range to search: add -m hydra/sweeper=optuna"):
        search("latent=interval(1,5)")


def test_a_missing_plugin_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingConfigException("", "hydra/sweeper/optuna", [])
    message = EmailMessage()
    message["Provides-Extra"] = "optuna"
    monkeypatch.setattr(messages.metadata, "metadata", lambda name: message)
    said = str(messages.translate(missing, ["experiment=search"]))
    assert said == "hydra/sweeper=optuna is not installed: type pip install 'vae-cli[optuna]'."


@pytest.mark.skipif(not with_optuna.args[0], reason="hydra-optuna-sweeper is installed")
def test_the_preset_says_how_to_install_what_it_needs(here: Path) -> None:
    with pytest.raises(UserError, match="hydra/sweeper=optuna is not installed: type pip install"):
        search("experiment=search")


@with_optuna
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sigma=learned,deterministic"], "objective=validation/loss hydra.sweeper.direction=minimize"),
        (["latent=2,4", "dataset.validation=0"], "no images are held out"),
        (["latent=2,4", "objective=validation/elb"], "Did you mean 'validation/elbo'?"),
        (["latent=2,4", "objective=test/loss"], "type hydra.sweeper.direction=minimize"),
        (["latent=2,4", "run_name=a"], "Give latent one value, or leave out run_name=a"),
        (["latent=2,4", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is not allowed"),
        (["latent=2,4", "hydra/sweeper/sampler=grid"], "Grid search does not use earlier results"),
        (["latent=2,4", 'arms=["sigma=fixed"]'], "a study (arms=) cannot be searched"),
        (["latent=interval(2,4)"], "For whole numbers type int(interval(2, 64))"),
        (["latent=2,-4"], "latent=-4 is not allowed"),
    ],
)
def test_an_impossible_search_is_refused_before_it_starts(words: list[str], said: str, here: Path) -> None:
    with pytest.raises(UserError) as caught:
        search("hydra/sweeper=optuna", *words)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(here.iterdir()) == []


def trials(here: Path, sweep: str = "runs/.sweeps/*") -> list[dict[str, str]]:
    """The rows of the table of a search."""
    (file,) = here.glob(f"{sweep}/trials.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def summary(row: dict[str, str]) -> dict[str, Any]:
    return json.loads(Path(row["run"], "summary.json").read_text())  # type: ignore[no-any-return]


SGD = ["hydra/sweeper=optuna", "optimizer=sgd"]


@with_optuna
def test_a_search_survives_divergence_and_typed_again_trains_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    words = [*SGD, "optimizer.lr=1e-3,1e8", "latent=int(interval(2,5))", "hydra.sweeper.n_trials=6"]
    search(*words)
    said, rows = capsys.readouterr().out, trials(here)
    finished = [row for row in rows if row["state"] == "finished"]
    failed = [row for row in rows if row["state"] == "failed"]
    assert finished
    assert failed
    assert rows == [*finished, *failed]
    values = [float(row["validation/elbo"]) for row in finished]
    assert values == [summary(row)["validation"]["elbo"] for row in finished]
    assert values == sorted(values, reverse=True)
    assert [row[""] for row in rows] == ["best", *[""] * (len(rows) - 1)]
    assert f"{len(failed)} of {len(rows)} runs failed:\n" in said
    assert "diverged" in said
    assert f"next:\n  vae sample {rows[0]['run']}\n" in said
    results = next(here.glob("runs/.sweeps/*/optimization_results.yaml"))
    assert yaml.safe_load(results.read_text())["best_value"] == values[0]

    files = [Path(row["run"], "checkpoint.pt") for row in finished]
    times = [file.stat().st_mtime_ns for file in files]
    search(*words, "hydra.sweep.dir=again")
    again = trials(here, "again")
    assert [{**row, "state": ""} for row in again] == [{**row, "state": ""} for row in rows]
    assert {row["state"] for row in again} == {"skipped", "failed"}
    assert times == [file.stat().st_mtime_ns for file in files]


@with_optuna
def test_an_interrupted_search_resumes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["hydra/sweeper=optuna", "latent=int(interval(2,60))", "hydra.sweeper.n_trials=3", "epochs=2"]
    search(*words, "runs_dir=whole")
    append, appended = RunDir.append_metrics, []

    def interrupt(run: RunDir, record: dict[str, Any]) -> None:
        appended.append(record)
        if len(appended) == 4:  # the second epoch of the second run
            raise KeyboardInterrupt
        append(run, record)

    monkeypatch.setattr(RunDir, "append_metrics", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(*words, "hydra.sweep.dir=a")
    search(*words, "hydra.sweep.dir=b")
    assert len(appended) == 4 + 1 + 2
    whole, rows = trials(here, "whole/.sweeps/*"), trials(here, "b")
    names = ["trial", "validation/elbo", "latent"]
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in whole]
    assert sorted(row["state"] for row in rows) == ["finished", "finished", "skipped"]


@with_optuna
def test_a_search_without_a_best_run_fails(here: Path) -> None:
    with pytest.raises(Failure, match=r"^There is no best run, because all 2 runs of the search failed:\n  sigma="):
        search(*SGD, "optimizer.lr=1e8", "latent=2", "sigma=learned,shared", "hydra.sweeper.n_trials=6")


@with_optuna
def test_a_failure_other_than_of_training_sets_the_exit_code(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunDir.write_config

    def full(run: RunDir, config: dict[str, Any]) -> None:
        if config["latent"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(run, config)

    monkeypatch.setattr(RunDir, "write_config", full)
    with pytest.raises(Failure, match=r"found a best run, but .*No space left on device"):
        search("hydra/sweeper=optuna", "latent=2,3", "hydra.sweeper.n_trials=6", "hydra.sweep.dir=a")
    assert [row["state"] for row in trials(here, "a")] == ["finished", "failed"]
    with pytest.raises(OSError, match="No space left on device"):
        search("hydra/sweeper=optuna", "latent=2,3", "hydra.sweeper.n_trials=6", "hydra.sweeper.max_failure_rate=0")


@with_optuna
def test_the_preset_can_be_narrowed_and_can_minimize(here: Path) -> None:
    words = ["experiment=search", "latent=2,3", "optimizer.lr=1e-3", "hydra.sweeper.n_trials=3"]
    search(*words, "objective=test/rate_bits", "hydra.sweeper.direction=minimize")
    rows = trials(here)
    assert list(rows[0]) == ["", "trial", "test/rate_bits", "regularizer.beta", "latent", "state", "run"]
    assert [float(row["test/rate_bits"]) for row in rows] == sorted(summary(row)["test"]["rate_bits"] for row in rows)
    assert all("optimizer.lr" not in row["run"] for row in rows)  # the default


@with_optuna
def test_runs_proposed_together_are_trained_together(here: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["hydra/sweeper=optuna", "latent=2,3,4", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    search(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    rows = trials(here)
    assert [float(row["validation/elbo"]) for row in rows] == [summary(row)["validation"]["elbo"] for row in rows]
    assert len({row["run"] for row in rows}) == len(rows) > 1
