"""Workers as whoever operates them sees them: started, looked at, started again when they ended, told to end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import StateferryError
from tests.processes import Command
from topology import control

from .sites import FINALITY, TIMEOUT_S, Site

SESSION_TIMEOUT_S = 3
STARTS_MAX = 6
"""Of one worker: what needs more does not come to an end."""


def wait_until(holds: Callable[[], Any], what: str, poll_s: float = 0.02) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, what

        time.sleep(poll_s)


class Worker:
    """One node's process. ``stop_at``: the fail point, with its hit, at which it stops itself."""

    def __init__(self, site: Site, node: str, *words: str, stop_at: str = "") -> None:
        self.site = site
        self.node = node
        self.words = words
        self.starts = 0
        self.was_killed = False
        self.process: Command
        self.start(stop_at)

    def start(self, stop_at: str = "") -> None:
        self.starts += 1
        self.was_killed = False
        environment = self.site.environment(self.node) | {"STATEFERRY_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S)}
        if stop_at:
            environment["STATEFERRY_FAILPOINT"] = f"{stop_at}:stop"
        output = self.site.path / f"{self.node}.out"
        self.process = Command(*self.words, environment=environment, folder=self.site.path, output=output)

    @property
    def socket(self) -> Path:
        return self.site.path / self.node / "control.sock"

    def told(self) -> str:
        return f"{self.node}: {self.words} ended with {self.process.returncode}: {self.process.told()[-6000:]}"

    def wait_until_stopped(self) -> None:
        """Until it stands at its fail point."""

        def is_stopped() -> bool:
            assert self.process.returncode is None, self.told()

            return self.process.is_stopped

        wait_until(is_stopped, f"{self.node} did not come to its fail point")

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process.returncode is None:
            self.was_killed = True
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(TIMEOUT_S)

    def status(self) -> dict[str, Any]:
        """Empty while it does not answer."""
        with contextlib.suppress(StateferryError):
            return control.ask(self.socket, {"what": "status"}, timeout_s=20.0) or {}
        return {}

    def end(self) -> None:
        """SIGTERM, and the end that follows."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"SIGTERM did not end it: {self.told()}") from None
        assert code == 0, self.told()

    def finish(self) -> None:
        """Wait for a command that ends by itself."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.told()}") from None
        assert code == 0, self.told()


def primary(site: Site, node: str, stop_at: str = "") -> Worker:
    return Worker(site, node, "run", "--role", "primary", "--finality", str(FINALITY), stop_at=stop_at)


def replica(site: Site, node: str, stop_at: str = "") -> Worker:
    return Worker(site, node, "run", "--role", "replica", stop_at=stop_at)


class Joiner:
    """Another member of a worker's group, until `leave`."""

    def __init__(self, site: Site, group: str, *topics: str) -> None:
        self._site = site
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.joiner", site.url, group, str(site.path / "joiner"), *topics],
            cwd=site.path,
            env=site.environment("joiner"),
            stdin=subprocess.DEVNULL,
            stdout=(site.path / "joiner.out").open("wb"),
            stderr=(site.path / "joiner.err").open("wb"),
        )

    def has_joined(self) -> bool:
        assert self._process.poll() is None, (self._site.path / "joiner.err").read_text()

        return "owned" in (self._site.path / "joiner.out").read_text()

    def leave(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        self._process.wait(TIMEOUT_S)
