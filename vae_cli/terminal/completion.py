"""Shell completion of overrides, runs, metrics, and the words that `vae explain` knows."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def complete_override(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the overrides of `vae train` that begin with the typed text, each with a description."""
    from vae_cli.config import catalog

    *before, word = _words_in_bash() or [*(ctx.params.get("overrides") or []), incomplete]
    config_dir = ctx.params.get("config_dir")
    found = catalog.complete(before, word, *([Path(config_dir)] if config_dir else []))
    start = len(word) - len(incomplete)  # the shell replaces only the part that it regards as the last word
    return [(text[start:], description) for text, description in found if text.startswith(word)]


def complete_word(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the words that `vae explain` knows and that begin with the typed text, each with a description."""
    from vae_cli.config.glossary import words
    from vae_cli.metrics.record import metric_words

    word = (_words_in_bash() or [incomplete])[-1]
    config_dir = ctx.params.get("config_dir")
    known = words(*([Path(config_dir)] if config_dir else []))
    known = dict.fromkeys(metric_words(), "a metric of vae evaluate") | known
    start = len(word) - len(incomplete)
    return [(text[start:], description) for text, description in known.items() if text.startswith(word)]


def complete_metrics(incomplete: str) -> list[str]:
    """Return lists of metrics, separated by commas, that complete the last of the typed metrics."""
    from vae_cli.metrics.record import metric_words

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{word}" for word in metric_words() if word.startswith(last)]


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the runs whose folder begins with the typed text, and `latest` if it does too."""
    from vae_cli.runs.find import find_runs

    folders = find_runs(Path(ctx.params.get("runs_dir") or "runs"))
    return [word for word in ["latest", *map(str, folders)] if word.startswith(incomplete)]


def _words_in_bash() -> list[str]:
    """Return the words typed in bash, rejoined where bash splits them ('=', '@' and ':'); empty in other shells."""
    if os.environ.get("_VAE_COMPLETE") != "complete_bash":
        return []
    words: list[str] = []
    is_joined = False
    for word in os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]:
        is_break = bool(word) and not word.strip("=@:")
        if words and word and (is_joined or is_break):
            words[-1] += word
        else:
            words.append(word)
        is_joined = is_break
    return words
