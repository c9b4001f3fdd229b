"""The catalog, which reads YAML files as plain text, agrees with OmegaConf."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vae_cli.config import catalog
from vae_cli.runs.find import find_runs

CHOICES = [(group, choice) for group in catalog.groups().values() for choice in group.choices.values()]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{g.name}={c.name}" for g, c in CHOICES])
def test_a_choice_is_read_as_omegaconf_reads_it(group: catalog.Group, choice: catalog.Choice) -> None:
    file = catalog.configs_dir() / group.name / f"{choice.name}.yaml"
    raw = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(raw, dict)
    for not_of_the_run in ("defaults", "hydra"):
        raw.pop(not_of_the_run, None)
    assert choice.target == raw.pop("_target_", "")
    assert choice.description
    assert list(dict.fromkeys(key.split(".")[0] for key in choice.settings)) == list(raw)
    for key, setting in choice.settings.items():
        value = raw
        for name in key.split("."):
            value = value[name]
        written = OmegaConf.create(f"x: {setting.default}") if setting.default else OmegaConf.create({"x": value})
        assert OmegaConf.to_container(written, resolve=False) == {"x": value}


def test_defaults_and_settings_are_those_of_train_yaml() -> None:
    root = OmegaConf.to_container(OmegaConf.load(catalog.configs_dir() / "train.yaml"))
    assert isinstance(root, dict)
    listed = [next(iter(item.items())) for item in root.pop("defaults") if isinstance(item, dict)]
    chosen = {key: str(value or "null") for key, value in listed if not key.startswith("override")}
    assert {key: setting.default for key, setting in catalog.defaults().items()} == chosen
    root.pop("hydra")
    assert list(catalog.settings()) == list(root)
    for setting in catalog.settings().values():
        assert OmegaConf.create(f"x: {setting.default}")["x"] == root[setting.key]
        assert setting.comment


def test_the_default_choice_of_every_group_exists() -> None:
    groups = catalog.groups()
    for name, setting in catalog.defaults().items():
        assert setting.default == "null" or setting.default in groups[name].choices


def test_choices_of_the_user_come_after_the_bundled_ones_and_do_not_replace_them(tmp_path: Path) -> None:
    (tmp_path / "sigma").mkdir()
    (tmp_path / "sigma" / "mine.yaml").write_text("# my own\n_target_: my.Sigma\na: {b: 1} # why\nc:\n  d: 'x # y'\n")
    (tmp_path / "sigma" / "fixed.yaml").write_text("# not this one\n_target_: my.Fixed\n")
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "hydra" / "launcher" / "mine.yaml").write_text("n_jobs: 2\n")
    (tmp_path / "broken.yaml").write_text("# no group\nx: 1\n")
    groups = catalog.groups(tmp_path)
    mine = groups["sigma"].choices["mine"]
    assert (mine.description, mine.target) == ("my own", "my.Sigma")
    assert {key: (s.default, s.comment) for key, s in mine.settings.items()} == {
        "a": ("{b: 1}", "why"),
        "c.d": ("'x # y'", ""),
    }
    assert groups["sigma"].choices["fixed"].target == "vae_cli.axes.sigma.Fixed"
    assert set(groups) == set(catalog.groups())


def test_an_unreadable_file_of_the_user_does_not_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "sigma").mkdir()
    (tmp_path / "sigma" / "odd.yaml").write_bytes(b"\xff\xfe: [\n- - -\n:\n\t: x\n")
    assert "odd" in catalog.groups(tmp_path)["sigma"].choices


def test_run_folders_are_found_at_any_depth_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("digits/a", "digits/deep/b", "digits/a/samples", ".sweeps/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    assert find_runs(tmp_path) == [tmp_path / "digits/a", tmp_path / "digits/deep/b"]
    assert find_runs(tmp_path / "nowhere") == []


def test_an_installed_package_reads_the_configurations_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "vae_cli" / "config" / "catalog.py"))
    assert catalog.configs_dir() == tmp_path / "configs"
    (tmp_path / "vae_cli" / "configs").mkdir(parents=True)
    assert catalog.configs_dir() == tmp_path / "vae_cli" / "configs"


def test_launchers_are_offered_where_they_are_typed() -> None:
    assert set(catalog.launchers().choices) == {"basic", "joblib", "ray", "submitit_local", "submitit_slurm"}
    assert all(choice.description for choice in catalog.launchers().choices.values())
    offered = dict(catalog.complete([], "hydra/launcher=s"))
    assert list(offered) == ["hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"]
    assert "hydra/launcher" not in catalog.groups()
