"""Comparing a store with the logs it follows, before anything flows: what did a log lose, and from where to read.

Every store keeps, for both topics, the next offset and the digest of the record before it. A log that holds another
record there, or none, is not the one that was followed: a broker that lost acknowledged records, or a topic made anew.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.block import SourceEpoch
from pipeline.errors import EventCorrupt, LogLost, OffsetOutOfRange, WalkInvalid
from pipeline.frame import NO_HASH, digest_of
from pipeline.generation import Generation
from pipeline.inlet import NO_SOURCE, EventReader, Source, SourcePosition, source_after
from pipeline.position import LogMark, Meta
from pipeline.primary import check_repeat
from pipeline.replica import Replica
from pipeline.splitting import ShardEventReader, stood_at
from topology import floors, logs, topics
from topology.transports.base import Broker

log = logs.get()

Events = EventReader | ShardEventReader


async def holds(broker: Broker, topic: str, partition: int, mark: LogMark) -> bool:
    """Whether the log still holds what the mark says was followed."""
    first, end = await broker.bounds(topic, partition)
    if mark.next_offset == 0 or (mark.next_offset == first and first <= end):
        return True  # nothing was read, or what was read is deleted by now
    if not mark.last_digest or mark.last_digest == NO_HASH:
        return mark.next_offset <= end
    if not first < mark.next_offset <= end:
        return False
    found = await broker.read(topic, partition, mark.next_offset - 1, bytes_max=1)
    return bool(found) and found[0].offset == mark.next_offset - 1 and digest_of(found[0].value) == mark.last_digest


async def follow_back(broker: Broker, topic: str, replica: Replica, unread: Meta) -> None:
    """Take back every frame that the diffs topic lost. ``unread``: the meta after the opening and nothing else.

    Raises LogLost when the journal does not reach far enough, OffsetOutOfRange when records in between are deleted.
    """
    shard = replica.meta.shard
    await _check_begins(broker, topic, replica.meta)
    from_seq, frames = replica.meta.seq, 0
    while not await holds(broker, topic, shard, replica.meta.diffs):
        await _check_begins(broker, topic, replica.meta)  # somebody may be deleting just now
        if replica.meta.seq > 0:
            replica.take_back()
            frames += 1
        elif replica.meta.epoch > 0:
            # Nothing but EPOCHs was followed, and the log lost one: begin after the opening again.
            replica.begin_again(replace(unread, tip=replica.meta.tip))
        else:
            raise LogLost("the diffs topic is not the one that this store followed", where=topic)
    if frames:
        log.warning(
            "log_taken_back",
            frames=frames,
            from_seq=from_seq,
            to_seq=replica.meta.seq,
            why="the log lost its end: it holds no record, or another one, where this store had read one",
        )


async def _check_begins(broker: Broker, topic: str, meta: Meta) -> None:
    first, _ = await broker.bounds(topic, meta.shard)
    if meta.diffs.next_offset < first:
        raise OffsetOutOfRange(
            f"the diffs topic begins at offset {first}, this store follows from {meta.diffs.next_offset}",
            where=topic,
            way_out="restore from a snapshot into an empty data directory: `stateferry restore`",
        )


async def find_events(broker: Broker, generation: Generation, replica: Replica) -> tuple[int, Events]:
    """The offset from which a primary reads events, and the reader for them.

    A blocks topic that lost its end is read to where it is sound for the source in force; what was applied already is
    known by its walk number. Raises OffsetOutOfRange.
    """
    topic, shard, mark = generation.events_topic, replica.meta.shard, replica.meta.blocks
    first, end = await broker.bounds(topic, shard)
    if mark.next_offset < first:
        raise OffsetOutOfRange(
            f"the topic begins at offset {first}, this store reads events from {mark.next_offset}",
            where=f"{topic}[{shard}]",
            way_out="restore from a snapshot into an empty data directory: `stateferry restore`",
        )
    if await holds(broker, topic, shard, mark):
        after = await _stood_at(broker, generation, shard, mark.next_offset, first)
        return mark.next_offset, _reader(generation, shard, after=after, previous_digest=mark.last_digest or NO_HASH)
    log.warning("blocks_log_shorter", stored_offset=mark.next_offset, end_offset=end)
    floor = await floors.of_events(broker, generation, shard, mark.next_offset)
    position = SourcePosition(generation, floor)
    last, follow_on = NO_HASH, position.next_offset
    after = await _stood_at(broker, generation, shard, follow_on, first)
    reader = _reader(generation, shard, after=after, with_ops=False)
    async for record in topics.records(broker, topic, follow_on, partition=shard):
        if record.offset >= mark.next_offset:
            break
        follow_on, last = record.offset + 1, digest_of(record.value)
        try:
            found = reader.feed(record.value, record.offset, position.source)
        except EventCorrupt:
            position.meet_bad_record()
            continue
        if found is not None:
            event, reading = found
            before = position.walk
            position.follow(event)
            try:
                if position.walk > before:
                    check_repeat(replica, event)
            except WalkInvalid:
                follow_on, last = reading.first, reading.previous_digest  # the primary refuses it there, by name
                break
    epoch, writer = position.source if position.source[0] else NO_SOURCE
    replica.meta = replace(replica.meta, source_epoch=epoch, source_writer=writer)
    return follow_on, _reader(generation, shard, previous_digest=last)


async def _stood_at(broker: Broker, generation: Generation, shard: int, offset: int, first: int) -> int:
    """What a reader of a partition of `shard-blocks` had read before ``offset``, as an offset on `blocks`."""
    if generation.shards == 1 or offset <= first:
        return 0
    before = await broker.read(generation.events_topic, shard, offset - 1, bytes_max=1)
    return stood_at(before[0].value)


class MendSearch:
    """Looks ahead on a shard's events, without taking any in, for those that say again what stands before them.

    * Reads every record once, some at a time. Holds two numbers for each that it found and that is still ahead.
    """

    def __init__(self, broker: Broker, generation: Generation, shard: int, offset: int, source: Source) -> None:
        """``offset``: where it begins. ``source``: in force there."""
        self._broker = broker
        self._generation = generation
        self._shard = shard
        self._next = offset
        self._source = source
        self._reader = _reader(generation, shard, links=False, with_ops=False)
        self._found: list[tuple[int, int]] = []  # offset, and the walk number from which it says all again

    async def look(self) -> None:
        """At some records more, if there are."""
        topic, generation = self._generation.events_topic, self._generation.generation
        _, end = await self._broker.bounds(topic, self._shard)
        if self._next >= end:
            return
        for record in await self._broker.read(topic, self._shard, self._next, bytes_max=topics.READ_BYTES_MAX):
            self._next = record.offset + 1
            try:
                found = self._reader.feed(record.value, record.offset, self._source)
            except EventCorrupt:
                continue
            if found is None or not isinstance(event := found[0], SourceEpoch):
                continue
            before, self._source = self._source, source_after(event, generation, self._source)
            if self._source != before and event.voids and event.stamp.chain_id == self._generation.chain_id:
                self._found.append((record.offset, event.resume_walk))

    def is_void(self, offset: int, walk: int) -> bool:
        """Whether the event at an offset is known to be void, where ``walk`` is the last number that was applied."""
        self._found = [(at, resume_walk) for at, resume_walk in self._found if at > offset]
        return any(resume_walk <= walk + 1 for _, resume_walk in self._found)


def _reader(
    generation: Generation,
    shard: int,
    *,
    after: int = 0,
    links: bool = True,
    previous_digest: bytes = NO_HASH,
    with_ops: bool = True,
) -> Events:
    """Of the events that a shard's primary reads. ``after`` and ``links``: as of `CutReader`."""
    if generation.shards == 1:
        return EventReader(generation.generation, previous_digest=previous_digest, with_ops=with_ops)
    return ShardEventReader(
        generation.generation,
        shard,
        generation.shards,
        after=after,
        links=links,
        previous_digest=previous_digest,
        with_ops=with_ops,
    )
