"""Handle a loss that is not finite: restart with a smaller learning rate, or explain what to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vae_cli.config.build import Experiment
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.meter import NotFinite
from vae_cli.training.state import SLOWER, State, restore, steps_per_epoch

log = logging.getLogger(__name__)


def restart_from_checkpoint(
    error: NotFinite, experiment: Experiment, folder: RunDir, console: Console, state: State
) -> State:
    """Go back to the end of the last epoch, or to the newest checkpoint if that state was not saved, and continue with
    a smaller learning rate. Raises UserError or Failure if the checkpoint cannot be used."""
    restored = restore(experiment, folder, _last_epoch(experiment, folder))
    restored.restarts = state.restarts + 1
    experiment.optimizer.slow_down(SLOWER**restored.restarts)
    folder.forget_metrics_after(restored.step)
    message = (
        f"diverged: {error}, {likely_cause(error.terms)}; restarted from step {restored.step} with "
        f"{SLOWER**restored.restarts:g} times the original learning rate (restart {restored.restarts} of "
        f"{experiment.config['restarts']})"
    )
    log.warning(message)
    console.print(message, soft_wrap=True, highlight=False, markup=False)
    restored.warnings = [*restored.warnings, message]
    return restored


def _last_epoch(experiment: Experiment, folder: RunDir) -> Path | None:
    """Return the file with the state at the end of the last epoch; None if there is none, or if it is older."""
    if not folder.restart_file.is_file() or not folder.checkpoint_file.exists():
        return None
    newest, saved = (load_checkpoint(file)["step"] for file in (folder.checkpoint_file, folder.restart_file))
    return folder.restart_file if saved == newest - newest % steps_per_epoch(experiment) else None


def likely_cause(terms: Sequence[str]) -> str:
    """Return the most likely reason why these terms of the loss, and no others, are not finite."""
    broken = {term.rpartition("/")[2] for term in terms}
    if broken == {"weights"}:
        return "probably because a step was too large"
    if "distortion" in broken and "rate" not in broken and "penalty" not in broken:
        return "probably because the decoder's output or the likelihood's scale grows without bound"
    if "distortion" not in broken and "rate" in broken:
        return "probably because the codes or their scales grow without bound"
    if "distortion" not in broken and "penalty" in broken:
        return "probably because the regularizer's weight is too large"
    return "probably because steps were too large"


def divergence_message(error: NotFinite, experiment: Experiment, folder: RunDir) -> str:
    """Return a message that says what is not finite, at which step, the likely cause, and how to continue."""
    config = experiment.config
    kept = "no checkpoint was saved before that"
    if folder.checkpoint_file.exists():
        kept = f"the last good checkpoint, from step {load_checkpoint(folder.checkpoint_file)['step']}, is kept"
    after = f" after {config['restarts']} restarts" if config["on_divergence"] == "restart" else ""
    restart = "" if after else ". To restart automatically from the last good checkpoint, type on_divergence=restart"
    rate = experiment.optimizer.rate
    return (
        f"{folder.path} diverged{after}: {error}, {likely_cause(error.terms)}; {kept}. "
        f"Try a learning rate below {rate:g} (optimizer.lr={rate / 10:g}) or gradient clipping "
        f"(max_grad_norm=100){restart}."
    )
