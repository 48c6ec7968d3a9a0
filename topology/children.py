"""Helper processes: work that would hold the worker's interpreter runs in a process of its own.

A child is a module of this package, run with `-m`. It prints one JSON object per line: progress, and last either
``{"result": ...}`` or ``{"error": ...}``, from which its error is raised again here. Its standard input is a pipe that
nobody writes to: when it ends, whoever started the child is gone, and the child ends itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from pipeline import errors
from pipeline.errors import StateferryError

Result = TypeVar("Result")

Report = Callable[[str, int, int], None]
"""What is done, how much of it, of how much in all (0: not known)."""

_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Path, asyncio.Lock]] = WeakKeyDictionary()
_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = WeakKeyDictionary()

_LINE_BYTES_MAX = 16 << 20
_FAILPOINT_VARIABLE = "STATEFERRY_FAILPOINT"


def alone_in(folder: Path) -> asyncio.Lock:
    """Held by whoever works in a folder that the next one would clear: in one process they take turns. Between
    processes the lock of the data directory decides."""
    return _locks.setdefault(asyncio.get_running_loop(), {}).setdefault(folder.absolute(), asyncio.Lock())


async def together(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all; the first error of one, once the others were cancelled and have ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def no_report(what: str, done: int, total: int) -> None:
    """For callers that do not want to know."""


async def run(module: str, arguments: Sequence[str], report: Report = no_report) -> Any:
    """A child's result. Raises its error; cancelled, it kills the child and waits for its end."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        outcome = await _read(process, report)
        code = await process.wait()
    finally:
        await kill(process)
    if "error" in outcome:
        raise raised(outcome["error"])
    if "result" not in outcome:
        raise StateferryError(f"the helper process {module} ended early, with code {code}", way_out="try again")
    return outcome["result"]


async def run_in_turn(module: str, arguments: Sequence[str], report: Report = no_report) -> Any:
    """`run`, with no more children of one module at once than there are cores."""
    slots = _slots.setdefault(asyncio.get_running_loop(), {})
    async with slots.setdefault(module, asyncio.Semaphore(os.cpu_count() or 1)):
        return await run(module, arguments, report)


async def kill(process: asyncio.subprocess.Process) -> None:
    """End a process at once if it lives, and read to the end of its pipes, so that nothing of it outlives the loop."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
    await process.communicate()


async def _read(process: asyncio.subprocess.Process, report: Report) -> dict[str, Any]:
    assert process.stdout is not None
    last: dict[str, Any] = {}
    async for line in process.stdout:
        try:
            last = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if "progress" in last:
            report(*last["progress"])
    return last


def described(error: StateferryError) -> dict[str, str]:
    """An error as a child tells it."""
    return {"name": error.name, "what": error.what, "where": error.where, "way_out": error.way_out}


def raised(fields: dict[str, str]) -> StateferryError:
    """The inverse of `described`."""
    kind = getattr(errors, fields["name"], StateferryError)
    error: StateferryError = kind(fields["what"], where=fields["where"], way_out=fields["way_out"])
    return error


def serve(work: Callable[[Report], Any]) -> int:
    """A child's whole life: do the work, print its result or its error. Returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if failpoint := os.environ.get(_FAILPOINT_VARIABLE):
        from topology.settings import arm_failpoint  # noqa: PLC0415 (a third of a helper's start, for tests alone)

        arm_failpoint(failpoint)
    try:
        try:
            _print({"result": work(lambda what, done, total: _print({"progress": [what, done, total]}))})
        except OSError as error:
            raise errors.disk_full(error) or error from error
    except StateferryError as error:
        _print({"error": described(error)})
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _print(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)
