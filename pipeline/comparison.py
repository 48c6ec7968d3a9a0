"""Where two states, or two histories, part: by roots first, by partials next, by keys last, and by no more of each than
must be read.

**Histories** are compared by a point a height. Within one generation the frame ids are a hash chain: points that are
equal at a height are equal at all below, so the first difference is found by bisection. Between generations block hash
and root are compared: they also part for good, unless both come to one state again, and then that is what is said.
Between other numbers of shards that is the global root, from the vectors of all shards.

**States** are compared by the partials of parts. Two snapshots may be cut at different keys; the smallest runs of parts
between cuts that both have are compared by their sums, and only what differs is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

from pipeline.block import BlockRef
from pipeline.diff import Diff
from pipeline.parts import Part, sum_parts
from pipeline.state import SCHEMAS, schema_of_storage_key

Entries = Iterator[tuple[bytes, bytes]]
"""Ascending (storage key, stored bytes)."""


class Point(NamedTuple):
    """What one side has at a height. ``frame_id``: of the block's frame; empty if it is not known. Between points of
    one generation it says more than the rest."""

    ref: BlockRef
    root: bytes
    generation: bytes
    frame_id: bytes

    def is_like(self, other: Point) -> bool:
        if self.generation == other.generation and self.frame_id and other.frame_id:
            return self.frame_id == other.frame_id
        return (self.ref, self.root) == (other.ref, other.root)


class Difference(NamedTuple):
    """A whole key whose value is another on either side; None: it is not there."""

    table: str
    key: bytes
    a: bytes | None
    b: bytes | None


class Heights:
    """Heights in runs, ascending, as one sequence."""

    def __init__(self, runs: Iterable[range]) -> None:
        self.runs = sorted((run for run in runs if run), key=lambda run: run.start)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __getitem__(self, at: int) -> int:
        for run in self.runs:
            if at < len(run):
                return run[at]
            at -= len(run)
        raise IndexError(at)

    def __contains__(self, height: int) -> bool:
        return any(height in run for run in self.runs)

    def only(self, wanted: Collection[int]) -> Heights:
        """Those of ``wanted`` that are among these."""
        return Heights([range(height, height + 1) for height in wanted if height in self])

    @staticmethod
    def common_to(every: Iterable[Heights]) -> Heights:
        """Those that all have."""
        return reduce(Heights.common, every)

    def common(self, other: Heights) -> Heights:
        both = (
            range(max(one.start, two.start), min(one.stop, two.stop))
            for one in self.runs
            for two in other.runs
            if one.start < two.stop and two.start < one.stop
        )
        return Heights(both)


def first_difference(heights: Heights, is_alike: Callable[[int], bool]) -> tuple[int, int | None] | None:
    """The first of ``heights`` that is not alike, and the one before it; None if the last one is alike."""
    if not len(heights) or is_alike(heights[len(heights) - 1]):
        return None
    low, high = 0, len(heights) - 1  # all below `low` are alike, `high` is not
    while low < high:
        middle = (low + high) // 2
        if is_alike(heights[middle]):
            low = middle + 1
        else:
            high = middle
    return heights[high], heights[high - 1] if high else None


def differing_changes(a: Sequence[Diff], b: Sequence[Diff]) -> Iterator[Difference]:
    """Keys that differ after two blocks that were put on equal states, each as its diffs of some shards: what one did
    not change is as it was before."""
    for table_id in sorted({table_id for diff in (*a, *b) for table_id in diff.tables}):
        one, two = (
            {
                change.key: change
                for diff in diffs
                if table_id in diff.tables
                for change in diff.tables[table_id].changes()
            }
            for diffs in (a, b)
        )
        name = SCHEMAS[table_id].name
        for key in sorted(one.keys() | two.keys()):
            before = (one.get(key) or two[key]).before
            after_a = one[key].after if key in one else before
            after_b = two[key].after if key in two else before
            if after_a != after_b:
                yield Difference(name, key, after_a, after_b)


def differing_runs(a: Sequence[Part], b: Sequence[Part]) -> Iterator[tuple[Sequence[Part], Sequence[Part]]]:
    """The runs of parts that do not sum up to the same: between them, all keys and values are equal."""
    for one, two in aligned(a, b):
        if sum_parts(one) != sum_parts(two):
            yield one, two


def aligned(a: Sequence[Part], b: Sequence[Part]) -> Iterator[tuple[Sequence[Part], Sequence[Part]]]:
    """Both lists cut at the places that no part of either spans, as often as there are such."""
    at_a = at_b = first_a = first_b = 0
    reach = b""
    while at_a < len(a) or at_b < len(b):
        next_a = a[at_a].first_key if at_a < len(a) else None
        next_b = b[at_b].first_key if at_b < len(b) else None
        if reach and (next_a is None or next_a > reach) and (next_b is None or next_b > reach):
            yield a[first_a:at_a], b[first_b:at_b]
            first_a, first_b, reach = at_a, at_b, b""
        if next_b is None or (next_a is not None and next_a <= next_b):
            reach = max(reach, a[at_a].last_key)
            at_a += 1
        else:
            reach = max(reach, b[at_b].last_key)
            at_b += 1
    if reach:
        yield a[first_a:], b[first_b:]


def differing_entries(a: Entries, b: Entries) -> Iterator[Difference]:
    """Whole keys that differ between two runs of entries."""
    one, two = next(a, None), next(b, None)
    while one is not None or two is not None:
        if two is None or (one is not None and one[0] < two[0]):
            assert one is not None
            yield from _in_entry(one[0], one[1], None)
            one = next(a, None)
        elif one is None or two[0] < one[0]:
            yield from _in_entry(two[0], None, two[1])
            two = next(b, None)
        else:
            if one[1] != two[1]:
                yield from _in_entry(one[0], one[1], two[1])
            one, two = next(a, None), next(b, None)


def _in_entry(storage_key: bytes, a: bytes | None, b: bytes | None) -> Iterator[Difference]:
    schema = schema_of_storage_key(storage_key)
    one, two = (dict(schema.items(storage_key, stored)) if stored is not None else {} for stored in (a, b))
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            yield Difference(schema.name, key, one.get(key), two.get(key))
