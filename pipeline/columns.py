"""Columns: little-endian arrays of keys, references and values, as `delta` lays them out, written and read with numpy.

Where a width can be chosen, it is the least of 1, 2, 4 bytes that fits, and a reader refuses a wider one: every set of
changes has exactly one encoding. Sorted hashes go out as differences of their first 8 bytes, in byte planes: with n of
them the top log2(n) bits are zeroes that zstd takes.

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

import numpy as np
import numpy.typing as npt

from pipeline.errors import FrameCorrupt
from pipeline.state import VALUE_BYTES_MAX, Schema

CHANGES_MAX = 8_000_000
"""Bound of one table's changes in one frame."""

_HEAD_BYTES = 8
_VALUE_HEAD_BYTES = 3
_WIDTHS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
"""Entry types by width. Numbers on the wire are little-endian, as are all machines this runs on (asserted below)."""

assert sys.byteorder == "little"

# Writing


def counts_column(created: int, updated: int, deleted: int) -> bytes:
    return np.array([created, updated, deleted], "<u4").tobytes()


def _width_column(numbers: npt.NDArray[np.integer]) -> tuple[bytes, bytes]:
    largest = int(numbers.max()) if len(numbers) else 0
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    return bytes([width]), numbers.astype(_WIDTHS[width]).tobytes()


def values_column(values: Sequence[bytes]) -> tuple[bytes, ...]:
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


def keys_column(schema: Schema, keys: Sequence[bytes]) -> tuple[bytes, ...]:
    return _grouped_column(keys, schema.key_bytes, schema.route_bytes)


def references_column(
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
        *keys_column(schema, whole),
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


# Reading


class Columns:
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
