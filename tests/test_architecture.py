"""The structure of the code: which modules may import which, and that tests use public names only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import vae_cli

PACKAGE = Path(vae_cli.__file__).parent

# The layers from top to bottom. Layers on the same line may not import each other.
LAYERS = """
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
LEVELS = [line.split() for line in LAYERS.split("\n") if line]


def name_of(file: Path) -> str:
    """Return the name of a module relative to vae_cli: `runs.folder`, or `runs` for a package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
del MODULES[""]  # the package itself, the entry point for Python users


def level(module: str) -> int:
    """Return the level of a module: the number of the line in LAYERS that has its layer, from the top."""
    layer = module.partition(".")[0]
    return next(number for number, layers in enumerate(LEVELS) if layer in layers)


def imports(file: Path) -> set[str]:
    """Return the modules of vae_cli that a file imports, at its top or inside functions."""
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


def test_every_module_is_in_a_layer() -> None:
    layers = [layer for level in LEVELS for layer in level]
    assert {name.partition(".")[0] for name in MODULES} == set(layers)


@pytest.mark.parametrize("layer", [file.parent.name for file in sorted(PACKAGE.glob("*/__init__.py"))])
def test_each_layer_lists_its_modules(layer: str) -> None:
    inside = {name.removeprefix(f"{layer}.").partition(".")[0] for name in MODULES if name.startswith(f"{layer}.")}
    assert set(import_module(f"vae_cli.{layer}").__all__) == inside


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    for imported in imports(MODULES[module]):
        is_same_layer = imported.partition(".")[0] == module.partition(".")[0]
        assert is_same_layer or level(imported) > level(module), f"{module} imports {imported}, which is not below"


def test_no_modules_import_each_other() -> None:
    graph = {name: imports(file) for name, file in MODULES.items()}
    while leaves := {name for name, below in graph.items() if not below}:
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {', '.join(graph)}"


def test_the_model_imports_no_axis() -> None:
    assert not any(name.startswith("axes") for file in PACKAGE.glob("model/*.py") for name in imports(file))


def test_the_files_that_quick_runs_exist(pytestconfig: pytest.Config) -> None:
    (conftest,) = (plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "QUICK_FILES"))
    assert {file.name for file in Path(__file__).parent.glob("test_*.py")} >= conftest.QUICK_FILES


# Private names --------------------------------------------------------------------------------------------------------

TESTS = sorted(Path(__file__).parent.rglob("*.py"))


def is_private(name: str) -> bool:
    """Return whether a name has one leading underscore, or two but no trailing ones.

    >>> [is_private(name) for name in ("_run", "run", "__init__", "_")]
    [True, False, False, False]
    """
    return name.startswith("_") and not name.endswith("_")


@cache
def private_definitions() -> frozenset[str]:
    """Return every private name that the package defines: functions, classes, variables and attributes."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return frozenset(filter(is_private, found))


def private_names_used(tree: ast.AST, defined: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each use of a private name of the package: imports, attributes of anything but
    `self` and `cls`, dotted names in strings (as monkeypatch accepts them), and code in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vae_cli":
            dotted = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name) for name in dotted if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and node.attr in defined:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            yield from ((node.lineno, word) for word in words if word in defined)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "vae_cli" in node.value:
            for name in re.findall(r"\bvae_cli(?:\.\w+)+", node.value):
                if any(part in defined for part in name.split(".")):
                    yield node.lineno, name
            if "import" in node.value:
                try:
                    code = ast.parse(node.value)
                except SyntaxError:  # prose
                    continue
                yield from ((node.lineno, name) for _, name in private_names_used(code, defined))


@pytest.mark.parametrize("test", TESTS, ids=lambda path: path.name)
def test_tests_use_public_names_only(test: Path) -> None:
    found = list(private_names_used(ast.parse(test.read_text()), private_definitions()))
    assert not found, "\n".join(f"{test.name}:{line}: {name} is private" for line, name in found)


@pytest.mark.parametrize(
    "code",
    [
        "from PACKAGE.layer import _example",
        "from PACKAGE import layer\nroom._example.close()",
        "import PACKAGE.layer\nPACKAGE.layer._example",
        "monkeypatch.setattr('PACKAGE.layer._example', None)",
        "monkeypatch.setattr(layer, '_example', None)",
        "commands.start(before='from PACKAGE import layer; layer._example = None')",
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert list(private_names_used(ast.parse(code.replace("PACKAGE", "vae_cli")), frozenset(["_example"])))


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short_and_public_names_are_documented(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{module}.{node.name} is too long"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
