"""The documents are correct: what they name exists, and the README names every choice and setting."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vae_cli.config import catalog

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "vae_cli/README.md", "configs/README.md", "tests/README.md", ".github/CONTRIBUTING.md"]
README = (ROOT / "README.md").read_text()
USERS_OWN = re.compile(r"own/|mine\.py$|config\.yaml$|runs/\w+/")  # files that a user or a run writes


def without_code_blocks(document: str) -> str:
    return re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def paths_in(document: str) -> Iterator[str]:
    """Yield the paths that a document writes as code: `model/vae.py`, `configs/sigma/`."""
    for path in re.findall(r"`([\w./*-]+)`", without_code_blocks(document)):
        is_path = path.endswith((".py", ".yaml", ".toml", ".j2", ".sh", ".yml")) or re.fullmatch(r"[\w./-]+/", path)
        if is_path and not USERS_OWN.match(path):
            yield path


@pytest.mark.parametrize("group", [*catalog.defaults()])
def test_every_choice_is_named(group: str) -> None:
    for choice in catalog.groups()[group].choices:
        assert f"`{choice}`" in README or f"={choice}" in README, f"{group}={choice}"


def test_every_preset_says_where_it_comes_from() -> None:
    text = (ROOT / "configs/README.md").read_text()
    for name, choice in catalog.groups()["experiment"].choices.items():
        if name in ("mnist_table", "search", "sigma_quick", "sigma_study", "tokenizer_study"):  # no models
            assert choice.facts == {}
            continue
        paper, published, ours = (choice.facts.get(word, "") for word in ("paper", "published", "ours"))
        assert paper, name
        assert choice.facts["setting"], name
        assert f"| `{name}` | {choice.description} | {paper} | {published} | {ours} |" in text, name


def test_every_setting_is_named() -> None:
    for setting in catalog.settings():
        assert f"`{setting}`" in README, setting


def test_every_subcommand_is_named(ask: Callable[..., Any]) -> None:
    listed = ask("--help").out.partition("Commands:")[2]
    subcommands = re.findall(r"^  ([a-z]+)  ", listed, flags=re.MULTILINE)
    assert "train" in subcommands
    for subcommand in subcommands:
        assert f"`vae {subcommand}" in README, subcommand


def test_pictures_are_small() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size < 1_000_000


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_exist(document: str, ask: Callable[..., Any]) -> None:
    """Every option that a document gives to a subcommand is in the help of this subcommand."""
    for subcommand, words in set(re.findall(r"\bvae ([a-z]+)( [^`\n]*)?", (ROOT / document).read_text())):
        options = re.findall(r" (--?[a-z][a-z-]*)", words)
        help_text = ask(subcommand, "--help").out if options else ""
        for option in options:
            assert re.search(rf"(?<![\w-]){option}\b", help_text), f"{document}: vae {subcommand} {option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", without_code_blocks(document)):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    places = (ROOT / document).parent, ROOT, ROOT / "vae_cli", ROOT / "tests"
    paths = [*paths_in(document)]
    assert paths
    assert not [path for path in paths if not any([*place.glob(path.rstrip("/"))] for place in places)]


def test_the_example_of_a_choice_is_one() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "configs/README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert example in [file.read_text() for file in ROOT.glob("configs/sigma/*.yaml")]


def test_the_map_of_the_code_names_what_is_there() -> None:
    """In "`axes/sigma.py`: `Fixed`, `Learned`" the file contains each of the names."""
    text = re.sub(r"\s+", " ", (ROOT / "vae_cli/README.md").read_text())
    found = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, | and )?)+)", text)
    assert len(found) > 20
    for file, names in found:
        code = (ROOT / "vae_cli" / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b(def|class) {name}\b|^\s*{name}\b", code, re.MULTILINE), f"no {name} in {file}"


def test_the_table_of_benchmarks_is_that_of_the_saved_results() -> None:
    script = ROOT / "tests" / "benchmarks" / "run.py"
    printed = subprocess.run([sys.executable, script, "--table"], capture_output=True, text=True, check=True).stdout
    assert printed.strip()
    assert printed.strip() in (ROOT / "tests" / "README.md").read_text()


def test_examples_of_users_own_classes_run(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own sigma mode and metric, as the README shows them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(sys.modules, "mine", None)  # restored afterwards, even if it was imported before
    monkeypatch.delitem(sys.modules, "mine")
    monkeypatch.setenv("VAE_TRUST", "")  # --trust sets it; this restores it
    Path("mine.py").write_text("\n\n".join(code for code in code_blocks("python") if "class " in code))
    Path("own/sigma").mkdir(parents=True)
    (choice,) = (code for code in code_blocks("yaml") if "mine.Loud" in code)
    assert yaml.safe_load(choice)["_target_"] == "mine.Loud"
    Path("own/sigma/loud.yaml").write_text(choice)
    train, evaluate = re.findall(r"^vae (.*--trust mine)$", README, flags=re.MULTILINE)
    assert ask(*train.split(), "epochs=1").code == 0
    assert ask(*evaluate.split(), "--quick").code == 0
    assert '"loudness"' in Path("runs/digits/sigma-loud/evaluation/metrics.json").read_text()


def test_the_example_of_load_run_runs(ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask("train", "sigma=fixed", "epochs=1").code == 0
    (example,) = (code for code in code_blocks("python") if "load_run" in code)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["images"].shape == (16, 1, 8, 8)
