"""Floors: the record both ways, what is passed by, and which one a reader begins at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import xxhash

from pipeline.block import BlockRef
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.floor import EventsFloor, Floor, FramesFloor, ShardFloor, decode_floor, encode_floor, floors_of, highest
from pipeline.generation import Generation, encode_generation, history
from pipeline.position import LogMark

GENERATION = b"g" * 16
REF = BlockRef(127, b"h" * 32)


def mark(offset: int) -> LogMark:
    return LogMark(next_offset=offset, last_digest=b"d" * 32)


def floor_at(offset: int, shards: int = 1) -> Floor:
    def events(at: int) -> EventsFloor:
        return EventsFloor(ref=REF, mark=mark(at), walk=140, source=(3, b"s" * 16))

    frames = FramesFloor(mark=mark(offset + 5), epoch=2, writer=b"w" * 16)
    each = tuple(ShardFloor(frames=frames, events=events(offset + shard)) for shard in range(shards))
    return Floor(generation=GENERATION, ref=REF, blocks=replace(events(offset), mark=mark(offset)), shards=each)


@pytest.mark.parametrize("shards", [1, 4])
def test_round_trip(shards: int) -> None:
    floor = floor_at(150, shards)

    assert decode_floor(encode_floor(floor)) == floor


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    fields = msgpack.unpackb(encode_floor(floor_at(150))[13:])
    change(fields)
    payload = msgpack.packb(fields)
    return b"SFfl\x01" + xxhash.xxh3_64_digest(payload) + payload


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("shards"),
        lambda fields: fields.update(more=1),
        lambda fields: fields.update(generation=b"short"),
        lambda fields: fields.update(height=-1),
        lambda fields: fields.update(hash=b""),
        lambda fields: fields["blocks"].pop(),
        lambda fields: fields["blocks"][0].append(1),
        lambda fields: fields["shards"][0].__setitem__(1, True),
        lambda fields: fields.update(shards=7),
        lambda fields: fields["shards"][0][0].__setitem__(1, b"no digest"),
    ],
)
def test_malformed(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(FrameCorrupt, match="malformed"):
        decode_floor(changed(change))


def test_damaged_and_later() -> None:
    """A flipped bit anywhere is noticed; a later version is named."""
    data = encode_floor(floor_at(150))
    for at in (0, 5, 20, len(data) - 1):
        with pytest.raises(FrameCorrupt):
            decode_floor(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(Unsupported, match="version 2"):
        decode_floor(data[:4] + b"\x02" + data[5:])


def test_beside_generations() -> None:
    """Floors and generations stand on one topic, and each reader passes the other's records by."""
    generation = Generation(generation=GENERATION, chain_id="main")
    mine, other = floor_at(150), replace(floor_at(160), generation=b"o" * 16)
    records = [encode_generation(generation), encode_floor(mine), b"garbage", encode_floor(other)]
    records.append(encode_floor(floor_at(170, shards=2)))

    assert history(records) == [generation]
    assert floors_of(records, GENERATION, 1) == [mine]


@pytest.mark.parametrize(
    ("first", "at_most", "begins"),
    [(10, 100, 40), (40, 100, 40), (10, 39, 20), (21, 39, None), (41, 100, None), (10, 20, 20)],
)
def test_where_to_begin(first: int, at_most: int, begins: int | None) -> None:
    """At the highest that the partition holds, whatever their order: whoever said one later may have known less."""
    found = highest([floor_at(20), floor_at(40), floor_at(5)], lambda floor: floor.blocks, first, at_most)

    assert (found and found.mark.next_offset) == begins
