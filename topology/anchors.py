"""Anchors on their topic: said by primaries of shards, summed up by whoever asks for the root of all of them."""

from __future__ import annotations

import asyncio

from pipeline.anchors import SLOTS, Anchor, AnchorBook, Joined, encode_anchor
from pipeline.errors import NotFound
from pipeline.generation import Generation
from pipeline.group import Step
from pipeline.position import Meta, Tip
from topology import topics
from topology.transports.base import Broker

_TRIM_EVERY = 4
"""How many times over the slots may be filled before a log that does not compact is cut."""


class Anchoring:
    """Says where a worker's shards stand, some time after each commit.

    * Holds the newest anchor of each slot that is not said yet: at most `SLOTS` a shard.
    * Nothing waits for it, and an anchor that a crash lost is made up for by the next one.
    """

    def __init__(self, broker: Broker, generation: Generation) -> None:
        self._broker = broker
        self._generation = generation
        self._waiting: dict[bytes, bytes] = {}
        self._wake = asyncio.Event()
        self._compacts = True

    def stands(self, meta: Meta) -> None:
        """A shard stands somewhere: said when a worker begins to lead it."""
        self._say(Anchor.of(meta))

    def committed(self, shard: int, steps: list[Step]) -> None:
        """A shard committed frames."""
        generation = self._generation
        for step in steps:
            after, header = step.after, step.header
            tip = Tip(ref=after.ref, vectors=after.vectors, seq=header.seq, counts=after.counts)
            self._say(
                Anchor(
                    generation=generation.generation, shard=shard, shards=generation.shards, walk=header.walk, tip=tip
                )
            )

    def _say(self, anchor: Anchor) -> None:
        self._waiting[anchor.key] = encode_anchor(anchor)
        self._wake.set()

    async def run(self) -> None:
        """Append what waits, for ever."""
        self._compacts = "compact" in (await self._facts()).get("cleanup.policy", "")
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Append what waits."""
        batch, self._waiting = list(self._waiting.items()), {}
        if not batch:
            return
        topic = self._generation.anchors_topic
        await self._broker.append(topic, 0, batch)
        first, end = await self._broker.bounds(topic, 0)
        kept = SLOTS * self._generation.shards
        if not self._compacts and end - first > _TRIM_EVERY * kept:
            await self._broker.delete_records(topic, 0, end - 2 * kept)

    async def _facts(self) -> dict[str, str]:
        return dict((await self._broker.describe(self._generation.anchors_topic)).config)


async def newest(broker: Broker, generation: Generation) -> Joined | None:
    """The highest position at which all shards stood, by what they say; None if there is none yet."""
    book = AnchorBook(generation.generation, generation.shards)
    try:
        async for record in topics.records(broker, generation.anchors_topic):
            book.feed(record.value)
    except NotFound:
        return None
    return book.newest()
