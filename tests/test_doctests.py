"""The examples in docstrings are correct."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import vae_cli

PACKAGE = Path(vae_cli.__file__).parent
EXAMPLES = {file: re.findall(r">>> .*", file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("file", [file for file, lines in EXAMPLES.items() if lines], ids=module_name)
def test_examples(file: Path, ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if any("load_run" in line for line in EXAMPLES[file]):
        assert ask("train", "sigma=fixed", "epochs=1").code == 0
    found = doctest.testmod(import_module(module_name(file)), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
