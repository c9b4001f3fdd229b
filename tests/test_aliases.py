"""Old names of classes, in stored runs and in users' own YAML files, still mean the same classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from vae_cli.config.aliases import ADDED_TO, MOVED, MOVED_FOR_IMPORT, current_target, with_current_targets
from vae_cli.config.build import check_config
from vae_cli.config.instantiate import find_class
from vae_cli.config.naming import AXES
from vae_cli.core.errors import UserError
from vae_cli.runs.folder import RunDir
from vae_cli.runs.plan import plan

# The classes of the bundled configurations, as runs named them before the modules moved into layers. Written out, so
# that an entry that disappears from the table of aliases is missed.
OLD_NAMES = [
    "vae_cli.dataset.Digits",
    "vae_cli.dataset.ImageFolder",
    "vae_cli.dataset.LinearGaussian",
    "vae_cli.dataset.Shapes",
    "vae_cli.dataset.Torchvision",
    "vae_cli.likelihood.Bernoulli",
    "vae_cli.likelihood.ContinuousBernoulli",
    "vae_cli.likelihood.DiscretizedLogistic",
    "vae_cli.likelihood.Gaussian",
    "vae_cli.likelihood.Laplace",
    "vae_cli.network.Conv",
    "vae_cli.network.Linear",
    "vae_cli.network.MLP",
    "vae_cli.network.ResNet",
    "vae_cli.optimizer.ScheduledOptimizer",
    "vae_cli.prior.ScaledNormal",
    "vae_cli.prior.StandardNormal",
    "vae_cli.regularizer.Capacity",
    "vae_cli.regularizer.Energy",
    "vae_cli.regularizer.FreeBits",
    "vae_cli.regularizer.KL",
    "vae_cli.regularizer.Nothing",
    "vae_cli.schedule.Constant",
    "vae_cli.schedule.Cosine",
    "vae_cli.schedule.Cyclic",
    "vae_cli.schedule.Linear",
    "vae_cli.sigma.Deterministic",
    "vae_cli.sigma.Fixed",
    "vae_cli.sigma.Learned",
    "vae_cli.sigma.Shared",
]


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_refers_to_a_current_class(old: str) -> None:
    found = find_class(current_target(old), "it", object)
    assert isinstance(found, type)
    assert found.__name__ == old.rpartition(".")[2]


def test_every_entry_of_the_table_has_an_old_name() -> None:
    assert {old.rpartition(".")[0] for old in OLD_NAMES} == set(MOVED)


@pytest.mark.parametrize("axis", ["dataset", "network", "sigma", "likelihood", "prior", "regularizer"])
def test_current_names_and_names_of_other_packages_are_unchanged(axis: str) -> None:
    for name in (f"vae_cli.axes.{axis}.Own", f"mine.{axis}.Own", f"vae_cli_more.{axis}.Own", "Own", axis):
        assert current_target(name) == name


def with_old_targets(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, as it was stored before the modules moved."""
    text = yaml.safe_dump(config, sort_keys=False)
    return yaml.safe_load(text.replace("vae_cli.axes.", "vae_cli."))  # type: ignore[no-any-return]


def test_a_run_stored_under_old_names_is_resumed(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = compose("sigma=fixed", "+schedule@regularizer.beta=linear")
    stored = with_old_targets(fresh)
    assert stored["sigma"]["_target_"] == "vae_cli.sigma.Fixed"
    assert stored["regularizer"]["beta"]["_target_"] == "vae_cli.schedule.Linear"
    assert with_current_targets(stored) == fresh
    run = RunDir(tmp_path)
    run.write_config(stored)
    run.checkpoint_file.touch()
    assert run.config() == fresh
    assert plan(run, fresh) == "resume"
    with pytest.raises(UserError, match="already holds a run with different settings"):
        plan(run, {**fresh, "latent": 3})


@pytest.mark.parametrize("words", [["optimizer=sgd"], ["network=conv"]], ids=" ".join)
def test_a_run_stored_without_settings_that_were_added_since_is_resumed(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, words: list[str]
) -> None:
    fresh = compose(*words)
    stored = compose(*words)
    del stored["network"]["spectral_norm"], stored["optimizer"]["decoder_weight_decay"]
    run = RunDir(tmp_path)
    run.write_config(stored)
    run.checkpoint_file.touch()
    assert run.config() == fresh
    assert plan(run, fresh) == "resume"
    for words in (["network.spectral_norm=true"], ["optimizer.decoder_weight_decay=0.1"]):
        with pytest.raises(UserError, match="already holds a run with different settings"):
            plan(run, compose(*words))


def test_an_old_name_works_in_a_users_file(compose: Callable[..., dict[str, Any]], place: Path, ask: Any) -> None:
    (place / "own/sigma").mkdir(parents=True)
    (place / "own/sigma/mine.yaml").write_text("_target_: vae_cli.sigma.Fixed\nvalue: 0.7\n")
    shown = ask("train", "--config-dir", "own", "sigma=mine", "--cfg", "job")
    assert shown.code == 0
    refused = ask("train", "--config-dir", "own", "sigma=mine", "sigma.value=0")
    assert "sigma.value=0" in refused.err  # the class raises this error itself, so it was found and built
    assert "type sigma=deterministic" in refused.err
    config = with_current_targets({**compose(), "sigma": {"_target_": "vae_cli.sigma.Fixed", "value": 0.7}})
    assert type(check_config(config).sigma).__name__ == "Fixed"


def test_a_message_names_the_new_place_of_a_module(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("VAE_TRUST", "written_earlier")
    (tmp_path / "written_earlier.py").write_text("from vae_cli.scale import diagonal_normal\n")
    found = ask("train", "sigma._target_=written_earlier.Loud")
    assert found.code == 2
    assert "importing written_earlier fails" in found.err
    assert "vae_cli.scale is now vae_cli.model.scales" in found.err


@pytest.mark.parametrize("module", MOVED_FOR_IMPORT.values())
def test_the_new_place_of_a_module_exists(module: str) -> None:
    assert import_module(module)


def test_a_run_without_a_setting_that_was_added_is_resumed(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fresh, run = compose(), RunDir(tmp_path)
    stored = yaml.safe_load(yaml.safe_dump(fresh))
    for axis in AXES:
        for key in ADDED_TO.get(stored[axis]["_target_"], {}):
            del stored[axis][key]
    assert stored != fresh
    run.write_config(stored)
    run.checkpoint_file.touch()
    assert run.config() == fresh
    assert plan(run, fresh) == plan(run, stored) == "resume"
