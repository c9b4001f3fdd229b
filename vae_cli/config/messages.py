"""What Hydra and OmegaConf refuse, as messages for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
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

from vae_cli.config import catalog
from vae_cli.core.errors import UserError, first_line, nearest

# What a plugin's choice is called, the extra of ours that installs it, and the distribution.
_PLUGINS = {
    "hydra/launcher/joblib": ("joblib", "hydra-joblib-launcher"),
    "hydra/launcher/ray": ("ray", "hydra-ray-launcher"),
    "hydra/launcher/submitit_local": ("slurm", "hydra-submitit-launcher"),
    "hydra/launcher/submitit_slurm": ("slurm", "hydra-submitit-launcher"),
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
    "hydra/sweeper/ax": ("ax", "hydra-ax-sweeper"),
    "hydra/sweeper/nevergrad": ("nevergrad", "hydra-nevergrad-sweeper"),
}


# Messages -------------------------------------------------------------------------------------------------------------

_TELLING = (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    UnsupportedInterpolationType,
    ConfigAttributeError,
    ConfigKeyError,
)
FORM = "Overrides look like key=value, for example sigma=fixed or latent=8."


def translate(
    error: BaseException,
    overrides: Sequence[str] = (),
    *,
    config_name: str | None = None,
    extra_dirs: Sequence[Path] = (),
) -> UserError | None:
    """Return one message for what Hydra or OmegaConf refused, or None for an error that is not theirs."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    groups = catalog.groups(*extra_dirs)
    refused = [cause for cause in chain if isinstance(cause, OmegaConfBaseException)]
    if refused:
        telling = [cause for cause in refused if isinstance(cause, _TELLING) and cause.full_key]
        return UserError(_omegaconf_message((telling or refused)[0], overrides, groups))
    if isinstance(error, OverrideParseException):
        return UserError(_syntax_message(error.override, groups))
    if isinstance(error, MissingConfigException):
        return UserError(_missing_message(error, overrides, config_name, groups))
    if isinstance(error, InstantiationException):
        return UserError(first_line(error))
    if isinstance(error, (ConfigCompositionException, HydraException)) or "Config group override" in str(error):
        return UserError(_override_message(overrides, groups) or first_line(error))
    if type(error).__module__.startswith("yaml."):
        return UserError(f"A configuration file is not valid YAML: {' '.join(str(error).split())}")
    if extra_dirs and isinstance(error, (UnicodeDecodeError, RecursionError)):
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "lists lie in lists without end"
        return UserError(f"A file that was chosen from {extra_dirs[0]} cannot be read: {why}.")
    if isinstance(error, ImportError) and "IS THE PLUGIN INSTALLED" in str(error):
        return UserError(first_line(error))
    if isinstance(error, RuntimeError) and "Unknown plugin class" in str(error):
        return UserError(_plugin_message(str(error), overrides))
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # OmegaConf wipes the cause of what it wraps; the context still has it.
        wrapped = error.__context__ if isinstance(error, (OmegaConfBaseException, HydraException)) else None
        error = error.__cause__ or wrapped


def _syntax_message(override: str, groups: dict[str, catalog.Group]) -> str:
    settings = catalog.settings()
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if not equals:
        owners = [group for group in groups.values() if override in group.choices and group.name != "schedule"]
        if owners:
            return f"'{override}' is a choice of {owners[0].name}: type {owners[0].name}={override}."
        if name in groups or name in settings:
            return f"'{override}' gives no value. {example(name, groups)}"
        return f"'{override}' is no override.{nearest(override, [*groups, *settings])} {FORM}"
    if value.startswith("="):
        return f"'{override}' has one '=' too many. Did you mean '{key}={value.lstrip('=')}'?"
    start = f"'{override}' cannot be read as an override"
    if value.count("[") != value.count("]"):
        return f"{start}: a bracket is not closed. Quote a list for the shell: '{key}=[1,2]'."
    if value.count("{") != value.count("}") or value.count("(") != value.count(")"):
        return f"{start}: a bracket is not closed."
    if "interval(" in value:
        return f"{start}: an interval goes from one number to a larger one, as {key}=interval(1,5)."
    if value.startswith("~"):
        return f"{start}: '~' means something else to Hydra. Write the folder out, or type {key}=$HOME{value[1:]}."
    if re.search(r"[=~!&#|<>;?*`^\"' ]", value):
        quoted = value.replace('"', "")
        return f"{start}: its value holds a character with a meaning of its own. Quote it twice: '{key}=\"{quoted}\"'."
    return f"{start}. {FORM}"


def _missing_message(
    error: MissingConfigException, overrides: Sequence[str], config_name: str | None, groups: dict[str, catalog.Group]
) -> str:
    missing = error.missing_cfg_file or ""
    if not error.options and missing == config_name:
        return f"--config-name {config_name}: neither the bundled configurations nor --config-dir have {missing}.yaml."
    group, _, choice = missing.rpartition("/")
    if missing in _PLUGINS:
        extra, distribution = _PLUGINS[missing]
        return f"{group}={choice} is not installed: type {_install(extra, distribution)}."
    if not group or not error.options:
        return first_line(error)
    options = sorted(error.options)
    message = f"'{choice}' is no choice of {group}.{nearest(choice, options)} Choices: {', '.join(options)}."
    # Not given by hand: a preset asks for it.
    presets = [override for override in overrides if override.startswith("experiment=")]
    if presets and not any(re.search(rf"\b{re.escape(choice)}\b", word) for word in overrides):
        message = f"{presets[0]}: {message}"
    return message


def _plugin_message(text: str, overrides: Sequence[str]) -> str:
    """Our own configuration describes the plugin, which is not there."""
    module = text.partition("hydra_plugins.")[2].partition(".")[0].replace("_", "-")
    found = {choice: plugin for choice, plugin in _PLUGINS.items() if plugin[1] == module}
    typed = [choice for choice in found if "=".join(choice.rsplit("/", 1)) in overrides]
    if not found:
        return f"Hydra has no plugin {text.partition(':')[2].strip()}. Is it installed?"
    choice = (typed or list(found))[0]
    return f"{'='.join(choice.rsplit('/', 1))} is not installed: type {_install(*found[choice])}."


def _install(extra: str, distribution: str) -> str:
    try:
        extras = metadata.metadata("vae-cli").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from a clone
        extras = []
    return f"pip install 'vae-cli[{extra}]'" if extra in extras else f"pip install {distribution}"


def _omegaconf_message(
    error: OmegaConfBaseException, overrides: Sequence[str], groups: dict[str, catalog.Group]
) -> str:
    key = str(error.full_key or error.key or "")
    if isinstance(error, (InterpolationToMissingValueError, MissingMandatoryValue)):
        named = re.search(r"Missing mandatory value: ([^\s]+)", str(error))
        # Of a reference the key is where it stands, and the text says what it leads to.
        key = named.group(1) if named and isinstance(error, InterpolationToMissingValueError) else key
        return f"{key} needs a value: type {key}=VALUE."
    if isinstance(error, InterpolationKeyError):
        named = re.search(r"Interpolation key '([^']*)'", str(error))
        asked = named.group(1) if named else ""
        words = [*groups, *catalog.settings()]
        where = next((f"'{word}'" for word in overrides if f"${{{asked}" in word), f"{key} refers to ${{{asked}}}")
        return f"{where}: the configuration has no '{asked}'.{nearest(asked, words)}"
    if isinstance(error, UnsupportedInterpolationType):
        kind = re.search(r"interpolation type (\w+)", str(error))
        where = next((f"'{word}'" for word in overrides if kind and f"${{{kind[1]}:" in word), key)
        return f"{where}: {first_line(error)}. What there is looks like ${{latent}}, ${{oc.env:HOME}} or ${{now:%Y}}."
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and key:
        return _unknown_key_message(key, error.parent_node, overrides, groups)
    own = [word for word in overrides if word.lstrip("+~").partition("=")[0] == key]
    if "Cannot merge" in str(error) and (placed := [word for word in overrides if "@" in word]):
        place = placed[0].partition("@")[2].partition("=")[0]
        return f"'{placed[0]}': {place} is not one number, so that no schedule can take its place."
    if isinstance(error, InterpolationResolutionError):
        said = re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error)).strip("\"'")
        own = own or [word for word in overrides if "${" in word]
        return f"'{own[0]}': {said}" if own else f"{key}: {said}"
    where = f"'{own[0]}'" if own else key
    return f"{where}: {first_line(error)}" if where else first_line(error)


def _unknown_key_message(full_key: str, parent: Any, overrides: Sequence[str], groups: dict[str, catalog.Group]) -> str:
    settings = catalog.settings()
    above, _, key = full_key.rpartition(".")
    keys = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    if not above:
        return _unknown_root_message(full_key, groups)
    keys = [name for name in keys if not name.startswith("_")]
    if full_key.startswith("hydra."):
        has = f" {above} has: {', '.join(keys)}." if keys else ""
        launcher = " Other launchers have more settings: hydra/launcher=joblib." if above == "hydra.launcher" else ""
        return f"Hydra's own configuration has no '{full_key}'.{nearest(key, keys)}{has}{launcher}"
    group = groups.get(above)
    choice = _choice_of(parent, group, overrides)
    if group is None or choice is None:
        if above in settings or not keys:
            schedules = ", ".join(groups["schedule"].choices) if "schedule" in groups else ""
            hint = f" To make it a schedule, type +schedule@{above}=linear (or {schedules})." if schedules else ""
            return f"There is no '{full_key}': {above} is one value.{hint if above not in settings else ''}"
        return f"{above} has no '{key}'.{nearest(key, keys)} It has: {', '.join(keys)}."
    others = [f"{group.name}={other.name}" for other in group.choices.values() if key in other.settings]
    own = [name for name, setting in choice.settings.items() if not setting.default.startswith("${")]
    message = f"{group.name}={choice.name} has no '{key}'"
    if not others:
        has = f"it has: {', '.join(own)}" if own else "it has no settings"
        return f"{message}; {has}.{nearest(key, own) or _near_elsewhere(key, group)}"
    value = next((word.partition("=")[2] for word in overrides if word.startswith(f"{full_key}=")), "VALUE")
    return f"{message}; {_and(others)} {'has' if len(others) == 1 else 'have'}: type {others[0]} {full_key}={value}."


def _unknown_root_message(key: str, groups: dict[str, catalog.Group]) -> str:
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


def _default_keys(group: str, groups: dict[str, catalog.Group]) -> dict[str, catalog.Setting]:
    choice = groups[group].choices.get(catalog.defaults()[group].default)
    return choice.settings if choice is not None else {}


def _near_elsewhere(key: str, group: catalog.Group) -> str:
    for choice in group.choices.values():
        if near := nearest(key, choice.settings):
            return f"{near} {group.name}={choice.name} has that."
    return ""


def _choice_of(parent: Any, group: catalog.Group | None, overrides: Sequence[str]) -> catalog.Choice | None:
    """Find the choice in force: by the word that was typed, or else by the class it builds, for it may come from a
    default or a preset."""
    if group is None or not isinstance(parent, DictConfig):
        return None
    target = OmegaConf.to_container(parent, resolve=False)
    named = target.get("_target_") if isinstance(target, dict) else None
    fitting = [choice for choice in group.choices.values() if choice.target and choice.target == named]
    typed = [choice for choice in fitting if f"{group.name}={choice.name}" in overrides]
    return next(iter([*typed, *fitting]), None)


def _override_message(overrides: Sequence[str], groups: dict[str, catalog.Group]) -> str | None:
    """Find the override that Hydra cannot have liked: its exceptions here carry nothing but prose."""
    settings = catalog.settings()
    choosable = catalog.defaults()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            return _syntax_message(text, groups)
        key, plain = override.key_or_group, text.lstrip("+~")
        value = text.partition("=")[2]
        if override.is_sweep_override():
            if override.is_hydra_override():
                return f"'{text}': Hydra's own settings cannot be swept. Give one value."
            continue
        if key == "hydra":
            return f"'{text}': Hydra's own settings have a dot or a slash, such as hydra/launcher=joblib."
        if override.package is not None and key not in groups and not key.startswith("hydra"):
            return f"'{text}': there is no group '{key}'.{nearest(key, groups)} Groups: {', '.join(groups)}."
        if override.package is not None and not override.is_add() and key not in choosable:
            return f"'{text}' adds to the configuration, which a leading + says: type +{plain}."
        if override.package is not None and not override.is_add():
            return f"'{text}': {key} stands in one place only. Type {key}={value}."
        if override.is_force_add() and key in groups:
            return f"'{text}': a choice needs no +. Type {plain}."
        if override.is_add() and override.package is None and (key in choosable or key in settings):
            return f"'{text}': '{key}' is there already, so it needs no +. Type {plain}."
        if override.is_delete():
            return f"'{text}': there is no '{key}' to remove.{nearest(key, [*choosable, *settings])}"
        if key in groups and not isinstance(override.value(), (str, list, dict)):
            choices = groups[key].choices
            return f"'{text}': '{value}' is no choice of {key}. Choices: {', '.join(choices)}."
        if key in groups and value == "???":
            return f"'{text}' gives no choice. {example(key, groups)}"
        if override.is_add() and "." in key:
            return f"'{text}': '{key}' is there already, so it needs no +. Type {plain}."
    swept = [text for text in overrides if _is_sweep(text)]
    if swept and OverridesParser.create().parse_override(swept[0]).is_interval_sweep():
        return f"'{swept[0]}' is an axis of a search: type -m hydra/sweeper=optuna with it, or list values and type -m."
    if swept:
        return f"'{swept[0]}' gives several values: give -m to sweep over them, or one value."
    return None


def _is_sweep(text: str) -> bool:
    return OverridesParser.create().parse_override(text).is_sweep_override()


def example(name: str, groups: dict[str, catalog.Group]) -> str:
    if name in groups:
        choices = list(groups[name].choices)
        return f"Type {name}={choices[0]}, for example. Choices: {', '.join(choices)}."
    setting = catalog.settings().get(name)
    if setting is None:
        words = [*groups, *catalog.settings()]
        return f"Type {name}=VALUE.{'' if '.' in name else nearest(name, words)}"
    comment = f": {setting.comment}" if setting.comment else ""
    return f"Type {name}={setting.default} for the default{comment}."


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
