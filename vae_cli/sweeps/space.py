"""The search space: the axes of a search, and defaults and checks for Optuna's settings.

`set_optuna_defaults` changes Hydra's ConfigStore, a public registry that the entire process shares. If Optuna's sweeper
is not installed, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import DictConfig

from vae_cli.config.objective import better_direction
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.values import Count, Probability, describe, is_allowed
from vae_cli.sweeps.runner import is_plugin

if TYPE_CHECKING:
    from torch import nn

    from vae_cli.model.vae import VAE

# Modules that import torch are imported inside functions: `--cfg` and misspelled overrides do not need them.

SWEEPER_SETTINGS = {"n_trials": Count, "n_jobs": Count, "max_failure_rate": Probability}
EXAMPLE = "latent=2,4,8 or 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"


def defined_terms(model: VAE, regularizer: nn.Module, shape: tuple[int, int, int]) -> set[str]:
    """Return the names of the figures (loss terms and posterior statistics) that are defined for a model.

    To find them, the model and the regularizer are applied to one black image of the given shape (C, H, W).
    """
    import torch

    from vae_cli.core.rng import evaluating
    from vae_cli.training.validation import Posterior, Terms

    names: set[str] = set()
    with evaluating(model, 0, torch.device("cpu")):
        inference = model(torch.zeros(1, *shape))
        penalty = regularizer(inference)
        for metric in (Terms(), Posterior()):
            metric.update(inference, penalty)
            names |= set(metric.compute())
    return names


def search_space(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split the overrides of a search into those that set a single value and the axes to search.

    The axes map each key to all of its choices, or to the two ends of its interval or range. If a key is set twice, the
    last override applies. Raises UserError if an axis is empty or of a kind that cannot be searched, if no axis has
    several values, or if seed is searched.
    """
    fixed: dict[str, str] = {}
    axes: dict[str, list[str]] = {}
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise UserError(f"'{word}' cannot be read as a range to search. Valid examples: {EXAMPLE}.") from error
        key = override.get_key_element()
        fixed.pop(key, None)
        axes.pop(key, None)
        if override.is_sweep_override():
            axes[key] = _ends(word, override)
        else:
            fixed[key] = word
    searched = [key for key, values in axes.items() if len(values) > 1]
    if not searched:
        raise UserError(f"There is nothing to search: give a setting several values or an interval, such as {EXAMPLE}.")
    if "seed" in searched:
        raise UserError(
            "A search over seed would only find the luckiest seed. Search with one seed, then train the best run again "
            "with more seeds: vae train -m seed=1,2,3 followed by the settings of that run."
        )
    return list(fixed.values()), axes


def _ends(word: str, override: Override) -> list[str]:
    """Return all choices of an axis, or the two ends of its interval or range. Raises UserError."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        start, end = value.start, value.end
        if start is None or end is None or not start < end:
            raise UserError(f"'{word}' is empty: an interval goes from a smaller number to a larger one.")
        if "log" in value.tags and start <= 0:
            raise UserError(f"'{word}': a logarithmic interval must start above 0.")
        return [str(start), str(end)]
    if isinstance(value, RangeSweep) and not value.shuffle:
        if value.start is None or value.stop is None or not value.start < value.stop or value.step <= 0:
            raise UserError(f"'{word}' is empty: a range goes from a smaller number to a larger one.")
        return [str(value.start), str(value.stop)]  # Optuna includes both ends
    if (override.is_choice_sweep() or override.is_range_sweep()) and not isinstance(value, Glob):
        return [str(choice) for choice in override.sweep_iterator(transformer=Transformer.encode)]
    raise UserError(f"'{word}' is not a range that can be searched. Valid examples: {EXAMPLE}.")


def words_of(config: DictConfig) -> list[str]:
    """Return the axes of the sweeper's configuration as overrides, then the typed overrides, which take precedence."""
    params = config.hydra.sweeper.get("params") or {}
    return [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]


def is_optuna(config: DictConfig) -> bool:
    """Return whether the sweeper of a configuration is Optuna's."""
    return is_plugin(config.hydra.sweeper, "OptunaSweeper")


def set_optuna_defaults() -> None:
    """Set Optuna's defaults: maximize, propose one run at a time, use a fixed seed, and continue after failed runs.

    The defaults are changed in Hydra's ConfigStore, because Hydra does not accept a second hydra/sweeper/optuna.yaml in
    addition to the plugin's own.
    """
    Plugins.instance()  # loads the plugins, as Hydra itself does a moment later
    store = ConfigStore.instance()
    with suppress(ConfigLoadError):  # Optuna's sweeper is not installed
        node = store.load("hydra/sweeper/optuna.yaml").node
        node.direction, node.n_jobs, node.max_failure_rate = "maximize", 1, 1.0
        store.store(name="optuna", node=node, group="hydra/sweeper", provider="vae")
        for name in ("tpe", "random", "cmaes", "nsgaii"):
            node = store.load(f"hydra/sweeper/sampler/{name}.yaml").node
            node.seed = 0
            store.store(name=name, node=node, group="hydra/sweeper/sampler", provider="vae")


def check_sweeper(sweeper: DictConfig, objective: str) -> None:
    """Raise UserError if settings of Optuna's sweeper are invalid or would make the search look for the worst run."""
    for key, kind in SWEEPER_SETTINGS.items():
        if not is_allowed(sweeper[key], kind):
            raise UserError(f"hydra.sweeper.{key}={sweeper[key]} is not allowed: it must be {describe(kind)}.")
    if sweeper.storage is not None and metadata.version("sqlalchemy") >= "2":
        raise UserError("hydra.sweeper.storage needs an older sqlalchemy: type pip install 'sqlalchemy<2'.")
    direction, words = str(sweeper.direction), ("maximize", "minimize")
    if direction not in words:
        raise UserError(
            f"hydra.sweeper.direction={direction} is not allowed: it must be maximize or minimize, because a search "
            f"has a single objective.{nearest(direction, words)}"
        )
    better = better_direction(objective) or direction
    if better != direction:
        raise UserError(
            f"hydra.sweeper.direction={direction} would find the run with the worst {objective}: type "
            f"hydra.sweeper.direction={better}."
        )
    if str(sweeper.sampler.get("_target_")).endswith(".GridSampler"):
        raise UserError(
            "Grid search does not use earlier results: leave out hydra/sweeper=optuna to run an ordinary sweep (-m)."
        )
