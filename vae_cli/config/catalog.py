"""All choices and settings, read from the configuration files as plain text, for help, completion and messages.

The reader understands only what these files use: keys, values, comments and indentation. It takes milliseconds, whereas
the libraries that compose the configuration take tenths of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

FACTS = ("paper", "setting", "published", "ours")  # of a preset


@dataclass(frozen=True)
class Setting:
    """A key with its default value and its comment, as written in the file."""

    key: str
    default: str
    comment: str


@dataclass(frozen=True)
class Choice:
    """One choice of a group: its name, a phrase that describes it, the class it builds, its settings, and its file.

    facts  what the comment at the top of the file says of a preset, such as {"paper": "Burda et al., ..."}
    """

    name: str
    description: str
    target: str
    settings: dict[str, Setting]
    file: Path | None = None
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One axis of an experiment, with its choices."""

    name: str
    choices: dict[str, Choice]


def configs_dir() -> Path:
    """Return the folder of the bundled configurations: inside an installed package, or at the top of a clone."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def groups(*extra_dirs: Path) -> dict[str, Group]:
    """Return every group with its choices, beginning with the groups of `train.yaml` in their order. As in Hydra, a
    choice in the user's own folder does not replace a bundled one of the same name."""
    found: dict[str, dict[str, Choice]] = {name: {} for name in defaults()}
    for folder in (configs_dir(), *extra_dirs):
        for file in sorted(folder.glob("*/**/*.yaml")):
            name = file.parent.relative_to(folder).as_posix()
            if name != "hydra" and not name.startswith("hydra/") and file.is_file():
                found.setdefault(name, {}).setdefault(file.stem, _read_choice(file))
    return {name: Group(name, choices) for name, choices in found.items() if choices}


def launchers() -> Group:
    """Return the group hydra/launcher: how the jobs of a sweep are run."""
    name = "hydra/launcher"
    basic = Choice("basic", "one run after the other, in this process", "", {})
    found = {file.stem: _read_choice(file) for file in sorted((configs_dir() / name).glob("*.yaml"))}
    return Group(name, {"basic": basic, **found})


def defaults() -> dict[str, Setting]:
    """Return the groups in the order of `train.yaml`, each with its default choice and its comment."""
    lines = [key for key in _read(configs_dir() / "train.yaml") if key.path[:1] == ("defaults",)]
    items = [Setting(key.path[1], key.value, key.comment) for key in lines if len(key.path) == 2]
    return {item.key: item for item in items if not item.key.startswith("override ")}


def settings() -> dict[str, Setting]:
    """Return the settings that belong to no group, in the order of `train.yaml`."""
    keys = _read(configs_dir() / "train.yaml")
    return {
        key.path[0]: Setting(key.path[0], key.value, key.comment)
        for key in keys
        if len(key.path) == 1 and key.path[0] not in ("defaults", "hydra")
    }


def complete(before: Sequence[str], word: str, *extra_dirs: Path) -> list[tuple[str, str]]:
    """Return the completions of a partly typed override, each with a description, given the overrides before it."""
    known = groups(*extra_dirs)
    named = {name: setting.comment for name, setting in (defaults() | settings()).items()}
    if word.startswith("hydra"):
        known[launchers().name] = launchers()
        named[launchers().name] = "how the jobs of a sweep are run"
    chosen = {name: [setting.default] for name, setting in defaults().items()}
    chosen |= {key: value.split(",") for key, _, value in (one.partition("=") for one in before) if key in known}
    keys = {
        f"{name}.{setting.key}": setting
        for name, choices in chosen.items()
        if name in known and name != "experiment"
        for choice in choices
        if choice in known[name].choices
        for setting in known[name].choices[choice].settings.values()
        if not setting.default.startswith("${")
    }
    named |= {key: setting.comment for key, setting in keys.items() if word}
    named |= {
        f"+schedule@{key}": "" for key, setting in keys.items() if word[:1] == "+" and "schedule" in setting.comment
    }
    named = {f"{key}=": comment for key, comment in named.items()}
    if "=" not in word:
        fitting = {key: comment for key, comment in named.items() if key.startswith(word)}
        if len(fitting) != 1:
            return list(fitting.items())
        # A shell adds a space after a single candidate. If the values of the key are offered too, it stops at the '='.
        word = next(iter(fitting))
    else:
        fitting = {}
    key, _, value = word.partition("=")
    first, comma, last = value.rpartition(",")
    values: dict[str, str] = {}
    if group := known.get(key.lstrip("+").partition("@")[0]):
        values = {choice.name: choice.description for choice in group.choices.values()}
    elif setting := keys.get(key) or settings().get(key):
        values = {setting.default: setting.comment} if setting.default not in ("", "???") else {}
        if setting.default in ("true", "false"):
            values = {"true": setting.comment, "false": setting.comment}
    return [
        *fitting.items(),
        *(
            (f"{key}={first}{comma}{name}", text)
            for name, text in values.items()
            if name.startswith(last) and name not in first.split(",")
        ),
    ]


@dataclass(frozen=True)
class _Key:
    path: tuple[str, ...]
    value: str
    comment: str


def _read_choice(file: Path) -> Choice:
    keys = [key for key in _read(file) if key.path[0] not in ("defaults", "hydra")]
    parents = {key.path[:-1] for key in keys}
    named = [key for key in keys if key.path not in parents and not key.path[-1].startswith("_")]
    return Choice(
        name=file.stem,
        description=_description(file),
        target=next((key.value for key in keys if key.path == ("_target_",)), ""),
        settings={".".join(key.path): Setting(".".join(key.path), key.value, key.comment) for key in named},
        file=file,
        facts=_facts(file),
    )


def _description(file: Path) -> str:
    for line in _lines(file):
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ").rstrip()
    return ""


def _facts(file: Path) -> dict[str, str]:
    """Return the lines `# word: text` of the comment at the top of a file, such as `# paper: ...`."""
    above = takewhile(lambda line: line.startswith("#"), _lines(file))
    found = (line.lstrip("# ").partition(": ") for line in above)
    return {word: text for word, _, text in found if word in FACTS}


def _read(file: Path) -> Iterator[_Key]:
    """Yield the keys of a YAML file from top to bottom; parent keys come before the keys inside them."""
    above: list[tuple[int, str]] = []
    for line in _lines(file):
        text, comment = _split_comment(line)
        indent = len(text) - len(text.lstrip())
        item = text.lstrip()
        if item.startswith("- "):  # the defaults list is the only list whose items are keys
            item = item[2:].lstrip()
            indent += 2
        key, colon, value = item.partition(": ") if ": " in item else (item[:-1], item[-1:], "")
        if colon.strip() != ":" or not key:
            continue
        while above and above[-1][0] >= indent:
            above.pop()
        key = key.strip("'\"/")
        above.append((indent, key))
        yield _Key(tuple(name for _, name in above), value.strip(), comment)


def _split_comment(line: str) -> tuple[str, str]:
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (index == 0 or line[index - 1] in " [{,"):  # not an apostrophe
            quote = letter
        elif letter == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index].rstrip(), line[index + 1 :].strip()
    return line.rstrip(), ""


def _lines(file: Path) -> list[str]:
    # A file that is not text yields no keys and no error here; the error appears when Hydra reads the file.
    return file.read_text(encoding="utf-8", errors="replace").splitlines()
