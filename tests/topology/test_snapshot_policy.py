"""Snapshots that a running worker takes by itself: when, and what is left if one is ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SnapshotCancelled
from pipeline.policy import Due, Final, Last, Triggers, due
from tests.chains import block_files
from tests.topology.commands import Site, finish, wait_until

LAST = Last(height=1000, root_start=b"r" * 8, size_bytes=10_000, put_s=5000.0)
OTHER = b"s" * 32


@pytest.mark.parametrize(
    ("triggers", "last", "final", "archived_bytes", "now_s", "expected"),
    [
        (Triggers(share=1.0), LAST, Final(9999, OTHER), 1 << 30, 9e9, Due(False, "on demand only")),
        (Triggers(blocks=10), None, Final(-1, None), 0, 0, Due(False, "no block is final yet")),
        (Triggers(blocks=10), None, Final(0, OTHER), 0, 0, Due(True, "there is none")),
        (Triggers(seconds=1), LAST, Final(1000, OTHER), 0, 9e9, Due(False, "no block became final since height 1000")),
        (Triggers(blocks=1), LAST, Final(1001, b"r" * 32), 0, 0, Due(False, "the state is that of height 1000")),
        (Triggers(blocks=1), LAST, Final(1001, None), 0, 0, Due(True, "1 blocks since height 1000")),
        (Triggers(blocks=100), LAST, Final(1099, OTHER), 0, 0, Due(False, "in 1 blocks")),
        (Triggers(blocks=100), LAST, Final(1100, OTHER), 0, 0, Due(True, "100 blocks since height 1000")),
        (
            *(Triggers(blocks=100, archived_bytes=2000, seconds=60), LAST, Final(1001, OTHER), 500, 5050.0),
            Due(False, "in 99 blocks or 1,500 archived bytes or 10 seconds"),
        ),
        (
            Triggers(archived_bytes=2000),
            LAST,
            Final(1001, OTHER),
            2000,
            0,
            Due(True, "2,000 archived bytes since height 1000"),
        ),
        (Triggers(seconds=60), LAST, Final(1001, OTHER), 0, 5060.0, Due(True, "60 seconds since height 1000")),
        (Triggers(seconds=60), LAST, Final(1001, OTHER), 0, 0.0, Due(False, "in 5,060 seconds")),
        (
            *(Triggers(blocks=100, share=0.5), LAST, Final(1100, OTHER), 4999, 0),
            Due(
                False,
                "100 blocks since height 1000, but restores fetch only 4,999 bytes of 5,000 for want of it",
            ),
        ),
        (Triggers(blocks=100, share=0.5), LAST, Final(1100, OTHER), 5000, 0, Due(True, "100 blocks since height 1000")),
    ],
)
def test_when_one_is_due(
    triggers: Triggers, last: Last | None, final: Final, archived_bytes: int, now_s: float, expected: Due
) -> None:
    """A trigger says how soon, the cost rule whether it is worth it; nothing is taken where nothing moved."""
    assert due(triggers, last, final, archived_bytes, now_s) == expected


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A primary that stands at height 599, with blocks final up to 499."""
    site = Site(tmp_path_factory.mktemp("policy"))
    site.ingest(*block_files("mainnet_0_599"))
    site.follow("primary", "p")
    yield site


@pytest.fixture
def site(full: Site, tmp_path: Path) -> Site:
    return full.copy(tmp_path / "site")


def snapshots(site: Site) -> list[int]:
    return [one["height"] for one in site.here("status").ok()["snapshots"]]


def policy(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = status.get("snapshotting") or {}
    return found


def test_a_worker_takes_one_by_itself(site: Site) -> None:
    """The first one at once; the next is not due before so many blocks."""
    with site.running("primary", "p", env={"STATEFERRY_SNAPSHOT_BLOCKS": "50"}) as process:
        status = site.wait_for_status("p", process, lambda found: policy(found).get("why") == "taken at height 499")

        assert (policy(status)["trouble"], policy(status)["running"]) == (None, 0)
        assert snapshots(site) == [499]
    with site.running("primary", "p", env={"STATEFERRY_SNAPSHOT_BLOCKS": "50"}) as process:
        status = site.wait_for_status("p", process, lambda found: policy(found).get("last_height") == 499)

        assert policy(status)["why"] == "no block became final since height 499"
    assert snapshots(site) == [499]


def stopped_child(process_id: int) -> int:
    """A child of a process that is stopped; 0: there is none."""
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    for child in map(int, children):
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return child
    return 0


@pytest.mark.parametrize("how", ["cancel", "timeout", "kill"])
def test_one_that_is_ended(site: Site, how: str) -> None:
    """Held before its manifest, then cancelled, or out of time, or killed with its worker: there is no snapshot and no
    scratch, the worker goes on, and the next one is the same as ever."""
    env = {"STATEFERRY_FAILPOINT": "snapshot.before_manifest:1:stop"}
    if how == "timeout":
        env["STATEFERRY_SNAPSHOT_TIMEOUT_S"] = "2"
    with site.running("primary", "p", env=env) as process:
        asked = site.start("snapshot")
        if how != "timeout":  # which comes before or after the child does
            wait_until(lambda: stopped_child(process.pid) > 0, process)
        if how == "cancel":
            assert site.here("snapshot", "--cancel").ok() == {"cancelled": 1}
        if how == "kill":
            child = stopped_child(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(child, signal.SIGKILL)
            assert finish(asked).code != 0
        else:
            finish(asked).failed(SnapshotCancelled)
            assert not (site.dir("p") / "snapshotting").exists()
            assert policy(site.here("status").ok())["running"] == 0
        assert snapshots(site) == []
    with site.running("primary", "p") as process:
        site.wait_for("p", process, height=599)
        assert not (site.dir("p") / "snapshotting").exists()
        assert site.here("snapshot").ok()["height"] == 499
    assert snapshots(site) == [499]
    site.here("gc", "--grace", "0").ok()
    assert site.here("restore", "--claimed", node="r").ok()["height"] == 499
