"""Where to begin to read the topics of a generation whose first records were deleted (`pipeline.floor`)."""

from __future__ import annotations

import sys

from pipeline.errors import OffsetOutOfRange
from pipeline.floor import EventsFloor, Floor, FramesFloor, floors_of, highest
from pipeline.generation import GENERATIONS_TOPIC, Generation
from pipeline.position import Meta
from topology import topics
from topology.transports.base import Broker


async def of(broker: Broker, generation: Generation) -> list[Floor]:
    """All that were said of a generation."""
    records = [record.value async for record in topics.records(broker, GENERATIONS_TOPIC)]
    return floors_of(records, generation.generation, generation.shards)


async def of_blocks(broker: Broker, generation: Generation) -> EventsFloor | None:
    """Where `blocks` is read from; None: from its first record. Raises OffsetOutOfRange."""
    topic = generation.blocks_topic
    first, end = await broker.bounds(topic, 0)
    if first == 0:
        return None
    found = highest(await of(broker, generation), lambda floor: floor.blocks, first, end)
    if found is None:
        raise _not_said(topic, 0, first)
    return found


async def of_events(broker: Broker, generation: Generation, shard: int, at_most: int) -> EventsFloor | None:
    """Where a shard's primary reads events from, ``at_most`` that offset; None: from the topic's first record. Raises
    OffsetOutOfRange."""
    topic = generation.events_topic
    first, end = await broker.bounds(topic, shard)
    if first == 0:
        return None
    found = highest(await of(broker, generation), lambda floor: floor.shards[shard].events, first, min(end, at_most))
    if found is None:
        raise _not_said(topic, shard, first)
    return found


async def of_frames(broker: Broker, generation: Generation, shard: int) -> FramesFloor | None:
    """Where a shard's frames are read from; None if no floor says it."""
    first, end = await broker.bounds(generation.diffs_topic, shard)
    return highest(await of(broker, generation), lambda floor: floor.shards[shard].frames, first, end)


async def lacking(broker: Broker, generation: Generation, shard: int, meta: Meta | None, *, events: bool) -> str:
    """What a store lacks of the topics, because it is deleted; empty: nothing. ``meta`` None: it would begin with the
    first record. ``events``: whether it reads those too."""
    wanted = [(generation.diffs_topic, 0 if meta is None else meta.diffs.next_offset)]
    if events:
        wanted.append((generation.events_topic, 0 if meta is None else meta.blocks.next_offset))
    for topic, offset in wanted:
        first, _ = await broker.bounds(topic, shard)
        if offset < first:
            return f"the topic {topic} begins at offset {first} in partition {shard}, this node is at {offset}"
    return ""


async def beginning(broker: Broker, generation: Generation, meta: Meta) -> dict[str, int]:
    """From where a primary will read on, by topic, that restores the newest state and has ``meta`` at least: there, or
    from the highest floor if records above were deleted. Raises OffsetOutOfRange."""
    offsets = {generation.diffs_topic: meta.diffs.next_offset, generation.events_topic: meta.blocks.next_offset}
    if await lacking(broker, generation, meta.shard, meta, events=True):
        frames = await of_frames(broker, generation, meta.shard)
        events = await of_events(broker, generation, meta.shard, sys.maxsize)
        if frames is not None:
            offsets[generation.diffs_topic] = frames.mark.next_offset
        if events is not None:
            offsets[generation.events_topic] = events.mark.next_offset
    return offsets


def _not_said(topic: str, partition: int, first: int) -> OffsetOutOfRange:
    return OffsetOutOfRange(
        f"the topic begins at offset {first}: the events before it were deleted, not by `stateferry topics trim`, and "
        "with them what its walk is counted from",
        where=f"{topic}[{partition}]",
        way_out="`stateferry generation new` begins again from a snapshot, with topics of its own",
    )
