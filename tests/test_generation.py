"""Generations: records both ways, which one is in force, and what the first record of a partition says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import xxhash

from pipeline import frame
from pipeline.block import BlockRef
from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.errors import FrameCorrupt, SettingsConflict, Unsupported
from pipeline.frame import Kind
from pipeline.generation import (
    Generation,
    Opening,
    decode_end,
    decode_generation,
    decode_opening,
    encode_end,
    encode_generation,
    encode_opening,
    history,
)

FIRST = Generation(generation=b"1" * 16, chain_id="main")
VECTOR = bytes(range(256)) * 8
SECOND = Generation(
    generation=b"2" * 16,
    chain_id="main",
    number=2,
    previous=b"1" * 16,
    base=BlockRef(800_000, b"b" * 32),
    base_vectors={1: VECTOR},
    base_counts={1: 12},
    base_manifest="main/2/manifest",
)


def sealed(payload: bytes) -> bytes:
    return b"SFge\x01" + xxhash.xxh3_64_digest(payload) + payload


def record_with(**changes: Any) -> bytes:
    fields = msgpack.unpackb(encode_generation(SECOND)[13:]) | changes
    return sealed(msgpack.packb({name: value for name, value in fields.items() if value is not None}))


@pytest.mark.parametrize("generation", [FIRST, SECOND], ids=["first", "second"])
def test_round_trip(generation: Generation) -> None:
    """A generation comes back from its record and from both frames that carry it."""
    opening = Opening(generation=replace(generation, shards=4), finality=7, shard=3)
    ended = Generation(generation=b"0" * 16, chain_id="main", shards=4)
    end = encode_end(generation, ended, shard=2, epoch=3, writer=b"w" * 16)

    assert decode_generation(encode_generation(generation)) == generation
    assert decode_opening(encode_opening(opening)) == opening
    assert decode_end(frame.decode(end).body) == generation
    header = frame.peek(end)
    assert (header.kind, header.epoch, header.generation) == (Kind.GENERATION, 3, b"0" * 16)
    assert (header.shard, header.shards) == (2, 4)


def test_opening_is_where_a_store_begins() -> None:
    """Before the first block, or at the base: nothing at or below it can be taken off."""
    empty = Opening(generation=FIRST, finality=7).meta(offset=0, digest=b"d" * 32)
    based = Opening(generation=SECOND, finality=7).meta(offset=5, digest=b"d" * 32)

    assert (empty.tip.ref, empty.final_height, empty.journal_first_height, empty.seq) == (None, -1, 0, 0)
    assert empty.tip.vectors == {1: lthash.ZERO}
    assert (based.tip.ref, based.final_height, based.journal_first_height) == (SECOND.base, 800_000, 800_001)
    assert (based.tip.vectors, based.tip.counts, based.archived_to) == ({1: VECTOR}, {1: 12}, 800_001)
    assert (based.diffs.next_offset, based.diffs.last_digest) == (6, b"d" * 32)
    assert based.epoch == 0


def test_topics_are_named_after_the_generation() -> None:
    """The first generation has the plain names, any later one its own."""
    assert (FIRST.blocks_topic, FIRST.diffs_topic) == ("blocks", "diffs")
    assert (SECOND.blocks_topic, SECOND.diffs_topic) == ("blocks-323232323232", "diffs-323232323232")


RIVAL = replace(SECOND, generation=b"3" * 16)
THIRD = replace(FIRST, generation=b"4" * 16, number=3, previous=b"2" * 16)


def last(records: Iterable[bytes]) -> Generation | None:
    """The generation in force."""
    found = history(records)
    return found[-1] if found else None


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], None),
        ([FIRST], FIRST),
        ([FIRST, FIRST], FIRST),
        ([FIRST, SECOND], SECOND),
        ([FIRST, SECOND, RIVAL], SECOND),
        ([FIRST, SECOND, THIRD], THIRD),
        ([FIRST, THIRD, SECOND], SECOND),
        ([SECOND], SECOND),
        ([SECOND, FIRST], SECOND),
        ([SECOND, THIRD], THIRD),
        ([replace(FIRST, number=2)], None),
        ([replace(FIRST, previous=b"0" * 15 + b"1")], None),
        ([FIRST, replace(SECOND, number=3)], FIRST),
        ([FIRST, replace(SECOND, chain_id="test")], FIRST),
    ],
)
def test_generation_in_force(records: list[Generation], expected: Generation | None) -> None:
    """Each valid record follows the one before; who loses the race is passed by."""
    assert last(map(encode_generation, records)) == expected


def test_damaged_record_is_void() -> None:
    """A record that was cut off does not hide the ones around it; a later version does stop the reader."""
    whole = encode_generation(SECOND)

    assert last([b"", encode_generation(FIRST), whole[:-1], whole, b"junk" * 9]) == SECOND
    with pytest.raises(Unsupported, match="version 2"):
        last([encode_generation(FIRST), whole[:4] + b"\x02" + whole[5:]])


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": b"short"},
        {"generation": None},
        {"previous": bytes(15)},
        {"chain": ""},
        {"chain": "x" * 33},
        {"chain": 5},
        {"hash": bytes(31)},
        {"vectors": [[1, bytes(2047)]]},
        {"vectors": [[1]]},
        {"vectors": 5},
        {"counts": [["x", 1]]},
        {"counts": None},
        {"manifest": None},
    ],
    ids=str,
)
def test_malformed_record_is_corrupt(changes: dict[str, Any]) -> None:
    """Every field is there and has its size."""
    assert decode_generation(record_with()) == SECOND
    with pytest.raises(FrameCorrupt):
        decode_generation(record_with(**changes))


@pytest.mark.parametrize("payload", [b"\xc1", b"\x01", b"\x80", b"\x92\x01"])
def test_sealed_garbage_is_corrupt(payload: bytes) -> None:
    """A good checksum over anything else than the map helps nobody."""
    with pytest.raises(FrameCorrupt):
        decode_generation(sealed(payload))


def opening_with(body: bytes) -> bytes:
    return frame.encode(frame.peek(encode_opening(Opening(generation=FIRST, finality=7))), body)


def test_opening_is_strict() -> None:
    """The first record of a partition is a GENERATION frame with finality, and tables that this build has."""
    fields = msgpack.unpackb(frame.decode(encode_opening(Opening(generation=FIRST, finality=7))).body)
    epoch = replace(frame.peek(opening_with(b"")), kind=Kind.EPOCH, codec=Codec.NONE)

    with pytest.raises(FrameCorrupt, match="not a GENERATION frame"):
        decode_opening(frame.encode(epoch, b""))
    for finality in (-1, "7", None):
        with pytest.raises(FrameCorrupt, match="without finality"):
            decode_opening(opening_with(msgpack.packb(fields | {"finality": finality})))
    with pytest.raises(SettingsConflict, match="account"):
        decode_opening(opening_with(msgpack.packb(fields | {"tables": {"utxo": 1, "account": 2}})))
    with pytest.raises(FrameCorrupt):
        decode_opening(opening_with(msgpack.packb([1, 2])))
