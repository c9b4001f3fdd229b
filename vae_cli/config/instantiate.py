"""From a configuration's node to the object that it names: only classes that are allowed, only values that their
constructors take."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args, get_type_hints

from vae_cli.axes.schedule import Schedule
from vae_cli.config import catalog
from vae_cli.config.naming import AXES
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.values import Interval, describe, is_allowed

ALLOWED = (*(f"vae_cli.axes.{axis}" for axis in (*AXES, "schedule")), "vae_cli.metrics", "torch.optim")


def build(node: Mapping[str, Any], path: str, kind: type) -> Any:
    """Build the object that a node names by `_target_`, from its other keys, after they are checked against the types
    in the constructor's signature. Raises UserError, with the full key in it."""
    if "_target_" not in node:
        raise UserError(f"{path}._target_ is missing: it names the class that {path} is.")
    target = find_class(node["_target_"], path, kind)
    arguments = built_arguments(node, path)
    # A class without a constructor of its own has nn.Module's *args and **kwargs, which are no settings.
    parameters = {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    hints = get_type_hints(target.__init__, include_extras=True)
    for key, value in arguments.items():
        if key not in parameters:
            allowed = f"Allowed are {', '.join(parameters)}." if parameters else f"{target.__name__} takes no settings."
            raise UserError(
                f"{path}.{key} is not a setting.{nearest(key, parameters)} {allowed}{_elsewhere(path, key)}"
            )
        check_value(value, hints.get(key, Any), f"{path}.{key}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{path}.{missing[0]} is missing; type {path}.{missing[0]}=...")
    return target(**arguments)


def _elsewhere(axis: str, key: str) -> str:
    """Name another choice of an axis that has this setting."""
    choices = catalog.groups()[axis].choices.values() if axis in catalog.defaults() else ()
    return next((f" {axis}={choice.name} has it." for choice in choices if key in choice.settings), "")


def built_arguments(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The keys of a node as what the constructor is called with: schedules are built. Raises UserError."""
    return {
        key: build(value, f"{path}.{key}", Schedule) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in node.items()
        if key != "_target_"
    }


def check_value(value: Any, kind: Any, path: str) -> None:
    """Raise UserError where a value is none of its kind, or a schedule leaves the bounds of it."""
    if not is_allowed(value, kind):
        raise UserError(f"{path}={shown(value)} is not allowed: it has to be {describe(kind)}.")
    if isinstance(value, Schedule):
        for bound in (metadata for option in get_args(kind) for metadata in get_args(option)[1:]):
            if isinstance(bound, Interval) and not all(bound.holds(number) for number in value.bounds()):
                low, high = value.bounds()
                raise UserError(f"{path} goes from {low:g} to {high:g}, and has to be {bound} all the time.")


def shown(value: Any) -> str:
    """A value as it is typed, shortened."""
    if isinstance(value, Mapping):
        return "(a schedule)" if "_target_" in value else "(several settings)"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def find_class(target: str, path: str, kind: type) -> Any:
    """Import the class that `_target_` names, where it is allowed: those of this package's axes, of torch.optim, and of
    modules that the user trusts by name. Raises UserError."""
    if not isinstance(target, str):
        raise UserError(f"{path}._target_={shown(target)} is not the name of a class; leave it out.")
    module_name, _, name = target.rpartition(".")
    allowed = (*ALLOWED, *trusted())
    if not _is_within(module_name, allowed):
        top = module_name.partition(".")[0] or target
        raise UserError(
            f"{path}._target_={target} is code from outside the axes of vae and torch.optim, and is not run unless you "
            f"say so: if you trust it, add --trust {top} (or set VAE_TRUST={top}; in Python: "
            f"load_run(..., trust=['{top}']))."
        )
    if trusted() and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module lies where the user stands
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}._target_={target} is not there: no module is named '{error.name}'.") from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{path}._target_={target} is not there.{nearest(name, vars(module))}")
    if not (isinstance(found, type) and issubclass(found, kind) and _is_within(found.__module__, allowed)):
        raise UserError(f"{path}._target_={target} cannot be used as {path}: it is not a {kind.__name__}.")
    if found is kind or inspect.isabstract(found):
        raise UserError(f"{path}._target_={target} is what all choices of {path} have in common, and none itself.")
    return found


def trusted() -> tuple[str, ...]:
    """The modules whose code the user has allowed, from VAE_TRUST, which --trust sets; worker processes inherit it."""
    return (*_trusted_here.get(), *os.environ.get("VAE_TRUST", "").replace(",", " ").split())


_trusted_here: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """Trust these modules too while the context is entered, without a change of the environment."""
    token = _trusted_here.set((*_trusted_here.get(), *modules))
    try:
        yield
    finally:
        _trusted_here.reset(token)


def _is_within(module: str, prefixes: Iterable[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)
