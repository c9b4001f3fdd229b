"""Imports go down only: a room may import the rooms below its own, and no two of its modules import each other."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import vae_cli

PACKAGE = Path(vae_cli.__file__).parent

# From the top down. Rooms on one line stand side by side: neither may import the other.
ROOMS = """
__main__
cli
commands
terminal
comparison
metrics sweeps
training
runs
config
axes
model
machine
core
"""
FLOORS = [line.split() for line in ROOMS.split("\n") if line]


def name_of(file: Path) -> str:
    """The name of a module below the package: `runs.folder`, or `runs` for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
del MODULES[""]  # the package itself, which offers what Python users need


def floor(module: str) -> int:
    """The number of a module's floor, counted from the top."""
    room = module.partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports(file: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vae_cli":
            base = node.module.removeprefix("vae_cli").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("vae_cli.") for a in node.names if a.name.startswith("vae_cli.")}
    return found - {"", name_of(file)}


def test_every_module_is_in_a_room() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert {name.partition(".")[0] for name in MODULES} == set(rooms)


@pytest.mark.parametrize("room", [file.parent.name for file in sorted(PACKAGE.glob("*/__init__.py"))])
def test_a_room_lists_its_modules(room: str) -> None:
    inside = {name.removeprefix(f"{room}.").partition(".")[0] for name in MODULES if name.startswith(f"{room}.")}
    assert set(import_module(f"vae_cli.{room}").__all__) == inside


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    for imported in imports(MODULES[module]):
        is_same_room = imported.partition(".")[0] == module.partition(".")[0]
        assert is_same_room or floor(imported) > floor(module), f"{module} imports {imported}, which is not below it"


def test_no_modules_import_each_other() -> None:
    graph = {name: imports(file) for name, file in MODULES.items()}
    while leaves := {name for name, below in graph.items() if not below}:
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {', '.join(graph)}"


def test_the_model_imports_no_axis() -> None:
    assert not any(name.startswith("axes") for file in PACKAGE.glob("model/*.py") for name in imports(file))
