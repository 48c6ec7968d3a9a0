"""Changes to bytes and back: one table's sorted, netted changes as compact columns.

Two forms exist. The **whole** form stands alone: whole keys, before- and after-values. It is what archives, journals
and ids are made of. The **reference** form is for the topic: a key that the reader already holds is named by its short
key (for a coin: 8 bytes of the txid, and the index) and its before-value is not sent. On real blocks nine tenths of a
diff are hash bytes that no compressor touches, so leaving them out is the one thing that helps.

Columns are little-endian arrays read in place with numpy. Where a width can be chosen, it is the least of 1, 2, 4
bytes that fits, and a reader refuses a wider one: every set of changes has exactly one encoding. Sorted hashes go out
as differences of their first 8 bytes, in byte planes: with n of them the top log2(n) bits are zeroes that zstd takes.

Whole form                                           Reference form
    u32 created, updated, deleted                        u32 created, updated, deleted
    keys created · keys updated · keys deleted           keys created
    values created                                       values created
    befores updated · afters updated                     references updated · afters updated
    befores deleted                                      references deleted

    keys        routes, suffixes
    routes      u32 distinct; distinct x 8 B heads as differences in 8 byte planes; distinct x tails;
                group sizes as a width column of `distinct` entries
    suffixes    n x suffix bytes, in byte planes
    references  u32 exceptions; short routes and suffixes of the (n - exceptions) references; keys of the exceptions
    values      lengths as a width column of n entries; heads, the first 3 bytes of the m values that have so many,
                in 3 byte planes of m; the rests
    width       u8 width (1, 2, 4), entries

Heads stand apart because the coins of a block begin alike, with its height: 5% of a frame that creates many.

An exception is a key whose short key is not unique in the state before the block: it is named whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ApplyConflict, FrameCorrupt
from pipeline.state import VALUE_BYTES_MAX, Change, Schema

CHANGES_MAX = 8_000_000
"""Bound of one table's changes in one frame."""

_HEAD_BYTES = 8
_VALUE_HEAD_BYTES = 3
_WIDTHS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
"""Entry types by width. Numbers on the wire are little-endian, as are all machines this runs on (asserted below)."""

assert sys.byteorder == "little"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDiff:
    """One table's netted changes in one block.

    * Each group's keys ascend strictly; no key stands in two groups.
    * Values stand at the position of their key. An update's before and after differ.
    """

    schema: Schema
    created_keys: Sequence[bytes]
    created_values: Sequence[bytes]
    updated_keys: Sequence[bytes]
    updated_befores: Sequence[bytes]
    updated_afters: Sequence[bytes]
    deleted_keys: Sequence[bytes]
    deleted_befores: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.created_keys) + len(self.updated_keys) + len(self.deleted_keys)

    def inverted(self) -> TableDiff:
        """The changes that take these back."""
        return TableDiff(
            schema=self.schema,
            created_keys=self.deleted_keys,
            created_values=self.deleted_befores,
            updated_keys=self.updated_keys,
            updated_befores=self.updated_afters,
            updated_afters=self.updated_befores,
            deleted_keys=self.created_keys,
            deleted_befores=self.created_values,
        )

    def changes(self) -> list[Change]:
        """The same as one ascending list."""
        changes = [Change(key, None, value) for key, value in zip(self.created_keys, self.created_values, strict=True)]
        changes += map(Change, self.updated_keys, self.updated_befores, self.updated_afters)
        changes += [
            Change(key, value, None) for key, value in zip(self.deleted_keys, self.deleted_befores, strict=True)
        ]
        changes.sort()
        return changes

    def check(self) -> None:
        """Raises FrameCorrupt unless the invariants hold. Decoders call it; builders hold them by construction."""
        everything = [*self.created_keys, *self.updated_keys, *self.deleted_keys]
        if len(set(everything)) != len(everything):
            raise FrameCorrupt(f"a key of table {self.schema.name} is changed twice")
        for before, after in zip(self.updated_befores, self.updated_afters, strict=True):
            if before == after:
                raise FrameCorrupt(f"an update of table {self.schema.name} changes nothing")


def table_diff(schema: Schema, changes: Sequence[Change]) -> TableDiff:
    """Ascending changes to columns."""
    created = [change for change in changes if change.before is None]
    deleted = [change for change in changes if change.after is None]
    updated = [change for change in changes if change.before is not None and change.after is not None]
    return TableDiff(
        schema=schema,
        created_keys=[change.key for change in created],
        created_values=[change.after or b"" for change in created],
        updated_keys=[change.key for change in updated],
        updated_befores=[change.before or b"" for change in updated],
        updated_afters=[change.after or b"" for change in updated],
        deleted_keys=[change.key for change in deleted],
        deleted_befores=[change.before or b"" for change in deleted],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """A decoded reference form: what is known before the reader's state was asked."""

    schema: Schema
    created_keys: Sequence[bytes]
    created_values: Sequence[bytes]
    updated_short: Sequence[bytes]
    updated_whole: Sequence[bytes]  # exceptions
    updated_afters: Sequence[bytes]  # of the updates in ascending order of their whole keys
    deleted_short: Sequence[bytes]
    deleted_whole: Sequence[bytes]  # exceptions

    @property
    def has_exceptions(self) -> bool:
        return bool(self.updated_whole or self.deleted_whole)

    def __len__(self) -> int:
        updated, deleted = (self.updated_short, self.updated_whole), (self.deleted_short, self.deleted_whole)
        return len(self.created_keys) + sum(map(len, updated + deleted))

    def storage_keys(self) -> list[bytes]:
        """All storage keys to read, in the order that `resolve` expects."""
        schema = self.schema
        return [
            *schema.storage_keys(self.created_keys),
            *schema.storage_keys_of_short(self.updated_short),
            *schema.storage_keys(self.updated_whole),
            *schema.storage_keys_of_short(self.deleted_short),
            *schema.storage_keys(self.deleted_whole),
        ]


# Encoding


@dataclass(frozen=True, slots=True)
class Created:
    """The columns that both forms have in common, made once for both."""

    keys: bytes
    values: bytes

    @classmethod
    def of(cls, diff: TableDiff) -> Created:
        return cls(
            keys=b"".join(_keys_column(diff.schema, diff.created_keys)),
            values=b"".join(_values_column(diff.created_values)),
        )


def encode_whole(diff: TableDiff, created: Created | None = None) -> bytes:
    """One table's changes in whole form. This is also the canonical content that ids are made of."""
    schema = diff.schema
    created = created or Created.of(diff)
    return b"".join(
        (
            _counts(diff),
            created.keys,
            *_keys_column(schema, diff.updated_keys),
            *_keys_column(schema, diff.deleted_keys),
            created.values,
            *_values_column(diff.updated_befores),
            *_values_column(diff.updated_afters),
            *_values_column(diff.deleted_befores),
        )
    )


def encode_references(diff: TableDiff, shared: frozenset[bytes] | set[bytes], created: Created | None = None) -> bytes:
    """One table's changes in reference form. ``shared``: the whole keys, among those updated and deleted, whose short
    key is not unique in the state before the block."""
    schema = diff.schema
    created = created or Created.of(diff)
    return b"".join(
        (
            _counts(diff),
            created.keys,
            created.values,
            *_references_column(schema, diff.updated_keys, shared),
            *_values_column(diff.updated_afters),
            *_references_column(schema, diff.deleted_keys, shared),
        )
    )


def _counts(diff: TableDiff) -> bytes:
    return np.array([len(diff.created_keys), len(diff.updated_keys), len(diff.deleted_keys)], "<u4").tobytes()


def _width_column(numbers: npt.NDArray[np.integer]) -> tuple[bytes, bytes]:
    largest = int(numbers.max()) if len(numbers) else 0
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    return bytes([width]), numbers.astype(_WIDTHS[width]).tobytes()


def _values_column(values: Sequence[bytes]) -> tuple[bytes, ...]:
    lengths = np.fromiter(map(len, values), np.uint32, len(values))
    blob = np.frombuffer(b"".join(values), np.uint8)
    places, is_rest = _value_heads(lengths.astype(np.int64))
    return (*_width_column(lengths), blob[places].tobytes(), blob[is_rest].tobytes())


def _value_heads(lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where values' heads are among all their bytes, plane by plane, and which bytes are in none."""
    stops = np.cumsum(lengths)
    starts = (stops - lengths)[lengths >= _VALUE_HEAD_BYTES]
    places = np.add.outer(np.arange(_VALUE_HEAD_BYTES), starts).ravel()
    is_rest = np.ones(int(stops[-1]) if len(stops) else 0, np.bool_)
    is_rest[places] = False
    return places, is_rest


def _keys_column(schema: Schema, keys: Sequence[bytes]) -> tuple[bytes, ...]:
    return _grouped_column(keys, schema.key_bytes, schema.route_bytes)


def _references_column(
    schema: Schema, keys: Sequence[bytes], shared: frozenset[bytes] | set[bytes]
) -> tuple[bytes, ...]:
    start, stop = schema.short_at, schema.route_bytes
    whole: list[bytes] = []
    if shared:
        whole = [key for key in keys if key in shared]
        keys = [key for key in keys if key not in shared]
    # Two routes may agree in what a short key keeps: then short keys do not ascend as whole keys do.
    short = sorted([key[:start] + key[stop:] for key in keys])
    return (
        np.uint32(len(whole)).tobytes(),
        *_grouped_column(short, schema.short_key_bytes, schema.short_at),
        *_keys_column(schema, whole),
    )


def _grouped_column(keys: Sequence[bytes], key_bytes: int, route_bytes: int) -> tuple[bytes, ...]:
    count = len(keys)
    if not count:
        return (bytes(4), b"\x01")  # no routes, and an empty width column
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(count, key_bytes)
    routes = rows[:, :route_bytes]
    first = np.empty(count, bool)
    first[0] = True
    np.any(routes[1:] != routes[:-1], axis=1, out=first[1:])
    starts = np.flatnonzero(first)
    distinct = np.ascontiguousarray(routes[starts])
    heads = np.ascontiguousarray(distinct[:, :_HEAD_BYTES]).view(">u8").ravel().astype("<u8")
    heads[1:] -= heads[:-1].copy()
    sizes = np.diff(starts, append=count)
    return (
        np.uint32(len(starts)).tobytes(),
        heads.view(np.uint8).reshape(-1, _HEAD_BYTES).T.tobytes(),
        distinct[:, _HEAD_BYTES:].tobytes(),
        *_width_column(sizes),
        rows[:, route_bytes:].T.tobytes(),
    )


# Decoding


class _Columns:
    """A cursor over one table's columns. Every size is checked before a view is made; nothing is copied."""

    def __init__(self, data: memoryview, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    def corrupt(self, why: str) -> FrameCorrupt:
        return FrameCorrupt(f"{self._what}: {why} (at byte {self._at} of {len(self._data)})")

    def take(self, size: int) -> memoryview:
        stop = self._at + size
        if stop > len(self._data):
            raise self.corrupt(f"{size} bytes announced, fewer are left")
        view = self._data[self._at : stop]
        self._at = stop
        return view

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def counts(self) -> tuple[int, int, int]:
        created, updated, deleted = (self.number() for _ in range(3))
        if created + updated + deleted > CHANGES_MAX:
            raise self.corrupt(f"{created + updated + deleted} changes, over the bound of {CHANGES_MAX}")
        return created, updated, deleted

    def width_column(self, count: int) -> npt.NDArray[np.int64]:
        width = self.take(1)[0]
        if width not in _WIDTHS:
            raise self.corrupt(f"a column of width {width}")
        numbers: npt.NDArray[np.int64] = np.frombuffer(self.take(width * count), _WIDTHS[width]).astype(np.int64)
        largest = int(numbers.max()) if count else 0
        if width > 1 and largest < 1 << (4 * width):
            raise self.corrupt("a column is wider than its largest entry needs")
        return numbers

    def values(self, count: int) -> list[bytes]:
        lengths = self.width_column(count)
        if not count:
            return []
        if int(lengths.max()) > VALUE_BYTES_MAX:
            raise self.corrupt(f"a value is longer than {VALUE_BYTES_MAX} bytes")
        stops = np.cumsum(lengths)
        packed = np.frombuffer(self.take(int(stops[-1])), np.uint8)
        places, is_rest = _value_heads(lengths)
        whole = np.empty(len(packed), np.uint8)
        whole[places] = packed[: len(places)]
        whole[is_rest] = packed[len(places) :]
        blob = whole.tobytes()
        bounds = stops.tolist()
        return [blob[start:stop] for start, stop in zip([0, *bounds], bounds, strict=False)]

    def keys(self, count: int, key_bytes: int, route_bytes: int) -> list[bytes]:
        distinct = self.number()
        if distinct > count:
            raise self.corrupt("more groups than keys")
        planes = np.frombuffer(self.take(_HEAD_BYTES * distinct), np.uint8).reshape(_HEAD_BYTES, distinct)
        tails = np.frombuffer(self.take((route_bytes - _HEAD_BYTES) * distinct), np.uint8)
        sizes = self.width_column(distinct)
        suffix_bytes = key_bytes - route_bytes
        suffixes = np.frombuffer(self.take(suffix_bytes * count), np.uint8).reshape(suffix_bytes, count)
        if int(sizes.sum()) != count or (distinct and int(sizes.min()) == 0):
            raise self.corrupt("group sizes do not sum up to the number of keys")
        if not count:
            return []
        steps = np.ascontiguousarray(planes.T).view("<u8").ravel()
        heads = np.cumsum(steps, dtype=np.uint64)
        if np.any(heads[1:] < heads[:-1]):
            raise self.corrupt("key differences overflow")
        routes = np.empty((distinct, route_bytes), np.uint8)
        routes[:, :_HEAD_BYTES] = heads.astype(">u8").view(np.uint8).reshape(distinct, _HEAD_BYTES)
        routes[:, _HEAD_BYTES:] = tails.reshape(distinct, route_bytes - _HEAD_BYTES)
        rows = np.empty((count, key_bytes), np.uint8)
        rows[:, :route_bytes] = np.repeat(routes, sizes, axis=0)
        rows[:, route_bytes:] = suffixes.T
        blob = rows.tobytes()
        keys = [blob[at : at + key_bytes] for at in range(0, len(blob), key_bytes)]
        # Strictly ascending keys whose groups are exactly the runs of equal routes: else another encoding exists.
        if sorted(set(keys)) != keys or bool(np.any(np.all(routes[1:] == routes[:-1], axis=1))):
            raise self.corrupt("keys do not ascend strictly")
        return keys

    def heads(self, count: int, key_bytes: int, route_bytes: int) -> npt.NDArray[np.uint64]:
        """The first 8 bytes of the routes of a column of keys, and pass by the rest of it."""
        distinct = self.number()
        if distinct > count:
            raise self.corrupt("more groups than keys")
        planes = np.frombuffer(self.take(_HEAD_BYTES * distinct), np.uint8).reshape(_HEAD_BYTES, distinct)
        self.take((route_bytes - _HEAD_BYTES) * distinct)
        self.width_column(distinct)
        self.take((key_bytes - route_bytes) * count)
        return np.cumsum(np.ascontiguousarray(planes.T).view("<u8").ravel(), dtype=np.uint64)

    def references(self, count: int, schema: Schema) -> tuple[list[bytes], list[bytes]]:
        exceptions = self.number()
        if exceptions > count or (exceptions and not schema.is_short):
            raise self.corrupt("more exceptions than keys")
        short = self.keys(count - exceptions, schema.short_key_bytes, schema.short_at)
        return short, self.keys(exceptions, schema.key_bytes, schema.route_bytes)

    def done(self) -> None:
        if self._at != len(self._data):
            raise self.corrupt("bytes are left over")


def decode_whole(schema: Schema, data: memoryview) -> TableDiff:
    """The inverse of `encode_whole`. Raises FrameCorrupt for anything that `encode_whole` would not have written."""
    columns = _Columns(data, f"changes of table {schema.name}")
    created, updated, deleted = columns.counts()
    layout = (schema.key_bytes, schema.route_bytes)
    created_keys = columns.keys(created, *layout)
    updated_keys = columns.keys(updated, *layout)
    deleted_keys = columns.keys(deleted, *layout)
    diff = TableDiff(
        schema=schema,
        created_keys=created_keys,
        updated_keys=updated_keys,
        deleted_keys=deleted_keys,
        created_values=columns.values(created),
        updated_befores=columns.values(updated),
        updated_afters=columns.values(updated),
        deleted_befores=columns.values(deleted),
    )
    columns.done()
    diff.check()
    return diff


def route_heads(schema: Schema, data: memoryview) -> npt.NDArray[np.uint64]:
    """Of changes in whole form, the first 8 bytes of the routes of their keys, big-endian; some may come twice.
    Raises FrameCorrupt."""
    columns = _Columns(data, f"changes of table {schema.name}")
    layout = (schema.key_bytes, schema.route_bytes)
    return np.concatenate([columns.heads(count, *layout) for count in columns.counts()])


def decode_references(schema: Schema, data: memoryview) -> References:
    """The inverse of `encode_references`, as far as it goes without a state. Next: read `References.storage_keys`,
    then `resolve`. Raises FrameCorrupt."""
    columns = _Columns(data, f"references of table {schema.name}")
    created, updated, deleted = columns.counts()
    created_keys = columns.keys(created, schema.key_bytes, schema.route_bytes)
    created_values = columns.values(created)
    updated_short, updated_whole = columns.references(updated, schema)
    updated_afters = columns.values(updated)
    deleted_short, deleted_whole = columns.references(deleted, schema)
    columns.done()
    return References(
        schema=schema,
        created_keys=created_keys,
        created_values=created_values,
        updated_short=updated_short,
        updated_whole=updated_whole,
        updated_afters=updated_afters,
        deleted_short=deleted_short,
        deleted_whole=deleted_whole,
    )


def resolve(references: References, stored: Sequence[bytes | None]) -> TableDiff:
    """References to changes, with what the reader's state holds under `References.storage_keys`.

    Raises ApplyConflict if the state is not the one that the references were made against.
    """
    schema = references.schema
    at = len(references.created_keys)
    updated, at = _resolve(schema, references.updated_short, references.updated_whole, stored, at)
    deleted, at = _resolve(schema, references.deleted_short, references.deleted_whole, stored, at)
    assert at == len(stored), (at, len(stored))
    diff = TableDiff(
        schema=schema,
        created_keys=references.created_keys,
        created_values=references.created_values,
        updated_keys=[key for key, _ in updated],
        updated_befores=[value for _, value in updated],
        updated_afters=references.updated_afters,
        deleted_keys=[key for key, _ in deleted],
        deleted_befores=[value for _, value in deleted],
    )
    diff.check()
    return diff


def _resolve(
    schema: Schema, short: Sequence[bytes], whole: Sequence[bytes], stored: Sequence[bytes | None], at: int
) -> tuple[list[tuple[bytes, bytes]], int]:
    """(whole key, before) pairs, ascending, and where the next ones begin in ``stored``."""
    split, rest_bytes = schema.short_at, schema.route_bytes - schema.short_at
    end = 1 + rest_bytes
    found: list[tuple[bytes, bytes]] = []
    if schema.is_short:
        for key, held in zip(short, stored[at : at + len(short)], strict=True):
            if held is None or held[0] != 1:
                raise ApplyConflict(f"a reference of table {schema.name}, {key.hex()}, names no single key")
            found.append((key[:split] + held[1:end] + key[split:], held[end:]))
        found.sort()
    else:
        for key, held in zip(short, stored[at : at + len(short)], strict=True):
            if held is None:
                raise ApplyConflict(f"a reference of table {schema.name}, {key.hex()}, names no key")
            found.append((key, held))
    at += len(short)
    if whole:
        for key, held in zip(whole, stored[at : at + len(whole)], strict=True):
            value = schema.find(key, held)
            if value is None or held is None or held[0] == 1:
                raise ApplyConflict(f"key {key.hex()} of table {schema.name} is not one of several under its short key")
            found.append((key, value))
        found.sort()
    return found, at + len(whole)
