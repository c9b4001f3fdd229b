"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vae_cli.config import catalog

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("group", [*catalog.defaults()])
def test_it_names_every_choice(group: str) -> None:
    for choice in catalog.groups()[group].choices:
        assert f"`{choice}`" in README or f"={choice}" in README, f"{group}={choice}"


def test_it_names_every_setting() -> None:
    for setting in catalog.settings():
        assert f"`{setting}`" in README, setting


def test_its_pictures_are_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / path).stat().st_size < 1_000_000
