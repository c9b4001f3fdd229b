"""What is said and done when the loss is not finite."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console

from vae_cli.config.build import Experiment
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.meter import NotFinite
from vae_cli.training.state import SLOWER, State, restore

log = logging.getLogger(__name__)


def restart(error: NotFinite, experiment: Experiment, folder: RunDir, console: Console, state: State) -> State:
    """Go back to the last checkpoint, with a smaller learning rate. Raises UserError or Failure as restore does."""
    again = restore(experiment, folder)
    again.restarts = state.restarts + 1
    experiment.optimizer.slow_down(SLOWER**again.restarts)
    folder.forget_metrics_after(again.step)
    said = (
        f"diverged: {error}, {likely_cause(error.terms)}; went on from step {again.step} with a learning rate times "
        f"{SLOWER**again.restarts:g} (restart {again.restarts} of {experiment.config['restarts']})"
    )
    log.warning(said)
    console.print(said, soft_wrap=True, highlight=False, markup=False)
    again.warnings = [*again.warnings, said]
    return again


def likely_cause(terms: Sequence[str]) -> str:
    """Say what most likely makes these terms, and no others, no finite numbers."""
    broken = {term.rpartition("/")[2] for term in terms}
    if broken == {"weights"}:
        return "as after a step that was too large"
    if "distortion" in broken and "rate" not in broken and "penalty" not in broken:
        return "as where the decoder's output or the likelihood's scale grows without bound"
    if "distortion" not in broken and "rate" in broken:
        return "as where codes, or their scales, grow without bound"
    if "distortion" not in broken and "penalty" in broken:
        return "as where the regularizer weighs too much"
    return "as after steps that were too large"


def diverged(error: NotFinite, experiment: Experiment, folder: RunDir) -> str:
    """Say what broke, at which step, why, what is left, and what to type."""
    config = experiment.config
    left = "no checkpoint had been written yet"
    if folder.checkpoint_file.exists():
        left = f"the last good checkpoint, of step {load_checkpoint(folder.checkpoint_file)['step']}, is kept"
    tried = f" after {config['restarts']} restarts" if config["on_divergence"] == "restart" else ""
    help_itself = "" if tried else ", or type on_divergence=restart, which goes on from there by itself"
    rate = experiment.optimizer.rate
    return (
        f"the training of {folder.path} diverged{tried}: {error}, {likely_cause(error.terms)}; {left}. A learning rate "
        f"smaller than {rate:g} (optimizer.lr={rate / 10:g}) or clipped gradients (max_grad_norm=100) may "
        f"help{help_itself}."
    )
