"""Columns: both forms both ways, one encoding per content, and nothing but named errors out of any bytes."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from walks import coin

from pipeline.columns import CHANGES_MAX
from pipeline.delta import decode_references, decode_whole, encode_references, encode_whole, resolve
from pipeline.errors import ApplyConflict, FrameCorrupt
from pipeline.state import UTXO, Change, Schema
from pipeline.table_diff import TableDiff, table_diff

PLAIN = Schema(table_id=9, name="plain", key_bytes=12, route_bytes=10, short_at=10)
SCHEMAS = [UTXO, PLAIN]

State = dict[bytes, bytes]


def keys_of(schema: Schema) -> st.SearchStrategy[bytes]:
    """Keys that meet in everything that a column groups by."""
    head, rest, index = st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)
    if schema is UTXO:
        return st.builds(coin, head, index, rest)
    return st.builds(lambda a, b, c: bytes([a]) * 8 + bytes([b, b, 0, c]), head, rest, index)


def cases(schema: Schema) -> st.SearchStrategy[tuple[State, TableDiff]]:
    """A state, and changes on top of it."""
    value = st.binary(max_size=3) | st.integers(0, 70_000).map(bytes)

    def build(state: State, wanted: dict[bytes, bytes | None]) -> tuple[State, TableDiff]:
        changes = [
            Change(key, state.get(key), after) for key, after in sorted(wanted.items()) if state.get(key) != after
        ]
        return state, table_diff(schema, changes)

    keys = keys_of(schema)
    return st.builds(
        build,
        st.dictionaries(keys, st.binary(max_size=3), max_size=12),
        st.dictionaries(keys, st.none() | value, max_size=12),
    )


def stored_of(schema: Schema, state: State) -> Callable[[Sequence[bytes]], list[bytes | None]]:
    held: dict[bytes, bytes | None] = {}
    for key, value in state.items():
        (at,) = schema.storage_keys([key])
        held[at] = schema.with_value(key, held.get(at), value)
    return lambda storage_keys: list(map(held.get, storage_keys))


def shared_of(schema: Schema, state: State) -> set[bytes]:
    (places,) = [schema.storage_keys(list(state))]
    return {key for key, at in zip(state, places, strict=True) if schema.is_short and places.count(at) > 1}


def refer(schema: Schema, state: State, diff: TableDiff) -> bytes:
    return encode_references(diff, shared_of(schema, state))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
@given(data=st.data())
def test_both_forms_round_trip(schema: Schema, data: st.DataObject) -> None:
    """The whole form stands alone; the reference form needs the state that it was made against."""
    state, diff = data.draw(cases(schema))
    references = decode_references(schema, memoryview(refer(schema, state, diff)))

    assert decode_whole(schema, memoryview(encode_whole(diff))) == diff
    assert resolve(references, stored_of(schema, state)(references.storage_keys())) == diff
    assert len(references) == len(diff)


def test_short_keys_need_not_ascend_as_whole_keys_do() -> None:
    """Two txids that share 8 bytes, at different indexes, are references like any others."""
    state = {coin(1, 2, 0): b"one", coin(1, 1, 5): b"two", coin(1, 3, 9): b"three"}
    diff = table_diff(UTXO, [Change(key, state[key], None) for key in sorted(state)])
    references = decode_references(UTXO, memoryview(encode_references(diff, set())))

    assert references.deleted_short == [coin(1, index)[:8] + coin(1, index)[32:] for index in (1, 2, 3)]
    assert resolve(references, stored_of(UTXO, state)(references.storage_keys())) == diff


def test_shared_short_keys_are_named_whole() -> None:
    """A reference is made only where it names one key; the others stand whole among the exceptions."""
    state = {coin(1, 0, 0): b"a", coin(1, 0, 1): b"b", coin(2): b"c"}
    diff = table_diff(UTXO, [Change(coin(1, 0, 1), b"b", b"B"), Change(coin(2), b"c", b"C")])
    references = decode_references(UTXO, memoryview(refer(UTXO, state, diff)))

    assert references.updated_whole == [coin(1, 0, 1)]
    assert references.updated_short == [coin(2)[:8] + coin(2)[32:]]


@pytest.mark.parametrize(
    ("state", "shared"),
    [
        ({}, set()),
        ({coin(1, 0, 0): b"a", coin(1, 0, 1): b"b"}, set()),
        ({coin(1, 0, 0): b"a"}, {coin(1, 0, 0)}),
        ({coin(1, 0, 1): b"a", coin(1, 0, 2): b"b"}, {coin(1, 0, 0)}),
    ],
    ids=["nothing-there", "short-of-two", "whole-of-one", "whole-of-others"],
)
def test_references_meet_only_their_state(state: State, shared: set[bytes]) -> None:
    """Against any other state than their own, references are a conflict."""
    diff = table_diff(UTXO, [Change(coin(1, 0, 0), b"a", None)])
    references = decode_references(UTXO, memoryview(encode_references(diff, shared)))

    with pytest.raises(ApplyConflict):
        resolve(references, stored_of(UTXO, state)(references.storage_keys()))


def mangled(data: bytes, random: Random) -> bytes:
    """Cut, flip, overwrite with a number that lies, drop or double a stretch."""
    at = random.randrange(len(data) + 1)
    match random.randrange(5):
        case 0:
            return data[:at]
        case 1:
            number = random.choice((0, 1, 255, 256, CHANGES_MAX, CHANGES_MAX + 1, (1 << 32) - 1))
            return data[:at] + struct.pack("<I", number) + data[at + 4 :]
        case 2:
            return data[:at] + data[at + random.randrange(1, 9) :]
        case 3:
            return data[:at] + data[max(0, at - 8) :]
        case _:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_accepted_bytes_are_the_only_encoding(schema: Schema, data: st.DataObject, seed: int) -> None:
    """Mangled columns are refused as corrupt, or are exactly what their content encodes to."""
    random = Random(seed)
    state, diff = data.draw(cases(schema))
    whole, sent = encode_whole(diff), refer(schema, state, diff)
    for _ in range(20):
        other = mangled(whole, random)
        try:
            decoded = decode_whole(schema, memoryview(other))
        except FrameCorrupt:
            continue
        assert encode_whole(decoded) == other
    for _ in range(20):
        other = mangled(sent, random)
        try:
            references = decode_references(schema, memoryview(other))
            diff = resolve(references, stored_of(schema, state)(references.storage_keys()))
        except (FrameCorrupt, ApplyConflict):
            continue
        assert encode_references(diff, shared_of(schema, state)) == other


@given(st.binary(max_size=120))
def test_garbage_is_corrupt(data: bytes) -> None:
    """Any bytes are refused as corrupt, or are an encoding."""
    for counts in (b"", struct.pack("<III", 1, 0, 0), bytes(12)):
        try:
            decoded = decode_whole(UTXO, memoryview(counts + data))
        except FrameCorrupt:
            continue
        assert encode_whole(decoded) == counts + data


@pytest.mark.parametrize("decode", [decode_whole, decode_references])
@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<III", CHANGES_MAX, 0, 0),
        struct.pack("<III", CHANGES_MAX, 0, 0) + struct.pack("<I", CHANGES_MAX) + bytes(999),
        struct.pack("<III", CHANGES_MAX, 1, 0) + bytes(99),
        struct.pack("<III", *[(1 << 32) - 1] * 3) + bytes(99),
        struct.pack("<III", 0, 0, CHANGES_MAX) + bytes(99),
    ],
)
def test_announced_counts_take_no_memory(decode: Callable[..., object], data: bytes) -> None:
    """Counts that lie are found out before anything is made for them."""
    tracemalloc.start()
    with pytest.raises(FrameCorrupt):
        decode(UTXO, memoryview(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1 << 20


def whole(created: Sequence[bytes] = (), **columns: Sequence[bytes]) -> TableDiff:
    names = ("created_values", "updated_keys", "updated_befores", "updated_afters", "deleted_keys", "deleted_befores")
    columns = {"created_values": [b""] * len(created)} | columns
    return TableDiff(schema=UTXO, created_keys=created, **{name: columns.get(name, ()) for name in names})


@pytest.mark.parametrize(
    ("diff", "message"),
    [
        (whole([coin(2), coin(1)]), "overflow"),
        (whole([coin(1, 1), coin(1, 0)]), "do not ascend"),
        (whole([coin(1, 0, 1), coin(1, 0, 0)]), "do not ascend"),
        (whole([coin(1), coin(1)]), "do not ascend"),
        (whole([coin(1)], deleted_keys=[coin(1)], deleted_befores=[b""]), "changed twice"),
        (whole(updated_keys=[coin(1)], updated_befores=[b"x"], updated_afters=[b"x"]), "changes nothing"),
    ],
    ids=["heads-descend", "suffixes-descend", "tails-descend", "twice", "in-two-groups", "same-value"],
)
def test_content_that_no_block_has_is_corrupt(diff: TableDiff, message: str) -> None:
    """Keys ascend strictly, stand in one group, and every update changes something."""
    with pytest.raises(FrameCorrupt, match=message):
        decode_whole(UTXO, memoryview(encode_whole(diff)))


def test_heads_of_values_stand_in_planes() -> None:
    """The first 3 bytes of every value that has so many come first, plane by plane; then what is left of all."""
    values = [b"abcd", b"xy", b"ABC", b"", b"123456"]
    keys = [coin(number) for number in range(5)]
    data = encode_whole(whole(keys, created_values=values))

    assert b"\x01\x04\x02\x03\x00\x06" + b"aA1" + b"bB2" + b"cC3" + b"d" + b"xy" + b"456" in data
    assert decode_whole(UTXO, memoryview(data)).created_values == values


def test_inverting_twice_changes_nothing() -> None:
    """Created and deleted trade places, before and after too."""
    diff = whole([coin(1)], updated_keys=[coin(2)], updated_befores=[b"b"], updated_afters=[b"a"])

    assert diff.inverted().changes() == [Change(coin(1), b"", None), Change(coin(2), b"a", b"b")]
    assert diff.inverted().inverted() == diff


def test_bytes_are_as_documented() -> None:
    """One coin created, one spent, in both forms, byte by byte."""
    diff = table_diff(UTXO, [Change(coin(1, 7), None, b"new"), Change(coin(2), b"old", None)])
    created = "01000000" + "01" * 8 + "00" * 24 + "01" + "01" + "00000007"
    deleted = "01000000" + "02" * 8 + "00" * 24 + "01" + "01" + "00000000"
    nothing = "00000000" + "01"
    value = "01" + "03"

    assert encode_whole(diff).hex() == (
        "010000000000000001000000"
        + (created + nothing + deleted)
        + (value + b"new".hex() + "01" + "01" + value + b"old".hex())
    )
    assert encode_references(diff, set()).hex() == (
        "010000000000000001000000"
        + (created + value + b"new".hex())
        + ("00000000" + nothing + nothing + "01")
        + ("00000000" + "01000000" + "02" * 8 + "01" + "01" + "00000000" + nothing)
    )
