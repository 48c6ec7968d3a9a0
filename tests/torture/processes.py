"""Commands as real processes, of which hundreds are started: forked by a server that has imported what they need.

What a user starts is `python -m topology ...`; a second and a half of that is spent on imports. From there on both are
the same: a process of its own, with its own environment, folder and exit code, for kill -9 like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = Path(__file__).parents[2]
PRELOAD: Final = (
    *("topology.cli", "topology.app", "topology.worker", "topology.restorer", "topology.snapshotter"),
    *("topology.transports.kafka", "topology.transports.kafka_broker", "topology.transports.embedded"),
    *("topology.commands.run", "topology.commands.restore", "topology.commands.store", "topology.commands.ingest"),
    "tests.torture.processes",
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(PRELOAD))


def _become(words: tuple[str, ...], environment: dict[str, str], folder: Path, output: Path) -> None:
    """In the new process: the command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with output.open("ab") as file, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["stateferry", *words]

    from topology.cli import main  # noqa: PLC0415

    main()


class Command:
    """A command that runs. ``output``: a file that takes what it says."""

    def __init__(self, *words: str, environment: dict[str, str], folder: Path, output: Path) -> None:
        self.words = words
        self.output = output
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = paths  # of the server, which the first command starts
        try:
            self._process = _server.Process(target=_become, args=(words, environment, folder, output))
            self._process.start()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it. None: it runs, or is stopped."""
        return self._process.exitcode

    @property
    def is_stopped(self) -> bool:
        try:
            return bool(psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def send(self, number: signal.Signals) -> None:
        if self.returncode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout_s)
        return self._process.exitcode

    def told(self) -> str:
        return self.output.read_text()
