"""Build the objects that a configuration names, from allowed classes only and with checked arguments.

Functions of the user's own, which options name, come from trusted modules, too.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, get_args, get_type_hints

from vae_cli.axes.schedule import Schedule
from vae_cli.config import catalog
from vae_cli.config.aliases import MOVED_FOR_IMPORT
from vae_cli.config.naming import AXES, typed
from vae_cli.config.trust import trusted
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.values import Interval, describe, flaw, is_allowed

ALLOWED = (*(f"vae_cli.axes.{axis}" for axis in (*AXES, "schedule")), "vae_cli.metrics", "torch.optim")


def build(node: Mapping[str, Any], path: str, kind: type) -> Any:
    """Build the object that a node names by `_target_`.

    The other keys of the node are the constructor's arguments; they are checked against the types in its signature.
    Raises UserError, which names the full key.
    """
    if "_target_" not in node:
        raise UserError(f"{path}._target_ is missing: it must name the class of {path}.")
    target = find_class(node["_target_"], path, kind)
    arguments = built_arguments(node, path)
    # A class without a constructor of its own inherits nn.Module's *args and **kwargs, which are not settings.
    parameters = {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    hints = get_type_hints(target.__init__, include_extras=True)
    for key, value in arguments.items():
        if key not in parameters:
            allowed = f"Allowed: {', '.join(parameters)}." if parameters else f"{target.__name__} has no settings."
            raise UserError(
                f"{path}.{key} is not a setting.{nearest(key, parameters)} {allowed}{_elsewhere(path, key)}"
            )
        check_value(value, hints.get(key, Any), f"{path}.{key}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{path}.{missing[0]} is missing; type {path}.{missing[0]}=...")
    return target(**arguments)


def _elsewhere(axis: str, key: str) -> str:
    """Return a hint that names another choice of the axis with this setting, or an empty string if none has it."""
    choices = catalog.groups()[axis].choices.values() if axis in catalog.defaults() else ()
    return next((f" {axis}={choice.name} has it." for choice in choices if key in choice.settings), "")


def built_arguments(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a node's constructor arguments, with schedules built. Raises UserError."""
    return {
        key: build(value, f"{path}.{key}", Schedule) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in node.items()
        if key != "_target_"
    }


def check_value(value: Any, kind: Any, path: str) -> None:
    """Check the value of a setting against its type. Raises UserError if it does not match, if it is unusable whatever
    its type (see `flaw`), or if a schedule takes values outside the bounds of the type."""
    if not is_allowed(value, kind):
        raise UserError(f"{path}={brief(value)} is not allowed: it must be {describe(kind)}.")
    if (reason := flaw(value)) is not None:
        raise UserError(f"{path}={brief(value)} is not allowed: {reason}.")
    if isinstance(value, Schedule):
        for bound in (metadata for option in get_args(kind) for metadata in get_args(option)[1:]):
            if isinstance(bound, Interval) and not all(bound.holds(number) for number in value.bounds()):
                low, high = value.bounds()
                raise UserError(f"{path} goes from {low:g} to {high:g}, but must always be {bound}.")


def brief(value: Any) -> str:
    """Return a value as it is typed on the command line, shortened for use in a message."""
    if isinstance(value, Mapping):
        return "(a schedule)" if "_target_" in value else "(several settings)"
    text = typed(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def find_class(target: str, path: str, kind: type) -> Any:
    """Import the class that `_target_` names, which must be a subclass of kind.

    The class must come from this package's axes or metrics, from torch.optim, or from a module that the user has
    named as trusted (see `trusted`). Raises UserError.
    """
    if not isinstance(target, str):
        raise UserError(f"{path}._target_={brief(target)} is not the name of a class; leave it out.")
    given = f"{path} {target}" if path.startswith("--") else f"{path}._target_={target}"
    module_name, _, name = target.rpartition(".")
    allowed = (*ALLOWED, *trusted())
    if not _is_within(module_name, allowed):
        top = module_name.partition(".")[0] or target
        raise UserError(
            f"{given} is neither a component or metric of vae nor in torch.optim. Other code "
            f"runs only with your consent: if you trust it, add --trust {top} (or set VAE_TRUST={top}; in Python: "
            f"load_run(..., trust=['{top}']))."
        )
    module = _imported(module_name, given)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{given} does not exist.{nearest(name, vars(module))}")
    if not (isinstance(found, type) and issubclass(found, kind) and _is_within(found.__module__, allowed)):
        raise UserError(f"{given} cannot be used as {path}: it is not a {kind.__name__}.")
    if found is kind or inspect.isabstract(found):
        raise UserError(f"{given} is the base class of all choices of {path}; name one of its subclasses.")
    return found


def find_function(target: str, path: str) -> Callable[..., Any]:
    """Import the function that MODULE:FUNCTION names, from a module that the user trusts (see `trusted`).

    Raises UserError.
    """
    module_name, colon, name = target.partition(":")
    given = f"{path} {target}"
    if not (module_name and colon and name):
        raise UserError(f"{given} is not the name of a function: type {path} MODULE:FUNCTION, such as mine:decode.")
    if not _is_within(module_name, trusted()):
        top = module_name.partition(".")[0]
        raise UserError(
            f"{given} is code from outside vae, which runs only with your consent: if you trust it, add --trust {top} "
            f"(or set VAE_TRUST={top})."
        )
    module = _imported(module_name, given)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{given} does not exist.{nearest(name, vars(module))}")
    if not callable(found):
        raise UserError(f"{given} cannot be used: it is not a function.")
    return found


def _imported(module: str, given: str) -> ModuleType:
    """Import a module, which may be in the current folder if the user trusts a module. Raises UserError."""
    if trusted() and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # users keep their own modules in the folder in which they type the command
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(_import_message(given, module, error)) from error


def _import_message(given: str, module: str, error: ImportError) -> str:
    """Return why the module of a class cannot be imported: it does not exist, or an import inside it fails."""
    missing = str(error.name)
    if isinstance(error, ModuleNotFoundError) and _is_within(module, [missing]):
        return f"{given} does not exist: there is no module '{missing}'."
    hint = f" {missing} is now {MOVED_FOR_IMPORT[missing]}." if missing in MOVED_FOR_IMPORT else ""
    return f"{given} cannot be used, because importing {module} fails: {error}.{hint}"


def _is_within(module: str, prefixes: Iterable[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)
