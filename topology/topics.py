"""Which topics there are, and which generation is in force: read once, before anything flows.

`generations` says it all. The topics of a generation are made by whoever opens it; everybody else waits for them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pipeline import generation as generations
from pipeline import shards
from pipeline.block import BlockRef
from pipeline.errors import NotFound, SettingsConflict, WrongChain
from pipeline.generation import GENERATIONS_TOPIC, Generation, Opening
from topology.transports.base import Broker, Record, TopicSpec

READ_BYTES_MAX = 8 << 20
"""Per read of a topic outside of the agents."""


async def records(broker: Broker, topic: str, start: int | None = None, *, partition: int = 0) -> AsyncIterator[Record]:
    """A partition's records from ``start`` (None: the first) to the end as it was when this began."""
    first, end = await broker.bounds(topic, partition)
    offset = first if start is None else start
    while offset < end:
        batch = await broker.read(topic, partition, offset, bytes_max=READ_BYTES_MAX)
        for record in batch:
            if record.offset >= end:
                return
            yield record
        if not batch:
            return
        offset = batch[-1].offset + 1


async def current_generation(broker: Broker) -> Generation | None:
    """The generation in force on this broker, or None if there was never one."""
    found = await history(broker)
    return found[-1] if found else None


async def history(broker: Broker) -> list[Generation]:
    """All generations of this broker, in their order."""
    try:
        return generations.history([record.value async for record in records(broker, GENERATIONS_TOPIC)])
    except NotFound:
        return []


async def open_generation(broker: Broker, wanted: Generation) -> Generation:
    """Append ``wanted`` after the generation in force; the one in force then, which is another's if that was first."""
    await broker.ensure_topics([TopicSpec(name=GENERATIONS_TOPIC, partitions=1)])
    if wanted.number == 1 and max(wanted.shards, await shards_of_topics(broker)) > 1:
        await ensure_topics(broker, wanted)  # topics that were made for another number of shards are refused first
    await broker.append(GENERATIONS_TOPIC, 0, [(None, generations.encode_generation(wanted))])
    in_force = await current_generation(broker)
    assert in_force is not None, "a generation was appended and is not there"
    await ensure_topics(broker, in_force)
    return in_force


def specs_of(generation: Generation) -> list[TopicSpec]:
    """The topics of a generation."""
    specs = [
        TopicSpec(name=generation.blocks_topic, partitions=1),
        TopicSpec(name=generation.diffs_topic, partitions=generation.shards),
    ]
    if generation.shards > 1:
        specs.append(TopicSpec(name=generation.shard_blocks_topic, partitions=generation.shards))
        specs.append(TopicSpec(name=generation.anchors_topic, partitions=1, compacted=True))
    return specs


async def ensure_topics(broker: Broker, generation: Generation) -> None:
    await broker.ensure_topics(specs_of(generation))


async def shards_of_topics(broker: Broker) -> int:
    """How many shards the topics were made for, before there is a generation; 1 without topics."""
    try:
        return (await broker.describe(Generation(generation=bytes(16), chain_id="").shard_blocks_topic)).partitions
    except NotFound:
        return 1


async def opening(broker: Broker, generation: Generation, shard: int = 0) -> tuple[Opening, bytes] | None:
    """What the first record of a shard's diffs says, and its bytes; None while there is none.

    Raises WrongChain if it is the record of another generation.
    """
    await ensure_topics(broker, generation)
    topic = generation.diffs_topic
    first, end = await broker.bounds(topic, shard)
    if first > 0:
        raise NotFound(
            "the first record of the diffs topic was deleted",
            where=f"{topic}[{shard}]",
            way_out="begin from a snapshot: `stateferry restore` into an empty data directory",
        )
    if end == 0:
        return None
    record = (await broker.read(topic, shard, 0, bytes_max=1))[0].value
    opened = generations.decode_opening(record)
    if opened.generation.generation != generation.generation:
        raise WrongChain(f"topic {topic} belongs to generation {opened.generation.generation.hex()}")
    return opened, record


async def ensure_opening(
    broker: Broker, generation: Generation, finality: int, shard: int = 0
) -> tuple[Opening, bytes]:
    """The opening of a shard's diffs, appended here by the first primary if there is none."""
    found = await opening(broker, generation, shard)
    if found is None:
        record = generations.encode_opening(Opening(generation=generation, finality=finality, shard=shard))
        await broker.append(generation.diffs_topic, shard, [(None, record)])
        found = await opening(broker, generation, shard)
        assert found is not None, "an opening was appended and is not there"
    return found


async def openings(broker: Broker, generation: Generation) -> list[tuple[Opening, bytes]] | None:
    """The openings of all shards; None while one is missing."""
    found = [await opening(broker, generation, shard) for shard in range(generation.shards)]
    return None if None in found else [one for one in found if one is not None]


async def ensure_openings(broker: Broker, generation: Generation, finality: int) -> list[tuple[Opening, bytes]]:
    """The openings of all shards, appended here where they are missing. Who opens the first says what finality is."""
    first = await ensure_opening(broker, generation, finality)
    others = range(1, generation.shards)
    return [first, *[await ensure_opening(broker, generation, first[0].finality, shard) for shard in others]]


def check_shards(asked: int | None, generation: Generation | None) -> None:
    """Raises UsageError for a number of shards that cannot be, SettingsConflict for another one than there are."""
    if asked is None:
        return
    shards.check_shards(asked)
    if generation is not None and asked != generation.shards:
        raise SettingsConflict(
            f"{asked} shards were asked for, the generation has {generation.shards}",
            way_out="leave --shards out; the number of shards is fixed for a generation's life",
        )


def check_chain(asked: str, found: str, where: str) -> None:
    """Raises WrongChain if a chain was asked for by name and another one is there."""
    if asked and asked != found:
        raise WrongChain(f"chain {asked!r} was asked for, this is {found!r}", where=where, way_out="check --chain")


def ref_text(ref: BlockRef | None) -> str:
    return "none" if ref is None else str(ref)
