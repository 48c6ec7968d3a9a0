"""Blocks larger than any record: chunked as an event and as a frame, they pass whole or not at all."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from random import Random

import pytest

from pipeline import chunk
from pipeline.block import Block, BlockRef, Connect, Op, Ops, SourceEpoch, SourceStamp, encode_event
from pipeline.generation import Generation
from tests.topology.commands import Site, same_state
from topology import source, topics
from topology.transports.base import Broker
from topology.transports.factory import open_broker

pytestmark = pytest.mark.usefixtures("each_broker")

GENERATION = Generation(generation=b"large blocks' id", chain_id="large")
VALUE_BYTES = 170


def blocks(changes: int) -> list[Block]:
    """Two of them: the second one spends half of the first, and as many new coins stand in their place."""
    random = Random(changes)
    keys = [random.randbytes(32) + bytes(4) for _ in range(changes + changes // 2)]
    found, parent, at = [], bytes(32), 0
    for height, spent in enumerate((0, changes // 2)):
        created = keys[at : at + changes - spent]
        found.append(
            Block(
                ref=BlockRef(height, random.randbytes(32)),
                parent_hash=parent,
                time_s=height,
                tables={
                    "utxo": Ops(
                        codes=bytes([Op.DELETE]) * spent + bytes([Op.CREATE]) * len(created),
                        keys=keys[:spent] + created,
                        values=[random.randbytes(VALUE_BYTES) for _ in created],
                    )
                },
            )
        )
        parent, at = found[-1].ref.block_hash, at + len(created)
    return found


def publish(site: Site, chain: list[Block]) -> None:
    """A source's whole work."""

    async def append(broker: Broker) -> None:
        generation = await topics.current_generation(broker) or await topics.open_generation(broker, GENERATION)
        publisher = source.Publisher(broker, generation, await source.read_position(broker, generation))
        for offer in source.offers(chain):
            await publisher.offer(offer)
        await publisher.flush()

    async def main() -> None:
        broker = open_broker(site.place.url, site.place.prefix)
        try:
            await append(broker)
        finally:
            await broker.close()

    asyncio.run(main())


def chunks(records: list[bytes]) -> int:
    return sum(map(chunk.is_chunk, records))


def test_300_000_changes(tmp_path: Path) -> None:
    """A block of 60 MB passes, as an event and as a frame in some sixty chunks each. Chunks with spends: below."""
    chain = blocks(300_000)[:1]
    site = Site(tmp_path / "site")
    publish(site, chain)
    primary, replica = site.follow_both()

    assert sum(map(len, site.records("blocks"))) > 60_000_000 < sum(map(len, site.records("diffs")))
    assert min(chunks(site.records("blocks")), chunks(site.records("diffs"))) > 60
    assert (primary["height"], primary["keys"], primary["root"]) == (0, 300_000, replica["root"])
    same_state(site, ["p", "r"])


def test_source_killed_in_the_middle(tmp_path: Path) -> None:
    """Half of an event has no effect, also behind it, and its block comes whole from the next source."""
    chain = blocks(20_000)
    whole = Site(tmp_path / "whole")
    publish(whole, chain)
    whole.follow_both()

    site = Site(tmp_path / "site")
    publish(site, [])
    stamp = SourceStamp(chain_id="large", generation=GENERATION.generation, epoch=1, writer=bytes(range(16)))
    event = encode_event(Connect(stamp=stamp, walk=1, block=chain[0]))
    records = chunk.cut(event, generation=stamp.generation, epoch=1, writer=stamp.writer, number=1)
    site.append("blocks", encode_event(SourceEpoch(stamp=stamp, resume_walk=1)), *records[: len(records) // 2])
    assert site.follow("primary", "p")["height"] == -1
    publish(site, chain)
    site.follow_both()

    same_state(site, ["p", "r"])
    assert site.content("r") == whole.content("r")
    assert site.frame_ids() == whole.frame_ids()


@pytest.mark.parametrize("acknowledged", [1, 4])
def test_primary_killed_in_the_middle(acknowledged: int, tmp_path: Path) -> None:
    """Half of a frame has no effect on any reader, and the frame comes whole after the start."""
    chain = blocks(20_000)
    site = Site(tmp_path / "site")
    publish(site, chain)
    point = {"STATEFERRY_FAILPOINT": f"propose.produced:{acknowledged}"}
    killed = site.command("run", "--role", "primary", "--until-idle", env=point)
    assert killed.code == -signal.SIGKILL
    assert site.follow("replica", "early")["height"] <= 0
    primary, replica = site.follow_both()

    assert (primary["height"], primary["keys"], primary["root"]) == (1, 20_000, replica["root"])
    same_state(site, ["p", "r"])
    assert len(set(site.frame_ids())) <= 2
