"""What can be compared: a node's stores, a snapshot, an object store. Each says what it knows, and counts its reads.

A side has a history (a point for a height, and the changes of a block) and states (whole contents at some heights).
Nothing is read before it is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline import frame
from pipeline.archive import Committed
from pipeline.archive_names import SegmentName, parse_segment_name
from pipeline.comparison import Heights, Point
from pipeline.diff import Diff, Vectors, decode_whole_body
from pipeline.errors import NotFound
from pipeline.journal import Entry
from pipeline.objects import ObjectStore
from pipeline.plans import check_one_chain
from pipeline.position import Meta, Tip
from pipeline.segment_index import SegmentIndex
from pipeline.shards import join_metas, stand_together
from pipeline.snapshot import Manifest, ManifestName, parse_manifest_name
from pipeline.stores.rocksdb import RocksStore
from topology.contents import PartReader, SnapshotState, State, StoreState
from topology.reads import View
from topology.restore_plans import read_manifest
from topology.views import union


class Side(Protocol):
    """* ``read``: objects, frames, parts and bytes that were read so far."""

    name: str
    read: Counter[str]

    @property
    def generation(self) -> bytes: ...

    @property
    def shards(self) -> int: ...

    def heights(self, shard: int) -> Heights:
        """Those that `point` and `diff` are for."""
        ...

    def point(self, shard: int, height: int) -> Point: ...

    def vectors(self, shard: int, height: int) -> Vectors:
        """Of the shard's state behind the block of a height."""
        ...

    def marks(self, shard: int) -> set[int]:
        """The heights of which `vectors` reads no frame."""
        ...

    def diff(self, shard: int, height: int) -> Diff:
        """What the block of a height changed."""
        ...

    def roots(self) -> dict[int, bytes]:
        """The first 8 bytes of the root at each height of which `state` has the content."""
        ...

    def state(self, height: int) -> State: ...

    def close(self) -> None: ...


# Nodes


class NodeSide:
    """A node's stores, one a shard, which nobody writes to."""

    def __init__(self, name: str, views: Sequence[View]) -> None:
        self.name = name
        self.read: Counter[str] = Counter()
        self._views = views
        self._metas = [view.meta for view in views]

    @property
    def generation(self) -> bytes:
        return self._metas[0].generation

    @property
    def shards(self) -> int:
        return self._metas[0].shards

    def heights(self, shard: int) -> Heights:
        meta = self._meta(shard)
        if meta is None or meta.tip.ref is None:
            return Heights([])
        first = min(meta.journal_first_height, meta.tip.height)
        entry = self._entry(shard, first)
        if entry is not None and entry.before.tip.ref is not None:
            first -= 1  # where the journal goes back to
        return Heights([range(first, meta.tip.height + 1)])

    def point(self, shard: int, height: int) -> Point:
        meta = self._meta(shard)
        assert meta is not None
        entry = self._entry(shard, height)
        if entry is not None:
            header = entry.header
            return Point(header.ref, header.post_root, meta.generation, header.frame_id)
        tip = self._tip(shard, height)
        assert tip.ref is not None
        return Point(tip.ref, tip.root, meta.generation, b"")  # it may have come back to that block

    def vectors(self, shard: int, height: int) -> Vectors:
        return self._tip(shard, height).vectors

    def marks(self, shard: int) -> set[int]:
        return {height for run in self.heights(shard).runs for height in run}

    def diff(self, shard: int, height: int) -> Diff:
        entry = self._entry(shard, height)
        if entry is None:
            raise NotFound(f"the journal does not reach down to height {height}", where=self.name)
        self.read["frames"] += 1
        return entry.diff()

    def roots(self) -> dict[int, bytes]:
        if len(self._metas) != self.shards or not stand_together(self._metas):
            return {}
        tip = join_metas(self._metas).tip
        return {} if tip.ref is None else {tip.height: tip.root[:8]}

    def state(self, height: int) -> StoreState:
        tip = join_metas(self._metas).tip
        assert tip.height == height, (tip.ref, height)
        return StoreState(union([view.store for view in self._views]), tip.root)

    def close(self) -> None:
        """Views are closed by who opened them."""

    def _tip(self, shard: int, height: int) -> Tip:
        meta, following = self._meta(shard), self._entry(shard, height + 1)
        before = meta if following is None else following.before
        assert before is not None and before.tip.height == height, (before, height)
        return before.tip

    def _meta(self, shard: int) -> Meta | None:
        return next((meta for meta in self._metas if meta.shard == shard), None)

    def _entry(self, shard: int, height: int) -> Entry | None:
        view = next(view for view in self._views if view.meta.shard == shard)
        assert isinstance(view.store, RocksStore)
        return Committed(view.store).entry(height)


# Object stores


class ObjectsSide:
    """What an object store has of a chain, in one generation: ``wanted``, or the newest that it has. ``height``: only
    the snapshot of it."""

    def __init__(
        self,
        name: str,
        objects: ObjectStore,
        scratch: Path,
        *,
        chain_id: str | None = None,
        wanted: bytes | None = None,
        height: int | None = None,
    ) -> None:
        """Raises NotFound, UsageError (several chains)."""
        self.name = name
        self.read: Counter[str] = Counter()
        self._objects = objects
        self._parts = PartReader(objects, scratch, self.read)
        self._indexes: dict[SegmentName, SegmentIndex] = {}
        self._vectors: dict[tuple[int, int], Vectors] = {}  # by shard and height: of some segments in all
        manifests, segments = _listed(objects, name, chain_id)
        self.generation = self._choose(manifests, segments, wanted)
        self._manifests = {one.height: one for one in manifests if one.generation == self.generation}
        self._segments = {one: size for one, size in segments.items() if one.generation == self.generation}
        if height is not None:
            if height not in self._manifests:
                held = ", ".join(map(str, sorted(self._manifests)))
                raise NotFound(f"there is no snapshot of height {height}", where=name, way_out=f"there are: {held}")
            self._manifests = {height: self._manifests[height]}
            self._segments = {}

    @property
    def shards(self) -> int:
        if self._segments:
            return self._index(next(iter(self._segments))).resume.shards
        return self._manifest(next(iter(self._manifests))).shards

    def heights(self, shard: int) -> Heights:
        runs: list[range] = []
        for name in sorted(one for one in self._segments if one.shard == shard):
            start = max(name.first, runs[-1].stop if runs else name.first)
            if runs and start == runs[-1].stop:
                runs[-1] = range(runs[-1].start, max(name.last + 1, start))
            else:
                runs.append(range(start, name.last + 1))
        return Heights(runs)

    def point(self, shard: int, height: int) -> Point:
        entry = self._index_of(shard, height).entry(height)
        assert entry is not None
        return Point(entry.ref, entry.post_root, self.generation, entry.frame_id)

    def vectors(self, shard: int, height: int) -> Vectors:
        """From the nearest height in its segment at which they are known, by the changes in between."""
        index = self._index_of(shard, height)
        name, known = index.name, self._vectors
        known[shard, name.last] = index.resume.tip.vectors
        near = [at for at in range(name.first - 1, name.last + 1) if (shard, at) in known]
        at = min(near, key=lambda one: abs(one - height))
        while at < height:
            known[shard, at + 1] = self.diff(shard, at + 1).advance(known[shard, at])
            at += 1
        while at > height:
            known[shard, at - 1] = self.diff(shard, at).inverted().advance(known[shard, at])
            at -= 1
        return known[shard, height]

    def marks(self, shard: int) -> set[int]:
        return {name.last for name in self._segments if name.shard == shard}

    def diff(self, shard: int, height: int) -> Diff:
        index = self._index_of(shard, height)
        entry = index.entry(height)
        assert entry is not None
        data = self._range(str(index.name), *index.place(entry))
        self.read["frames"] += 1
        decoded = frame.decode(data)
        return decode_whole_body(decoded.body)

    def roots(self) -> dict[int, bytes]:
        return {height: name.root_start for height, name in self._manifests.items()}

    def state(self, height: int) -> SnapshotState:
        return SnapshotState(self._manifest(height), self._parts)

    def close(self) -> None:
        self._parts.close()

    def _choose(
        self, manifests: Sequence[ManifestName], segments: dict[SegmentName, int], wanted: bytes | None
    ) -> bytes:
        """The generation wanted, if it is here, or the newest."""
        found = {one.generation for one in manifests} | {one.generation for one in segments}
        if wanted in found:
            return wanted
        if len(found) == 1:
            return found.pop()
        numbers: dict[int, bytes] = {}
        for generation in found:
            manifest = next((one for one in manifests if one.generation == generation), None)
            if manifest is not None:
                numbers[read_manifest(self._objects, str(manifest)).generation_number] = generation
            else:
                segment = next(one for one in segments if one.generation == generation)
                numbers[self._read_index(segment, segments[segment]).resume.generation_number] = generation
        return numbers[max(numbers)]

    def _index_of(self, shard: int, height: int) -> SegmentIndex:
        name = next(one for one in self._segments if one.shard == shard and one.first <= height <= one.last)
        return self._index(name)

    def _index(self, name: SegmentName) -> SegmentIndex:
        if name not in self._indexes:
            self._indexes[name] = self._read_index(name, self._segments[name])
        return self._indexes[name]

    def _read_index(self, name: SegmentName, size: int) -> SegmentIndex:
        self.read["indexes"] += 1
        return SegmentIndex.read(name, size, lambda start, stop: self._range(str(name), start, stop))

    def _range(self, name: str, start: int, stop: int) -> bytes:
        data = self._objects.get_range(name, start, stop)
        self.read["bytes"] += len(data)
        return data

    def _manifest(self, height: int) -> Manifest:
        self.read["manifests"] += 1
        return read_manifest(self._objects, str(self._manifests[height]))


def _listed(
    objects: ObjectStore, where: str, chain_id: str | None
) -> tuple[list[ManifestName], dict[SegmentName, int]]:
    manifests: list[ManifestName] = []
    segments: dict[SegmentName, int] = {}
    for info in objects.list("" if chain_id is None else f"{chain_id}/"):
        manifest, segment = parse_manifest_name(info.name), parse_segment_name(info.name)
        if manifest is not None:
            manifests.append(manifest)
        elif segment is not None:
            segments[segment] = info.size_bytes
    chains = {one.chain_id for one in manifests} | {one.chain_id for one in segments}
    if not chains:
        raise NotFound("there is no snapshot and no archive", where=where)
    check_one_chain(chains, where)
    return manifests, segments
