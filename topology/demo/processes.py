"""The demo's child processes: workers that run until they are told to stop, and commands that are waited for.

All of them are `python -m topology ...`. They know none of the user's settings, and `close` ends every one of them,
also when the demo itself is being cancelled.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.errors import StateferryError
from topology import children, control
from topology.data_dir import DataDir
from topology.settings import CONFIG_VARIABLE

_ROOT = Path(__file__).parents[2]
_STOP_TIMEOUT_S = 15.0
_LOG_LINES_SHOWN = 5
_DOCUMENT_BYTES_MAX = 16 << 20


class Worker:
    """A running `stateferry run`. What it prints goes to a file beside its data directory."""

    def __init__(self, name: str, data_dir: Path, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.data_dir = data_dir
        self.peak_memory_mb = 0.0
        self._process = process
        self._log = log

    async def status(self) -> dict[str, Any] | None:
        """What `stateferry status` would say; None before the worker listens. Raises StateferryError if it ended."""
        if self._process.returncode is not None:
            raise StateferryError(
                f"the {self.name} ended with code {self._process.returncode}: {_last_lines(self._log)}",
                where=str(self._log),
            )
        self._measure()
        answer: dict[str, Any] | None = await asyncio.to_thread(
            control.ask, DataDir(self.data_dir).socket_path, {"what": "status"}
        )
        return answer

    def _measure(self) -> None:
        """The kernel's own high-water mark, where there is one."""
        with suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_memory_mb = int(line.split()[1]) / 1024

    async def stop(self) -> None:
        self._measure()
        await end(self._process)


class Processes:
    """Starts children, and knows all that live."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._living: list[asyncio.subprocess.Process] = []
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STATEFERRY_")}
        self._environment = kept | {"PYTHONPATH": path, CONFIG_VARIABLE: os.devnull}

    async def start(self, name: str, data_dir: Path, *arguments: str) -> Worker:
        log = self._folder / f"{name}.log"
        with log.open("wb") as file:
            process = await self._spawn("run", "--data-dir", str(data_dir), *arguments, stdout=file, stderr=file)
        return Worker(name, data_dir, process, log)

    async def command(self, *arguments: str) -> dict[str, Any]:
        """The document that a command prints with --json. Raises its error."""
        process = await self._spawn(
            *arguments, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            out, err = await process.communicate()
        finally:
            await end(process)
            self._living.remove(process)
        try:
            document: dict[str, Any] = json.loads(out)
        except ValueError:
            document = {}
        if process.returncode:
            kind = getattr(errors, document.get("error", ""), StateferryError)
            raise kind(
                document.get("message") or f"it ended with code {process.returncode}: {err.decode().strip()[-500:]}",
                where=document.get("where") or f"stateferry {' '.join(arguments)}",
                way_out=document.get("way_out", ""),
            )
        return document

    async def _spawn(self, *arguments: str, stdout: Any, stderr: Any) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "topology",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            limit=_DOCUMENT_BYTES_MAX,
            env=self._environment,
        )
        self._living.append(process)
        return process

    async def close(self) -> None:
        await asyncio.gather(*map(end, self._living))


async def end(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end, and make it if it does not."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    finally:
        await children.kill(process)


def _last_lines(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:])
