"""How far a store is behind the log: in records, in blocks and in seconds.

Said of one partition and of what a store has *committed* of it:

* ``records``: offsets above the store's. Chunks, EPOCHs and void records count.
* ``blocks``: numbers above the store's: frames of the diffs topic (a block put on or taken off), events of the blocks
  topic (a block, or a rewind of any depth). The last numbered record says how many there are.
* ``seconds``: since the oldest of these blocks was appended, by the clock of whoever appended it. 0 with none.

A record that no reader follows is not taken for a block: one that is damaged, of another generation, or of an epoch
before the one that the store stands in. It takes a whole reader to know more, so these are figures to look at, and
nothing is decided by them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pipeline import chunk, frame
from pipeline.block import SourceEpoch, decode_event
from pipeline.errors import StateferryError
from pipeline.position import Meta
from topology.transports.base import Broker, Record

ANSWER_S = 3.0
"""A broker that has not answered by then is not waited for: who asks for a status wants one."""
_LOOK_BACK = 8
"""Records without a number that may stand behind the last numbered one, before its number counts as unknown."""
_LOOK_BYTES = 64 << 10
"""Read in search of the oldest block that is not applied."""


class Mark(NamedTuple):
    """What one record says of itself. ``number``: a frame's seq, an event's walk number; 0: it has none."""

    generation: bytes
    epoch: int
    writer: bytes
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """What a store has committed of one partition."""

    topic: str
    partition: int
    next_offset: int
    generation: bytes
    epoch: int  # in force there, as far as the store read
    writer: bytes
    number: int  # of the last frame or event applied
    mark_of: Callable[[bytes], Mark | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """What a partition holds that a store has not committed. ``epoch`` and ``writer``: of the last numbered record."""

    end_offset: int
    records: int
    blocks: int
    seconds: float
    epoch: int
    writer: bytes


def diffs_stand(meta: Meta, topic: str, partition: int) -> Stand:
    """Of the frames that a store follows."""
    return Stand(
        topic=topic,
        partition=partition,
        next_offset=meta.diffs.next_offset,
        generation=meta.generation,
        epoch=meta.epoch,
        writer=meta.writer,
        number=meta.seq,
        mark_of=frame_mark,
    )


def blocks_stand(meta: Meta, topic: str, partition: int) -> Stand:
    """Of the events that a primary applies."""
    return Stand(
        topic=topic,
        partition=partition,
        next_offset=meta.blocks.next_offset,
        generation=meta.generation,
        epoch=meta.source_epoch,
        writer=meta.source_writer,
        number=meta.walk,
        mark_of=event_mark,
    )


def frame_mark(record: bytes) -> Mark | None:
    """Of a record on the diffs topic; None for one that is damaged or unreadable here."""
    try:
        if chunk.is_chunk(record):
            return _chunk_mark(record)
        header = frame.peek(record)
    except StateferryError:
        return None
    return Mark(header.generation, header.epoch, header.writer, header.seq)


def event_mark(record: bytes) -> Mark | None:
    """Of a record on the blocks topic; None for one that is damaged or unreadable here."""
    try:
        if chunk.is_chunk(record):
            return _chunk_mark(record)
        event = decode_event(record, with_ops=False)
    except StateferryError:
        return None
    stamp = event.stamp
    return Mark(stamp.generation, stamp.epoch, stamp.writer, 0 if isinstance(event, SourceEpoch) else event.walk)


def _chunk_mark(record: bytes) -> Mark:
    part = chunk.decode_chunk(record)
    return Mark(part.generation, part.epoch, part.writer, part.number)


async def measure(broker: Broker, stand: Stand, *, now_s: float) -> Lag:
    """A few small reads. Raises what a broker raises, and TimeoutError if it takes longer than `ANSWER_S`."""
    async with asyncio.timeout(ANSWER_S):
        return await _measure(broker, stand, now_s)


async def _measure(broker: Broker, stand: Stand, now_s: float) -> Lag:
    first, end = await broker.bounds(stand.topic, stand.partition)
    start = max(first, stand.next_offset)
    newest = Mark(stand.generation, stand.epoch, stand.writer, stand.number)
    for offset in range(end - 1, max(start, end - _LOOK_BACK) - 1, -1):
        record = (await broker.read(stand.topic, stand.partition, offset, bytes_max=1))[0]
        found = _numbered(stand, record)
        if found is not None:
            newest = found
            break
    blocks = max(0, newest.number - stand.number)
    return Lag(
        end_offset=end,
        records=max(0, end - stand.next_offset),
        blocks=blocks,
        seconds=max(0.0, now_s - await _oldest_s(broker, stand, start)) if blocks else 0.0,
        epoch=newest.epoch,
        writer=newest.writer,
    )


async def _oldest_s(broker: Broker, stand: Stand, start: int) -> float:
    """When the oldest block that the store lacks was appended, Unix time."""
    waiting = await broker.read(stand.topic, stand.partition, start, bytes_max=_LOOK_BYTES)
    lacking = (record for record in waiting if (mark := _numbered(stand, record)) and mark.number > stand.number)
    return next(lacking, waiting[0]).timestamp_ms / 1000


def _numbered(stand: Stand, record: Record) -> Mark | None:
    """What a record says, if it has a number and may be in force."""
    mark = stand.mark_of(record.value)
    if mark is None or mark.number == 0 or mark.generation != stand.generation or mark.epoch < stand.epoch:
        return None
    return mark
