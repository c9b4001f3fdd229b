"""The undocumented parts of Hydra, submitit and torch that this package uses.

Each test uses the real library, fails if a name is gone or has changed its meaning, and says where the name is used.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from torch import nn

import vae_cli
from vae_cli.config import hydra
from vae_cli.machine import distributed, memory
from vae_cli.sweeps import launcher, slurm
from vae_cli.sweeps.space import set_optuna_defaults
from vae_cli.sweeps.study import jobs_of_study
from vae_cli.sweeps.trials import Trial

PACKAGE = Path(vae_cli.__file__).parent


def has_plugin(name: str) -> bool:
    """Return whether a Hydra plugin is installed."""
    return (
        importlib.util.find_spec("hydra_plugins") is not None
        and importlib.util.find_spec(f"hydra_plugins.{name}") is not None
    )


with_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
with_optuna = pytest.mark.skipif(not has_plugin("hydra_optuna_sweeper"), reason="hydra-optuna-sweeper is not installed")


# Nothing private elsewhere -------------------------------------------------------------------------------------------

# The layers that use these libraries most, and the files in which private names may appear.
PRIVATE: dict[str, dict[str, set[str]]] = {
    "config": {"hydra.py": {"_return_value"}},
    "sweeps": {"slurm.py": {"_make_command"}},
    "machine": {},
}


def private_names(file: Path) -> set[str]:
    """The private names that a file uses, imports, or overrides in a class of submitit's.

    Not counted: names on `self`, and those of `os`, such as `os._exit`, which Python documents.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in {"self", "os"}:
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.ClassDef) and {getattr(base, "id", "") for base in node.bases} & {"SlurmInfoWatcher"}:
            found |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("layer", PRIVATE)
def test_private_names_are_used_only_where_they_are_documented(layer: str) -> None:
    found = {file.name: private_names(file) for file in sorted((PACKAGE / layer).glob("*.py"))}
    assert {name: names for name, names in found.items() if names} == PRIVATE[layer]


# Hydra: config/hydra.py ----------------------------------------------------------------------------------------------


def failed() -> JobReturn:
    """The result of a job that has failed."""
    result = JobReturn(overrides=["latent=2"], status=JobStatus.FAILED)
    result.return_value = ValueError("it broke")
    return result


def test_the_result_of_a_failed_job_raises_silently(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra would print a line; `silent_result` prevents that through JobReturn._return_value."""
    with pytest.raises(ValueError, match="it broke"):
        _ = failed().return_value
    assert "Error executing job with overrides" in capsys.readouterr().err
    with hydra.silent_result(), pytest.raises(ValueError, match="it broke"):
        _ = failed().return_value
    assert capsys.readouterr().err == ""
    assert isinstance(failed()._return_value, ValueError)
    with hydra.silent_result():
        assert JobReturn(status=JobStatus.COMPLETED, _return_value=3).return_value == 3


def test_without_the_private_name_a_failed_job_still_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: JobReturn) -> Any:
        sys.stderr.write("a line of Hydra's\n")
        raise KeyError("elsewhere")

    monkeypatch.setattr(JobReturn, "return_value", property(fails))
    result = JobReturn(status=JobStatus.FAILED)
    with hydra.silent_result(), pytest.raises(KeyError, match="elsewhere"):
        _ = result.return_value
    assert capsys.readouterr().err == "a line of Hydra's\n"
    monkeypatch.setattr(JobReturn, "return_value", None)
    with hydra.silent_result():
        pass


def test_hydra_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vae", "a"])
    before = vars(JobReturn)["return_value"]
    with hydra.hydra_raises(["vae", "b"]):
        assert vars(JobReturn)["return_value"] is not before
        assert sys.argv == ["vae", "b"]
    assert vars(JobReturn)["return_value"] is before
    assert sys.argv == ["vae", "a"]


def test_the_only_warning_that_is_ignored_is_that_of_matching_schemas() -> None:
    """This is the wording of Hydra 1.3; config/compose.py ignores the warning on import."""
    text = inspect.getsource(importlib.import_module("hydra._internal.config_loader_impl"))
    assert "'{config_path}' is validated against ConfigStore schema with the same name." in text
    code = (
        "import warnings, vae_cli.config.compose\n"
        "warnings.warn('\\n\\'hydra/launcher/joblib\\' is validated against ConfigStore schema with the same name.')\n"
        "warnings.warn('another')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert "validated" not in said.stderr
    assert "another" in said.stderr


# Hydra: sweeps -------------------------------------------------------------------------------------------------------


def test_the_launcher_that_hydra_makes_is_replaced_and_restored() -> None:
    """sweeps/launcher.py replaces Plugins.instantiate_launcher, which BasicSweeper must call by keywords."""
    before = Plugins.instantiate_launcher
    assert list(inspect.signature(before).parameters)[1:] == ["hydra_context", "task_function", "config"]
    config = OmegaConf.create(
        {
            "hydra": {
                "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
                "sweeper": {
                    "_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
                    "max_batch_size": None,
                    "params": None,
                },
            }
        }
    )
    context: Any = None
    with launcher.check_sweeps(lambda config: True):
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=lambda config: None, config=config
        )
        assert isinstance(sweeper.launcher, launcher.CheckedLauncher)
    assert Plugins.instantiate_launcher is before


def test_the_configuration_of_hydra_can_be_put_back() -> None:
    """sweeps/launcher.py reads and sets HydraConfig.instance().cfg."""
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        instance.cfg = None
        assert not HydraConfig.initialized()
    finally:
        instance.cfg = before


def test_a_study_makes_the_combinations_that_hydra_makes() -> None:
    """sweeps/study.py does with public names what Hydra's private BasicSweeper.split_arguments does."""
    sweeper: Any = importlib.import_module("hydra._internal.core_plugins.basic_sweeper")
    arms = ["sigma=fixed sigma.value=0.5,1", "latent=range(1,4) seed=1", "a=choice(x,y) b={c:1} a=2,3", "n=[1],[2]"]
    for arm in arms:
        theirs = sweeper.BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(arm.split()), None)[0]
        assert jobs_of_study([], [arm]) == theirs


def test_a_trial_without_a_value_raises_its_error_and_one_with_a_value_returns_it() -> None:
    """sweeps/trials.py sets JobReturn.return_value by its public setter."""
    trial = Trial(["latent=2"], value=3.0)
    assert trial.result().return_value == 3.0
    trial.fail(ValueError("it broke"))
    with pytest.raises(ValueError, match="it broke"):
        _ = trial.result().return_value


@with_optuna
def test_the_defaults_of_optuna_are_changed_where_hydra_finds_them() -> None:
    """sweeps/space.py writes into Hydra's ConfigStore under the names that the plugin uses."""
    set_optuna_defaults()
    node = ConfigStore.instance().load("hydra/sweeper/optuna.yaml").node
    assert (node.direction, node.n_jobs, node.max_failure_rate) == ("maximize", 1, 1.0)
    for sampler in ("tpe", "random", "cmaes", "nsgaii"):
        assert ConfigStore.instance().load(f"hydra/sweeper/sampler/{sampler}.yaml").node.seed == 0


def test_plugins_are_told_apart_by_the_names_of_their_classes() -> None:
    """sweeps/runner.py: is_plugin, for the classes that are installed here."""
    named = {"BasicLauncher", "BasicSweeper"}
    named |= {"JoblibLauncher"} if has_plugin("hydra_joblib_launcher") else set()
    named |= {"LocalLauncher", "SlurmLauncher"} if has_plugin("hydra_submitit_launcher") else set()
    named |= {"RayLauncher"} if has_plugin("hydra_ray_launcher") else set()
    named |= {"OptunaSweeper"} if has_plugin("hydra_optuna_sweeper") else set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert named <= {plugin.__name__ for plugin in Plugins.instance().discover()}


# submitit: sweeps/slurm.py -------------------------------------------------------------------------------------------


@with_submitit
def test_submitit_asks_squeue_for_the_jobs_that_have_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """QueueWatcher overrides SlurmInfoWatcher._make_command, and submitit calls it."""
    asked: list[Any] = []
    listed = {"12": "RUNNING", "13_0": "PENDING"}

    def answer(command: list[str], **_: Any) -> bytes:
        asked.append(command)
        return "".join(f"{job}|{state}\n" for job, state in listed.items()).encode()

    monkeypatch.setattr(subprocess, "check_output", answer)
    watcher = slurm.queue_watcher()
    for job in ("12", "13_0", "14"):
        watcher.register_job(job)
    assert not watcher.is_done("12", mode="force")
    assert asked == [slurm.SQUEUE]
    assert not watcher.is_done("13_0", mode="cache")
    assert watcher.is_done("14", mode="cache")  # the queue no longer lists it
    assert watcher.get_state("14", mode="cache") == "ENDED"
    listed.clear()
    time.sleep(0.01)  # submitit asks once a millisecond at most
    assert watcher.is_done("12", mode="force")
    assert watcher.is_done("13_0", mode="cache")
    time.sleep(0.01)
    assert watcher.is_done("12", mode="force")
    assert asked == [slurm.SQUEUE] * 2  # all have ended: nothing is asked


@with_submitit
@pytest.mark.parametrize("has_accounts", [True, False])
def test_all_jobs_of_submitit_share_one_watcher(has_accounts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """sweeps/slurm.py replaces SlurmJob.watcher if sacct does not answer."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    before = SlurmJob.watcher
    monkeypatch.setattr(SlurmJob, "watcher", before)
    monkeypatch.setattr(slurm, "command_succeeds", lambda *command: has_accounts)
    assert type(before) is SlurmInfoWatcher
    slurm.watch_jobs()
    assert (SlurmJob.watcher is before) == has_accounts
    assert isinstance(SlurmJob.watcher, SlurmInfoWatcher)


@with_submitit
@pytest.mark.parametrize("state", [*sorted(slurm.ENDS), "CONFIGURING", "PENDING", "REQUEUED"])
def test_a_job_has_ended_for_submitit_as_it_has_for_slurm(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: f"1|{state}\n".encode())
    watcher = slurm.queue_watcher()
    watcher.register_job("1")
    assert watcher.is_done("1", mode="force") == (state in slurm.ENDS)


# torch: machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_is_one_object(device: str) -> None:
    """machine/memory.py tells storages apart by `id`, on `meta` too, where all addresses are 0."""
    tensor = torch.zeros(3, 4, device=device)
    storage = tensor.untyped_storage()
    assert tensor.view(-1).untyped_storage() is storage
    assert tensor[1].untyped_storage() is storage
    assert torch.zeros(3, 4, device=device).untyped_storage() is not storage
    layer = nn.Linear(3, 5, device=device)
    model = nn.Sequential(layer, nn.ReLU())
    own = {id(kept): kept for kept in (parameter.untyped_storage() for parameter in layer.parameters())}
    seen: list[torch.UntypedStorage] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.untyped_storage()), t)[1], lambda t: t)
    with hooks:
        model(torch.zeros(2, 3, device=device, requires_grad=True))
    sizes = sorted(kept.nbytes() for kept in seen if id(kept) not in own)
    assert sizes == [2 * 3 * 4, 2 * 5 * 4]  # the input of the layer, and the output of ReLU
    assert memory.size_of(model) == 4 * (3 * 5 + 5)


def test_every_batch_normalization_of_torch_is_known() -> None:
    """machine/distributed.py names the public classes, of which torch keeps a private base class."""
    base = nn.modules.batchnorm._BatchNorm
    classes = {kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, base)}
    assert classes == set(distributed.BATCH_NORMS)
    assert distributed.has_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))
    assert not distributed.has_batch_norm(nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)))
