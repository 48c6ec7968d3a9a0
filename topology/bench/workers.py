"""A process of its own for what is measured: its peak memory is its own, and two can take turns.

A worker is a class that is made in the new process; each call of `Worker.ask` is one call of its method `answer` over
there. What is asked and answered is pickled, which stays outside of what is timed over there.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self


class Answering(Protocol):
    def answer(self, question: Any) -> Any: ...

    def close(self) -> None: ...


class Worker:
    """`make(*arguments)` in a process of its own, until the context ends."""

    def __init__(self, make: Callable[..., Answering], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments))
        self._process.start()
        there.close()

    def ask(self, question: Any) -> Any:
        """One answer. Raises RuntimeError with the other side's traceback."""
        self._connection.send(question)
        try:
            is_good, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a bench process ended with exit code {self._process.exitcode}") from None
        if not is_good:
            raise RuntimeError(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Answering], arguments: tuple[Any, ...]) -> None:
    worker: Answering | None = None
    try:
        while True:
            question = connection.recv()
            try:
                worker = worker or make(*arguments)
                said = True, worker.answer(question)
            except Exception:
                said = False, traceback.format_exc()
            connection.send(said)
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more
    finally:
        if worker is not None:
            worker.close()


def peak_rss_mb(process_id: int | None = None) -> float:
    """The most memory that a process ever had resident; None: this one. Another one's is known only on Linux."""
    status = Path("/proc", "self" if process_id is None else str(process_id), "status")
    if status.exists():  # getrusage would count what the parent had when this process was forked off it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    if process_id is not None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
