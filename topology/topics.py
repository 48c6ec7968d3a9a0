"""Which topics there are, and which generation is in force: read once, before anything flows.

`generations` says it all. The topics of a generation are made by whoever opens it; everybody else waits for them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pipeline import generation as generations
from pipeline.block import BlockRef
from pipeline.errors import NotFound, WrongChain
from pipeline.generation import GENERATIONS_TOPIC, Generation, Opening
from topology.transports.base import Broker, Record, TopicSpec

READ_BYTES_MAX = 8 << 20
"""Per read of a topic outside of the agents."""


async def records(broker: Broker, topic: str, start: int | None = None) -> AsyncIterator[Record]:
    """A partition's records from ``start`` (None: the first) to the end as it was when this began."""
    first, end = await broker.bounds(topic, 0)
    offset = first if start is None else start
    while offset < end:
        batch = await broker.read(topic, 0, offset, bytes_max=READ_BYTES_MAX)
        for record in batch:
            if record.offset >= end:
                return
            yield record
        if not batch:
            return
        offset = batch[-1].offset + 1


async def current_generation(broker: Broker) -> Generation | None:
    """The generation in force on this broker, or None if there was never one."""
    try:
        return generations.current([record.value async for record in records(broker, GENERATIONS_TOPIC)])
    except NotFound:
        return None


async def open_generation(broker: Broker, wanted: Generation) -> Generation:
    """Append ``wanted`` after the generation in force; the one in force then, which is another's if that was first."""
    await broker.ensure_topics([TopicSpec(name=GENERATIONS_TOPIC, partitions=1)])
    await broker.append(GENERATIONS_TOPIC, 0, [(None, generations.encode_generation(wanted))])
    in_force = await current_generation(broker)
    assert in_force is not None, "a generation was appended and is not there"
    await ensure_topics(broker, in_force)
    return in_force


async def ensure_topics(broker: Broker, generation: Generation) -> None:
    await broker.ensure_topics(
        [TopicSpec(name=generation.blocks_topic, partitions=1), TopicSpec(name=generation.diffs_topic, partitions=1)]
    )


async def opening(broker: Broker, generation: Generation) -> tuple[Opening, bytes] | None:
    """What the first record of the diffs topic says, and its bytes; None while there is none.

    Raises WrongChain if it is the record of another generation.
    """
    await ensure_topics(broker, generation)
    first, end = await broker.bounds(generation.diffs_topic, 0)
    if first > 0:
        raise NotFound(
            "the first record of the diffs topic was deleted",
            where=generation.diffs_topic,
            way_out="restore from a snapshot: `stateferry restore`",
        )
    if end == 0:
        return None
    record = (await broker.read(generation.diffs_topic, 0, 0, bytes_max=1))[0].value
    opened = generations.decode_opening(record)
    if opened.generation.generation != generation.generation:
        raise WrongChain(f"topic {generation.diffs_topic} belongs to generation {opened.generation.generation.hex()}")
    return opened, record


async def ensure_opening(broker: Broker, generation: Generation, finality: int) -> tuple[Opening, bytes]:
    """The opening of the diffs topic, appended here by the first primary if there is none."""
    found = await opening(broker, generation)
    if found is None:
        record = generations.encode_opening(Opening(generation=generation, finality=finality))
        await broker.append(generation.diffs_topic, 0, [(None, record)])
        found = await opening(broker, generation)
        assert found is not None, "an opening was appended and is not there"
    return found


def check_chain(asked: str, found: str, where: str) -> None:
    """Raises WrongChain if a chain was asked for by name and another one is there."""
    if asked and asked != found:
        raise WrongChain(f"chain {asked!r} was asked for, this is {found!r}", where=where, way_out="check --chain")


def ref_text(ref: BlockRef | None) -> str:
    return "none" if ref is None else str(ref)
