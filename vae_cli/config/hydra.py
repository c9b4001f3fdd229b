"""The call into Hydra: run a task as Hydra's command line would, and turn its errors into UserErrors.

This uses a private name of Hydra: `JobReturn._return_value` (see `silent_result`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from vae_cli.config import catalog
from vae_cli.config.messages import causes, translate
from vae_cli.config.overrides import check_overrides, parse
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.files import expand_home

VIEWS = {
    "cfg": ("job", "hydra", "all"),
    "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}


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
    """Run a task decorated with `hydra.main`, as if these overrides and flags had been typed on its command line.

    Raises UserError for anything that Hydra rejects; exceptions raised by the task itself propagate unchanged.
    """
    overrides = [override.strip() for override in overrides]
    flags = {"cfg": cfg, "package": package, "info": info, "config-name": config_name, "config-dir": config_dir}
    switches = {"multirun": multirun, "resolve": resolve, "hydra-help": hydra_help}
    _check_flags(flags, switches)
    extra_dirs = [expand_home(config_dir, "--config-dir")] if config_dir is not None else []
    check_overrides(overrides, extra_dirs)

    argv = [sys.argv[0], *(_defer_to_jobs(overrides) if multirun else overrides)]
    argv += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    argv += [f"--{name}" for name, value in switches.items() if value]
    with hydra_raises(argv):
        try:
            if package is None:
                task()
            else:
                _show_package(task, package)
        except SystemExit as stop:  # how Hydra ends after showing a view
            if stop.code:
                raise
        except Exception as error:  # every failure passes here; only what the user can change becomes a message
            if (own := _inside_resolver(error)) is not None:
                raise own from error
            message = translate(error, overrides, config_name=config_name, extra_dirs=extra_dirs)
            if message is None or message is error:
                raise
            raise message from (message.__cause__ if message in causes(error) else error)


def _check_flags(flags: Mapping[str, str | None], switches: Mapping[str, bool]) -> None:
    """Raise UserError for mutually exclusive flags and for invalid values of a flag."""
    exclusive = {"-m": switches["multirun"], "--cfg": flags["cfg"], "--info": flags["info"]}
    exclusive["--hydra-help"] = switches["hydra-help"]
    given = [flag for flag, value in exclusive.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} cannot be given together: each does something different. Use one.")
    for flag, value in {"--resolve": switches["resolve"], "--package": flags["package"]}.items():
        if value and not flags["cfg"]:
            raise UserError(f"{flag} changes how a configuration is shown: give it together with --cfg job.")
    for flag, words in VIEWS.items():
        word = flags[flag]
        if word is not None and word not in words:
            raise UserError(f"--{flag} {word}: there is no such view.{nearest(word, words)} Views: {', '.join(words)}.")
    folder = flags["config-dir"]
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder.")


@contextmanager
def hydra_raises(argv: list[str]) -> Iterator[None]:
    """Inside the block, make Hydra read this command line and raise its errors instead of printing them."""
    before_argv, before_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with silent_result():
            yield
    finally:
        sys.argv = before_argv
        if before_full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before_full


@contextmanager
def silent_result() -> Iterator[None]:
    """Inside the block, make Hydra raise the error of a failed job without printing anything.

    Hydra's property `JobReturn.return_value` prints "Error executing job with overrides" before it raises, even if
    vae is about to print a message of its own. Avoiding this needs the private `JobReturn._return_value`. If a future
    Hydra lacks that name, Hydra's own property is called, and its line is printed above the message.
    """
    original: Any = vars(JobReturn).get("return_value")
    if not isinstance(original, property):
        yield
        return

    def silent(result: JobReturn) -> Any:
        error = getattr(result, "_return_value", None)
        if result.status is JobStatus.FAILED and isinstance(error, BaseException):
            raise error
        return original.__get__(result)

    setattr(JobReturn, "return_value", original.getter(silent))  # noqa: B010  # mypy refuses to assign a property
    try:
        yield
    finally:
        setattr(JobReturn, "return_value", original)  # noqa: B010


def _show_package(task: Callable[[], Any], package: str) -> None:
    """Show one part of the configuration. Raises UserError if Hydra finds no such part."""
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


def _defer_to_jobs(overrides: Sequence[str]) -> list[str]:
    """Rewrite `likelihood.scale=1` as `likelihood.scale=choice(1)` if `likelihood` itself is swept.

    Hydra applies plain values once, before any swept choice. So it would refuse a key that the default choice lacks,
    even if every swept choice has it.
    """
    parsed: list[tuple[str, Override | None]] = []
    for override in overrides:
        try:
            parsed.append((override, parse(override)))
        except HydraException:  # Hydra will meet it again and refuse it
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
    """Return the error (such as a disk error) that vae's own code raised while Hydra was resolving a run's folder.

    Returns None for errors of Hydra or OmegaConf, and for a UserError, which `translate` handles.
    """
    if not isinstance(error, InterpolationResolutionError) or error.full_key != "hydra.run.dir":
        return None
    chain = list(causes(error))
    libraries = (OmegaConfBaseException, HydraException)
    if any(isinstance(cause, UserError) for cause in chain) or isinstance(chain[-1], libraries):
        return None
    return chain[-1]
