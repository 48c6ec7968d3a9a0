"""A slow broker, a slow store, a long way to go: what a worker holds stays below its bounds, by its own counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.stores.rocksdb import RocksStore
from tests.topology.commands import Site, same_state
from topology import committing, shard_set
from topology.app import STREAM_BUFFER_RECORDS, Application
from topology.buffers import held_by
from topology.lead import BEGUN_MAX
from topology.node import Node
from topology.transports.kafka_appends import Appends
from topology.transports.sqlite_writer import Writer

BLOCKS, CHANGES = 80, 24
BOUND_BYTES = 1 << 16
"""The least that the settings allow: a few of these blocks."""
SLOW_S = 0.01


class Watched(Node):
    """A node that notes the most that each of its buffers ever held."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.most: dict[str, int] = {}
        self.bounds: dict[str, int] = {}
        self.largest_block = 0
        commit = self.committing.commit

        def commit_noted() -> None:
            self.note()
            commit()

        self.committing.commit = commit_noted  # type: ignore[method-assign]
        seen.append(self)

    async def on_blocks(self, offset: int, record: bytes) -> Any:
        done = await super().on_blocks(offset, record)
        self.note()
        return done

    async def on_diffs(self, offset: int, record: bytes) -> None:
        await super().on_diffs(offset, record)
        self.note()

    def note(self) -> None:
        for name, held in held_by(self).items():
            self.most[name] = max(self.most.get(name, 0), held.bytes)
            self.bounds[name] = held.bytes_max
        self.largest_block = max([self.largest_block, *self.stored.replica.layers._sizes.values()])

    @property
    def has_stopped_computing(self) -> bool:
        """There is no room for another block, or no other block, or it is not its turn."""
        lead = self.lead
        if lead is None or lead.primary is None or self.stopping.is_set():
            return True
        return lead.ahead_bytes > self.settings.ahead_bytes_max or lead.next_blocks >= self.ends.blocks

    def check(self) -> None:
        """Nothing was ever above its bound by more than the block that reached it, and those being sealed then."""
        for name, bound_bytes in self.bounds.items():
            room = 0 if name.endswith("chunks") else (1 + BEGUN_MAX) * self.largest_block
            assert self.most[name] <= bound_bytes + room, name


seen: list[Watched] = []
"""The nodes of a test, in the order in which they ran."""
waiting: list[int] = []
"""Records in every queue of an agent, as they were looked at."""


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers of this process have small bounds, and are watched."""
    seen.clear()
    waiting.clear()
    monkeypatch.setattr(shard_set, "Node", Watched)
    monkeypatch.setenv("STATEFERRY_GROUP_BYTES_MAX", str(BOUND_BYTES))
    monkeypatch.setenv("STATEFERRY_AHEAD_BYTES_MAX", str(BOUND_BYTES))
    stored_offsets = Application._stored_offsets

    async def start(self: Application, assignment: set[Any]) -> dict[Any, int]:
        task = asyncio.create_task(look(self))
        self.looking = task  # type: ignore[attr-defined]
        return await stored_offsets(self, assignment)

    async def look(application: Application) -> None:
        while True:
            for channels in application.app.topics._tp_index.values():
                waiting.extend(channel.queue.qsize() for channel in channels)
            await asyncio.sleep(0)

    monkeypatch.setattr(Application, "_stored_offsets", start)
    yield


@pytest.fixture
def site(each_broker: None, tmp_path: Path) -> Site:
    site = Site(tmp_path / "site")
    more = ("--blocks", BLOCKS, "--changes", CHANGES, "--seed", 5)
    site.here("ingest", "synthetic", *more).ok()
    return site


def test_slow_broker(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that takes nothing until the primary has computed all that it may: frames wait at their bound."""
    append_batch, commit = Appends._append_batch, Writer._commit

    async def append_late(*arguments: Any) -> int:
        while seen and not seen[-1].has_stopped_computing:
            await asyncio.sleep(0.001)
        return await append_batch(*arguments)

    def commit_late(*arguments: Any) -> None:
        while seen and not seen[-1].has_stopped_computing:
            time.sleep(0.001)
        commit(*arguments)

    monkeypatch.setattr(Appends, "_append_batch", append_late)
    monkeypatch.setattr(Writer, "_commit", commit_late)
    site.follow("primary", "p")

    (primary,) = seen
    primary.check()
    assert primary.most["computed_ahead"] > BOUND_BYTES
    assert primary.most["frames_in_flight"] > 0
    assert max(waiting) <= STREAM_BUFFER_RECORDS


def test_slow_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes its time holds everything up, and nothing grows meanwhile; a replica far behind writes when
    its group is full, and not later."""
    write = RocksStore.write

    def write_late(*arguments: Any) -> None:
        time.sleep(SLOW_S)
        write(*arguments)

    monkeypatch.setattr(RocksStore, "write", write_late)
    height = site.follow("primary", "p")["height"]
    monkeypatch.setattr(committing, "GROUP_WAIT_S", 60.0)  # nothing but a full group is written
    site.here("run", "--role", "replica", "--until-height", height, node="r").ok()

    primary, replica = seen
    primary.check()
    replica.check()
    assert BOUND_BYTES <= replica.most["dirty_layers"] <= BOUND_BYTES + replica.largest_block
    assert max(waiting) <= STREAM_BUFFER_RECORDS
    same_state(site, ["p", "r"])
