"""The splitter: one order of events in, a partition of them for each shard out. See `pipeline.splitting`.

It runs in the worker that the primaries' consumer group gave `blocks` to. It keeps nothing: where it starts is what the
ends of the partitions say. Two at once, as when one was asleep while another took over, write the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pipeline import failpoints
from pipeline.errors import LogLost
from pipeline.frame import NO_HASH
from pipeline.generation import Generation
from pipeline.position import LogMark
from pipeline.splitting import CutReader, SplitPoint, Splitter, lowest
from topology import floors, log_check, logs, topics
from topology.transports.base import Broker

log = logs.get()

AHEAD_BYTES_MAX = 8 << 20
"""Shard events that were handed to the broker and are not acknowledged; the splitter waits above it."""
_TAIL_RECORDS = 8
"""Read first from the end of a partition, in search of the last whole event there."""

ProduceTo = Callable[[int, bytes], Awaitable[Awaitable[Any]]]
"""Hand a record for a shard to the broker; what comes back is done when the record is durable."""


class Splitting:
    """One worker's splitter, while `blocks` is assigned to it."""

    def __init__(self, *, broker: Broker, generation: Generation, produce: ProduceTo) -> None:
        self.next_blocks = 0  # the next offset of blocks to handle
        self._broker = broker
        self._generation = generation
        self._produce = produce
        self._splitter: Splitter | None = None
        self._sent: asyncio.Queue[tuple[int, Awaitable[Any]]] = asyncio.Queue()
        self._sent_bytes = 0
        self._handling = 0  # records taken, and not yet all with the broker
        self._room = asyncio.Event()

    async def start(self) -> int:
        """Find where to go on: the offset. After every assignment. Raises LogLost."""
        generation = self._generation
        ends = await asyncio.gather(*(self._end_of(shard) for shard in range(generation.shards)))
        at = lowest(ends)
        mark = LogMark(next_offset=at.next_offset, last_digest=at.last_digest)
        if not await log_check.holds(self._broker, generation.blocks_topic, 0, mark):
            raise LogLost(
                f"the blocks topic does not hold what was split up to offset {at.next_offset}: it lost its end, or is "
                "another one",
                where=generation.blocks_topic,
                way_out="ingest again from the source, under another --topic-prefix",
            )
        self._splitter = Splitter(generation.generation, generation.shards, at)
        self.next_blocks = at.next_offset
        log.info("splitter_started", offset=at.next_offset, walk=at.walk)
        return at.next_offset

    async def _end_of(self, shard: int) -> SplitPoint:
        """What the last whole event of a partition says."""
        generation, topic = self._generation, self._generation.shard_blocks_topic
        first, end = await self._broker.bounds(topic, shard)
        count = _TAIL_RECORDS
        while True:
            start = max(first, end - count)
            reader = CutReader(generation.generation, shard, generation.shards, links=False)
            found = None
            async for record in topics.records(self._broker, topic, start, partition=shard):
                found = reader.feed(record.value, record.offset) or found
            if found is not None:
                return SplitPoint.after(found)
            if start == first:
                return await self._floor()
            count *= 16

    async def _floor(self) -> SplitPoint:
        """Where `blocks` begins, for a partition that holds no event. Raises OffsetOutOfRange."""
        floor = await floors.of_blocks(self._broker, self._generation)
        if floor is None:
            return SplitPoint()
        mark = floor.mark
        return SplitPoint(
            next_offset=mark.next_offset,
            last_digest=mark.last_digest or NO_HASH,
            source=floor.source,
            walk=floor.walk,
        )

    def rest(self) -> None:
        """`blocks` belongs to another worker now."""
        self._splitter = None

    @property
    def is_running(self) -> bool:
        return self._splitter is not None

    async def on_blocks(self, offset: int, record: bytes) -> None:
        """One record of blocks, in order. Returns once all that it became is with the broker, if not durable yet.

        Raises Unsupported.
        """
        splitter = self._splitter
        if splitter is None or offset < self.next_blocks:
            return
        self.next_blocks = offset + 1
        self._handling += 1
        try:
            for shard, records in enumerate(splitter.feed(record, offset)):
                for one in records:
                    sent = await self._produce(shard, one)
                    self._sent.put_nowait((len(one), sent))
                    self._sent_bytes += len(one)
        finally:
            self._handling -= 1
        failpoints.hit("split.sent")
        while self._sent_bytes > AHEAD_BYTES_MAX:
            self._room.clear()
            await self._room.wait()

    async def check_sent(self) -> None:
        """Await every send, in order, for ever. Raises what one of them raises: only the log says what became of it."""
        while True:
            size, sent = await self._sent.get()
            await sent
            self._sent_bytes -= size
            self._room.set()

    @property
    def has_sent_all(self) -> bool:
        """Whether all that was taken is durable in the partitions of the shards."""
        return not self._handling and not self._sent_bytes

    @property
    def held_bytes(self) -> int:
        return self._sent_bytes + (0 if self._splitter is None else self._splitter.held_bytes)
