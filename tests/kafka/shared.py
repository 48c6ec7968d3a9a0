"""What all processes of a test run use together: started by the first that asks for it, ended with the last."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

_GUARD: Final = """
import fcntl, os, signal, sys
users, state, process_id = sys.argv[1:]
with open(users) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    os.unlink(state)
    os.kill(int(process_id), signal.SIGKILL)
"""


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@contextmanager
def shared(folder: Path, start: Callable[[Path], tuple[int, Any]]) -> Iterator[Any]:
    """The facts, as JSON gives them back, of something that ``start`` has begun in a folder of its own.

    ``start`` returns the id of its process, and the facts. Every user holds a shared lock, which goes with its process,
    however that ends. A guard waits to have the lock alone, and kills what was started; who comes later starts anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    with (folder / "USERS").open("w") as users, (folder / "STARTING").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        if not state.exists():
            process_id, facts = start(folder / secrets.token_hex(4))
            state.write_text(json.dumps(facts))
            guard = [sys.executable, "-S", "-c", _GUARD, users.name, str(state), str(process_id)]
            subprocess.Popen(guard, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        facts = json.loads(state.read_text())
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield facts
