"""The report's section on second stages: the answer in plain English, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vae_cli.comparison.findings import amount, gap
from vae_cli.comparison.labels import BETA
from vae_cli.comparison.noise_families import RECONSTRUCTION, STAGES, VALUE, NoiseFamily, generation
from vae_cli.comparison.second_stage import RATE, AtEqual, BestLevel, Rank, SecondStages
from vae_cli.comparison.statistics import Difference, difference, statistic
from vae_cli.comparison.tables import MISSING, Cell, Column, Footnotes, Row, Table
from vae_cli.comparison.verdicts import FEW_SEEDS
from vae_cli.config.claims import entry
from vae_cli.core.wording import capitalized, digits_for, listed, number, quoted

PLURALS = {VALUE: "noise levels", BETA: "values of beta"}
BESIDE = ("rate", "novelty_{stage}")  # figures of the table of best levels, in addition to those that it is about
HALF_NEW = 0.5  # novelty below which the answer warns: closer to copies than to held-out images
NOT_REACHED = "no number: in some seed, one of the two families does not reach it, or reaches it at several levels"


@dataclass(frozen=True)
class StageTables:
    """The tables of one second stage; a table without rows is left out by the template."""

    title: str
    levels: Table
    at_equal_rate: Table
    at_equal_reconstruction: Table


@dataclass(frozen=True)
class StageSection:
    """The section: a verdict in a few words, the answer, the tables, and a sentence on the predictor (or nothing).

    comes_first  whether the section stands before the five claims, as it does if none of them was judged
    comparisons  the number of intervals in the tables of equal rate and equal reconstruction
    """

    verdict: str
    plain: list[str]
    stages: list[StageTables]
    reference: str
    prediction: str
    comparisons: int
    comes_first: bool


def stage_section(found: SecondStages | None, comes_first: bool, colors: dict[str, str]) -> StageSection | None:
    """Return the section on second stages; None without them. `colors` are those of the families, by label."""
    if found is None:
        return None
    return StageSection(
        verdict_in_short(found),
        in_plain_english(found),
        [
            StageTables(
                capitalized(STAGES[stage]),
                _levels(found, stage, colors),
                _equal(found, found.at_equal_rate, stage, RATE, colors),
                _equal(found, found.at_equal_reconstruction, stage, RECONSTRUCTION, colors),
            )
            for stage in found.stages
        ],
        found.reference.label if found.reference else "",
        _prediction(found),
        found.comparisons,
        comes_first,
    )


def verdict_in_short(found: SecondStages) -> str:
    """Return which noise is the best for the second stage that decides, in a few words."""
    stage = found.stages[0]
    ranks = found.ranking(stage)
    if len(ranks) < 2:
        return "Not judged"
    could = [rank.label for rank in ranks if rank.could_be_best]
    if len(could) == len(ranks):
        return "Undecided: no noise can be ruled out"
    if len(could) > 1:
        return f"Undecided between {quoted(could)}"
    word = "Tentatively: " if _seeds(ranks) < FEW_SEEDS else ""
    return f"{word}{quoted(could)}, with {STAGES[stage]} as the second stage"


def in_plain_english(found: SecondStages) -> list[str]:
    """Return the answer: which noise, at which level, at what cost in reconstruction, and what is undecided."""
    stage = found.stages[0]
    ranks = found.ranking(stage)
    noise = next((rank for rank in ranks if rank.family is not None), None)
    if noise is None or noise.family is None:
        return [
            "Which noise gives codes that a second stage learns best cannot be judged, because no noise has two seeds "
            "or more that all of its levels share: train more seeds."
        ]
    sentences = [_which(stage, ranks)]
    if (best := found.best(noise.family, stage)) is not None:
        if noise is not ranks[0]:
            sentences.append(f"Of the noises, {_named(noise)} comes first.")
        sentences += [_level(best), _cost(found, best), _copies(best)]
        sentences += [
            _at_equal(found.at_equal_rate, best, "rate"),
            _at_equal(found.at_equal_reconstruction, best, "reconstruction"),
        ]
    sentences.append(_others(found))
    if _seeds(ranks) < FEW_SEEDS:
        sentences.append(f"All of this is tentative: there are only {_seeds(ranks)} seeds.")
    return [text for text in sentences if text]


def _seeds(ranks: Sequence[Rank]) -> int:
    return min(len(rank.values) for rank in ranks)


def _named(rank: Rank) -> str:
    """Return a noise and its figure: 'fixed' (12.81 ± 0.46, at a level chosen on the other seeds)."""
    is_chosen = rank.family is not None and len(rank.family.arms) > 1
    return (
        f"{quoted([rank.label])} ({amount(rank.stat)}{', at a level chosen on the other seeds' if is_chosen else ''})"
    )


def _which(stage: str, ranks: Sequence[Rank]) -> str:
    """Return a sentence on which noise is the best, which others could be, and what codes without noise achieve."""
    first = ranks[0]
    if len(ranks) == 1:
        return f"These runs have a single noise, {_named(first)}, and no codes without noise to compare it with."
    others = [rank for rank in ranks[1:] if rank.could_be_best]
    second = f"With {STAGES[stage]} as the second stage"
    text = f"{second}, the Fréchet distance of images is lowest for codes of {_named(first)}"
    if others and len(others) == len(ranks) - 1:
        text += ", but these runs can rule out no other noise"
    elif others:
        text += f", but these runs do not decide between it and {quoted([rank.label for rank in others])}"
    text += "."
    silent = next((rank for rank in ranks if rank.family is None), None)
    if silent is None or silent is first:
        return text
    gain = difference(generation(stage), silent.label, silent.values, first.label, first.values)
    if gain is None:
        return text
    if gain.is_real:
        return f"{text} Without noise, the distance {_differs(gain)}."
    found = "no difference was found" if gain.is_real is False else "the difference is not judged"
    return f"{text} From codes without noise, {found}: {gap(gain)}."


def _differs(found: Difference) -> str:
    """Return the words for a difference whose interval excludes 0: 'is 3.20 [2.90, 3.50] higher'."""
    assert found.interval is not None
    low, high = sorted(abs(end) for end in found.interval)
    digits = digits_for([found.value, low, high])
    size = f"{number(abs(found.value), digits)} [{number(low, digits)}, {number(high, digits)}]"
    return f"is {size} {'higher' if found.value > 0 else 'lower'}"


def _level(best: BestLevel) -> str:
    """Return a sentence on the best level of a family; empty if it has one level."""
    family, name = best.family, quoted([best.family.label])
    arms = family.at(generation(best.stage))
    if len(arms) == 1:
        return ""
    words, own = PLURALS[family.key], f"{family.level(best.arm):g}"
    if not best.is_judged:
        text = f"Of the {words} of {name}, {own} has the lowest mean, which one seed cannot confirm"
    elif best.is_decided:
        tried = listed([f"{family.level(arm):g}" for arm in arms])
        text = f"Of the {words} of {name}, which are {tried}, {own} is the best"
    elif best.is_flat:
        text = (
            f"Which of the {words} of {name} is the best is undecided: {own} has the lowest mean, but all could be it"
        )
    else:
        *most, last = [f"{family.level(arm):g}" for arm in best.candidates]
        text = f"Of the {words} of {name}, {', '.join(most)} or {last} is the best; {own} has the lowest mean"
    if best.edge:
        beyond = "lower" if best.edge == "lowest" else "higher"
        text += f". {own} is the {best.edge} that was tried, so a {beyond} one may be better"
    return f"{text}."


def _cost(found: SecondStages, best: BestLevel) -> str:
    """Return a sentence on what the best level costs in reconstruction; empty if that was not measured."""
    cost = found.cost(best.arm)
    if cost is None:
        return ""
    where = f"with {quoted([best.arm.label])}, the Fréchet distance of reconstructions"
    if not cost.is_real:
        found_none = "No cost in reconstruction was found" if cost.is_real is False else "The cost is not judged"
        return f"{found_none}: {where} differs from that without noise by {gap(cost)}."
    word = "This costs reconstruction" if cost.value > 0 else "Reconstructions gain, too"
    return f"{word}: {where} {_differs(cost)} than without noise."


def _copies(best: BestLevel) -> str:
    """Return a warning if the images of the best arm are closer to copies of training images than to new ones."""
    novelty = best.arm.stat(f"novelty_{best.stage}")
    if novelty is None or novelty.mean >= HALF_NEW:
        return ""
    return (
        f"These images resemble training images: their novelty is {amount(novelty)}, where held-out images have 1 and "
        "copies 0. A low Fréchet distance of copies says little about the second stage."
    )


def _at_equal(rows: Sequence[AtEqual], best: BestLevel, word: str) -> str:
    """Return a sentence that counts at which common rates (or reconstructions) the noise differs from the reference
    family; empty if they were not compared."""
    gaps = [row.difference for row in rows if (row.stage, row.family) == (best.stage, best.family.label)]
    found = [one for one in gaps if one is not None]
    if not found:
        return ""
    name, reference = quoted([best.family.label]), quoted([found[0].reference])
    lower = sum(bool(one.is_real) and one.value < 0 for one in found)
    higher = sum(bool(one.is_real) and one.value > 0 for one in found)
    if len(found) == 1:
        says = (
            "lower than that of" if lower else "higher than that of" if higher else "not found to differ from that of"
        )
        return f"At equal {word}, the distance of {name} is {says} {reference}: {gap(found[0])}."
    counts = f"at {lower} of {len(found)} {word}s, higher at {higher}, and undecided at {len(found) - lower - higher}"
    return f"At equal {word}, the distance of {name} is lower than that of {reference} {counts}."


def _others(found: SecondStages) -> str:
    """Return a sentence on the noise that comes first with each of the other second stages; empty without any."""
    first: dict[str, list[str]] = {}
    for stage in found.stages[1:]:
        ranks = found.ranking(stage)
        if len(ranks) > 1:
            is_decided = sum(rank.could_be_best for rank in ranks) == 1
            first.setdefault(ranks[0].label, []).append(STAGES[stage] + (" (decided)" if is_decided else ""))
    parts = [f"{quoted([label])} comes first with {listed(stages)}" for label, stages in first.items()]
    if not parts:
        return ""
    return f"With the other second stages, which are undecided unless stated: {'; '.join(parts)}."


def _prediction(found: SecondStages) -> str:
    """Return a sentence on how well the predictor ranks the arms; empty if it was not measured."""
    one = found.prediction
    if one is None:
        return ""
    text = f"Over {one.n} arms, the rank correlation between the velocity's irreducible variance and the Fréchet "
    text += f"distance with flow matching is {number(one.value, 2)}"
    if one.interval is None:
        return f"{text}; there are too few arms for an interval."
    low, high = (number(end, 2) for end in one.interval)
    text += f" [{low}, {high}]"
    if one.interval[0] > 0:
        return f"{text}: arms with a lower variance tend to be learned better."
    if one.interval[1] < 0:
        return f"{text}: arms with a lower variance tend to be learned worse."
    return f"{text}. The interval contains 0, so it is undecided whether one predicts the other."


def _levels(found: SecondStages, stage: str, colors: dict[str, str]) -> Table:
    """Return a table of the best level of each family, with the noises in ascending order of their distance."""
    name = generation(stage)
    ranks = {rank.label: rank for rank in found.ranking(stage)}
    beside = [word.format(stage=stage) for word in BESIDE]
    beside = [word for word in beside if any(arm.stat(word) for family in found.families for arm in family.arms)]
    rows = []
    families = sorted(found.families, key=lambda family: _place(family, ranks))
    best = [(family, one) for family in families if (one := found.best(family, stage)) is not None]
    arms = [one.arm for _, one in best] + ([found.silent] if found.silent and found.silent.stat(name) else [])
    digits = digits_for([stat.mean for arm in arms if (stat := arm.stat(name)) is not None])
    for family, one in best:
        kept = [f"{family.level(arm):g}" for arm in one.candidates]
        word = "beta " if family.key == BETA else ""
        cells = [
            Cell(f"{word}{family.level(one.arm):g}"),
            Cell(", ".join(kept) if one.is_judged else MISSING),
            Cell(amount(statistic(list(one.arm.by_seed(name).values())), "", digits)),
            *_ranked(ranks.get(family.label), digits),
            *(_value(found, one, word) for word in (RECONSTRUCTION, *beside)),
        ]
        rows.append(Row(family.label, cells, colors.get(family.label, "")))
    if found.silent is not None and (stat := found.silent.stat(name)) is not None:
        measured = [found.silent.stat(word) for word in (RECONSTRUCTION, *beside)]
        cells = [Cell(MISSING), Cell(MISSING), Cell(amount(stat, "", digits))]
        cells += _ranked(ranks.get(found.silent.label), digits)
        cells += [Cell(MISSING if value is None else amount(value)) for value in measured]
        rows.append(Row(found.silent.label, cells))
    columns = [
        Column("level with the lowest mean"),
        Column("levels that could be the best"),
        Column("Fréchet distance", better="lower"),
        Column("the same, with the level chosen on other seeds", better="lower"),
        Column("could be the best noise"),
        *(Column(one.title, one.unit, one.definition, one.better) for one in map(entry, (RECONSTRUCTION, *beside))),
    ]
    return Table("noise", columns, rows)


def _place(family: NoiseFamily, ranks: dict[str, Rank]) -> float:
    return ranks[family.label].stat.mean if family.label in ranks else float("inf")


def _ranked(rank: Rank | None, digits: int) -> list[Cell]:
    if rank is None:
        return [Cell(MISSING), Cell(MISSING)]
    return [Cell(amount(rank.stat, "", digits)), Cell("yes" if rank.could_be_best else "no")]


def _value(found: SecondStages, best: BestLevel, name: str) -> Cell:
    stat = best.arm.stat(name)
    if stat is None:
        return Cell(MISSING)
    cost = found.cost(best.arm) if name == RECONSTRUCTION else None
    return Cell(amount(stat) + (f", {gap(cost)}" if cost else ""), differs=cost is not None and bool(cost.is_real))


def _equal(found: SecondStages, rows: Sequence[AtEqual], stage: str, equal: str, colors: dict[str, str]) -> Table:
    """Return a table of a second stage at equal rate or at equal reconstruction: a column for each common place, and
    one for the arms that are compared at their own."""
    own = [row for row in rows if row.stage == stage]
    places = list(dict.fromkeys(row.at for row in own if row.at is not None))
    has_own = any(row.at is None for row in own)
    unit = entry(equal).unit
    footnotes = Footnotes()
    table_rows = []
    for label in dict.fromkeys(row.family for row in own):
        mine = {row.at: row for row in own if row.family == label}
        is_reference = found.reference is not None and label == found.reference.label
        cells = [_equal_cell(mine.get(at), is_reference, footnotes) for at in places]
        if has_own:
            cells.append(_equal_cell(mine.get(None), is_reference, footnotes))
        table_rows.append(Row(label, cells, colors.get(label, ""), is_reference))
    word = "rate" if equal == RATE else "reconstruction"
    columns = [Column(f"at {word} {at:g}", unit) for at in places] + [Column(f"at its own {word}")] * has_own
    return Table("noise", columns, table_rows, footnotes.marks)


def _equal_cell(row: AtEqual | None, is_reference: bool, footnotes: Footnotes) -> Cell:
    """Return a difference with its interval or, for the reference family, its own figure."""
    if row is None:
        return Cell("")
    if is_reference and row.stat is not None:
        return Cell(amount(row.stat))
    if row.difference is None:
        return Cell(MISSING, [footnotes.mark(NOT_REACHED)])
    where = "" if row.own is None else f" at {number(row.own)}"
    return Cell(gap(row.difference) + where, differs=bool(row.difference.is_real))
