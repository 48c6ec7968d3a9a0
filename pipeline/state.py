"""What state is made of: tables, keys, values, changes, and where a key stands in a store.

A chain has tables; a table has a schema; the schema says how long a whole key is, which leading bytes route it, and
how whole keys and values become what a store holds. Two layouts of a key exist:

* the **whole key** is what the chain means (`utxo`: txid in hashing order, 32 B, then the output index, 4 B
  big-endian). Diffs, the commitment, archives and people use whole keys.
* the **storage key** is where a store keeps it: ``key_group (2 B, big-endian) || table id (1 B) || short key``.
  For a table with ``short_at`` set, the short key leaves out the middle of the routing hash, so that an existing key
  can be named by few bytes on the wire and found by a plain multi-get. The rest of the hash goes into the value.

Two whole keys may share a short key: somebody who tries hard enough can make two meet. Then their entries share a
**bucket**. Nothing but the layout of the stored bytes follows from it. A stored value of such a table is

    n (1 B, 1..255) || n times: rest of the key || (only if n > 1: value length, 4 B little-endian) || value

in ascending order of the rests. Equal states therefore have equal stored bytes.

Key group = the top 12 bits of the routing bytes: 4,096 slices, fixed for ever, so shard counts can change later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import SchemaUnknown, StoreCorrupt

KEY_GROUPS = 4096
KEY_BYTES_MAX = 1 << 10
VALUE_BYTES_MAX = 4 << 20
"""Bounds of one key and one value. The largest value a chain knows is a contract or a script: far below 4 MiB."""

_STORAGE_PREFIX_BYTES = 3
_BUCKET_ENTRIES_MAX = 255
_VECTOR_KEYS_MIN = 64
"""Below so many keys numpy's fixed costs outweigh its speed."""
_GROUP_PREFIX = [group.to_bytes(2, "big") for group in range(KEY_GROUPS)]

Reader = Callable[[list[bytes]], Sequence["bytes | None"]]
"""Storage keys in, stored bytes out, None where nothing stands: one multi-get."""


class Change(NamedTuple):
    """One key's netted change in one block. ``before`` None: created. ``after`` None: deleted. Never equal."""

    key: bytes
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One table's layout. Generations fix it: it never changes under a running chain."""

    table_id: int  # 1..255, part of every element hash and storage key
    name: str
    key_bytes: int  # whole key
    route_bytes: int  # leading bytes of a whole key that decide its key group; grouped on the wire
    short_at: int  # bytes of the route kept in the storage key; equal to route_bytes: nothing is left out

    @property
    def rest(self) -> slice:
        """The part of a whole key that its storage key leaves out."""
        return slice(self.short_at, self.route_bytes)

    @property
    def is_short(self) -> bool:
        return self.short_at != self.route_bytes

    @property
    def short_key_bytes(self) -> int:
        return self.key_bytes - (self.route_bytes - self.short_at)

    def storage_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """Whole keys to storage keys, in the same order."""
        if len(keys) < _VECTOR_KEYS_MIN:
            short_at, route = self.short_at, self.route_bytes
            return self.storage_keys_of_short([key[:short_at] + key[route:] for key in keys])
        return self._place(keys, self.key_bytes)

    def storage_keys_of_short(self, short_keys: Sequence[bytes]) -> list[bytes]:
        """Short keys, as references on the wire name them, to storage keys."""
        if len(short_keys) >= _VECTOR_KEYS_MIN:
            return self._place(short_keys, self.short_key_bytes)
        table, prefix = bytes([self.table_id]), _GROUP_PREFIX
        return [prefix[(key[0] << 4) | (key[1] >> 4)] + table + key for key in short_keys]

    def _place(self, keys: Sequence[bytes], key_bytes: int) -> list[bytes]:
        """Whole or short keys to storage keys, all at once: three times as fast as key by key."""
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, key_bytes)
        tail_bytes = self.key_bytes - self.route_bytes
        size = _STORAGE_PREFIX_BYTES + self.short_key_bytes
        placed = np.empty((len(rows), size), np.uint8)
        placed[:, 0] = rows[:, 0] >> 4
        placed[:, 1] = rows[:, 0] << 4 | rows[:, 1] >> 4
        placed[:, 2] = self.table_id
        placed[:, 3 : 3 + self.short_at] = rows[:, : self.short_at]
        placed[:, size - tail_bytes :] = rows[:, key_bytes - tail_bytes :]
        return _rows(placed)

    def stored_heads(self, keys: Sequence[bytes]) -> list[bytes]:
        """What stands before the value of each whole key of a short table, where no other key shares its short key."""
        if len(keys) < _VECTOR_KEYS_MIN:
            return [b"\x01" + key[self.rest] for key in keys]
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, self.key_bytes)[:, self.rest]
        heads = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
        heads[:, 0] = 1
        heads[:, 1:] = rows
        return _rows(heads)

    def find(self, key: bytes, stored: bytes | None) -> bytes | None:
        """The value of one whole key in what stands under its storage key, or None."""
        if stored is None:
            return None
        if not self.is_short:
            return stored
        rest = key[self.rest]
        if stored[0] == 1:
            end = 1 + len(rest)
            return stored[end:] if stored[1:end] == rest else None
        for other, value in self.entries(stored):
            if other == rest:
                return value
        return None

    def find_all(self, keys: Sequence[bytes], stored: Sequence[bytes | None]) -> list[bytes | None]:
        """`find` for a batch: the hot path of every read."""
        if not self.is_short:
            return list(stored)
        start, stop = self.short_at, self.route_bytes
        end = 1 + stop - start
        find = self.find
        return [
            None
            if held is None
            else (held[end:] if held[0] == 1 and held[1:end] == key[start:stop] else find(key, held))
            for key, held in zip(keys, stored, strict=True)
        ]

    def entries(self, stored: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The (rest of key, value) pairs under one storage key of a short table. Raises StoreCorrupt."""
        rest_bytes = self.route_bytes - self.short_at
        count = stored[0] if stored else 0
        if count == 1 and len(stored) >= 1 + rest_bytes:
            yield stored[1 : 1 + rest_bytes], stored[1 + rest_bytes :]
            return
        at, previous = 1, b""
        for _ in range(count):
            head = at + rest_bytes + 4
            rest = stored[at : at + rest_bytes]
            stop = head + int.from_bytes(stored[at + rest_bytes : head], "little")
            if stop > len(stored) or rest <= previous:
                raise self._corrupt(stored)
            yield rest, stored[head:stop]
            at, previous = stop, rest
        if count < 2 or at != len(stored):
            raise self._corrupt(stored)

    def _corrupt(self, stored: bytes) -> StoreCorrupt:
        return StoreCorrupt(
            f"a stored value of table {self.name} is malformed ({len(stored)} bytes, first {stored[:8].hex()})",
            way_out="run `stateferry verify --level full`, then restore this data directory",
        )

    def with_value(self, key: bytes, stored: bytes | None, value: bytes | None) -> bytes | None:
        """What stands under a storage key after ``key`` got ``value`` (None: was deleted)."""
        if not self.is_short:
            return value
        rest = key[self.rest]
        if stored is None or (stored[0] == 1 and stored[1 : 1 + len(rest)] == rest):
            return None if value is None else b"\x01" + rest + value
        others = [entry for entry in self.entries(stored) if entry[0] != rest]
        if value is not None:
            others.append((rest, value))
            others.sort()
        return self.bucket(others)

    def bucket(self, entries: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """Ascending (rest, value) entries as stored bytes; None if there are none."""
        if not entries:
            return None
        if len(entries) == 1:
            return b"\x01" + entries[0][0] + entries[0][1]
        if len(entries) > _BUCKET_ENTRIES_MAX:
            raise StoreCorrupt(f"more than {_BUCKET_ENTRIES_MAX} keys of table {self.name} share one short key")
        parts = [bytes([len(entries)])]
        for rest, value in entries:
            parts += (rest, len(value).to_bytes(4, "little"), value)
        return b"".join(parts)

    def items(self, storage_key: bytes, stored: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The (whole key, value) pairs that stand under one storage key, ascending."""
        short = storage_key[_STORAGE_PREFIX_BYTES:]
        if not self.is_short:
            yield short, stored
            return
        head, tail = short[: self.short_at], short[self.short_at :]
        for rest, value in self.entries(stored):
            yield head + rest + tail, value

    def plain_items(
        self, storage_keys: Sequence[bytes], stored: Sequence[bytes]
    ) -> tuple[list[bytes], list[bytes]] | None:
        """`items` for a batch: the whole keys and the values. None where some entry is not the plain one that nearly
        all are, or does not belong to this table: for those there are `schema_of_storage_key` and `items`."""
        size, rest_bytes = _STORAGE_PREFIX_BYTES + self.short_key_bytes, self.route_bytes - self.short_at
        if set(map(len, storage_keys)) != {size} or not self.is_short or min(map(len, stored)) < 1 + rest_bytes:
            return None
        rows = np.frombuffer(b"".join(storage_keys), np.uint8).reshape(-1, size)
        is_own = rows[:, 2] == self.table_id
        is_own &= (rows[:, 0] == rows[:, 3] >> 4) & (rows[:, 1] == rows[:, 3] << 4 | rows[:, 4] >> 4)
        if not is_own.all() or bytes(map(itemgetter(0), stored)).strip(b"\1"):
            return None
        rests = b"".join(map(itemgetter(slice(1, 1 + rest_bytes)), stored))
        keys = np.empty((len(rows), self.key_bytes), np.uint8)
        keys[:, : self.short_at] = rows[:, 3 : 3 + self.short_at]
        keys[:, self.short_at : self.route_bytes] = np.frombuffer(rests, np.uint8).reshape(-1, rest_bytes)
        keys[:, self.route_bytes :] = rows[:, 3 + self.short_at :]
        return _rows(keys), list(map(itemgetter(slice(1 + rest_bytes, None)), stored))


def _rows(table: npt.NDArray[np.uint8]) -> list[bytes]:
    """The rows of a table of bytes: as `void` they become bytes objects five times as fast as by slicing."""
    rows: Any = table.view(np.dtype((np.void, table.shape[1]))).ravel()
    return cast(list[bytes], rows.tolist())


UTXO = Schema(table_id=1, name="utxo", key_bytes=36, route_bytes=32, short_at=8)
"""Unspent coins. Whole key: txid in hashing order (not the reversed order people see), output index big-endian."""

SCHEMAS: dict[int, Schema] = {schema.table_id: schema for schema in (UTXO,)}
SCHEMAS_BY_NAME: dict[str, Schema] = {schema.name: schema for schema in SCHEMAS.values()}


def schema_named(name: str) -> Schema:
    """The schema of a table. Raises SchemaUnknown."""
    try:
        return SCHEMAS_BY_NAME[name]
    except KeyError:
        known = ", ".join(sorted(SCHEMAS_BY_NAME))
        raise SchemaUnknown(f"there is no table {name!r}", way_out=f"tables are: {known}") from None


def schema_of_storage_key(storage_key: bytes) -> Schema:
    """The schema of the table a storage key belongs to. Raises StoreCorrupt."""
    schema = SCHEMAS.get(storage_key[2]) if len(storage_key) > _STORAGE_PREFIX_BYTES else None
    if schema is None or len(storage_key) != _STORAGE_PREFIX_BYTES + schema.short_key_bytes:
        raise StoreCorrupt(f"storage key {storage_key.hex()} belongs to no table of this version")
    if key_group(storage_key) != (storage_key[3] << 4) | (storage_key[4] >> 4):
        raise StoreCorrupt(f"storage key {storage_key.hex()} stands in a key group that is not its own")
    return schema


def key_group(storage_key: bytes) -> int:
    return int.from_bytes(storage_key[:2], "big")
