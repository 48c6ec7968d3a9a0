"""What the tests of the transports share: a log in a temporary directory, and workers as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, Command
from topology.transports.base import TopicSpec
from topology.transports.sqlite_log import SqliteLog

PATIENCE_S = 60.0  # until a condition counts as never coming true; a starved machine loses sessions by the way


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Return what ``condition`` gives once it is true."""
    began_s = time.monotonic()
    while (waited_s := time.monotonic() - began_s) < PATIENCE_S:
        value = condition()
        if value:
            return value
        time.sleep(min(0.005 + waited_s / 50, 0.03))
    raise AssertionError(f"{what} did not come true in {PATIENCE_S} s")


class Process:
    """A Python script in a process of its own that prints facts, one JSON object per line."""

    def __init__(self, script: str, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._command = Command(*arguments, script=Path(script), environment=environment, folder=ROOT)
        self._facts: list[dict[str, Any]] = []
        self._read_to = 0

    @property
    def facts(self) -> list[dict[str, Any]]:
        """All so far."""
        if self._command.output.exists():
            with self._command.output.open("rb") as said:
                said.seek(self._read_to)
                whole, _, _ = said.read().rpartition(b"\n")
            if whole:
                self._read_to += len(whole) + 1
                lines = (line for line in whole.split(b"\n") if line.startswith(b"{") and line.endswith(b"}"))
                self._facts += map(json.loads, lines)
        return self._facts

    @property
    def errors(self) -> str:
        return self._command.errors.read_text()

    def all(self, name: str) -> list[dict[str, Any]]:
        """Return the facts so far that have ``name``."""
        return [fact for fact in self.facts if name in fact]

    def last(self, name: str) -> Any:
        """Return the newest value of ``name``, None if there is none yet."""
        facts = self.all(name)
        return facts[-1][name] if facts else None

    def end(self, signal_number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal, wait for the end and return the exit code."""
        self._command.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end."""
        try:
            return self._command.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._command.kill()
            raise


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log is."""
    return tmp_path / "log.sqlite"


@pytest.fixture
def log(path: Path) -> Iterator[SqliteLog]:
    """A log with the topics a and b of two partitions each."""
    log = SqliteLog(path)
    log.ensure_topics([TopicSpec(name="a", partitions=2), TopicSpec(name="b", partitions=2)])
    yield log
    log.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start processes that are killed at the end of the test, if they still run."""
    processes: list[Process] = []

    def start(script: str, *arguments: str) -> Process:
        processes.append(Process(str(Path(__file__).parent / script), *arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.fixture
def worker(start: Callable[..., Process], path: Path, tmp_path: Path) -> Callable[..., Process]:
    """Start a Faust worker over the log; options are those of ``faust_worker.py``."""

    def worker(**options: Any) -> Process:
        where = {"broker": f"embedded://{path}", "datadir": str(tmp_path / "faust")}
        return start("faust_worker.py", json.dumps(where | options))

    return worker
