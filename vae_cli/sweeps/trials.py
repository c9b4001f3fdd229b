"""The runs that a search has proposed, and what has become of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hydra.core.utils import JobReturn, JobStatus

from vae_cli.config.messages import translate
from vae_cli.core.errors import explain

if TYPE_CHECKING:
    pass


@dataclass
class Trial:
    """A run that was proposed, and what has become of it."""

    words: list[str]
    path: Path | None = None  # of a proposal that cannot be a run
    epochs: int = 0
    state: Literal["new", "finished", "left alone", "failed"] = "new"
    value: float | None = None
    error: Exception | None = None
    note: str = ""
    same_as: Trial | None = None  # an earlier one that was the same run


def mark_failed(trial: Trial, error: Exception) -> None:
    trial.state, trial.value, trial.error = "failed", None, translate(error, trial.words) or error


def result_of(trial: Trial) -> JobReturn:
    if trial.value is None:
        return JobReturn(overrides=trial.words, status=JobStatus.FAILED, _return_value=trial.error)
    return JobReturn(overrides=trial.words, status=JobStatus.COMPLETED, _return_value=trial.value)


def reason_of(trial: Trial) -> str:
    return " ".join(explain(trial.error)[0].split()) if trial.error is not None else ""


def values_of(trial: Trial) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in trial.words)}


def shortened(value: str) -> str:
    """A number with four digits, and any other word as it is."""
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value
