"""The numbers of a comparison for scripts: the content of `compare.json` and the rows of `compare.csv`."""

from __future__ import annotations

from typing import Any

from vae_cli.comparison.answers import answers
from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.second_stage import AtEqual, SecondStages, second_stages
from vae_cli.comparison.second_stage_text import in_plain_english, verdict_in_short
from vae_cli.comparison.statistics import LEVEL, statistic
from vae_cli.comparison.verdicts import Verdict, verdicts


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """Return the content of `compare.json`: the arms, their differences from the reference, the answers, and
    the second stages if there are any."""
    found = verdicts(comparison)
    return {
        "format": 1,
        "reference": comparison.reference.label,
        "level": LEVEL,
        "settings": {"differ": comparison.differing, "equal": comparison.equal},
        "arms": [_plain_arm(comparison, arm) for arm in comparison.arms],
        "differences": [
            {
                "arm": d.arm,
                "figure": d.figure,
                "value": d.value,
                "interval": d.interval,
                "seeds": d.seeds,
                "paired": d.is_paired,
                "is_difference": d.is_real,
            }
            for d in comparison.differences
        ],
        "comparisons": comparison.comparisons,
        "at_equal_rate": [
            {
                "family": found.family,
                "rate": found.rate,
                "outside": found.outside,
                "distortion": None if found.difference is None else found.difference.value,
                "interval": None if found.difference is None else found.difference.interval,
                "is_difference": None if found.difference is None else found.difference.is_real,
            }
            for found in comparison.at_equal_rate
        ],
        "answers": {
            claim: {
                "question": a.question,
                "verdict": a.verdict,
                "sentences": a.sentences,
                **_plain_verdict(found[claim]),
            }
            for claim, a in answers(comparison, found).items()
        },
        "second_stage": _plain_stages(second_stages(comparison)),
    }


def _plain_stages(found: SecondStages | None) -> dict[str, Any] | None:
    """Return the best levels, the ranking and the comparisons at equal rate and reconstruction; None without any."""
    if found is None:
        return None
    return {
        "verdict": verdict_in_short(found),
        "sentences": in_plain_english(found),
        "reference": found.reference.label if found.reference else None,
        "families": [
            {"family": family.label, "level": family.key, "arms": {arm.label: family.level(arm) for arm in family.arms}}
            for family in found.families
        ],
        "best_levels": [
            {
                "stage": stage,
                "family": family.label,
                "level": family.level(best.arm),
                "could_be_best": [family.level(arm) for arm in best.candidates],
                "is_judged": best.is_judged,
            }
            for stage in found.stages
            for family in found.families
            if (best := found.best(family, stage)) is not None
        ],
        "ranking": [
            {
                "stage": stage,
                "family": rank.label,
                "mean": rank.stat.mean,
                "sd": rank.stat.sd,
                "n": rank.stat.n,
                "could_be_best": rank.could_be_best,
            }
            for stage in found.stages
            for rank in found.ranking(stage)
        ],
        "at_equal_rate": [_plain_equal(one) for one in found.at_equal_rate],
        "at_equal_reconstruction": [_plain_equal(one) for one in found.at_equal_reconstruction],
        "prediction": None
        if found.prediction is None
        else {
            "rank_correlation": found.prediction.value,
            "interval": found.prediction.interval,
            "arms": found.prediction.n,
        },
    }


def _plain_equal(one: AtEqual) -> dict[str, Any]:
    gap = one.difference
    return {
        "stage": one.stage,
        "family": one.family,
        "at": one.at,
        "own": one.own,
        "mean": None if one.stat is None else one.stat.mean,
        "difference": None if gap is None else gap.value,
        "interval": None if gap is None else gap.interval,
        "is_difference": None if gap is None else gap.is_real,
    }


def _plain_verdict(verdict: Verdict) -> dict[str, Any]:
    found = verdict.contrast
    return {
        "word": verdict.word,
        "is_difference": verdict.is_difference,
        "is_tentative": verdict.is_tentative,
        "why": verdict.why,
        "margin": verdict.margin,
        "level": verdict.level,
        "contrast": None
        if found is None
        else {
            "figure": found.figure,
            "arm": found.arm,
            "reference": found.reference,
            "value": found.value,
            "error": found.error,
            "degrees": found.degrees,
            "p": found.p,
            "interval": found.interval(verdict.level) if verdict.level else None,
            "seeds": found.seeds,
        },
    }


def _plain_arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, info in comparison.figures.items():
        about = {"unit": info.unit, "claim": info.claim}
        if info.is_curve and (curves := arm.curves(name)):
            stats = [statistic(column) for column in zip(*curves, strict=True)]
            figures[name] = {"mean": [s.mean for s in stats], "sd": [s.sd for s in stats], "n": len(curves), **about}
        elif (stat := arm.stat(name)) is not None:
            figures[name] = {"mean": stat.mean, "sd": stat.sd, "n": stat.n, "interval": stat.interval, **about}
        if name not in figures and (reason := arm.reason(name)):
            left_out[name] = reason
    runs = [{"path": str(member.folder.path), "seed": member.seed} for member in arm.members]
    return {"label": arm.label, "settings": arm.settings, "runs": runs, "figures": figures, "left_out": left_out}


def as_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of `compare.csv`: each run's folder, arm, seed, settings that differ and scalar figures."""
    names = [name for name, info in comparison.figures.items() if not info.is_curve]
    rows = []
    for arm in comparison.arms:
        for member in arm.members:
            row: dict[str, Any] = {"run": str(member.folder.path), "arm": arm.label, "seed": member.seed}
            row |= {key: _or_empty(member.settings.get(key)) for key in comparison.differing}
            rows.append(row | {name: _or_empty(member.scalar(name)) for name in names})
    return rows


def _or_empty(value: Any) -> Any:
    return "" if value is None else value
