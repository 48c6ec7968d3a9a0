"""Filters: which blocks of a segment may have changed a key, without reading one.

A Bloom filter for each frame, over the heads of its keys' routes: the first 8 bytes of a txid or an address hash, which
stand in a frame's columns as they are. So making them costs decompressing a frame and adding up differences, 0.1 us
a change, and keys of one transaction are found together. 16 bits and 8 looks a route: one of 1,700 blocks is looked at
for nothing. Whoever grinds txids that meet in 8 bytes makes a reader look at blocks for nothing, no more.

A head is mixed with its table's id by the finalizer of MurmurHash3; look i of 8 is at bit (low + i * high) mod bits, of
the halves of that hash, the high one made odd. Filters are as long as they need to be in whole 8 bytes, without keys
empty. A section of filters (little-endian):

    per frame: bytes of its filter u32
    the filters, one after another
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline import frame
from pipeline.delta import route_heads
from pipeline.diff import split_tables
from pipeline.errors import SegmentCorrupt
from pipeline.state import SCHEMAS, Schema

_BITS_EACH = 16
_LOOKS = 8
_WORD_BYTES = 8
_LENGTH_BYTES = 4
_MULTIPLIERS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_TABLE_STEP = 0x9E3779B97F4A7C15

Heads = npt.NDArray[np.uint64]


def build_filters(frames: Sequence[bytes]) -> bytes:
    """The section for whole frames, in their order. Raises FrameCorrupt."""
    filters = [_build(_hashes_of_frame(data)) for data in frames]
    lengths = np.fromiter(map(len, filters), "<u4", len(filters))
    return lengths.tobytes() + b"".join(filters)


def split_filters(section: bytes, count: int) -> list[bytes]:
    """The filters of ``count`` frames. Raises SegmentCorrupt."""
    at = count * _LENGTH_BYTES
    if len(section) < at:
        raise SegmentCorrupt("the filters of a segment are cut off")
    stops = at + np.cumsum(np.frombuffer(section[:at], "<u4").astype(np.int64))
    bounds = [at, *stops.tolist()]
    if bounds[-1] != len(section) or any(stop % _WORD_BYTES != bounds[0] % _WORD_BYTES for stop in bounds):
        raise SegmentCorrupt("the filters of a segment do not have the lengths they say")
    return [section[start:stop] for start, stop in pairwise(bounds)]


def may_hold(filter_bytes: bytes, schema: Schema, key: bytes) -> bool:
    """Whether a frame with this filter may have changed a key: False is certain."""
    if not filter_bytes:
        return False
    head = np.array([int.from_bytes(key[:8], "big")], np.uint64)
    looks = _looks(_mixed(head, schema.table_id), len(filter_bytes) * 8).tolist()
    return all(filter_bytes[look >> 3] >> (look & 7) & 1 for look in looks)


def _hashes_of_frame(data: bytes) -> Heads:
    tables = split_tables(frame.decode(data).body)
    hashes = [_mixed(route_heads(SCHEMAS[table_id], view), table_id) for table_id, view in tables.items()]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def _build(hashes: Heads) -> bytes:
    size = -(-len(hashes) * _BITS_EACH // (8 * _WORD_BYTES)) * _WORD_BYTES
    bits = np.zeros(size * 8, np.bool_)
    if size:
        bits[_looks(hashes, size * 8)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _looks(hashes: Heads, bits: int) -> npt.NDArray[np.int64]:
    low, high = hashes & np.uint64(0xFFFFFFFF), hashes >> np.uint64(32) | np.uint64(1)
    steps = np.arange(_LOOKS, dtype=np.uint64)
    looks: npt.NDArray[np.int64] = ((low[:, None] + steps * high[:, None]) % np.uint64(bits)).ravel().astype(np.int64)
    return looks


def _mixed(heads: Heads, table_id: int) -> Heads:
    mixed = heads ^ np.uint64(table_id * _TABLE_STEP & (1 << 64) - 1)
    for multiplier in _MULTIPLIERS:
        mixed = (mixed ^ mixed >> np.uint64(33)) * multiplier
    return mixed ^ mixed >> np.uint64(33)
