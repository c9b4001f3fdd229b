"""Decide whether to start, resume or skip a run, based on the files in its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vae_cli.config.aliases import with_current_targets
from vae_cli.config.naming import as_word, show, what_matters
from vae_cli.config.settings import Config
from vae_cli.config.trust import in_shell
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import is_locked
from vae_cli.runs.folder import RunDir


class Finished(UserError):
    """Raised if a run is finished, so that there is nothing to train. Exit code 0."""

    exit_code = 0


class InTraining(UserError):
    """Raised if another process is training the run."""


def finished_message(path: Path, are_images_new: bool = False) -> str:
    """Return a message saying that a finished run is skipped, with suggestions for the next command."""
    summary = RunDir(path).summary()
    has_ended_early = summary.get("epoch", 0) < summary.get("config", {}).get("epochs", 0)
    what = "patience" if has_ended_early else "epochs"
    further = f"To train it further, type a larger {what}=...; to train it again from the start"
    if are_images_new:
        further = "The images have changed since it was trained. To train it again, on the images as they are now"
    return f"{path} is finished; skipped. {further}, overwrite=true; to see samples: vae sample {in_shell(path)}"


Plan = Literal["new", "resume", "put_back", "finished"]


def plan(folder: RunDir, config: Config, is_ours: bool = False) -> Plan:
    """Decide what to do with a run, without changing its folder. `is_ours`: this process already holds the run's lock.

    `put_back` means that the run is finished, but was set aside for another one, which was killed before its first
    checkpoint.

    Raises UserError if the folder cannot be used, for example because it contains a run with different settings, a run
    that another process is training, or files that do not belong to a run.
    """
    path = folder.path
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, not a folder; choose a different run_name=... or runs_dir=...")
    for file in (folder.lock_file, folder.metrics_file, folder.log_file, folder.next_best_file, folder.replaced):
        if file.is_symlink():  # appending follows links
            raise UserError(
                f"{file} is a link, and vae does not write through links: remove the link, or choose a different "
                "run_name=..."
            )
        kind = "folder" if file == folder.replaced else "regular file"
        if file.exists() and not (file.is_dir() if kind == "folder" else file.is_file()):
            # For example, a pipe: appending to it would wait for a reader.
            raise UserError(f"{file} is not a {kind}: remove it, or choose a different run_name=...")
    aside = RunDir(folder.replaced)
    if not is_ours and aside.checkpoint_file.exists() and not folder.checkpoint_file.exists():
        # A run that was to replace another one was killed before its first checkpoint: the other one will be put back.
        # If it was killed while the other one was moved, some files of the latter are still in their place.
        if is_locked(folder.lock_file):
            raise InTraining(in_training_message(folder))
        if config["overwrite"]:
            return "new"
        refuse_other(aside if aside.config_file.exists() else folder, config, path)
        former = aside if aside.summary_file.exists() else folder
        return "put_back" if _resume_or_finished(former, config, path) == "finished" else "resume"
    if not folder.config_file.exists():
        foreign = [p.name for p in path.iterdir() if not p.name.startswith(".")] if path.exists() else []
        if foreign:
            raise UserError(
                f"{path} exists, but is not a run (it contains {foreign[0]}); choose a different run_name=..."
            )
        return "new"
    if not is_ours and is_locked(folder.lock_file):
        raise InTraining(in_training_message(folder))
    if config["overwrite"] and not _is_started_by(submission(), folder):
        return "new"
    refuse_other(folder, config)
    return _resume_or_finished(folder, config, path) if folder.checkpoint_file.exists() else "new"


def _resume_or_finished(folder: RunDir, config: Config, path: Path) -> Literal["resume", "finished"]:
    summary = folder.summary()
    if summary.get("status") == "finished":
        epoch, patience = summary.get("epoch", 0), config["patience"]
        waited = epoch - summary.get("weights_of_epoch", epoch)
        if epoch >= config["epochs"] or (patience is not None and waited >= patience):
            return "finished"
    done = max((record["epoch"] for record in folder.metrics()), default=0)
    if done > config["epochs"]:
        raise UserError(f"{path} has already been trained for {done} epochs; set epochs={done} or higher.")
    return "resume"


def has_other_images(folder: RunDir, config: Config) -> bool:
    """Return whether the user's own images have changed since a run was trained on them; False if they are gone."""
    from vae_cli.axes.dataset import Dataset
    from vae_cli.config.instantiate import build

    there = folder.summary().get("image_files")
    try:
        return there is not None and there != build(config["dataset"], "dataset", Dataset).fingerprint_of_files()
    except UserError:
        return False


def submission() -> str | None:
    """Return an identifier of this process's submitit job, which a requeue does not change; None outside such a job."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    return f"{os.environ['SUBMITIT_FOLDER']}/{job}" if "SUBMITIT_FOLDER" in os.environ else None


def _is_started_by(job: str | None, folder: RunDir) -> bool:
    if job is None:
        return False
    try:
        return folder.summary().get("submission") == job
    except Failure:
        return False


def in_training_message(folder: RunDir) -> str:
    """Return a message saying which process is training a run, on which machine and since when."""
    try:
        summary = folder.summary()
    except Failure:
        summary = {}
    by = "by another process"
    if "pid" in summary:
        by = f"by process {summary['pid']} on {summary.get('host')}, since {summary.get('started')}"
    return f"{folder.path} is being trained {by}; wait until it ends, or choose a different run_name=..."


def refuse_other(folder: RunDir, config: Config, path: Path | None = None) -> None:
    """Raise UserError if the run in a folder differs from config in settings that affect results, and name them.

    The message names `path`, if it is given, in place of the folder.
    """
    there, here = (what_matters(c) for c in (folder.config(), with_current_targets(config)))
    differing = [key for key in {**there, **here} if there.get(key, "nothing") != here.get(key, "nothing")]
    if differing:
        named = ", ".join(
            f"{k}={show(as_word(k, there.get(k, 'nothing')))} there, {show(as_word(k, here.get(k, 'nothing')))} here"
            for k in differing
        )
        raise UserError(
            f"{path or folder.path} already holds a run with different settings: {named}. Choose a different "
            "run_name=..., or type overwrite=true to replace the run."
        )
