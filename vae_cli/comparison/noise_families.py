"""Families of arms that differ only in the level of their noise, and the second stages trained on their codes.

A second stage is a model that learns the distribution of the codes of a trained run, and generates new ones; the run's
decoder turns these into images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vae_cli.comparison.arms import Arm, Comparison, without_beta
from vae_cli.comparison.labels import BETA
from vae_cli.comparison.verdicts import closest
from vae_cli.config.naming import show

VALUE = "sigma.value"
# What each setting is called that can be the level of a family's noise, for axes and sentences.
LEVELS: Mapping[str, str] = {VALUE: "noise level", BETA: "beta"}
LEAST = 3  # levels that a family must have for a section on second stages
# The second stages, by the source of codes in the name of a figure, such as frechet_flow: from the simplest to the one
# that learns most. The last one that was measured decides which noise is named first, whatever the others say.
STAGES: Mapping[str, str] = {
    "aggregate": "one Gaussian",
    "mixture": "10 Gaussians",
    "mixture_50": "50 Gaussians",
    "vae": "a second VAE",
    "flow": "flow matching",
}
RECONSTRUCTION = "frechet_reconstructions"


def generation(stage: str) -> str:
    """Return the name of the figure that says how good the images of a second stage are."""
    return f"frechet_{stage}"


@dataclass(frozen=True)
class NoiseFamily:
    """Arms whose settings are equal except for the level of their noise, in ascending order of the level.

    key  the setting that is the level: sigma.value or, if the noise has no such number, the regularizer's weight beta,
         which sets the level of a noise that is learned
    """

    label: str
    key: str
    arms: list[Arm]

    def level(self, arm: Arm) -> float:
        """Return the level of one of the arms."""
        level = _level(arm, self.key)
        assert level is not None
        return level

    def at(self, figure: str) -> list[Arm]:
        """Return the arms that have a figure."""
        return [arm for arm in self.arms if arm.stat(figure)]


def stages_of(comparison: Comparison) -> list[str]:
    """Return the second stages for which some arm has the figure, from the simplest to the one that learns most."""
    return [stage for stage in STAGES if any(arm.stat(generation(stage)) for arm in comparison.arms)]


def without_noise(comparison: Comparison) -> Arm | None:
    """Return the arm without noise that is closest to the reference and has figures of second stages; None without such
    an arm."""
    arms = [arm for arm in _measured(comparison) if not arm.has_noise]
    return closest(arms, comparison.reference) if arms else None


def noise_families(comparison: Comparison) -> list[NoiseFamily]:
    """Return families that together contain every arm with noise, a level above 0 and figures of second stages.

    An arm with several values of sigma and of beta belongs to two possible families. The one with more levels is chosen
    first, and another one only if it contains further arms.
    """
    groups: dict[tuple[object, ...], list[Arm]] = {}
    for key in LEVELS:
        others = [other for other in comparison.differing if other != key]
        for arm in _measured(comparison):
            if arm.has_noise and _level(arm, key) is not None:
                groups.setdefault((key, *(arm.settings.get(other) for other in others)), []).append(arm)
    chosen: list[tuple[str, list[Arm]]] = []
    inside: set[str] = set()
    for (word, *_), arms in sorted(groups.items(), key=lambda item: -len(item[1])):
        labels = {arm.label for arm in arms}
        if labels - inside:
            chosen.append((str(word), arms))
            inside |= labels
    places = {arm.label: place for place, arm in enumerate(comparison.arms)}
    chosen.sort(key=lambda pair: min(places[arm.label] for arm in pair[1]))
    named = [_label(comparison, key, arms) for key, arms in chosen]
    return [
        NoiseFamily(
            label if named.count(label) == 1 else arms[0].label,
            key,
            sorted(arms, key=lambda arm: _level(arm, key) or 0.0),
        )
        for label, (key, arms) in zip(named, chosen, strict=True)
    ]


def _measured(comparison: Comparison) -> list[Arm]:
    names = [generation(stage) for stage in STAGES]
    return [arm for arm in comparison.arms if any(arm.stat(name) for name in names)]


def _level(arm: Arm, key: str) -> float | None:
    """Return the number that is the level of an arm's noise, if this setting is one; None unless it is above 0."""
    value = arm.beta if key == BETA else arm.members[0].settings.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _label(comparison: Comparison, key: str, arms: Sequence[Arm]) -> str:
    """Return the label that the arms of a family have in common."""
    if key == BETA:
        usual = next((arm for arm in arms if arm.beta == comparison.base_beta), arms[0])
        label = without_beta(usual, comparison.differing)
    else:
        first, comma, rest = arms[0].label.partition(",")
        label = first.removesuffix(f" {show(arms[0].settings.get(key))}") + comma + rest
    return label or str(arms[0].members[0].settings.get("sigma", arms[0].label))
