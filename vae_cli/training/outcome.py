"""Record a run's log messages in train.log, and a failure or interruption in summary.json."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vae_cli.config.settings import Config
from vae_cli.core.errors import is_failure
from vae_cli.machine import distributed
from vae_cli.runs.folder import RunDir

log = logging.getLogger(__name__)


@contextmanager
def logging_to_file(folder: RunDir) -> Iterator[None]:
    """Write the log messages of this package to the run's train.log."""
    handler = QuietFileHandler(folder.log_file) if distributed.is_first() else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("vae_cli")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class QuietFileHandler(logging.FileHandler):
    """A log handler that ignores write errors: if the disk is full, the training itself reports that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def recording_failure(folder: RunDir, about: dict[str, Any]) -> Iterator[None]:
    """If the run does not finish, record in summary.json that it failed or was interrupted, and re-raise the error.

    `about` describes the run: its start, machine, configuration and versions.
    """
    try:
        yield
    except BaseException as error:  # KeyboardInterrupt and SystemExit too
        if is_failure(type(error)):
            log.exception("failed")
            summary = {"status": "failed", "error": str(error), **about}
        else:
            log.info("interrupted")
            summary = {"status": "interrupted", **about}
        # If the disk is full, the status remains "running", which is read as "interrupted" once the lock is released.
        with suppress(OSError):
            folder.write_summary(summary)
        raise


@contextmanager
def recording_failed_build(folder: RunDir, config: Config) -> Iterator[None]:
    """If a run of a sweep cannot be set up, for example because its data are missing, record the error in its folder.

    A folder that already contains a run is not changed.
    """
    try:
        yield
    except Exception as error:
        if not folder.config_file.exists():
            folder.write_config(config)
            with logging_to_file(folder):
                log.exception("failed")
            folder.write_summary({"status": "failed", "error": str(error), "config": config})
        raise
