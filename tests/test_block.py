"""Block events: both directions, and strict decoding of everything a source may send."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from walks import NO_PARENT, STAMP, block, coin, make_walk, ref

from pipeline import codec
from pipeline.block import (
    EVENT_BYTES_MAX,
    OPS_MAX,
    Block,
    Connect,
    Event,
    Op,
    Rewind,
    SourceEpoch,
    decode_event,
    encode_event,
)
from pipeline.errors import EventCorrupt, Unsupported

CONNECT = Connect(
    stamp=STAMP,
    walk=7,
    block=block(ref(3), NO_PARENT, (Op.CREATE, coin(1), b"v"), (Op.DELETE, coin(2)), (Op.PUT, coin(3), b"")),
)
REWIND = Rewind(stamp=STAMP, walk=8, to=ref(2))
EPOCH = SourceEpoch(stamp=STAMP, resume_walk=9)
EVENTS = [CONNECT, REWIND, EPOCH]
VOIDING = replace(EPOCH, voids=True)


def fields_of(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(encode_event(event)[13:])
    return fields


def sealed(payload: bytes) -> bytes:
    return b"SFev\x01" + xxhash.xxh3_64_digest(payload) + payload


def event_with(event: Event, **changes: Any) -> bytes:
    """The event with other fields; None takes one out."""
    fields = fields_of(event) | changes
    return sealed(msgpack.packb({name: value for name, value in fields.items() if value is not None}))


def tables_with(tables: Any, op_count: int = 1) -> bytes:
    packed = codec.compress(msgpack.packb(tables), codec.Codec.ZSTD)
    return event_with(CONNECT, tables=packed, op_count=op_count)


@pytest.mark.parametrize("event", [*EVENTS, VOIDING, *(step.event for step in make_walk(3, 20))], ids=lambda _: "")
def test_round_trip(event: Event) -> None:
    """What was encoded comes back, and encodes to the same bytes."""
    data = encode_event(event)

    assert decode_event(data) == event
    assert encode_event(decode_event(data)) == data


def test_without_ops_the_branch_is_still_there() -> None:
    """A reader that only wants the branch need not unpack the ops."""
    event = decode_event(encode_event(CONNECT), with_ops=False)

    assert event == replace(CONNECT, block=replace(CONNECT.block, tables={}))


def test_blocks_may_be_empty() -> None:
    """A block without tables, and one with a table without ops, are blocks."""
    bare = replace(CONNECT, block=Block(ref=ref(0), parent_hash=NO_PARENT, time_s=0))
    empty = replace(CONNECT, block=block(ref(0), NO_PARENT))

    assert decode_event(encode_event(bare)) == bare
    assert decode_event(encode_event(empty)) == empty


@pytest.mark.parametrize("event", EVENTS, ids=["connect", "rewind", "epoch"])
def test_every_flip_and_cut_is_noticed(event: Event) -> None:
    """No bit of an event can change, and no byte go, without an error."""
    data = encode_event(event)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises((EventCorrupt, Unsupported)):
            decode_event(bytes(flipped))
        with pytest.raises(EventCorrupt):
            decode_event(data[:at])


@given(st.binary(max_size=200))
def test_sealed_garbage_is_corrupt(payload: bytes) -> None:
    """A good checksum over anything else than an event's map helps nobody."""
    with pytest.raises(EventCorrupt):
        decode_event(sealed(payload))


def test_unknown_versions_and_kinds_are_unsupported() -> None:
    """What a newer build says is told apart from damage."""
    data = encode_event(EPOCH)
    with pytest.raises(Unsupported, match="version 2"):
        decode_event(data[:4] + b"\x02" + data[5:])
    with pytest.raises(Unsupported, match="kind 'merge'"):
        decode_event(event_with(EPOCH, kind="merge"))
    with pytest.raises(Unsupported, match="table 'slot'"):
        decode_event(tables_with({"slot": {"ops": b"", "keys": [], "values": []}}, 0))


@pytest.mark.parametrize(
    ("event", "changes", "message"),
    [
        (EPOCH, {"walk": 3}, "fields that this version does not know"),
        (EPOCH, {"resume_walk": None}, "'resume_walk' is not of type int"),
        (EPOCH, {"resume_walk": True}, "'resume_walk' is not of type int"),
        (EPOCH, {"resume_walk": 1.0}, "'resume_walk' is not of type int"),
        (EPOCH, {"resume_walk": -1}, "not within"),
        (EPOCH, {"resume_walk": 1 << 63}, "not within"),
        (EPOCH, {"voids": False}, "'voids' stands there and says no"),
        (EPOCH, {"voids": 1}, "'voids' is not of type bool"),
        (REWIND, {"voids": True}, "fields that this version does not know"),
        (EPOCH, {"chain": ""}, "'chain' is empty or longer"),
        (EPOCH, {"chain": "x" * 33}, "'chain' is empty or longer"),
        (EPOCH, {"chain": b"walk"}, "'chain' is not of type str"),
        (EPOCH, {"generation": b"short"}, "'generation' has 5 bytes, not 16"),
        (EPOCH, {"writer": "w" * 16}, "'writer' is not of type bytes"),
        (REWIND, {"hash": bytes(31)}, "'hash' has 31 bytes, not 32"),
        (CONNECT, {"parent": bytes(33)}, "'parent' has 33 bytes, not 32"),
        (CONNECT, {"op_count": 2}, "op count is not the number of its ops"),
        (CONNECT, {"op_count": OPS_MAX + 1}, "not within"),
        (CONNECT, {"tables": b"no zstd"}, "cannot be decompressed"),
        (CONNECT, {"tables": codec.compress(b"", codec.Codec.ZSTD)}, "not the MessagePack map"),
        (EPOCH, {"resume_walk": msgpack.ExtType(1, b"x")}, "not the MessagePack map"),
    ],
)
def test_fields_are_strict(event: Event, changes: dict[str, Any], message: str) -> None:
    """Every field has its type, its size and its range; none is missing, none is too many."""
    with pytest.raises(EventCorrupt, match=message):
        decode_event(event_with(event, **changes))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "not a map"),
        ({"utxo": {"ops": b"\x02", "keys": [coin(1)]}}, "does not have the columns"),
        ({"utxo": {"ops": b"\x02", "keys": [coin(1)], "values": [], "more": 1}}, "does not have the columns"),
        ({"utxo": {"ops": "\x02", "keys": [coin(1)], "values": []}}, "a column has the wrong type"),
        ({"utxo": {"ops": b"\x02", "keys": coin(1), "values": []}}, "a column has the wrong type"),
        ({"utxo": {"ops": b"\x04", "keys": [coin(1)], "values": [b""]}}, "none of create, delete, put"),
        ({"utxo": {"ops": b"\0", "keys": [coin(1)], "values": [b""]}}, "none of create, delete, put"),
        ({"utxo": {"ops": b"\x02", "keys": [], "values": []}}, "matching lengths"),
        ({"utxo": {"ops": b"\x02", "keys": [coin(1)], "values": [b""]}}, "matching lengths"),
        ({"utxo": {"ops": b"\x01", "keys": [coin(1)], "values": []}}, "matching lengths"),
        ({"utxo": {"ops": b"\x01", "keys": [coin(1)], "values": ["v"]}}, "not a byte string"),
        ({"utxo": {"ops": b"\x01", "keys": ["k" * 36], "values": [b"v"]}}, "not a byte string"),
        ({"utxo": {"ops": b"\x01", "keys": [coin(1)[:-1]], "values": [b"v"]}}, "not 36 bytes long"),
        (
            {"utxo": {"ops": b"\x01", "keys": [coin(1)], "values": [random.Random(1).randbytes((4 << 20) + 1)]}},
            "longer than 4194304 bytes",
        ),
    ],
)
def test_columns_are_strict(tables: Any, message: str) -> None:
    """A table's columns have their types, lengths and sizes."""
    with pytest.raises(EventCorrupt, match=message):
        decode_event(tables_with(tables))


def test_field_twice_is_corrupt() -> None:
    """Two readers must never take different values from one event."""
    payload = msgpack.packb(fields_of(EPOCH))
    assert payload[0] == 0x80 | 6

    twice = bytes([payload[0] + 1]) + payload[1:] + msgpack.packb("resume_walk") + msgpack.packb(1)

    with pytest.raises(EventCorrupt, match="twice"):
        decode_event(sealed(twice))


def test_announced_lists_take_no_memory() -> None:
    """An array of millions of entries, announced in five bytes at every level, is refused as what it is."""
    nested = b"\x81\xa4kind" + b"\xdd\x00\x3d\x09\x00" * 300

    with pytest.raises(EventCorrupt, match="max_array_len"):
        decode_event(sealed(nested))


def test_event_over_the_bound_is_corrupt() -> None:
    """The wire size is looked at first."""

    class Long(bytes):
        def __len__(self) -> int:
            return EVENT_BYTES_MAX + 1

    with pytest.raises(EventCorrupt, match="over the bound"):
        decode_event(Long(b"SFev"))
