"""The commitment of every block: a lattice hash of the set of all (key, value) pairs of a table.

Each pair becomes an **element**, each element 2,048 bytes of BLAKE3 extended output, read as 1,024 lanes of
u16. The **vector** of a table is the lane-wise sum of its elements, modulo 2^16. Adding a pair adds its
lanes, taking it away subtracts them; order does not matter, so a change costs the same however large the
state is, and vectors of disjoint parts (shards, snapshot parts) sum to the vector of the whole. The
construction is that of SIMD-0215 (Solana's accounts lattice hash) after Bellare and Micciancio; its
published vectors are acceptance tests.

An element says unambiguously what it stands for, so that no two pairs, of whatever tables, share one:

    "stateferry/element/1" || table id (1 B) || key length (4 B LE) || key || value length (4 B LE) || value

A vector is sound for sets only: a pair counted 65,536 times is as good as absent. Whoever sums must therefore
see each key once; stores do by nature, and parts by keeping their keys strictly ascending.

The **table root** is BLAKE3-256 of the vector. The **root** is BLAKE3-256 over (table id, 1 B; table root,
32 B) in ascending order of table ids. Vectors travel as 2,048 bytes of little-endian lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Final

import numpy as np
from blake3 import blake3

from pipeline.commitment import native

LANES: Final = 1024
VECTOR_BYTES: Final = 2 * LANES
ROOT_BYTES: Final = 32
ZERO: Final = bytes(VECTOR_BYTES)
"""The vector of nothing."""

_DOMAIN = b"stateferry/element/1"
_CHUNK = 48
"""Elements hashed by `blake3` before they are summed: 96 KiB of extended output, which stays in a core's
second-level cache and below the size from which malloc maps fresh pages: 0.9 us an element, against 1.6 us
with chunks of 512."""
_NATIVE_CHUNK = 512
"""Elements that the compiled loop gets at a time: half a MiB at most."""

_LENGTHS = [length.to_bytes(4, "little") for length in range(1024)]
"""Length prefixes made once: nearly all values are shorter than this."""


def elements(table_id: int, keys: Sequence[bytes], values: Sequence[bytes]) -> list[bytes]:
    """What is hashed for each pair, in the order given. ``table_id``: 1..255; keys and values match."""
    table = _DOMAIN + bytes([table_id])
    short, join = len(_LENGTHS), b"".join
    key_lengths = set(map(len, keys))
    if len(key_lengths) == 1 and max(map(len, values)) < short:
        # All keys of a table have one length and values are short: the hot path of every block.
        head = repeat(table + key_lengths.pop().to_bytes(4, "little"), len(keys))
        lengths = map(_LENGTHS.__getitem__, map(len, values))
        return list(map(join, zip(head, keys, lengths, values, strict=True)))
    return [
        join((table, len(key).to_bytes(4, "little"), key, len(value).to_bytes(4, "little"), value))
        for key, value in zip(keys, values, strict=True)
    ]


class Accumulator:
    """A running vector.

    - Order and grouping of calls do not matter; what was added and then subtracted leaves nothing behind.
    - Memory is bounded: elements are hashed and summed some at a time.
    """

    __slots__ = ("_lanes",)

    def __init__(self, vector: bytes = ZERO) -> None:
        self._lanes = _lanes_of(vector).copy()

    def add(self, elements: Sequence[bytes]) -> None:
        """Count in what `elements` made of pairs that now stand in the table."""
        self._lanes += _sum(elements)

    def subtract(self, elements: Sequence[bytes]) -> None:
        """Count out pairs that stood in the table until now."""
        self._lanes -= _sum(elements)

    def combine(self, vector: bytes) -> None:
        """Add the vector of a disjoint part. Raises ValueError unless it is 2,048 bytes long."""
        self._lanes += _lanes_of(vector)

    def vector(self) -> bytes:
        """The sum so far, 2,048 bytes."""
        return self._lanes.astype("<u2", copy=False).tobytes()


def combine(vectors: Mapping[int, bytes], gains: Mapping[int, bytes]) -> dict[int, bytes]:
    """Vectors of disjoint parts, or of a state and of what a diff adds to it, summed table by table."""
    return dict(vectors) | {
        table_id: (_lanes_of(vectors[table_id]) + _lanes_of(gain)).astype("<u2", copy=False).tobytes()
        for table_id, gain in gains.items()
    }


def table_root(vector: bytes) -> bytes:
    """BLAKE3-256 of a vector: the 32 bytes that name what a table holds."""
    return blake3(vector).digest()


def state_root(vectors: Mapping[int, bytes]) -> bytes:
    """The root of a state, from the vector of each of its tables (by table id), empty tables included."""
    return state_root_of_table_roots({table_id: table_root(vector) for table_id, vector in vectors.items()})


def state_root_of_table_roots(roots: Mapping[int, bytes]) -> bytes:
    """The root of a state, from the roots of its tables: how a replica of some tables checks a header."""
    return blake3(b"".join(bytes([table_id]) + roots[table_id] for table_id in sorted(roots))).digest()


def _sum(elements: Sequence[bytes]) -> native.Lanes:
    if NATIVE is None:
        return _sum_by_library(elements)
    total = np.zeros(LANES, np.uint16)
    for start in range(0, len(elements), _NATIVE_CHUNK):
        some = elements[start : start + _NATIVE_CHUNK]
        if max(map(len, some)) > native.ELEMENT_BYTES_MAX:
            total += _sum_by_library([element for element in some if len(element) > native.ELEMENT_BYTES_MAX])
            some = [element for element in some if len(element) <= native.ELEMENT_BYTES_MAX]
        total += NATIVE(some)
    return total


def _sum_by_library(elements: Sequence[bytes]) -> native.Lanes:
    total = np.zeros(LANES, np.uint16)
    join = b"".join
    for start in range(0, len(elements), _CHUNK):
        hashed = join([blake3(element).digest(VECTOR_BYTES) for element in elements[start : start + _CHUNK]])
        total += np.frombuffer(hashed, "<u2").reshape(-1, LANES).sum(axis=0, dtype=np.uint16)
    return total


def _lanes_of(vector: bytes) -> native.Lanes:
    if len(vector) != VECTOR_BYTES:
        raise ValueError(f"a vector has {VECTOR_BYTES} bytes, not {len(vector)}")
    return np.frombuffer(vector, "<u2").astype(np.uint16, copy=False)


def _checked(loop: native.Sum | None) -> native.Sum | None:
    """The compiled loop, once it agreed with the library about elements of all sizes that differ for it."""
    sample = bytes(range(256)) * 4
    elements = [sample[:size] for size in (0, 1, 63, 64, 65, 127, 128, 129, 1023, native.ELEMENT_BYTES_MAX)]
    if loop is not None and not np.array_equal(loop(elements), _sum_by_library(elements)):
        raise ImportError("the compiled loop of LtHash does not compute what it must; install stateferry again")
    return loop


NATIVE: Final = _checked(native.load())
"""The compiled loop, where it runs."""
