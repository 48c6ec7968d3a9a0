"""Commands as real processes, of which hundreds are started: forked by a server that has imported what they need.

What a user starts is `python -m topology ...`; a second and a half of that is spent on imports. From there on both are
the same: a process of its own, with its own environment, folder and exit code, for kill -9 like any other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final
from weakref import WeakSet

import psutil

ROOT: Final = Path(__file__).parents[1]
PRELOAD: Final = (
    *("topology.cli", "topology.app", "topology.worker", "topology.restorer", "topology.snapshotter"),
    *("topology.transports.kafka", "topology.transports.kafka_broker", "topology.transports.embedded"),
    *("topology.commands.run", "topology.commands.restore", "topology.commands.store", "topology.commands.ingest"),
    *("topology.commands.verify", "topology.commands.archive"),
    # What Faust leaves to the first application that a process makes.
    *("faust.app.router", "faust.assignor.partition_assignor", "faust.events", "faust.fixups.django"),
    *("faust.models.record", "faust.tables.objects", "faust.tables.sets", "faust.topics", "faust.transport.utils"),
    *("faust.web.drivers.aiohttp", "faust.worker"),
    "tests.processes",
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(PRELOAD))


def _become(
    script: Path | None,
    words: tuple[str, ...],
    environment: dict[str, str],
    folder: Path,
    files: tuple[Path, Path],
    file_bytes_max: int | None,
) -> None:
    """In the new process: the command, or the script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with files[0].open("ab") as output, files[1].open("ab") as errors, Path(os.devnull).open("rb") as nothing:
        for number, file in enumerate((nothing, output, errors)):
            os.dup2(file.fileno(), number)
    if file_bytes_max is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))
    sys.argv = [str(script or "stateferry"), *words]
    if script is not None:
        runpy.run_path(str(script), run_name="__main__")
        return

    from topology.cli import main  # noqa: PLC0415

    main()


class Command:
    """A command that runs, with the methods of a `subprocess.Popen`.

    What it says goes to the file ``output``, or is there for `communicate`. No file that it writes gets longer than
    ``file_bytes_max``. With ``script`` it is that, in Python, instead of `stateferry`.
    """

    def __init__(
        self,
        *words: str,
        environment: dict[str, str],
        folder: Path,
        output: Path | None = None,
        file_bytes_max: int | None = None,
        script: Path | None = None,
    ) -> None:
        self.args = words
        self._said = tempfile.TemporaryDirectory(prefix="stateferry-said-")
        own = Path(self._said.name)
        self.output, self.errors = (output, output) if output else (own / "output", own / "errors")
        given = (script, words, environment, folder, (self.output, self.errors), file_bytes_max)
        before = os.environ.get("PYTHONPATH")
        # Of the server, which the first command starts.
        os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        try:
            self._process = _server.Process(target=_become, args=given)
            self._process.start()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        _living.add(self)

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it. None: it runs, or is stopped."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    @property
    def is_stopped(self) -> bool:
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None

            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said, and what it said on stderr, once it has ended."""
        self.wait(timeout)
        return self.output.read_text(), self.errors.read_text()

    def told(self) -> str:
        return self.output.read_text()


_living: WeakSet[Command] = WeakSet()


@atexit.register
def _end_all() -> None:
    """What a failed test left behind; multiprocessing would wait for it."""
    for command in list(_living):
        command.kill()
