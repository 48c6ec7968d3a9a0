"""What the tests of the transports share: a log in a temporary directory, and workers as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from topology.transports.base import TopicSpec
from topology.transports.sqlite_log import SqliteLog

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0  # until a condition counts as never coming true; a starved machine loses sessions by the way


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Return what ``condition`` gives once it is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"{what} did not come true in {PATIENCE_S} s")


class Process:
    """A Python script in a process of its own that prints facts, one JSON object per line."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.facts: list[dict[str, Any]] = []
        self.popen = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.errors = ""
        self._threads = [threading.Thread(target=self._read_facts), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_facts(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                self.facts.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.popen.stderr is not None
        self.errors = self.popen.stderr.read()

    def all(self, name: str) -> list[dict[str, Any]]:
        """Return the facts so far that have ``name``."""
        return [fact for fact in list(self.facts) if name in fact]

    def last(self, name: str) -> Any:
        """Return the newest value of ``name``, None if there is none yet."""
        facts = self.all(name)
        return facts[-1][name] if facts else None

    def end(self, signal_number: int = signal.SIGKILL) -> int:
        """Send a signal, wait for the end and return the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end and for everything that was printed."""
        try:
            code = self.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        for thread in self._threads:
            thread.join()
        return code


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
