"""Squashing: consecutive diffs to one, by a merge of sorted runs, whatever their size.

Frames are netted in dicts, as many at a time as have 32 MiB of columns; if there are more, through files in between. A
**run** is one diff's changes as chunks, ascending by table and key. Of all runs the merge takes what stands up to the
lowest end of their present chunks, nets it in the order of the blocks, and goes on: so it holds a chunk of each run,
and what it makes leaves as chunks again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from pipeline import frame
from pipeline.archive import Segment
from pipeline.archive_names import RangeName, SegmentName
from pipeline.delta import encode_whole
from pipeline.diff import decode_whole_body
from pipeline.errors import RangeCorrupt
from pipeline.frame import Header
from pipeline.position import Meta
from pipeline.range_pieces import CHUNK_CHANGES_MAX, CHUNK_RAW_BYTES, Entry, pack_chunk, unpack_chunk
from pipeline.ranges import RangeDiff, RangeWriter
from pipeline.state import SCHEMAS, Change
from pipeline.table_diff import TableDiff, table_diff

LEVELS = (64, 4096, 65536)
"""Blocks. Ten hours, four weeks and fifteen months of Bitcoin: to any of its 900,000 heights lead at most 14 + 15 + 63
range diffs and 63 frames."""
HELD_RAW_BYTES_MAX = 32 << 20
"""Columns of frames that are decoded at a time: some 150 MB of keys and values."""
_CHANGE_OVERHEAD_BYTES = 4

Run = Iterable[TableDiff]


# What is due


class Due(NamedTuple):
    """A range diff that can be made. ``sources``: those of the level below that it is made of; none: segments."""

    first: int
    last: int
    sources: tuple[tuple[int, int], ...]


def due_ranges(segments: Iterable[SegmentName], ranges: Iterable[RangeName]) -> list[Due]:
    """What one shard's archive has no range diff of yet, in an order in which they can be made: of each level every
    aligned run of blocks whose level below is whole. The first of all may begin where the archive does."""
    spans = sorted((name.first, name.last) for name in segments if is_aligned(name))
    have = {(name.first, name.last) for name in ranges}
    begin = min((first for first, _ in [*spans, *have]), default=0)
    due = [Due(first, last, ()) for first, last in _windows(spans, begin) if (first, last) not in have]
    have.update((one.first, one.last) for one in due)
    for below, level in pairwise(LEVELS):
        for last in sorted(last for _, last in have if last % level == level - 1):
            starts = range(last + 1 - level, last + 1, below)
            sources = tuple((max(start, begin), start + below - 1) for start in starts if start + below > begin)
            first = sources[0][0]
            is_there = any((lower, last) in have for lower in {first, last + 1 - level})
            if not is_there and have.issuperset(sources):
                due.append(Due(first, last, sources))
                have.add((first, last))
    return sorted(due, key=lambda one: (one.last, -one.first))


def is_aligned(name: SegmentName) -> bool:
    """Whether a segment ends where one of the lowest level may end, and holds the resume record of that height."""
    return name.first // LEVELS[0] == name.last // LEVELS[0]


def _windows(spans: Iterable[tuple[int, int]], begin: int) -> Iterator[tuple[int, int]]:
    """The aligned runs of the lowest level that ascending spans cover."""
    level = LEVELS[0]
    runs: list[tuple[int, int]] = []
    for first, last in spans:
        if runs and first <= runs[-1][1] + 1:
            first, last = runs[-1][0], max(last, runs.pop()[1])
        runs.append((first, last))
    for first, last in runs:
        start = first if first == begin else -(-first // level) * level
        while (stop := start - start % level + level) <= last + 1:
            yield start, stop - 1
            start = stop


# From segments


class Lowest:
    """A range diff of the lowest level, of segments that come in the order of their heights.

    * One segment's bytes are held at a time, and no more of its frames decoded than `HELD_RAW_BYTES_MAX` and one.
    """

    def __init__(self, first: int, last: int, scratch: Path) -> None:
        self._first, self._last = first, last
        self._scratch = scratch
        self._runs: list[Run] = []
        self._held: list[Mapping[int, TableDiff]] = []
        self._held_bytes = 0
        self._opening: Header | None = None
        self._tip: Header | None = None
        self._resume: Meta | None = None

    def add(self, segment: Segment) -> None:
        """Raises RangeCorrupt if it does not lead on, FrameCorrupt."""
        for data in segment.frames(self._first if self._tip is None else self._tip.ref.height + 1):
            decoded = frame.decode(data)
            header, tip = decoded.header, self._tip
            if tip is None:
                self._opening = header
            if header.ref.height != (self._first if tip is None else tip.ref.height + 1):
                raise RangeCorrupt(f"block {header.ref} is not the next one of heights {self._first} to {self._last}")
            if tip is not None and (header.parent_hash, header.prev_root) != (tip.ref.block_hash, tip.post_root):
                raise RangeCorrupt(f"block {header.ref} does not stand on {tip.ref}")
            self._held.append(decode_whole_body(decoded.body).tables)
            self._held_bytes += len(decoded.body)
            self._tip = header
            if self._held_bytes > HELD_RAW_BYTES_MAX:
                self._runs.append(_spill(net(self._held), self._scratch / f"run-{len(self._runs):05d}"))
                self._held, self._held_bytes = [], 0
        self._resume = segment.resume

    def write(self, folder: Path) -> list[Path]:
        """Its pieces. Raises RangeCorrupt."""
        opening, tip, resume = self._opening, self._tip, self._resume
        if opening is None or tip is None or resume is None or tip.ref.height != self._last:
            raise RangeCorrupt(f"the segments of heights {self._first} to {self._last} end at {tip and tip.ref}")
        writer = RangeWriter(
            folder, first=self._first, parent=opening.parent_hash, prev_root=opening.prev_root, resume=resume
        )
        rest = net(self._held)
        for chunk in merge([*self._runs, rest]) if self._runs else rest:
            writer.add(chunk)
        return writer.finish()


def _spill(run: Run, path: Path) -> Run:
    entries: list[Entry] = []
    with path.open("wb") as file:
        for chunk in run:
            entry, packed = pack_chunk(encode_whole(chunk), chunk)
            entries.append(entry)
            file.write(packed)
    return _spilled(path, entries)


def _spilled(path: Path, entries: Sequence[Entry]) -> Iterator[TableDiff]:
    with path.open("rb") as file:
        for entry in entries:
            yield unpack_chunk(entry, file.read(entry.packed_bytes))


# From the level below


def squash_ranges(ranges: Sequence[RangeDiff], folder: Path) -> list[Path]:
    """Consecutive range diffs as one: its pieces. Raises RangeCorrupt."""
    for one, after in pairwise(ranges):
        if one.name[:3] != after.name[:3] or one.name.last + 1 != after.name.first:
            raise RangeCorrupt(f"{after.name} does not follow {one.name}")
        if (after.parent, after.prev_root) != (one.ref.block_hash, one.resume.tip.root):
            raise RangeCorrupt("a range diff does not stand on the one before it", where=str(after.name))
    first, last = ranges[0], ranges[-1]
    writer = RangeWriter(
        folder, first=first.name.first, parent=first.parent, prev_root=first.prev_root, resume=last.resume
    )
    for chunk in merge([one.chunks() for one in ranges]):
        writer.add(chunk)
    return writer.finish()


# Netting


def net(diffs: Sequence[Mapping[int, TableDiff]]) -> Iterator[TableDiff]:
    """Consecutive diffs, oldest first, as one, in chunks. That each follows from the one before is not looked at: who
    writes it checks the root that it leads from."""
    cut = _Cut()
    for table_id in sorted(set().union(*diffs)):
        tables = [diff[table_id] for diff in diffs if table_id in diff]
        befores: dict[bytes, bytes | None] = {}
        afters: dict[bytes, bytes | None] = {}
        for table in reversed(tables):
            befores.update(dict.fromkeys(table.created_keys))
            befores.update(zip(table.updated_keys, table.updated_befores, strict=True))
            befores.update(zip(table.deleted_keys, table.deleted_befores, strict=True))
        for table in tables:
            afters.update(zip(table.created_keys, table.created_values, strict=True))
            afters.update(zip(table.updated_keys, table.updated_afters, strict=True))
            afters.update(dict.fromkeys(table.deleted_keys))
        for key in sorted([key for key, before in befores.items() if afters[key] != before]):
            if (full := cut.add(table_id, Change(key, befores[key], afters[key]))) is not None:
                yield full
    if (rest := cut.rest()) is not None:
        yield rest


def merge(runs: Sequence[Run]) -> Iterator[TableDiff]:
    """Runs of consecutive diffs, oldest first, netted to one. Raises RangeCorrupt if one does not follow from those
    before it: a before-value that is not the last after-value."""
    heads = [head for head in map(_Head, runs) if head.refill()]
    cut = _Cut()
    while heads:
        table_id = min(head.table_id for head in heads)
        here = [head for head in heads if head.table_id == table_id]
        stop = min(head.last_key for head in here)
        merged: dict[bytes, Change] = {}
        for head in here:
            for change in head.take(stop):
                held = merged.get(change.key)
                if held is None:
                    merged[change.key] = change
                elif held.after == change.before:
                    merged[change.key] = Change(change.key, held.before, change.after)
                else:
                    raise RangeCorrupt(
                        f"diffs do not follow each other at key {change.key.hex()} of table {SCHEMAS[table_id].name}"
                    )
        for key in sorted(merged):
            change = merged[key]
            if change.before != change.after and (full := cut.add(table_id, change)) is not None:
                yield full
        heads = [head for head in heads if head.refill()]
    if (rest := cut.rest()) is not None:
        yield rest


class _Head:
    """What is left of a run's present chunk."""

    def __init__(self, run: Run) -> None:
        self._chunks = iter(run)
        self._changes: list[Change] = []
        self._at = 0
        self.table_id = 0

    @property
    def last_key(self) -> bytes:
        return self._changes[-1].key

    def take(self, stop: bytes) -> list[Change]:
        """The changes up to a key, inclusive."""
        start = self._at
        self._at = bisect_right(self._changes, stop, lo=start, key=itemgetter(0))
        return self._changes[start : self._at]

    def refill(self) -> bool:
        """The next chunk if this one is used up. False: there is none."""
        while self._at == len(self._changes):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._changes, self._at, self.table_id = chunk.changes(), 0, chunk.schema.table_id
        return True


class _Cut:
    """Ascending changes to chunks."""

    def __init__(self) -> None:
        self._table_id = 0
        self._changes: list[Change] = []
        self._bytes = 0

    def add(self, table_id: int, change: Change) -> TableDiff | None:
        """The chunk that is full, if one is."""
        is_full = len(self._changes) == CHUNK_CHANGES_MAX or self._bytes >= CHUNK_RAW_BYTES
        full = self.rest() if is_full or table_id != self._table_id else None
        self._table_id = table_id
        self._changes.append(change)
        key, before, after = change
        self._bytes += len(key) + len(before or b"") + len(after or b"") + _CHANGE_OVERHEAD_BYTES
        return full

    def rest(self) -> TableDiff | None:
        if not self._changes:
            return None
        chunk = table_diff(SCHEMAS[self._table_id], self._changes)
        self._changes, self._bytes = [], 0
        return chunk
