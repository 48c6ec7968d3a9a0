"""How a worker ends: once, for one reason, whoever found it first."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import StateferryError, disk_full
from topology import logs

log = logs.get()

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_signals(asked: Callable[[], None]) -> None:
    """What the signals that ask a worker to end do, from now on, in the running loop."""
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, asked)


@contextmanager
def ending_at_once(otherwise: Callable[[], None]) -> Iterator[None]:
    """While a state is restored in a thread, which hears of nothing: signals end the process there and then, with 0, as
    a restore goes on after any kill. ``otherwise``: what they do afterwards."""

    def end() -> None:
        log.info("restore_cut_short", why="told to end")
        os._exit(0)

    on_signals(end)
    try:
        yield
    finally:
        on_signals(otherwise)


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
