"""How a worker ends where nothing in it can hear that it should."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_RESTORING = """
import asyncio, time
from topology.ending import ending_at_once

async def main():
    with ending_at_once(lambda: None):
        print("restores", flush=True)
        await asyncio.to_thread(time.sleep, 100)

asyncio.run(main())
"""

_AFTERWARDS = """
import asyncio
from topology.ending import ending_at_once, on_signals

async def main():
    told = asyncio.Event()
    on_signals(told.set)
    with ending_at_once(told.set):
        pass
    print("runs", flush=True)
    await told.wait()
    print("ends in order", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_restores_ends_when_it_is_told_to(asked: signal.Signals) -> None:
    """A restore at its start may take an hour; nobody waits for it, and what is fetched is there for the next start."""
    with subprocess.Popen([sys.executable, "-c", _RESTORING], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "restores\n"
        worker.send_signal(asked)
        assert worker.wait(60) == 0


def test_a_worker_that_has_restored_ends_in_order() -> None:
    """Behind the restore a signal asks, as before."""
    with subprocess.Popen([sys.executable, "-c", _AFTERWARDS], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "runs\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.stdout.read() == "ends in order\n"
        assert worker.wait(60) == 0
