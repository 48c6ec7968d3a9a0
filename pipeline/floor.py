"""Floors: what the records that were deleted from a generation's topics said, for whoever reads what is left of them.

Where a walk stands, which source is in force, and which epoch, follows from a topic's records from the first one on.
So before any of them is deleted, a floor says it: a record of the topic `generations`, which is never trimmed. It names
a block that is final and archived in every shard, for each topic the offset behind everything that made this block
current, and what is known there. Records below these offsets may then be deleted, in any order and by anybody; reading
goes on from the highest floor whose offset the topic still has. A reader that knows no floors passes the record by.

Layout: magic "SFfl" · version u8 · checksum 8 B (XXH3-64 of the payload) · payload, a MessagePack map. FORMAT.md,
"Generations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import xxhash

from pipeline.block import BlockRef
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.position import LogMark

_MAGIC = b"SFfl"
_VERSION = 1
_HEAD_BYTES = len(_MAGIC) + 1 + 8

Place = TypeVar("Place", bound="EventsFloor | FramesFloor")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsFloor:
    """Of a partition of events: where to begin, and what was so before."""

    ref: BlockRef  # the tip there
    mark: LogMark
    walk: int  # the last number applied
    source: tuple[int, bytes]  # epoch and writer in force


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesFloor:
    """Of a partition of diffs."""

    mark: LogMark
    epoch: int  # in force there
    writer: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFloor:
    """``events``: of what the shard's primary reads, which is `blocks` itself with one shard."""

    frames: FramesFloor
    events: EventsFloor


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """``blocks``: of the topic `blocks`, the lowest of what the shards need."""

    generation: bytes
    ref: BlockRef
    blocks: EventsFloor
    shards: tuple[ShardFloor, ...]


def encode_floor(floor: Floor) -> bytes:
    """The value of a record of the topic `generations`."""
    assert all(one.ref == floor.ref for one in (floor.blocks, *(shard.events for shard in floor.shards)))
    fields = {
        "generation": floor.generation,
        "height": floor.ref.height,
        "hash": floor.ref.block_hash,
        "blocks": _events_fields(floor.blocks),
        "shards": [
            [_mark_fields(one.frames.mark), one.frames.epoch, one.frames.writer, _events_fields(one.events)]
            for one in floor.shards
        ],
    }
    payload: bytes = msgpack.packb(fields, use_bin_type=True)
    return _MAGIC + bytes([_VERSION]) + xxhash.xxh3_64_digest(payload) + payload


def _events_fields(events: EventsFloor) -> list[Any]:
    return [_mark_fields(events.mark), events.walk, *events.source]


def _mark_fields(mark: LogMark) -> list[Any]:
    return [mark.next_offset, mark.last_digest]


def decode_floor(data: bytes) -> Floor:
    """The inverse of `encode_floor`. Raises FrameCorrupt, also for a record that is no floor; Unsupported."""
    if data[: len(_MAGIC)] != _MAGIC or len(data) <= _HEAD_BYTES:
        raise FrameCorrupt("a record does not begin as a floor")
    if data[len(_MAGIC)] != _VERSION:
        raise Unsupported(f"a floor of version {data[len(_MAGIC)]}", way_out="upgrade")
    payload = data[_HEAD_BYTES:]
    if xxhash.xxh3_64_digest(payload) != data[len(_MAGIC) + 1 : _HEAD_BYTES]:
        raise FrameCorrupt("the checksum of a floor does not match its bytes")
    try:
        fields = msgpack.unpackb(payload, raw=False, strict_map_key=True)
        if fields.keys() != {"generation", "height", "hash", "blocks", "shards"}:
            raise ValueError(f"it has the fields {sorted(fields)}")
        ref = BlockRef(_number(fields["height"]), _bytes(fields["hash"], 32))
        shards = [
            ShardFloor(
                frames=FramesFloor(mark=_mark(frames), epoch=_number(epoch), writer=_bytes(writer, 16)),
                events=_events(ref, events),
            )
            for frames, epoch, writer, events in fields["shards"]
        ]
        floor = Floor(
            generation=_bytes(fields["generation"], 16),
            ref=ref,
            blocks=_events(ref, fields["blocks"]),
            shards=tuple(shards),
        )
    except (AttributeError, TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameCorrupt(f"a floor is malformed: {error!r}") from error
    return floor


def _events(ref: BlockRef, fields: Any) -> EventsFloor:
    mark, walk, epoch, writer = fields
    return EventsFloor(ref=ref, mark=_mark(mark), walk=_number(walk), source=(_number(epoch), _bytes(writer, 16)))


def _mark(fields: Any) -> LogMark:
    offset, digest = fields
    return LogMark(next_offset=_number(offset), last_digest=_bytes(digest, 0, 32))


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number")
    return value


def _bytes(value: Any, *lengths: int) -> bytes:
    if not isinstance(value, bytes) or len(value) not in lengths:
        raise ValueError(f"{value!r} does not have {lengths} bytes")
    return value


def floors_of(records: Iterable[bytes], generation: bytes, shards: int) -> list[Floor]:
    """Those of a generation, from all records of the topic. What is none, or damaged, is passed by. Raises
    Unsupported."""
    found = []
    for record in records:
        try:
            floor = decode_floor(record)
        except FrameCorrupt:
            continue
        if (floor.generation, len(floor.shards)) == (generation, shards):
            found.append(floor)
    return found


def highest(floors: Sequence[Floor], place_of: Callable[[Floor], Place], first: int, at_most: int) -> Place | None:
    """Of one partition, the highest place to begin at that is in what the partition holds: ``first`` to ``at_most``."""
    places = [place for floor in floors if first <= (place := place_of(floor)).mark.next_offset <= at_most]
    return max(places, key=lambda place: place.mark.next_offset, default=None)
