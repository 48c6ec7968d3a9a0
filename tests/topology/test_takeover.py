"""Shards that come to a worker which has nothing of them: restored beside its other shards."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from pipeline.position import BEFORE_FIRST_HEIGHT
from pipeline.snapshot import decode_manifest
from tests.processes import Command
from tests.topology.commands import wait_until
from tests.topology.sharded import Sharded, heights, leading, more, same

QUICK = {"STATEFERRY_SESSION_TIMEOUT_S": "6"}  # no broker allows less
FINALITY = ("--finality", 10)
BLOCKS = 280
ARCHIVED = 255
"""Of whole segments: where a snapshot stands of a worker that has half of the shards."""


def helpers(worker: Command) -> list[psutil.Process]:
    """The processes in which a worker restores."""
    return [one for one in psutil.Process(worker.pid).children() if "topology.restorer" in one.cmdline()]


@pytest.mark.usefixtures("each_broker")
def test_a_dead_worker_s_shards(tmp_path: Path) -> None:
    """Restored from the snapshot in a process of its own; the other shard goes on while this one stands still."""
    site = Sharded(tmp_path / "site").begin(2)
    site.here("ingest", "synthetic", "--blocks", 20, "--changes", 20).ok()  # so few that none is behind who joins late
    stop = QUICK | {"STATEFERRY_FAILPOINT": "restore.planned:1:stop"}
    with (
        site.running("primary", "p", *FINALITY, env=QUICK) as first,
        site.running("primary", "q", *FINALITY, env=stop) as second,
    ):
        wait_until(lambda: len(leading(site, "p")) == len(leading(site, "q")) == 1, second)
        mine, others = leading(site, "q"), leading(site, "p")
        more(site, 19, BLOCKS - 20)
        for node in "pq":
            wait_until(lambda node=node: set(heights(site, node).values()) == {BLOCKS - 1}, second)  # type: ignore[misc]
        assert site.here("snapshot").ok()["height"] == ARCHIVED
        first.send_signal(signal.SIGKILL)
        first.wait()
        wait_until(lambda: [one.status() for one in helpers(second)] == [psutil.STATUS_STOPPED], second)
        more(site, BLOCKS - 1, 20)
        wait_until(lambda: [heights(site, "q")[shard] for shard in mine] == [BLOCKS + 19], second)
        assert [heights(site, "q")[shard] for shard in others] == [BEFORE_FIRST_HEIGHT]
        assert leading(site, "q") == mine
        shards = site.here("status", node="q").ok()["shards"]
        assert [one["shard"] for one in shards if one["restoring"]] == others
        for helper in helpers(second):
            helper.send_signal(signal.SIGCONT)
        site.wait_for("q", second, height=BLOCKS + 19, state="leading", in_flight=0, proven=True)
    site.follow("replica", "r")
    restored = {meta.shard for meta in site.metas("q") if meta.base_height == ARCHIVED}

    assert restored == set(others)
    assert all(len(ids) == len(set(ids)) == BLOCKS + 20 for ids in site.valid_ids())
    same(site, ["q", "r"])


def test_a_lost_disk(tmp_path: Path) -> None:
    """A worker whose directory is gone restores all of its shards; what cannot be restored is followed."""
    site = Sharded(tmp_path / "site").begin(2)
    site.here("ingest", "synthetic", "--blocks", BLOCKS, "--changes", 20).ok()
    site.follow("primary", "p", *FINALITY)
    manifest = decode_manifest(site.here("snapshot").ok() and next(site.objects.rglob("manifest.json")).read_bytes())
    (part, *_) = manifest.parts_of(1)
    (site.objects / manifest.part_name(part)).unlink()
    more(site, BLOCKS - 1, 20)
    assert site.follow("primary", "new")["height"] == BLOCKS + 19
    site.follow("replica", "r")

    assert [meta.base_height for meta in site.metas("new")] == [manifest.height, BEFORE_FIRST_HEIGHT]
    assert site.here("verify", node="new").ok()["verified_height"] == BLOCKS + 19
    same(site, ["new", "r"])
