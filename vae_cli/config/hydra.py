"""What stands between our command line and Hydra: the call, and messages for people."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    HydraException,
)
from omegaconf.errors import (
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from vae_cli.config import catalog
from vae_cli.config.messages import FORM, causes, example, translate
from vae_cli.core.errors import UserError, nearest

# Our settings of a launcher or sweeper stand before the plugin's own, which Hydra takes for their schema and says so.
warnings.filterwarnings("ignore", r"\s*'hydra/(launcher|sweeper)/\w+' is validated against ConfigStore schema")


def run(
    task: Callable[[], Any],
    overrides: Sequence[str],
    *,
    multirun: bool = False,
    cfg: str | None = None,
    package: str | None = None,
    resolve: bool = False,
    info: str | None = None,
    config_name: str | None = None,
    config_dir: str | None = None,
    hydra_help: bool = False,
) -> None:
    """Run a task that `hydra.main` wraps as if its overrides and flags stood on the command line.

    Raises UserError for whatever Hydra refuses; what the task itself raises comes through unchanged.
    """
    overrides = [override.strip() for override in overrides]
    only_one = {"-m": multirun, "--cfg": cfg, "--info": info, "--hydra-help": hydra_help}
    given = [flag for flag, value in only_one.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} cannot be given together: each asks for something else. Give one.")
    for flag, value in {"--resolve": resolve, "--package": package}.items():
        if value and not cfg:
            raise UserError(f"{flag} says how a configuration is shown: give it together with --cfg job.")
    for flag, word, words in (
        ("--cfg", cfg, ("job", "hydra", "all")),
        ("--info", info, ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    ):
        if word is not None and word not in words:
            raise UserError(f"{flag} {word}: there is no such view.{nearest(word, words)} Views: {', '.join(words)}.")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder.")
    extra_dirs = [Path(config_dir)] if config_dir is not None else []
    _check_shapes(overrides, extra_dirs)

    flags = {"cfg": cfg, "package": package, "info": info, "config-name": config_name, "config-dir": config_dir}
    argv = [sys.argv[0], *(_defer_to_jobs(overrides) if multirun else overrides)]
    argv += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    switches = {"multirun": multirun, "resolve": resolve, "hydra-help": hydra_help}
    argv += [f"--{name}" for name, value in switches.items() if value]
    with _hydra_raises(argv):
        try:
            if package is None:
                task()
            else:
                _show_package(task, package)
        except SystemExit as stop:  # Hydra ends its views this way
            if stop.code:
                raise
        except Exception as error:  # every failure passes here; the ones that are not the user's go on as they are
            if (own := _inside_resolver(error)) is not None:
                raise own from error
            message = translate(error, overrides, config_name=config_name, extra_dirs=extra_dirs)
            if message is None or message is error:
                raise
            raise message from (message.__cause__ if message in causes(error) else error)


@contextmanager
def _hydra_raises(argv: list[str]) -> Iterator[None]:
    """Let Hydra read these words, raise its errors instead of printing them, and put everything back after."""
    before_argv, before_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    value = JobReturn.__dict__["return_value"]

    def quiet(result: JobReturn) -> Any:
        if result.status is JobStatus.FAILED:
            raise result._return_value
        return value.fget(result)

    sys.argv = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    JobReturn.return_value = value.getter(quiet)  # type: ignore[method-assign]  # else it prints before it raises
    try:
        yield
    finally:
        sys.argv = before_argv
        JobReturn.return_value = value  # type: ignore[method-assign]
        if before_full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before_full


def _show_package(task: Callable[[], Any], package: str) -> None:
    try:
        with redirect_stderr(StringIO()):
            task()
    except SystemExit as stop:
        if stop.code:
            words = [*catalog.defaults(), *catalog.settings()]
            raise UserError(
                f"--package {package}: the configuration has no such part.{nearest(package, words)}"
            ) from stop
        raise


def _check_shapes(overrides: Sequence[str], extra_dirs: Sequence[Path]) -> None:
    """Refuse what Hydra would take for something else, or would only complain about much later."""
    groups, settings, axes = catalog.groups(*extra_dirs), catalog.settings(), catalog.defaults()
    placed = set(catalog.groups()) - set(axes)  # bundled groups that need a place: schedule
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+~")
        choices = list(groups[name].choices) if name in groups else []
        if re.search(r"\d{1000}", override):
            raise UserError(f"'{override[:40]}...' holds a number of a thousand digits or more. Give a smaller one.")
        if override.startswith("-"):
            raise UserError(f"'{override}' is a flag, and flags stand before any '--'.")
        if equals and not name:
            raise UserError(f"'{override}' names nothing to set. {FORM}")
        if equals and not value and not key.startswith("~"):
            raise UserError(f"'{override}' gives no value. {example(name, groups)}")
        if key.startswith("~") and (name in settings or name in axes) and name != "experiment":
            raise UserError(f"'{override}' would remove '{name}', which every run needs. {example(name, groups)}")
        if equals and name in placed:
            raise UserError(
                f"'{override}' does not say what it sets: type +{name}@regularizer.beta={value}, for example."
            )
        files = [word for word in value.split(",") if word not in choices]
        if choices and any(word.endswith(".yaml") or word.startswith(("/", ".")) for word in files):
            near = nearest(Path(files[0]).stem, choices)
            raise UserError(f"'{override}': {name} takes the name of a choice, not a file.{near}")
        if choices and value in ("null", "~") and value not in choices:
            raise UserError(f"'{override}': leave {name} out, or choose one of: {', '.join(choices)}.")
        if name in axes and name != "experiment" and value.startswith("["):
            inside = value.strip("[]")
            raise UserError(f"'{override}': {name} takes one choice. To run several, type -m {name}={inside}.")


def _defer_to_jobs(overrides: Sequence[str]) -> list[str]:
    """Rewrite `likelihood.scale=1` as `likelihood.scale=choice(1)` where `likelihood` itself is swept.

    Hydra applies plain values once before it applies any swept choice, and would refuse a key that the default choice
    does not have although every job has it.
    """
    parsed: list[tuple[str, Override | None]] = []
    for override in overrides:
        try:
            parsed.append((override, OverridesParser.create().parse_override(override)))
        except HydraException:  # Hydra meets it again and says so
            parsed.append((override, None))
    groups = [one for _, one in parsed if one is not None and one.is_sweep_override() and "." not in one.key_or_group]
    below = tuple("" if one.key_or_group == "experiment" else f"{one.package or one.key_or_group}." for one in groups)
    deferred = []
    for text, one in parsed:
        plain = one is not None and text[0] not in "+~" and not one.is_sweep_override() and "." in one.key_or_group
        if plain and not text.startswith("hydra.") and text.startswith(below):
            key, _, value = text.partition("=")
            text = f"{key}=choice({value})"
        deferred.append(text)
    return deferred


def _inside_resolver(error: Exception) -> BaseException | None:
    """What went wrong in our own code while Hydra asked it for the folder of a run, as a disk that cannot be read."""
    if not isinstance(error, InterpolationResolutionError) or error.full_key != "hydra.run.dir":
        return None
    chain = list(causes(error))
    told = (OmegaConfBaseException, HydraException)
    if any(isinstance(cause, UserError) for cause in chain) or isinstance(chain[-1], told):
        return None
    return chain[-1]
