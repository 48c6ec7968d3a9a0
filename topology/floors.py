"""Where to begin to read the topics of a generation whose first records were deleted (`pipeline.floor`)."""

from __future__ import annotations

from pipeline.errors import OffsetOutOfRange
from pipeline.floor import EventsFloor, Floor, FramesFloor, floors_of, highest
from pipeline.generation import GENERATIONS_TOPIC, Generation
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
    return found or _refuse(topic, 0, first)


async def of_events(broker: Broker, generation: Generation, shard: int, at_most: int) -> EventsFloor | None:
    """Where a shard's primary reads events from, ``at_most`` that offset; None: from the topic's first record. Raises
    OffsetOutOfRange."""
    topic = generation.events_topic
    first, end = await broker.bounds(topic, shard)
    if first == 0:
        return None
    found = highest(await of(broker, generation), lambda floor: floor.shards[shard].events, first, min(end, at_most))
    return found or _refuse(topic, shard, first)


async def of_frames(broker: Broker, generation: Generation, shard: int) -> FramesFloor | None:
    """Where a shard's frames are read from; None if no floor says it."""
    first, end = await broker.bounds(generation.diffs_topic, shard)
    return highest(await of(broker, generation), lambda floor: floor.shards[shard].frames, first, end)


def _refuse(topic: str, partition: int, first: int) -> EventsFloor:
    raise OffsetOutOfRange(
        f"the topic begins at offset {first}: the events before it were deleted, not by `stateferry topics trim`, and "
        "with them what its walk is counted from",
        where=f"{topic}[{partition}]",
        way_out="`stateferry generation new` begins again from a snapshot, with topics of its own",
    )
