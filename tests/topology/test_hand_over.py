"""Who has the partitions when a worker ends, and how soon: no test here ever comes to the end of a session."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.topology.commands import WAIT_S, Site, finish, wait_until
from tests.topology.sharded import Sharded, leading, more, same

pytestmark = pytest.mark.usefixtures("each_broker")

SESSION = {"STATEFERRY_SESSION_TIMEOUT_S": str(int(2 * WAIT_S))}
"""Longer than any condition is waited for, so that nothing here comes true because of its end."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_started_again(number: signal.Signals, tmp_path: Path) -> None:
    """A worker that is started again on its directory goes on, however it ended."""
    site = Site(tmp_path / "site")
    site.here("ingest", "synthetic", "--blocks", 30, "--changes", 10).ok()
    with site.running("primary", "p", env=SESSION) as worker:
        site.wait_for("p", worker, height=29, in_flight=0)
        worker.send_signal(number)
        worker.wait(WAIT_S)
    site.here("ingest", "synthetic", "--from-height", 29, "--blocks", 1, "--changes", 10).ok()
    with site.running("primary", "p", env=SESSION) as worker:
        site.wait_for("p", worker, height=30, in_flight=0)


def test_left_to_the_others(tmp_path: Path) -> None:
    """A worker that is told to end leaves its shards to the other one; the last one keeps them for its next start."""
    site = Sharded(tmp_path / "site").begin(2)
    site.here("ingest", "synthetic", "--blocks", 30, "--changes", 10).ok()
    with site.running("primary", "q", env=SESSION) as stays:
        site.wait_for("q", stays, height=29, in_flight=0)
        with site.running("primary", "p", env=SESSION) as leaves:
            wait_until(lambda: len(leading(site, "p")) == len(leading(site, "q")) == 1, leaves)
            leaves.terminate()
            finish(leaves).ok()
        wait_until(lambda: len(leading(site, "q")) == 2, stays)
        more(site, 29, 5)
        site.wait_for("q", stays, height=34, in_flight=0)
    more(site, 34, 5)
    with site.running("primary", "q", env=SESSION) as again:
        site.wait_for("q", again, height=39, in_flight=0)
    site.follow("replica", "r")

    same(site, ["q", "r"])
