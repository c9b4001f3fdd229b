"""Translate errors of Hydra and OmegaConf into messages that say what to type instead.

Both libraries give the details only in the text of their exceptions, so `TABLE` matches these texts. A test makes the
real libraries raise the error of each row; if an update changes a text, the failing test names the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from vae_cli.config import catalog
from vae_cli.config.overrides import Groups, refused_message, syntax_message
from vae_cli.core.errors import UserError, first_line, nearest

# For each choice that a plugin adds: the extra of this package that installs the plugin, and the plugin's PyPI name.
PLUGINS = {
    "hydra/launcher/joblib": ("joblib", "hydra-joblib-launcher"),
    "hydra/launcher/ray": ("ray", "hydra-ray-launcher"),
    "hydra/launcher/submitit_local": ("slurm", "hydra-submitit-launcher"),
    "hydra/launcher/submitit_slurm": ("slurm", "hydra-submitit-launcher"),
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
    "hydra/sweeper/ax": ("ax", "hydra-ax-sweeper"),
    "hydra/sweeper/nevergrad": ("nevergrad", "hydra-nevergrad-sweeper"),
}

# OmegaConf wraps one error in another. These are the most specific ones: they name the key and what is wrong with it.
SPECIFIC = (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    UnsupportedInterpolationType,
    ConfigAttributeError,
    ConfigKeyError,
)


def translate(
    error: BaseException,
    overrides: Sequence[str] = (),
    *,
    config_name: str | None = None,
    extra_dirs: Sequence[Path] = (),
) -> UserError | None:
    """Return a UserError that explains an error of Hydra or OmegaConf; None if no row of `TABLE` matches the error.

    If the chain of causes contains a UserError, such as one raised by a resolver, it is returned unchanged.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    groups = catalog.groups(*extra_dirs)
    subject = _most_specific(chain)
    for row in TABLE:
        found = re.search(row.pattern, str(subject)) if isinstance(subject, row.error) else None
        if found is not None:
            message = row.message(Refusal(subject, found, overrides, groups, config_name, extra_dirs))
            if message is not None:
                return UserError(message)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        # OmegaConf removes the cause of an error that it wraps; the context still has it.
        wrapped = error.__context__ if isinstance(error, (OmegaConfBaseException, HydraException)) else None
        error = error.__cause__ or wrapped


def _most_specific(chain: Sequence[BaseException]) -> BaseException:
    refused = [cause for cause in chain if isinstance(cause, OmegaConfBaseException)]
    specific = [cause for cause in refused if isinstance(cause, SPECIFIC) and cause.full_key]
    return next(iter([*specific, *refused, *chain]))


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """An error raised by Hydra or OmegaConf, with the command-line arguments that may have caused it.

    `found` is the match of the row's pattern in the error's text.
    """

    error: Any
    found: re.Match[str]
    overrides: Sequence[str]
    groups: Groups
    config_name: str | None
    extra_dirs: Sequence[Path]

    @property
    def key(self) -> str:
        """The full key that OmegaConf names, or an empty string."""
        return str(self.error.full_key or self.error.key or "")

    def override_with(self, text: str) -> str | None:
        """The first override that contains a text, in quotes."""
        return next((f"'{word}'" for word in self.overrides if text in word), None)

    def override_of_key(self) -> str | None:
        """The override that sets the key, in quotes."""
        return next((f"'{word}'" for word in self.overrides if word.lstrip("+~").partition("=")[0] == self.key), None)


class Row(NamedTuple):
    """A row of `TABLE`: `message` explains errors of type `error` whose text matches `pattern`.

    If `message` returns None, the next row is tried.
    """

    name: str
    error: type[BaseException] | tuple[type[BaseException], ...]
    pattern: str
    message: Callable[[Refusal], str | None]


def _missing_value(refusal: Refusal) -> str:
    return f"{refusal.key} needs a value: type {refusal.key}=VALUE."


def _missing_reference(refusal: Refusal) -> str:
    key = refusal.found[1]  # the key referred to; the error's own key is the one that contains the reference
    return f"{key} needs a value: type {key}=VALUE."


def _unknown_reference(refusal: Refusal) -> str:
    key = refusal.found[1]
    where = refusal.override_with(f"${{{key}") or f"{refusal.key} refers to ${{{key}}}"
    return f"{where}: the configuration has no '{key}'.{nearest(key, [*refusal.groups, *catalog.settings()])}"


def _unknown_resolver(refusal: Refusal) -> str:
    where = refusal.override_with(f"${{{refusal.found[1]}:") or refusal.key
    return f"{where}: {first_line(refusal.error)}. References look like ${{latent}}, ${{oc.env:HOME}} or ${{now:%Y}}."


def _schedule_in_wrong_place(refusal: Refusal) -> str | None:
    placed = [word for word in refusal.overrides if "@" in word]
    if not placed:
        return None
    place = placed[0].partition("@")[2].partition("=")[0]
    return f"'{placed[0]}': {place} is not a single number, so no schedule can replace it."


def _resolver_failed(refusal: Refusal) -> str:
    where = refusal.override_of_key() or refusal.override_with("${") or refusal.key
    reason = refusal.found[1].strip().strip("\"'")
    return f"{where}: {reason}"


def _other_of_omegaconf(refusal: Refusal) -> str:
    where = refusal.override_of_key() or refusal.key
    return f"{where}: {first_line(refusal.error)}" if where else first_line(refusal.error)


def _unreadable_override(refusal: Refusal) -> str:
    return syntax_message(refusal.error.override, refusal.groups)


def _unknown_config_name(refusal: Refusal) -> str | None:
    name = refusal.config_name
    if refusal.error.options or refusal.error.missing_cfg_file != name:
        return None
    return f"--config-name {name}: {name}.yaml is neither among the bundled configurations nor in --config-dir."


def _missing_plugin(refusal: Refusal) -> str | None:
    missing = refusal.error.missing_cfg_file
    return _not_installed(missing) if missing in PLUGINS else None


def _unknown_choice(refusal: Refusal) -> str | None:
    group, _, choice = (refusal.error.missing_cfg_file or "").rpartition("/")
    if not group or not refusal.error.options:
        return None
    options = sorted(refusal.error.options)
    message = f"'{choice}' is not a choice of {group}.{nearest(choice, options)} Choices: {', '.join(options)}."
    # If the choice was not typed, it comes from a preset.
    presets = [word for word in refusal.overrides if word.startswith("experiment=")]
    if presets and not any(re.search(rf"\b{re.escape(choice)}\b", word) for word in refusal.overrides):
        message = f"{presets[0]}: {message}"
    return message


def _refused_override(refusal: Refusal) -> str:
    return refused_message(refusal.overrides, refusal.groups) or first_line(refusal.error)


def _first_line(refusal: Refusal) -> str:
    return first_line(refusal.error)


def _cannot_build(refusal: Refusal) -> str:
    # Without Hydra's advice to set HYDRA_FULL_ERROR, which config.hydra sets itself.
    return first_line(refusal.error).partition(", set env var")[0]


def _invalid_yaml(refusal: Refusal) -> str:
    return f"A configuration file is not valid YAML: {' '.join(str(refusal.error).split())}"


def _unreadable_file(reason: str) -> Callable[[Refusal], str | None]:
    def message(refusal: Refusal) -> str | None:
        if not refusal.extra_dirs:
            return None
        return f"A file that was chosen from {refusal.extra_dirs[0]} cannot be read: {reason}."

    return message


def _unknown_plugin_class(refusal: Refusal) -> str:
    """Return a message on how to install the missing plugin or, if vae does not know it, that Hydra lacks it."""
    module = refusal.found[1].partition("hydra_plugins.")[2].partition(".")[0].replace("_", "-")
    choices = [choice for choice, (_, distribution) in PLUGINS.items() if distribution == module]
    typed = [choice for choice in choices if "=".join(choice.rsplit("/", 1)) in refusal.overrides]
    if not choices:
        return f"Hydra has no plugin {refusal.found[1]}. Is it installed?"
    return _not_installed((typed or choices)[0])


def _not_installed(choice: str) -> str:
    extra, distribution = PLUGINS[choice]
    try:
        extras = metadata.metadata("vae-cli").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from a clone
        extras = []
    command = f"pip install 'vae-cli[{extra}]'" if extra in extras else f"pip install {distribution}"
    return f"{'='.join(choice.rsplit('/', 1))} is not installed: type {command}."


def _unknown_key(refusal: Refusal) -> str | None:
    full_key, parent, groups = refusal.key, refusal.error.parent_node, refusal.groups
    above, _, key = full_key.rpartition(".")
    if not full_key:
        return None
    if not above:
        return _unknown_root(full_key, groups)
    keys = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    keys = [name for name in keys if not name.startswith("_")]
    if full_key.startswith("hydra."):
        has = f" {above} has: {', '.join(keys)}." if keys else ""
        launcher = " Other launchers have more settings: hydra/launcher=joblib." if above == "hydra.launcher" else ""
        return f"Hydra's own configuration has no '{full_key}'.{nearest(key, keys)}{has}{launcher}"
    group = groups.get(above)
    choice = _choice_of(parent, group, refusal.overrides)
    if group is not None and choice is not None:
        return _unknown_setting(full_key, group, choice, refusal.overrides)
    if above in catalog.settings():
        return f"There is no '{full_key}': {above} is a single value."
    if keys:
        return f"{above} has no '{key}'.{nearest(key, keys)} It has: {', '.join(keys)}."
    schedules = ", ".join(groups["schedule"].choices) if "schedule" in groups else ""
    hint = f" To make it a schedule, type +schedule@{above}=linear (or {schedules})." if schedules else ""
    return f"There is no '{full_key}': {above} is a single value.{hint}"


def _unknown_setting(full_key: str, group: catalog.Group, choice: catalog.Choice, overrides: Sequence[str]) -> str:
    """Return a message that names the other choices with the unknown setting or, if there are none, lists the
    settings of this choice."""
    key = full_key.rpartition(".")[2]
    others = [f"{group.name}={other.name}" for other in group.choices.values() if key in other.settings]
    own = [name for name, setting in choice.settings.items() if not setting.default.startswith("${")]
    message = f"{group.name}={choice.name} has no '{key}'"
    if not others:
        has = f"it has: {', '.join(own)}" if own else "it has no settings"
        return f"{message}; {has}.{nearest(key, own) or _near_elsewhere(key, group)}"
    value = next((word.partition("=")[2] for word in overrides if word.startswith(f"{full_key}=")), "VALUE")
    return f"{message}; {_and(others)} {'has' if len(others) == 1 else 'have'}: type {others[0]} {full_key}={value}."


def _unknown_root(key: str, groups: Groups) -> str:
    settings = catalog.settings()
    choosable = catalog.defaults()
    words = [*choosable, *settings]
    message = f"There is no group or setting '{key}'."
    hint = nearest(key, words)
    if not hint:
        dotted = [
            f"{name}.{key}"
            for name, group in groups.items()
            for choice in group.choices.values()
            if name in choosable and name != "experiment" and key in choice.settings
        ]
        dotted.sort(key=lambda word: key not in _default_keys(word.partition(".")[0], groups))
        hint = f" Did you mean '{dotted[0]}'?" if dotted else nearest(key.replace("/", "."), words)
    return f"{message}{hint}\n  groups: {', '.join(choosable)}\n  settings: {', '.join(settings)}"


def _default_keys(group: str, groups: Groups) -> dict[str, catalog.Setting]:
    choice = groups[group].choices.get(catalog.defaults()[group].default)
    return choice.settings if choice is not None else {}


def _near_elsewhere(key: str, group: catalog.Group) -> str:
    for choice in group.choices.values():
        if near := nearest(key, choice.settings):
            return f"{near} {group.name}={choice.name} has that."
    return ""


def _choice_of(parent: Any, group: catalog.Group | None, overrides: Sequence[str]) -> catalog.Choice | None:
    """Return the current choice of a group; None if it cannot be determined.

    The choice may come from a default or a preset, so it is identified by the class that it builds. If several choices
    build this class, one that was typed on the command line is preferred.
    """
    if group is None or not isinstance(parent, DictConfig):
        return None
    target = OmegaConf.to_container(parent, resolve=False)
    named = target.get("_target_") if isinstance(target, dict) else None
    fitting = [choice for choice in group.choices.values() if choice.target and choice.target == named]
    typed = [choice for choice in fitting if f"{group.name}={choice.name}" in overrides]
    return next(iter([*typed, *fitting]), None)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# Rows are tried from the top. A pattern matches a part of the error's text; "" matches any.
TABLE = (
    # OmegaConf
    Row("reference to a missing value", InterpolationToMissingValueError, r"Missing mandatory value: (\S+)",
        _missing_reference),
    Row("missing value", (MissingMandatoryValue, InterpolationToMissingValueError), "", _missing_value),
    Row("reference to an unknown key", InterpolationKeyError, r"Interpolation key '([^']*)'", _unknown_reference),
    Row("unknown resolver", UnsupportedInterpolationType, r"interpolation type (\w+)", _unknown_resolver),
    Row("unknown key", (ConfigAttributeError, ConfigKeyError), "", _unknown_key),
    Row("schedule in a wrong place", OmegaConfBaseException, "Cannot merge", _schedule_in_wrong_place),
    Row("resolver failed", InterpolationResolutionError,
        r"\A\s*(?:\w+ raised while resolving interpolation: )?(.*)", _resolver_failed),
    Row("anything else of OmegaConf's", OmegaConfBaseException, "", _other_of_omegaconf),
    # Hydra
    Row("unreadable override", OverrideParseException, "", _unreadable_override),
    Row("unknown --config-name", MissingConfigException, "", _unknown_config_name),
    Row("plugin without its configuration", MissingConfigException, "", _missing_plugin),
    Row("unknown choice", MissingConfigException, "", _unknown_choice),
    Row("missing file", MissingConfigException, "", _first_line),
    Row("object that cannot be built", InstantiationException, "", _cannot_build),
    Row("choice that is not a word", ValueError, "Config group override", _refused_override),
    Row("override that Hydra refused", HydraException, "", _refused_override),
    Row("unknown plugin class", RuntimeError, r"Unknown plugin class\s*:\s*(.*\S)", _unknown_plugin_class),
    # Files
    Row("invalid YAML", YAMLError, "", _invalid_yaml),
    Row("file in another encoding", UnicodeDecodeError, "", _unreadable_file("it is not UTF-8")),
    Row("file nested too deeply", RecursionError, "", _unreadable_file("it nests lists too deeply")),
)  # fmt: skip
