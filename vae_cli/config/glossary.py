"""Explanations of figures, claims, groups of choices, single choices and settings, found without importing torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import dropwhile
from pathlib import Path

from vae_cli.config import catalog
from vae_cli.config.catalog import Choice, Group, Setting
from vae_cli.config.claims import CLAIMS, FIGURES, GROUPS, TITLES, Entry, GroupName, entry
from vae_cli.core.errors import UserError, nearest

Rows = list[tuple[str, str]]

DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "neither": "neither direction is better"}
# Prefixes of figures in metrics.jsonl, and of tags in TensorBoard
SPLITS = ("train", "validation", "test", "posterior", "parameters", "curves", "evaluation", "vae evaluate")


@dataclass(frozen=True)
class Meaning:
    """One thing that a word can mean.

    name    as it is typed or displayed, such as sigma=fixed or rate
    kind    figure, claim, choice, group or setting
    text    paragraphs, separated by blank lines; indented lines keep their layout
    facts   names and values, such as ("unit", "nats")
    tables  titles with rows, such as the settings of a choice
    """

    name: str
    kind: str
    text: str
    facts: Rows = field(default_factory=list)
    tables: list[tuple[str, Rows]] = field(default_factory=list)


def explain_word(word: str, *extra_dirs: Path) -> list[Meaning]:
    """Return all meanings of a word in the register of figures and in the configuration files.

    The word is an identifier, title or tag of a figure, the name of a claim, a group, a choice (alone or as
    group=choice), or a setting (alone or as group.setting). Raises UserError, which suggests the
    nearest word, if the word is unknown.
    """
    groups = catalog.groups(*extra_dirs) | {catalog.launchers().name: catalog.launchers()}
    # As in an override: +schedule@regularizer.beta=linear is a choice of the group schedule.
    word = re.sub(r"@[^=]*", "", word.strip().lstrip("+")).replace("hydra.launcher", "hydra/launcher")
    name, equals, choice = word.partition("=")
    if equals and name in groups and choice:
        if choice not in groups[name].choices:
            known = groups[name].choices
            raise UserError(
                f"'{choice}' is not a choice of {name}.{nearest(choice, known)} Choices: {', '.join(known)}."
            )
        return [_explain_choice(groups[name], groups[name].choices[choice])]
    found = [*_figures(word), *_claims(word), *_groups(word, groups), *_choices(word, groups), *_settings(word, groups)]
    if not found and equals:
        found = [*_groups(name, groups), *_settings(name, groups)]
    if not found:
        raise UserError(
            f"'{word[:60]}' is not a figure, a claim, a choice or a setting.{nearest(word, words(*extra_dirs))} "
            "Type vae explain to list the figures and choices."
        )
    return found


def words(*extra_dirs: Path) -> dict[str, str]:
    """Return every word that `explain_word` knows, with a short description, for completion and suggestions."""
    groups = catalog.groups(*extra_dirs)
    known = {one.name: one.title for one in FIGURES if "{" not in one.name}
    known |= {name: claim.title for name, claim in CLAIMS.items()}
    known |= {str(name): title for name, title in GROUPS.items()}
    known |= {name: setting.comment for name, setting in (catalog.defaults() | catalog.settings()).items()}
    for group in groups.values():
        known |= {f"{group.name}={choice.name}": choice.description for choice in group.choices.values()}
        for choice in group.choices.values():
            known |= {choice.name: choice.description}
            known |= {
                f"{group.name}.{key}": setting.comment
                for key, setting in choice.settings.items()
                if group.name != "experiment" and not setting.default.startswith("${")
            }
    return known


def overview(*extra_dirs: Path) -> list[Meaning]:
    """Return the figures by claim, the figures of no claim, and the choices of each group."""
    meanings = [
        Meaning(f"{claim.number}. {claim.title}", f"claim: {name}", "", tables=[("", _titles(name))])
        for name, claim in CLAIMS.items()
    ]
    for other, title in GROUPS.items():
        meanings.append(Meaning(title, f"figures: {other}", "", tables=[("", _titles(other))]))
    meanings.append(Meaning("Figures reported only in training", "figures", "", tables=[("", _titles(None))]))
    comments = catalog.defaults()
    for name, group in catalog.groups(*extra_dirs).items():
        about = comments[name].comment if name in comments else ""
        rows = [(choice.name, choice.description) for choice in group.choices.values()]
        meanings.append(Meaning(f"{name}=", f"group{f': {about}' if about else ''}", "", tables=[("", rows)]))
    return meanings


def _titles(claim: GroupName | None) -> Rows:
    return [(one.name, one.title) for one in FIGURES if one.claim == claim]


def _figures(word: str) -> Iterator[Meaning]:
    split, slash, term = word.partition("/")
    name = re.sub("/(train|validation)$", "", term) if slash and split in SPLITS else word
    for one in FIGURES:
        if name.lower() in (one.name, one.title.lower()):
            yield _explain_figure(one)
    filled = entry(name)
    if filled.definition and all(filled.name != one.name for one in FIGURES):  # such as iw_bound_k64
        yield _explain_figure(filled)


def _explain_figure(one: Entry) -> Meaning:
    facts = [
        ("identifier", one.name),
        ("formula", one.formula),
        ("unit", one.unit),
        ("direction", DIRECTIONS[one.better]),
    ]
    if one.claim is not None:
        facts.append(("group" if one.claim in GROUPS else "claim", TITLES[one.claim]))
    facts.append(("source", one.source))
    return Meaning(one.title, "figure", one.definition, [(name, value) for name, value in facts if value])


def _claims(word: str) -> Iterator[Meaning]:
    for name, claim in CLAIMS.items():
        if word.lower() in (name, str(claim.number), claim.title.lower()):
            yield Meaning(f"{claim.number}. {claim.title}", "claim", claim.question, tables=_by_rank(name))
    for other, title in GROUPS.items():
        if word.lower() in (other, title.lower()):
            text = "These figures belong to no claim: no verdict depends on them."
            yield Meaning(title, "figures", text, tables=_by_rank(other))


def _by_rank(claim: GroupName) -> list[tuple[str, Rows]]:
    """Return tables of the headline figures and of the other figures of a claim or group."""
    headlines = [(one.name, one.title) for one in FIGURES if one.claim == claim and one.headline]
    others = [(one.name, one.title) for one in FIGURES if one.claim == claim and not one.headline]
    return [("Headline figures", headlines), ("Other figures", others)]


def _groups(word: str, groups: dict[str, Group]) -> Iterator[Meaning]:
    if word in groups:
        about = catalog.defaults().get(word)
        rows = [(f"{word}={choice.name}", choice.description) for choice in groups[word].choices.values()]
        facts = [("default", f"{word}={about.default}")] if about and about.default != "null" else []
        yield Meaning(word, "group", _sentence(about.comment if about else ""), facts, [("Choices", rows)])


def _choices(word: str, groups: dict[str, Group]) -> Iterator[Meaning]:
    for group in groups.values():
        if word in group.choices:
            yield _explain_choice(group, group.choices[word])


def _explain_choice(group: Group, choice: Choice) -> Meaning:
    typed = f"{group.name}={choice.name}"
    text = _sentence(choice.description)
    if documented := documentation(choice.target):
        text = f"{text}\n\n{documented}"
    elif choice.target:
        text = f"{text}\n\nThe class {choice.target}, with that class's own settings."
    if group.name == "experiment" and choice.file is not None:
        tables = [("What it sets", [(line, "") for line in _body(choice.file)])]
    else:
        tables = [
            ("Settings", _setting_rows([(_dotted(group.name, key), one) for key, one in choice.settings.items()]))
        ]
    multirun = "-m " if group.name.startswith("hydra") else ""
    is_own = choice.file is not None and not choice.file.is_relative_to(catalog.configs_dir())
    own = f" --config-dir {choice.file.parents[1]}" if is_own and choice.file is not None else ""
    place = f"+{group.name}@regularizer.beta={choice.name}" if group.name == "schedule" else typed
    prefix = "regularizer.beta" if group.name == "schedule" else group.name
    missing = [f" {_typed(_dotted(prefix, key), one)}" for key, one in choice.settings.items() if one.default == "???"]
    # A choice that works only with a choice on another axis says so in its description: "needs prior=sphere".
    needed = [f" {word}" for word in re.findall(r"\bneeds (\w+=\w+)", choice.description)]
    facts = [*choice.facts.items(), ("usage", f"vae train {multirun}{place}{''.join(needed + missing)}{own}")]
    return Meaning(typed, "choice", text, facts, tables)


def _settings(word: str, groups: dict[str, Group]) -> Iterator[Meaning]:
    if own := catalog.settings().get(word):
        yield Meaning(word, "setting", _sentence(own.comment), [("default", f"{word}={own.default}")])
    group, dot, key = word.partition(".")
    axes = catalog.defaults()  # a value such as ${latent} repeats a setting of the run
    for name in [group] if dot else groups:
        having = [
            (f"{name}={choice.name} {_typed(_dotted(name, found), setting)}", setting.comment)
            for choice in (groups[name].choices.values() if name in groups and name != "experiment" else ())
            for found, setting in choice.settings.items()
            if found == (key if dot else word) and not (name in axes and setting.default.startswith("${"))
        ]
        if having:
            yield Meaning(_dotted(name, key if dot else word), "setting", "", tables=[("Available in", having)])


def _setting_rows(settings: list[tuple[str, Setting]]) -> Rows:
    return [(_typed(key, setting), setting.comment) for key, setting in settings]


def _dotted(group: str, key: str) -> str:
    """Return the full name of a setting of a group.

    >>> _dotted("sigma", "value"), _dotted("hydra/launcher", "n_jobs")
    ('sigma.value', 'hydra.launcher.n_jobs')
    """
    return f"{group.replace('/', '.')}.{key}"


def _typed(key: str, setting: Setting) -> str:
    """Return a setting as it is typed; ??? is Hydra's mark for a value that the user must give."""
    return f"{key}=VALUE" if setting.default == "???" else f"{key}={setting.default}" if setting.default else key


def _body(file: Path) -> list[str]:
    """Return the lines of a YAML file without its leading comments."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return list(dropwhile(lambda line: line.startswith("#"), lines))


def _sentence(phrase: str) -> str:
    """Return a comment with a period at the end.

    >>> _sentence("images x")
    'images x.'
    """
    return phrase if not phrase or phrase.endswith((".", "?")) else f"{phrase}."


@cache
def documentation(target: str) -> str:
    """Return the docstring of one of this package's classes, read from its source without importing it.

    Empty for classes of other packages.

    Doctests and sentences about errors are left out: they are for callers of the class.

    >>> documentation("vae_cli.axes.sigma.Deterministic").partition(":")[0]
    'A point mass at loc(x)'
    >>> documentation("torch.optim.Adam")
    ''
    """
    module, _, name = target.rpartition(".")
    file = _source_file(module)
    if file is None:
        return ""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            text = "\n\n".join(paragraph for paragraph in paragraphs if not paragraph.startswith(">>>"))
            return re.sub(r"\s*\bRaises [A-Z][^.]*\.(?=\s|$)", "", text).strip()
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return documentation(f"{node.module}.{alias.name}")
    return ""


def _source_file(module: str) -> Path | None:
    """Return the source file of a module of this package; None for modules of other packages."""
    first, *parts = module.split(".")
    path = Path(__file__).resolve().parents[1].joinpath(*parts)
    if first != "vae_cli":
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
