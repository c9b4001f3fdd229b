"""Imports go down only: a module may import modules of the layers below its own, and those before it in its own."""

from __future__ import annotations

import ast
from pathlib import Path

import vae_cli

PACKAGE = Path(vae_cli.__file__).parent

# From the bottom up; within a layer the order in which modules may build on each other.
LAYERS = [
    [
        "errors",
        "launch",
        "processes",
        "check",
        "part",
        "files",
        "machine",
        "slurm",
        "naming",
        "objective",
        "delta",
        "scale",
        "inference",
        "schedule",
        "image",
        "indices",
        "memory",
        "catalog",
    ],
    ["sigma", "prior", "likelihood", "regularizer", "dense", "network", "optimizer", "metric", "metric.terms"],
    ["dataset.mapped", "dataset.split", "dataset.pack", "dataset.digits", "dataset.linear_gaussian", "dataset.shapes"],
    ["dataset.image_folder", "dataset.torchvision", "dataset"],
    ["target", "settings", "device"],
    [
        "model",
        "build",
        "folder",
        "checkpoint",
        "events",
        "meter",
        "interruption",
        "composition",
        "output",
        "study",
        "measured",
    ],
    ["evaluation", "progress", "training", "experiment", "run", "codes", "report", "hydra_front"],
    ["jobs", "overview", "search"],
    ["metric.base", "metric.features", "metric.bits", "metric.scales", "metric.neighbours", "metric.shortcuts"],
    ["metric.price", "metric.quality", "assessment"],
    ["comparison", "evaluations", "kept", "findings", "plots", "gallery", "html_report"],
    [
        "commands.runs",
        "commands.train",
        "commands.repeat",
        "commands.sample",
        "commands.interpolate",
        "commands.evaluate",
    ],
    ["commands.compare", "commands"],
    ["cli", "__main__"],
]
ORDER = [name for layer in LAYERS for name in layer]


def modules() -> dict[str, Path]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = file
    found.pop("")  # the package itself, which names what is offered to Python users
    return found


def imports(file: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vae_cli":
            base = node.module.removeprefix("vae_cli").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in ORDER else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("vae_cli.") for a in node.names if a.name.startswith("vae_cli.")}
    return found - {""}


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_imports_go_down_only() -> None:
    for name, file in modules().items():
        for imported in imports(file):
            assert imported in ORDER, f"{name} imports {imported}, which is no module"
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}, which stands above it"


def test_model_imports_no_axis() -> None:
    axes = {"sigma", "prior", "likelihood", "regularizer", "network", "optimizer", "dataset"}
    assert not imports(PACKAGE / "model.py") & axes
