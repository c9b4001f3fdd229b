"""The conditions under which a run was trained: configuration, versions, commit, device, threads."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from vae_cli.config.build import Experiment
from vae_cli.machine import distributed


def describe(experiment: Experiment) -> dict[str, Any]:
    """Return the configuration, versions, commit, device, number of threads, ... of a run, for its summary."""
    packages = ["torch", "hydra-core", "omegaconf", "tensorboard", "vae-cli"]
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    cuda = experiment.device.type == "cuda"
    splits, files = experiment.splits, experiment.splits.files
    return {
        "config": experiment.config,
        "images": {
            "shape": list(splits.train.images.shape[1:]),
            **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        },
        **({} if files is None else {"image_files": files}),
        "versions": versions,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(experiment.device) if cuda else str(experiment.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        },
    }


def git_commit() -> str | None:
    """Return the git commit of this code, with a + appended if there are uncommitted changes; None outside a clone."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing, or refuses a repository that belongs to another user
    return found.stdout.strip()
