"""The tracer: which blocks, frames, segments, range diffs and snapshots touch a key, or a height.

It asks names, manifests, and the indexes and filters of segments, by ranges; of frames it reads those alone that a
filter names. A segment without filters is read frame by frame.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

from pipeline import frame
from pipeline.archive import IndexEntry, covered_to
from pipeline.archive_names import RangeName, SegmentName, parse_piece_name, parse_segment_name, whole_ranges
from pipeline.diff import Diff, decode_whole_body
from pipeline.errors import NotFound, SegmentCorrupt
from pipeline.frame import NO_HASH, Header
from pipeline.objects import ObjectStore
from pipeline.parts import Part
from pipeline.plans import check_one_chain
from pipeline.segment_index import SegmentIndex
from pipeline.shards import shard_of
from pipeline.snapshot import Manifest, ManifestName, parse_manifest_name
from pipeline.state import Change, Schema
from topology.restore_plans import read_manifest

_THREADS = 8


class Touch(NamedTuple):
    """A frame that changed a key."""

    segment: SegmentName
    header: Header
    change: Change


class Holder(NamedTuple):
    """A snapshot, and the part in whose range a key stands. ``holds`` None: the archive does not say whether it does;
    ``part`` None: no part spans the key."""

    name: ManifestName
    part: Part | None
    holds: bool | None


class Tracer:
    """One object store's diff index, of one chain. Generations are told apart by the names in what it returns.

    * ``read``: what was read so far, in objects, frames, bytes and requests.
    """

    def __init__(self, objects: ObjectStore, chain_id: str | None = None) -> None:
        """Raises NotFound, UsageError (several chains)."""
        self.read: Counter[str] = Counter(manifests=0, indexes=0, frames=0, bytes=0, requests=0)
        self._counting = threading.Lock()
        self._kept: dict[SegmentName, SegmentIndex] = {}
        self._objects = objects
        self.manifests: list[ManifestName] = []
        self.segments: dict[SegmentName, int] = {}
        pieces = []
        for info in objects.list("" if chain_id is None else f"{chain_id}/"):
            manifest, segment = parse_manifest_name(info.name), parse_segment_name(info.name)
            piece = parse_piece_name(info.name)
            if manifest is not None:
                self.manifests.append(manifest)
            elif segment is not None:
                self.segments[segment] = info.size_bytes
            elif piece is not None:
                pieces.append((piece, info.size_bytes))
        self.ranges = [found.name for found in whole_ranges(pieces)]
        chains = {name.chain_id for name in self.manifests} | {name.chain_id for name in self.segments}
        if not chains:
            raise NotFound("there is no snapshot and no archive in the object store")
        check_one_chain(chains)

    # Keys

    def changes(self, schema: Schema, key: bytes) -> list[Touch]:
        """All that is archived of a key, by generation and height. Raises SegmentCorrupt, FrameCorrupt."""
        (storage_key,) = schema.storage_keys([key])
        shards = self._shards
        wanted = [name for name in self.segments if name.shard == shard_of(storage_key, shards[name.generation])]
        found: dict[bytes, Touch] = {}
        with ThreadPoolExecutor(_THREADS) as threads:
            for touches in threads.map(lambda name: self._changes_in(name, schema, key), wanted):
                found |= {touch.header.frame_id: touch for touch in touches}
        return sorted(found.values(), key=lambda touch: (touch.segment.generation, touch.header.ref.height))

    def holders(self, schema: Schema, key: bytes, touches: Sequence[Touch]) -> list[Holder]:
        """Of every snapshot the part that a key stands in, and whether the archive says that it does."""
        (storage_key,) = schema.storage_keys([key])
        shards = self._shards
        found = []
        for name in self.manifests:
            manifest = self._manifest(name)
            part = next((one for one in manifest.parts if one.first_key <= storage_key <= one.last_key), None)
            holds: bool | None = False
            if part is not None:
                shard = shard_of(storage_key, shards.get(name.generation, 1))
                own = [touch for touch in touches if touch.segment.generation == name.generation]
                holds = self._holds(name, shard, own)
            found.append(Holder(name, part, holds))
        return found

    def _holds(self, name: ManifestName, shard: int, touches: Sequence[Touch]) -> bool | None:
        """By the change before a snapshot, or the one behind it, if all in between is archived."""
        segments = [one for one in self.segments if (one.generation, one.shard) == (name.generation, shard)]
        before = [touch for touch in touches if touch.header.ref.height <= name.height]
        after = touches[len(before) :]
        if before and covered_to(segments, before[-1].header.ref.height) > name.height:
            return before[-1].change.after is not None
        if after and covered_to(segments, name.height + 1) >= after[0].header.ref.height:
            return after[0].change.before is not None
        if not touches and segments and self._opens_chain(first := min(segments, key=lambda one: one.first)):
            return False if covered_to(segments, first.first) > name.height else None
        return None

    def _opens_chain(self, name: SegmentName) -> bool:
        """Whether a segment begins with the first block of its chain: what is not said of a key never was."""
        index = self._index(name)
        return self._frame(index, index.entries[0])[0].parent_hash == NO_HASH

    # Heights

    def entries(self, first: int, last: int) -> list[tuple[SegmentIndex, IndexEntry]]:
        """What indexes say of some heights, both inclusive, by generation, height and shard."""
        found: dict[tuple[bytes, int, int], tuple[SegmentIndex, IndexEntry]] = {}
        for name in self.segments:
            if name.first <= last and first <= name.last:
                index = self._index(name)
                for height in range(max(first, name.first), min(last, name.last) + 1):
                    entry = index.entry(height)
                    assert entry is not None
                    found[name.generation, height, name.shard] = (index, entry)
        return [found[place] for place in sorted(found)]

    def block(self, index: SegmentIndex, entry: IndexEntry) -> tuple[Header, Diff]:
        """A block's frame. Raises SegmentCorrupt, FrameCorrupt."""
        return self._frame(index, entry)

    def ranges_over(self, of: SegmentName, height: int) -> list[RangeName]:
        """Range diffs of a segment's shard that a height is in. A change that one later block took back is not."""
        return [
            name
            for name in self.ranges
            if (name.generation, name.shard) == (of.generation, of.shard) and name.first <= height <= name.last
        ]

    # Reading

    @cached_property
    def _shards(self) -> dict[bytes, int]:
        """How many each generation has, by the index of one segment, which is kept."""
        one = {name.generation: name for name in self.segments}
        self._kept = {name: self._index(name, with_filters=True) for name in one.values()}
        return {name.generation: index.resume.shards for name, index in self._kept.items()}

    def _changes_in(self, name: SegmentName, schema: Schema, key: bytes) -> list[Touch]:
        index, found = self._index(name, with_filters=True), []
        for entry in index.may_hold(schema, key):
            header, diff = self._frame(index, entry)
            table = diff.tables.get(schema.table_id)
            change = None if table is None else next((one for one in table.changes() if one.key == key), None)
            if change is not None:
                found.append(Touch(name, header, change))
        return found

    def _index(self, name: SegmentName, *, with_filters: bool = False) -> SegmentIndex:
        if name in self._kept:
            return self._kept[name]
        self._count(indexes=1)
        size_bytes = self.segments[name]
        return SegmentIndex.read(
            name, size_bytes, lambda start, stop: self._range(str(name), start, stop), with_filters=with_filters
        )

    def _frame(self, index: SegmentIndex, entry: IndexEntry) -> tuple[Header, Diff]:
        decoded = frame.decode(self._range(str(index.name), *index.place(entry)))
        self._count(frames=1)
        if (decoded.header.ref, decoded.header.frame_id) != (entry.ref, entry.frame_id):
            raise SegmentCorrupt(
                f"the index of a segment does not describe its frame of block {decoded.header.ref}",
                where=str(index.name),
            )
        return decoded.header, decode_whole_body(decoded.body)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        data = self._objects.get_range(name, start, stop)
        self._count(bytes=len(data), requests=1)
        return data

    def _count(self, **read: int) -> None:
        with self._counting:
            self.read.update(read)

    def _manifest(self, name: ManifestName) -> Manifest:
        self._count(manifests=1, requests=1)
        return read_manifest(self._objects, str(name))


def including(manifests: Iterable[ManifestName], generation: bytes, height: int) -> list[ManifestName]:
    """Snapshots of states that a block is part of, lowest first."""
    found = [name for name in manifests if name.generation == generation and name.height >= height]
    return sorted(found, key=lambda name: name.height)
