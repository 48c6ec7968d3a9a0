"""How a worker ends: once, for one reason, whoever found it first."""

from __future__ import annotations

import asyncio

from pipeline.errors import StateferryError, disk_full
from topology import logs

log = logs.get()


class Ending:
    """Shared by everything that runs in one worker.

    * `failure` is the error that ended it, None for a clean end; `stopping` is set either way.
    * The first error counts.
    """

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        """``stopping``: set by signals since before there was anything to end."""
        self.failure: StateferryError | None = None
        self.stopping = stopping or asyncio.Event()

    def fail(self, error: BaseException) -> None:
        """End the worker with an error."""
        if not self.stopping.is_set():
            self.failure = named(error)
            self.stopping.set()

    def add(self, error: BaseException) -> None:
        """Something went wrong while it ended: what ended it comes first."""
        self.failure = self.failure or named(error)


def named(error: BaseException) -> StateferryError:
    """An error with its name. One that nobody expected is logged with its traceback."""
    if isinstance(error, StateferryError):
        return error
    if isinstance(error, OSError) and (full := disk_full(error)) is not None:
        return full
    log.error("worker_failed", error=type(error).__name__, exc_info=error)
    return StateferryError(f"{error!r}")
