"""Checks of overrides such as `sigma=fixed`, with messages that say what is wrong and what to type instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from vae_cli.config import catalog
from vae_cli.core.errors import UserError, nearest

FORM = "Overrides look like key=value, for example sigma=fixed or latent=8."
Groups = Mapping[str, catalog.Group]


def parse(text: str) -> Override:
    """Parse one override by Hydra's grammar. Raises HydraException."""
    return OverridesParser.create().parse_override(text)


def check_overrides(overrides: Sequence[str], extra_dirs: Sequence[Path] = ()) -> None:
    """Refuse overrides that Hydra would misread, or would refuse only much later. Raises UserError."""
    groups = catalog.groups(*extra_dirs)
    for override, following in zip_longest(overrides, overrides[1:], fillvalue=""):
        names = {*groups, *catalog.settings()}
        if following and "=" not in override + following and override in names and following not in names:
            raise UserError(f"'{override} {following}' needs an equals sign. Type {override}={following}.")
        if fault := _form_fault(override, groups) or _choice_fault(override, groups):
            raise UserError(fault)


def _form_fault(override: str, groups: Groups) -> str | None:
    """Return a message about a syntax error in an override, regardless of its key; None if there is no error."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if re.search(r"\d{1000}", override):
        return f"'{override[:40]}...' contains a number with a thousand digits or more. Give a smaller one."
    if override.startswith("-"):
        return f"'{override}' is a flag, and flags go before any '--'."
    if equals and not name:
        return f"'{override}' does not name a setting. {FORM}"
    if equals and not value and not key.startswith("~"):
        return f"'{override}' gives no value. {example(name, groups)}"
    return None


def _choice_fault(override: str, groups: Groups) -> str | None:
    """Return a message if an override selects an invalid choice or removes a required group; None if it does not."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    axes = catalog.defaults()
    is_axis = name in axes and name != "experiment"
    choices = list(groups[name].choices) if name in groups else []
    if key.startswith("~") and (name in catalog.settings() or is_axis):
        return f"'{override}' would remove '{name}', which every run needs. {example(name, groups)}"
    if equals and name in catalog.groups() and name not in axes:  # a group that needs a place: schedule
        return (
            f"'{override}' does not say which setting it replaces: type +{name}@regularizer.beta={value}, for example."
        )
    files = [word for word in value.split(",") if word not in choices]
    if choices and any(word.endswith(".yaml") or word.startswith(("/", ".")) for word in files):
        near = nearest(Path(files[0]).stem, choices)
        return f"'{override}': {name} accepts the name of a choice, not a file.{near}"
    if choices and value in ("null", "~") and value not in choices:
        return f"'{override}': leave {name} out, or choose one of: {', '.join(choices)}."
    if is_axis and value.startswith("["):
        return f"'{override}': {name} accepts one choice. To run several, type -m {name}={value.strip('[]')}."
    return None


def syntax_message(override: str, groups: Groups) -> str:
    """Return a message that explains why Hydra's grammar cannot parse an override."""
    key, equals, value = override.partition("=")
    if not equals:
        return _bare_word_message(override, groups)
    if value.startswith("="):
        return f"'{override}' has one '=' too many. Did you mean '{key}={value.lstrip('=')}'?"
    start = f"'{override}' cannot be read as an override"
    if value.count("[") != value.count("]"):
        return f"{start}: a bracket is not closed. Quote a list for the shell: '{key}=[1,2]'."
    if value.count("{") != value.count("}") or value.count("(") != value.count(")"):
        return f"{start}: a bracket is not closed."
    if "interval(" in value:
        return f"{start}: an interval goes from one number to a larger one, for example {key}=interval(1,5)."
    if value.startswith("~"):
        at_home = f", or {key}=$HOME{value[1:]}" if value in ("~", "~/") or value.startswith("~/") else ""
        return f"{start}: '~' means something different to Hydra. Type the full path{at_home}."
    if re.search(r"[\n\r]", value):
        return f"{start}: its value contains a line break."
    if not value.isascii() or re.search(r"[=~!&#|<>;?*`^\"' ]", value):
        quoted = value.replace('"', r"\"") if "'" in value or value.count('"') % 2 else value.replace('"', "")
        what = "a special character" if value.isascii() else "a letter that is not ASCII"
        typed = shlex.quote(f'{key}="{quoted}"')
        return f"{start}: its value contains {what}. Quote it twice: {typed}."
    if re.search(r"[{}\[\](),:]", value):
        typed = shlex.quote(f'{key}="{value}"')
        return f"{start}: brackets, commas and colons have a meaning of their own. For a text, quote it twice: {typed}."
    return f"{start}. {FORM}"


def _bare_word_message(word: str, groups: Groups) -> str:
    """Return a message on what to type instead of a word without `=`."""
    name, settings = word.lstrip("+~"), catalog.settings()
    owners = [group.name for group in groups.values() if word in group.choices and group.name != "schedule"]
    if owners:
        return f"'{word}' is a choice of {owners[0]}: type {owners[0]}={word}."
    if name in groups or name in settings:
        return f"'{word}' gives no value. {example(name, groups)}"
    return f"'{word}' is not an override.{nearest(word, [*groups, *settings])} {FORM}"


def refused_message(overrides: Sequence[str], groups: Groups) -> str | None:
    """Find the override that Hydra rejected without naming it, and return a message about it; None if not found."""
    for text in overrides:
        try:
            override = parse(text)
        except HydraException:
            return syntax_message(text, groups)
        if override.is_sweep_override():
            message = "Hydra's own settings cannot be swept. Give one value." if override.is_hydra_override() else None
        else:
            message = _place_message(text, override, groups) or _value_message(text, override, groups)
        if message is not None:
            return f"'{text}': {message}"
    swept = [text for text in overrides if parse(text).is_sweep_override()]
    if swept and parse(swept[0]).is_interval_sweep():
        return (
            f"'{swept[0]}' is a range to search: add -m hydra/sweeper=optuna, or add -m and give values separated by "
            "commas."
        )
    if swept:
        return f"'{swept[0]}' gives several values: type -m to sweep over them, or give one value."
    return None


def _place_message(text: str, override: Override, groups: Groups) -> str | None:
    """Return what is wrong with the key of an override, or with the + or ~ in front of it; None if nothing is wrong."""
    choosable, settings = catalog.defaults(), catalog.settings()
    key, plain = override.key_or_group, text.lstrip("+~")
    if key == "hydra":
        return "Hydra's own settings have a dot or a slash in them, such as hydra/launcher=joblib."
    if override.package is not None and key not in groups and not key.startswith("hydra"):
        return f"there is no group '{key}'.{nearest(key, groups)} Groups: {', '.join(groups)}."
    if override.is_delete():
        return f"there is no '{override.get_key_element()[1:]}' to remove.{nearest(key, [*choosable, *settings])}"
    if override.package is not None and not override.is_add():
        if key not in choosable:
            return f"an override that adds to the configuration starts with a +. Type +{plain}."
        return f"{key} has a fixed place, so it needs no @. Type {key}={text.partition('=')[2]}."
    if override.is_force_add() and key in groups:
        return f"a choice needs no +. Type {plain}."
    if override.is_add() and override.package is None and (key in choosable or key in settings):
        return f"'{key}' exists already, so it needs no +. Type {plain}."
    return None


def _value_message(text: str, override: Override, groups: Groups) -> str | None:
    """Return what is wrong with the value of an override that selects a choice, or with an unnecessary + before the
    key of a setting; None if nothing is wrong."""
    key, value = override.key_or_group, text.partition("=")[2]
    if key in groups and not isinstance(override.value(), (str, list, dict)):
        return f"'{value}' is not a choice of {key}. Choices: {', '.join(groups[key].choices)}."
    if key in groups and value == "???":
        return f"no choice is given. {example(key, groups)}"
    if override.is_add() and "." in key:
        return f"'{key}' exists already, so it needs no +. Type {text.lstrip('+~')}."
    return None


def example(name: str, groups: Groups) -> str:
    """Return an example of what to type for a group or a setting."""
    if name in groups:
        choices = list(groups[name].choices)
        return f"Type {name}={choices[0]}, for example. Choices: {', '.join(choices)}."
    setting = catalog.settings().get(name)
    if setting is None:
        words = [*groups, *catalog.settings()]
        return f"Type {name}=VALUE.{'' if '.' in name else nearest(name, words)}"
    comment = f": {setting.comment}" if setting.comment else ""
    return f"Type {name}={setting.default} for the default{comment}."
