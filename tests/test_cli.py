"""The command line: help, flags, arguments, error messages, exit codes, and the check of a sweep before it starts."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import typer
from hydra.conf import HydraConf
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from vae_cli import cli
from vae_cli.config import catalog
from vae_cli.config import hydra as hydra_front
from vae_cli.core.errors import Failure, UserError
from vae_cli.sweeps import launcher
from vae_cli.terminal.help import Subcommands

RAN: list[Any] = []


@hydra.main(version_base="1.3", config_path=str(catalog.configs_dir()), config_name="train")
def task(config: DictConfig) -> int:
    """Stand in for the training of a run."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    RAN.append(plain)
    if config.latent == 13:
        raise Failure("the loss is not finite")
    if config.latent == 14:
        raise ZeroDivisionError("division by zero")
    return int(config.latent)


@pytest.fixture(autouse=True)
def _nothing_ran() -> Iterator[None]:
    RAN.clear()
    yield
    RAN.clear()


@pytest.fixture
def front(tmp_path: Path) -> Any:
    """Return a function that calls Hydra with the task above and given overrides."""

    def call(*overrides: str, **flags: Any) -> None:
        folders = [
            f"hydra.run.dir={tmp_path}/run",
            f"hydra.sweep.dir={tmp_path}",
            "hydra.sweep.subdir=${hydra.job.num}",
        ]
        hydra_front.run(task, [*folders, *overrides], **flags)

    return call


def vae(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a subprocess, without a terminal."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-m", "vae_cli", *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


# Help -----------------------------------------------------------------------------------------------------------------


def imported(cwd: Path, *words: str) -> set[str]:
    """Run a command, which must succeed, and return the modules that it has imported."""
    program = f"""
import sys
from vae_cli.cli import main
sys.argv = ["vae", *{words!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\n", *sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["sample", "--help"], ["export", "--help"], ["--version"], []]
)
def test_help_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    heavy = {"torch", "hydra", "omegaconf", "numpy", "yaml", "sklearn", "matplotlib"}
    assert not heavy & imported(tmp_path, *words)


def test_a_run_imports_only_the_heavy_modules_it_needs(tmp_path: Path) -> None:
    used = imported(tmp_path, "train", "epochs=1", "network.hidden=[4]", "max_grad_norm=1", "run_name=a")
    assert {"torch", "hydra"} <= used
    assert not {"torch._dynamo", "sympy", "torchvision", "sklearn", "scipy", "matplotlib", "pandas"} & used
    for words in (["sample", "a"], ["interpolate", "a", "--path", "geodesic", "--count", "1"]):
        assert not {"torch._dynamo", "sympy", "hydra", "tensorboard"} & imported(tmp_path, *words)
    imported(tmp_path, "evaluate", "a", "--quick")  # the first time, it trains the feature net
    used = imported(tmp_path, "evaluate", "a", "--quick")
    assert not {"torch._dynamo", "sympy", "hydra", "torchvision", "sklearn", "scipy", "pandas"} & used


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("words", ["--help", "runs", "explain rate"])
def test_a_closed_output_is_no_error(words: str, closed: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = f"{shlex.quote(sys.executable)} -m vae_cli {words} {closed}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr


def test_the_word_help_shows_the_help(tmp_path: Path) -> None:
    assert vae("help", cwd=tmp_path).stdout == vae("--help", cwd=tmp_path).stdout
    assert vae("help", "train", cwd=tmp_path).stdout == vae("train", "--help", cwd=tmp_path).stdout
    assert vae("help", "help", cwd=tmp_path).returncode == 2
    assert "of one subcommand: type vae help train" in vae("help", "train", "sample", cwd=tmp_path).stderr


def test_vae_without_a_subcommand_lists_the_subcommands(tmp_path: Path) -> None:
    done = vae(cwd=tmp_path)
    assert done.returncode == 0
    for name in ("train", "sample", "interpolate", "evaluate", "export", "compare", "runs"):
        assert f"  {name} " in done.stdout


def test_the_help_of_train_lists_every_choice_and_setting(tmp_path: Path) -> None:
    text = vae("train", "--help", cwd=tmp_path).stdout
    for group in catalog.groups().values():
        for choice in group.choices.values():
            assert f"  {choice.name}" in text
    for name, setting in catalog.defaults().items():
        assert f"  {setting.default} (default)" in text or name == "experiment"
    for setting in catalog.settings().values():
        assert f"  {setting.key}={setting.default}" in text
    assert "vae train -m sigma=learned,fixed,deterministic latent=2,8,32" in text


@pytest.mark.parametrize("flag", ["--config-dir own", "--config-dir=own"])
def test_the_help_lists_the_choices_in_the_users_own_folder(flag: str, tmp_path: Path) -> None:
    (tmp_path / "own" / "sigma").mkdir(parents=True)
    (tmp_path / "own" / "sigma" / "mine.yaml").write_text("# a sigma of my own\n_target_: mine.Mine\n")
    for words in (["--help", *flag.split()], [*flag.split(), "--help"]):
        assert "a sigma of my own" in vae("train", *words, cwd=tmp_path).stdout
    assert "a sigma of my own" not in vae("train", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", ["train", "sample", "interpolate", "evaluate", "export", "compare", "runs"])
@pytest.mark.parametrize("markup", ["rich", None])
def test_every_subcommand_has_examples_that_are_whole_lines(
    name: str, markup: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.app, "rich_markup_mode", markup)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.app([name, "--help"], prog_name="vae", standalone_mode=False) in (0, None)
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f" vae {name}" in text
    assert "[bold" not in text


def test_an_example_in_the_help_of_train_works(front: Any) -> None:
    front("sigma=fixed", "sigma.value=0.5", "latent=8")
    assert (RAN[0]["sigma"]["value"], RAN[0]["latent"]) == (0.5, 8)


# Arguments and options ------------------------------------------------------------------------------------------------


def parsed(name: str, *words: str) -> dict[str, Any]:
    """Return the arguments with which Typer would call a subcommand."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, Subcommands)
    params: dict[str, Any] = group.commands[name].make_context(name, list(words)).params
    return params


def test_overrides_and_flags_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hydra_front, "run", lambda task, overrides, **flags: calls.append((overrides, flags)))
    monkeypatch.setenv("VAE_TRUST", "")
    words = ["sigma=a,b", "-m", "latent=2,8", "~x", "+y=1", "--config-dir", "here", "--trust", "mine", "z=3"]
    cli.app(["train", *words], prog_name="vae", standalone_mode=False)
    flags = {
        "multirun": True,
        "cfg": None,
        "package": None,
        "resolve": False,
        "info": None,
        "config_name": None,
        "config_dir": "here",
        "hydra_help": False,
    }
    assert calls == [(["sigma=a,b", "latent=2,8", "~x", "+y=1", "z=3"], flags)]


@pytest.mark.parametrize("words", [["train"], ["sample", "latest"], ["interpolate", "latest"]], ids=" ".join)
def test_trust_reaches_the_processes_that_a_command_starts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_TRUST", "one two")
    parsed(*words)
    assert os.environ["VAE_TRUST"] == "one two"
    parsed(*words, "--trust", "three", "--trust", "four")
    assert os.environ["VAE_TRUST"] == "three four"


def test_options_reach_the_parameters_of_their_command() -> None:
    given = parsed("sample", "latest", "--from", "posterior", "--images", "0,5", "--draw", "--count", "3")
    expected = {"run": "latest", "source": "posterior", "images": "0,5", "draw": True, "count": 3}
    assert given.items() >= (expected | {"weights": "best", "runs_dir": Path("runs"), "out": None}).items()
    words = ["--pair", "0,1", "--pair", "2,3", "--path", "norm-corrected", "--grid", "1,2,3,4", "--gif"]
    given = parsed("interpolate", "r", *words)
    expected = {"run": "r", "pairs": ["0,1", "2,3"], "path": "norm-corrected", "corners": "1,2,3,4", "gif": True}
    assert given.items() >= expected.items()
    given = parsed("runs", "elsewhere", "--where", "sigma=fixed", "--where", "latent=2", "--sort", "elbo")
    expected = {"folder": Path("elsewhere"), "sort": "elbo", "reverse": False}
    assert given == {**expected, "where": ["sigma=fixed", "latent=2"]}


# Errors: one message and an exit code ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "There is no subcommand 'trian'. Did you mean 'train'?"),
        (["sigma=fixed"], "Did you mean 'vae train sigma=fixed'?"),
        (["--versoin"], "Did you mean '--version'?"),
        (["train", "--mltirun"], "Did you mean '--multirun'?"),
        (["train", "--config-path", "x"], "add a folder of your own with --config-dir"),
        (["train", "--shell-completion"], "vae --install-completion"),
        (["train", "--sigma", "fixed"], "Settings are typed without dashes: sigma=fixed"),
        (["train", "--cfg", "foo"], "'foo' is not one of 'job', 'hydra', 'all'"),
        (["sample"], "Missing argument"),
        (["sample", "x", "--count", "0"], "greater than or equal to 1"),
        (["sample", "x", "--from", "nowhere"], "'aggregate'"),
    ],
)
def test_wrong_words_end_in_one_line_and_exit_code_2(words: list[str], said: str, tmp_path: Path) -> None:
    done = vae(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("vae: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such run"), 2, "vae: no such run\n"),
        (Failure("diverged"), 1, "vae: diverged\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 1, "vae: x.pt: No space left on device. Make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            1,
            "vae: runs: Permission denied. Change the permissions",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 1, "vae: a: No such file.\n"),
        (ValueError("odd"), 1, "vae: ValueError: odd (set HYDRA_FULL_ERROR=1 for the traceback)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert raising(error, monkeypatch) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert "Traceback" not in printed
    assert bool(printed) == bool(said)


def test_nothing_to_do_is_reported_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("finished already")
    error.exit_code = 0
    assert raising(error, monkeypatch) == 0
    assert capsys.readouterr() == ("finished already\n", "")


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert raising(UserError("no such run"), monkeypatch) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pipes work differently")
@pytest.mark.parametrize("words", ["train --help", "--help"])
def test_a_reader_that_leaves_early_is_no_error(words: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    script = f'{{ sleep 0; "{sys.executable}" -m vae_cli {words}; echo $? >&2; }} | true'
    # `true` exits without reading. Whether or not it has exited before the program prints, nothing is reported.
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() in ("0", "141")


def test_a_broken_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["vae", "train", "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 141
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vae_cli", "--help"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr.startswith("vae: No space left on device.")
    assert "Traceback" not in done.stderr


def test_the_program_shows_a_configuration(tmp_path: Path) -> None:
    done = vae("train", "sigma=fixed", "--cfg", "job", "-p", "sigma", "sigma.value=0.5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "value: 0.5" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_program_explains_a_wrong_override(tmp_path: Path) -> None:
    done = vae("train", "sigma=fixd", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("vae: 'fixd' is not a choice of sigma. Did you mean 'fixed'?")
    full = vae("train", "sigma=fixd", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert full.returncode == 2
    assert "Traceback" in full.stderr
    assert "MissingConfigException" in full.stderr
    assert list(tmp_path.iterdir()) == []


# What Hydra refuses ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, str]] = [
    ("sigm=fixed", "There is no group or setting 'sigm'. Did you mean 'sigma'?"),
    ("sigma/value=2", "There is no group or setting 'sigma/value'. Did you mean 'sigma'?"),
    ("latnt=3", "There is no group or setting 'latnt'. Did you mean 'latent'?"),
    ("lr=0.1", "Did you mean 'optimizer.lr'?"),
    ("beta=4", "Did you mean 'regularizer.beta'?"),
    (
        "sigma=fixd",
        "'fixd' is not a choice of sigma. Did you mean 'fixed'? Choices: bounded, deterministic, fixed,",
    ),
    ("sigma=3", "'sigma=3': '3' is not a choice of sigma. Choices: bounded,"),
    ("sigma=null", "'sigma=null': leave sigma out, or choose one of: bounded,"),
    ("sigma=???", "'sigma=???': no choice is given."),
    ("sigma=[fixed,learned]", "sigma accepts one choice. To run several, type -m sigma=fixed,learned."),
    ("experiment=beta_vae", "'beta_vae' is not a choice of experiment. Did you mean 'beta_vae_loss'?"),
    ("experiment=null", "'experiment=null': leave experiment out,"),
    ("sigma.vlue=2", "sigma=learned has no 'vlue'; it has no settings. Did you mean 'value'? sigma=fixed has that."),
    ("sigma=fixed sigma.vlue=2", "sigma=fixed has no 'vlue'; it has: value. Did you mean 'value'?"),
    ("regularizer.bta=1", "regularizer=kl has no 'bta'; it has: beta, draws. Did you mean 'beta'?"),
    ("sigma.value=0.5", "sigma=learned has no 'value'; sigma=fixed, sigma=interpolated, "),
    ("experiment=autoencoder regularizer.beta=2", "regularizer=none has no 'beta'; "),
    (
        "regularizer.beta.epochs=3",
        "regularizer.beta is a single value. To make it a schedule, type +schedule@regularizer.beta=",
    ),
    (
        "+schedule@regularizer.beta=linear regularizer.beta.epocs=4",
        "regularizer.beta has no 'epocs'. Did you mean 'epochs'? It has: epochs, start, stop.",
    ),
    ("schedule@regularizer.beta=linear", "starts with a +. Type +schedule@regularizer.beta=linear."),
    ("sched@regularizer.beta=linear", "there is no group 'sched'. Did you mean 'schedule'?"),
    ("+schedule@regularizer.beta=linr", "'linr' is not a choice of schedule. Did you mean 'linear'?"),
    ("+schedule=linear", "does not say which setting it replaces: type +schedule@regularizer.beta=linear"),
    ("schedule=linear", "does not say which setting it replaces: type +schedule@regularizer.beta=linear"),
    ("sigma@prior=fixed", "'sigma@prior=fixed': sigma has a fixed place, so it needs no @. Type sigma=fixed."),
    ("latent=", "'latent=' gives no value. Type latent=16 for the default: dimensions of the code z; with"),
    ("sigma=", "'sigma=' gives no value. Type sigma="),
    ("hydra.foo=", "'hydra.foo=' gives no value."),
    ("=3", "'=3' does not name a setting."),
    ("sigma==fixed", "'sigma==fixed' has one '=' too many. Did you mean 'sigma=fixed'?"),
    ("foo", "'foo' is not an override. Overrides look like key=value"),
    ("laten", "'laten' is not an override. Did you mean 'latent'?"),
    ("sigma", "'sigma' gives no value. Type sigma="),
    ("fixed", "'fixed' is a choice of sigma: type sigma=fixed."),
    ("latent=[1", "a bracket is not closed. Quote a list for the shell: 'latent=[1,2]'."),
    ("latent=${epochs", "cannot be read as an override: a bracket is not closed."),
    ("run_name=a=b", "Quote it twice: 'run_name=\"a=b\"'."),
    ("data_dir=~/data", "'~' means something different to Hydra. Type the full path, or data_dir=$HOME/data."),
    ("-- --foo", "'--foo' is a flag, and flags go before any '--'."),
    ("latent=${latnt}", "'latent=${latnt}': the configuration has no 'latnt'. Did you mean 'latent'?"),
    ("latent=${foo:1}", "'latent=${foo:1}': Unsupported interpolation type foo."),
    ("latent=${oc.env:VAE_NO_SUCH_VARIABLE}", "Environment variable 'VAE_NO_SUCH_VARIABLE' not found"),
    ("latent=???", "latent needs a value: type latent=VALUE."),
    ("dataset=image_folder", "dataset.path needs a value: type dataset.path=VALUE."),
    (
        "sigma=learned,fixed",
        "'sigma=learned,fixed' gives several values: type -m to sweep over them, or give one value.",
    ),
    ("latent=range(1,3)", "'latent=range(1,3)' gives several values: type -m to sweep"),
    ("+latent=3", "'+latent=3': 'latent' exists already, so it needs no +. Type latent=3."),
    ("+sigma=fixed", "'+sigma=fixed': 'sigma' exists already, so it needs no +. Type sigma=fixed."),
    ("+regularizer.beta=3", "so it needs no +. Type regularizer.beta=3."),
    ("++sigma=fixed", "'++sigma=fixed': a choice needs no +. Type sigma=fixed."),
    ("~latent", "'~latent' would remove 'latent', which every run needs. Type latent=16"),
    ("~sigma", "'~sigma' would remove 'sigma', which every run needs."),
    ("~latnt", "'~latnt': there is no 'latnt' to remove. Did you mean 'latent'?"),
    ("hydra.foo=1", "Hydra's own configuration has no 'hydra.foo'. hydra has: callbacks,"),
    ("hydra.mode=FOO", "'hydra.mode=FOO': Invalid value 'FOO', expected one of [RUN, MULTIRUN]"),
    ("hydra/launcher=nowhere", "'nowhere' is not a choice of hydra/launcher."),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_the_message_about_a_wrong_override_says_what_to_type(words: str, said: str, front: Any) -> None:
    with pytest.raises(UserError) as caught:
        front(*words.removeprefix("-- ").split())
    message = str(caught.value)
    assert said in message
    assert caught.value.exit_code == 2
    for jargon in ("struct", "full_key", "object_type", "ConfigComposition", "See https", "Config search path"):
        assert jargon not in message
    assert RAN == []


FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"multirun": True, "cfg": "job"}, "-m and --cfg cannot be given together"),
    ({"resolve": True}, "--resolve changes how a configuration is shown: give it together with --cfg job."),
    ({"package": "sigma"}, "--package changes how a configuration is shown"),
    ({"cfg": "job", "package": "sigm"}, "--package sigm: the configuration has no such part. Did you mean 'sigma'?"),
    ({"cfg": "jib"}, "--cfg jib: there is no such view. Did you mean 'job'?"),
    ({"config_dir": "/nowhere"}, "--config-dir /nowhere: there is no such folder."),
    (
        {"config_name": "foo"},
        "--config-name foo: foo.yaml is neither among the bundled configurations nor in --config-dir.",
    ),
]


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_wrong_flags_get_a_message(flags: dict[str, Any], said: str, front: Any) -> None:
    with pytest.raises(UserError) as caught:
        front(**flags)
    assert said in str(caught.value)
    assert RAN == []


@pytest.mark.parametrize(("name", "wanted"), [("joblib", "joblib"), ("submitit_slurm", "submitit"), ("ray", "ray")])
def test_the_message_about_a_missing_launcher_says_how_to_install_it(name: str, wanted: str, front: Any) -> None:
    package = f"hydra_plugins.hydra_{wanted}_launcher"
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(UserError, match=rf"hydra/launcher={name} is not installed: type pip install .*{wanted}"):
            front(f"hydra/launcher={name}", multirun=True)
    else:
        pytest.skip(f"{package} is installed")


def test_a_broken_file_of_the_user_is_named(front: Any, tmp_path: Path) -> None:
    (tmp_path / "sigma").mkdir()
    (tmp_path / "sigma" / "mine.yaml").write_text("a: [1\nb: {\n")
    with pytest.raises(UserError, match=r"not valid YAML.*mine\.yaml"):
        front("sigma=mine", config_dir=str(tmp_path))


def test_a_misspelt_choice_inside_a_preset_names_the_preset(front: Any, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /sigma: fixd\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"experiment=mine: 'fixd' is not a choice of sigma\. Did you mean 'fixed'\?"):
        front("experiment=mine", config_dir=str(tmp_path))


def test_a_message_raised_inside_a_resolver_comes_through(front: Any) -> None:
    def refuse() -> None:
        raise UserError("the folder holds another run")

    OmegaConf.register_new_resolver("test_refuse", refuse, replace=True)
    with pytest.raises(UserError, match=r"^the folder holds another run$"):
        front("run_name=${test_refuse:}")


def test_what_the_task_raises_comes_through_unchanged_and_without_hydras_line(
    front: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Failure, match=r"^the loss is not finite$"):
        front("latent=13")
    with pytest.raises(ZeroDivisionError):
        front("latent=14")
    assert capsys.readouterr() == ("", "")


def test_argv_and_environment_are_restored(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    front("latent=2")
    with pytest.raises(UserError):
        front("latnt=2")
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_views(front: Any, capsys: pytest.CaptureFixture[str]) -> None:
    front("prior=scaled_normal", cfg="job", package="prior", resolve=True)
    assert "latent: 16" in capsys.readouterr().out
    front(cfg="hydra")
    assert "launcher" in capsys.readouterr().out
    assert RAN == []


# Sweeps ---------------------------------------------------------------------------------------------------------------


def latents() -> list[int]:
    return [plain["latent"] for plain in RAN]


def test_a_sweep_runs_every_combination(front: Any) -> None:
    front("sigma=learned,fixed", "latent=2,4", multirun=True)
    assert latents() == [2, 4, 2, 4]


def test_every_job_is_checked_before_the_first_starts(front: Any) -> None:
    def check(config: DictConfig) -> bool:
        assert RAN == []
        assert "runtime" in config.hydra
        if config.latent == 4:
            raise UserError("latent=4 is not allowed")
        return True

    with launcher.check_sweeps(check), pytest.raises(UserError) as caught:
        front("latent=2,4", "sigma=fixed", multirun=True)
    said = "The job latent=4 sigma=fixed cannot run, so no job was started: latent=4 is not allowed"
    assert str(caught.value) == said
    assert RAN == []


def test_finished_jobs_are_skipped(front: Any) -> None:
    with launcher.check_sweeps(lambda config: config.latent != 2):
        front("latent=2,4,8", multirun=True)
    assert latents() == [4, 8]
    with launcher.check_sweeps(lambda config: False):
        front("latent=2,4,8", multirun=True)
    assert latents() == [4, 8]


def test_the_check_ends_with_its_context(front: Any) -> None:
    with launcher.check_sweeps(lambda config: False):
        pass
    front("latent=2,4", multirun=True)
    assert latents() == [2, 4]


def test_one_failed_job_does_not_stop_the_others(front: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with launcher.check_sweeps(lambda config: True), pytest.raises(Failure) as caught:
        front("latent=2,13,14,4", multirun=True)
    assert latents() == [2, 13, 14, 4]
    assert caught.value.exit_code == 1
    said, *lines = str(caught.value).splitlines()
    assert said == "2 of 4 jobs failed:"
    assert lines[0].startswith("  latent=13")
    assert lines[0].endswith(": the loss is not finite")
    assert lines[1].endswith(": ZeroDivisionError: division by zero")
    assert isinstance(caught.value.__cause__, Failure)
    assert capsys.readouterr().err == ""


def test_a_job_that_fails_before_its_task_does_not_stop_the_others(front: Any) -> None:
    def folder(*, _root_: DictConfig) -> str:
        if _root_.latent == 4:
            raise UserError("the folder holds another run")
        return str(_root_.latent)

    OmegaConf.register_new_resolver("test_folder", folder, replace=True)
    with launcher.check_sweeps(lambda config: True), pytest.raises(Failure, match=r"latent=4.*another run"):
        front("latent=2,4,8", "hydra.sweep.subdir=${test_folder:}", multirun=True)
    assert latents() == [2, 8]


def test_settings_of_a_swept_choice_reach_the_jobs_that_have_them(front: Any) -> None:
    # Hydra itself would refuse likelihood.scale, which the default likelihood does not have.
    front("likelihood=gaussian,laplace", "likelihood.scale=1.5", multirun=True)
    assert [plain["likelihood"]["scale"] for plain in RAN] == [1.5, 1.5]
    front("+schedule@regularizer.beta=linear,cyclic", "regularizer.beta.epochs=7", multirun=True)
    assert [plain["regularizer"]["beta"]["epochs"] for plain in RAN[2:]] == [7, 7]
    with pytest.raises(UserError, match="sigma=learned has no 'value'; sigma=fixed, "):
        front("sigma=learned,fixed", "sigma.value=2", multirun=True)


@pytest.mark.parametrize("word", ["latent=2,x", "sigma=learned,fixd", "sigma.vlue=1,2", "hydra.verbose=true,false"])
def test_a_wrong_value_in_a_sweep_stops_it_before_it_starts(word: str, front: Any) -> None:
    def check(config: DictConfig) -> bool:
        if not isinstance(config.latent, int):
            raise UserError("latent has to be a whole number")
        return True

    with launcher.check_sweeps(check), pytest.raises(UserError):
        front(word, "seed=1,2", multirun=True)
    assert RAN == []


class Inner:
    """Stand in for a launcher that gets all jobs at once."""

    def __init__(self) -> None:
        self.given: list[Sequence[Sequence[str]]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.given.append(job_overrides)
        error = Failure("diverged")
        wrong = [words == ["latent=4"] for words in job_overrides]
        return [
            JobReturn(status=JobStatus.FAILED if failed else JobStatus.COMPLETED, _return_value=error if failed else 0)
            for failed in wrong
        ]


def checked_launcher(inner: Any) -> launcher.CheckedLauncher:
    class Loader:
        def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
            return OmegaConf.create({"hydra": OmegaConf.structured(HydraConf), "first": overrides[0]})

    config = {"hydra": {"launcher": {"_target_": "plugin.ParallelLauncher"}}}
    context: Any = types.SimpleNamespace(config_loader=Loader())
    return launcher.CheckedLauncher(
        inner, lambda config: config["first"] != "latent=2", None, context, OmegaConf.create(config)
    )


def test_a_launcher_of_a_plugin_gets_all_jobs_at_once_without_the_finished_ones() -> None:
    inner = Inner()
    launcher = checked_launcher(inner)
    with pytest.raises(Failure, match=r"^1 of 3 jobs failed:\n  latent=4: diverged$"):
        launcher.launch([["latent=2"], ["latent=3"], ["latent=4"], ["latent=5"]], 0)
    assert inner.given == [[["latent=3"], ["latent=4"], ["latent=5"]]]


def test_the_real_command_composes(tmp_path: Path) -> None:
    done = vae("train", "experiment=cv_vae_loss", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(json.dumps(OmegaConf.to_container(OmegaConf.create(done.stdout))))["sigma"]["value"] == 0.7
