"""Keys and where they stand: layouts against literal bytes, buckets against a dict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from walks import coin

from pipeline.errors import SchemaUnknown, StoreCorrupt
from pipeline.state import SCHEMAS, UTXO, Schema, key_group, schema_named, schema_of_storage_key

PLAIN = Schema(table_id=9, name="plain", key_bytes=20, route_bytes=20, short_at=20)

rests = st.integers(0, 3).map(lambda number: bytes([number]) * 24)
values = st.binary(max_size=8)


def key_of(rest: bytes) -> bytes:
    return b"\xab\xcd" + bytes(6) + rest + b"\0\0\0\x07"


def test_storage_key_is_group_table_and_short_key() -> None:
    """A coin stands under the top 12 bits of its txid, the table, 8 bytes of the txid and the index."""
    key = bytes(range(0xA0, 0xC0)) + b"\0\0\0\x05"

    (storage_key,) = UTXO.storage_keys([key])

    assert storage_key.hex() == "0a0a" + "01" + "a0a1a2a3a4a5a6a7" + "00000005"
    assert key_group(storage_key) == 0xA0A


def test_plain_table_keeps_whole_keys() -> None:
    """A table that leaves nothing out stands under group, table and the whole key."""
    key = bytes(range(20))

    assert PLAIN.storage_keys([key]) == [b"\x00\x00\x09" + key]
    assert list(PLAIN.items(b"\x00\x00\x09" + key, b"value")) == [(key, b"value")]
    assert PLAIN.find_all([key, key], [b"", None]) == [b"", None]


@pytest.mark.parametrize("schema", [UTXO, PLAIN], ids=lambda schema: schema.name)
@given(data=st.data(), count=st.integers(0, 200))
def test_many_keys_stand_where_one_does(schema: Schema, data: st.DataObject, count: int) -> None:
    """Storage keys do not depend on how many are asked for; short keys lead to the same place."""
    random = data.draw(st.randoms(use_true_random=False))
    keys = [random.randbytes(schema.key_bytes) for _ in range(count)]
    shorts = [key[: schema.short_at] + key[schema.route_bytes :] for key in keys]

    storage_keys = schema.storage_keys(keys)

    assert storage_keys == [schema.storage_keys([key])[0] for key in keys]
    assert storage_keys == schema.storage_keys_of_short(shorts)
    assert [storage_key[3:] for storage_key in storage_keys] == shorts


@given(st.lists(st.tuples(rests, st.none() | values), max_size=12))
def test_bucket_equals_dict(writes: list[tuple[bytes, bytes | None]]) -> None:
    """Whatever was written under one short key, each whole key finds its own value."""
    stored: bytes | None = None
    model: dict[bytes, bytes] = {}
    for rest, value in writes:
        stored = UTXO.with_value(key_of(rest), stored, value)
        model.pop(key_of(rest), None)
        if value is not None:
            model[key_of(rest)] = value
        everywhere = [key_of(bytes([number]) * 24) for number in range(5)]

        assert [UTXO.find(key, stored) for key in everywhere] == [model.get(key) for key in everywhere]
        assert UTXO.find_all(everywhere, [stored] * 5) == [model.get(key) for key in everywhere]

    at = UTXO.storage_keys([key_of(bytes(24))])[0]
    assert ([] if stored is None else list(UTXO.items(at, stored))) == sorted(model.items())


@given(st.lists(st.binary(min_size=36, max_size=36), min_size=1, max_size=80, unique=True), st.data())
def test_plain_items_are_the_items(keys: list[bytes], data: st.DataObject) -> None:
    """Entries of one key each are read at once, to what `items` reads; any other entry among them is left to it."""
    storage_keys = UTXO.storage_keys(keys)
    stored = [b"\x01" + key[8:32] + key[: key[0] % 7] for key in keys]

    found = UTXO.plain_items(storage_keys, stored)

    assert found is not None
    assert list(zip(*found, strict=True)) == [
        item for at, held in zip(storage_keys, stored, strict=True) for item in UTXO.items(at, held)
    ]

    odd = data.draw(st.integers(0, len(keys) - 1))
    for other in (b"", b"\x01" + bytes(23), b"\x02" + stored[odd][1:]):
        assert UTXO.plain_items(storage_keys, [*stored[:odd], other, *stored[odd + 1 :]]) is None
    group = data.draw(st.integers(0, 2))
    moved = bytes(byte ^ (at == group) for at, byte in enumerate(storage_keys[odd]))
    for strange in (moved, storage_keys[odd] + b"x"):
        assert UTXO.plain_items([*storage_keys[:odd], strange, *storage_keys[odd + 1 :]], stored) is None


@given(st.dictionaries(rests, values, min_size=1), st.randoms(use_true_random=False))
def test_equal_states_have_equal_bytes(held: dict[bytes, bytes], random) -> None:  # type: ignore[no-untyped-def]
    """The order in which keys met under a short key leaves no trace."""
    order = list(held.items())
    random.shuffle(order)
    stored = None
    for rest, value in order:
        stored = UTXO.with_value(key_of(rest), stored, value)

    assert stored == UTXO.bucket(sorted(held.items()))


def test_stored_bytes_are_as_documented() -> None:
    """One entry: count, rest, value. Several: count, then rest, length, value of each."""
    one, two = b"\x01" * 24, b"\x02" * 24

    assert UTXO.bucket([]) is None
    assert UTXO.bucket([(one, b"v")]) == b"\x01" + one + b"v"
    assert UTXO.bucket([(one, b"v"), (two, b"")]) == b"\x02" + one + b"\x01\0\0\0v" + two + b"\0\0\0\0"


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\0",
        b"\x01" + bytes(23),
        b"\x02" + b"\x01" * 24 + b"\0\0\0\0",
        b"\x02" + b"\x01" * 24 + bytes(4) + b"\x01" * 24 + bytes(4),
        b"\x02" + b"\x02" * 24 + bytes(4) + b"\x01" * 24 + bytes(4),
        b"\x02" + b"\x01" * 24 + bytes(4) + b"\x02" * 24 + bytes(4) + b"x",
        b"\x02" + b"\x01" * 24 + b"\xff\xff\xff\xff" + b"\x02" * 24 + bytes(4),
        b"\x03" + b"\x01" * 24 + bytes(4) + b"\x02" * 24 + bytes(4),
    ],
    ids=["empty", "no-entry", "cut", "one-of-two", "twice", "descending", "trailing", "length-lies", "two-of-three"],
)
def test_malformed_stored_value_is_corrupt(stored: bytes) -> None:
    """Stored bytes that no state has are an error, never a guess."""
    with pytest.raises(StoreCorrupt, match="malformed"):
        list(UTXO.entries(stored))


@pytest.mark.parametrize(
    "storage_key", [b"", b"\0\0\x01", b"\0\0\x07" + bytes(12), b"\0\0\x01" + bytes(13), b"\0\x01\x01" + bytes(12)]
)
def test_storage_key_of_no_table_is_corrupt(storage_key: bytes) -> None:
    """A key of an unknown table, of a wrong length, or in another group than its own is refused."""
    with pytest.raises(StoreCorrupt):
        schema_of_storage_key(storage_key)


def test_storage_key_names_its_table() -> None:
    """Every storage key that a schema makes is recognised as its own."""
    assert schema_of_storage_key(UTXO.storage_keys([coin(0xAB, 3, 2)])[0]) is UTXO
    assert schema_named("utxo") is UTXO is SCHEMAS[1]

    with pytest.raises(SchemaUnknown, match="tables are: utxo"):
        schema_named("coins")
