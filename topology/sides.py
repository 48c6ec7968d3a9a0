"""What can be compared: a node's stores, a snapshot, an object store. Each says what it knows, and counts its reads.

A side has a history (a point for a height, and the changes of a block) and states (whole contents at some heights).
Nothing is read before it is asked for.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Protocol

from pipeline import frame
from pipeline.archive import Committed, SegmentName, parse_segment_name
from pipeline.audits import check_digest
from pipeline.comparison import Difference, Entries, Heights, Point, differing_entries, differing_runs
from pipeline.diff import Diff, decode_whole_body
from pipeline.errors import NotFound, PartCorrupt, StoreCorrupt
from pipeline.journal import Entry
from pipeline.objects import ObjectStore
from pipeline.parts import Part, digest_file
from pipeline.plans import check_one_chain
from pipeline.position import Meta
from pipeline.segment_index import SegmentIndex
from pipeline.shards import join_metas, stand_together
from pipeline.snapshot import Manifest, ManifestName, parse_manifest_name
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import audit
from topology.reads import Readable, View
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

    def diff(self, shard: int, height: int) -> Diff:
        """What the block of a height changed."""
        ...

    def roots(self) -> dict[int, bytes]:
        """The first 8 bytes of the root at each height of which `state` has the content."""
        ...

    def state(self, height: int) -> StoreState | SnapshotState: ...


# Nodes


class StoreState:
    """What stores hold where they stand."""

    def __init__(self, name: str, store: Readable, root: bytes) -> None:
        self.name = name
        self.store = store
        self.root = root


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
        following = self._entry(shard, height + 1)
        before = meta if following is None else following.before
        assert before.tip.ref is not None and before.tip.height == height, (before.tip.ref, height)
        return Point(before.tip.ref, before.tip.root, meta.generation, b"")  # it may have come back to that block

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
        return StoreState(self.name, union([view.store for view in self._views]), tip.root)

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
        self._scratch = scratch
        self._indexes: dict[SegmentName, SegmentIndex] = {}
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
        return SnapshotState(self, self._manifest(height))

    def entries(self, manifest: Manifest, parts: Sequence[Part]) -> Entries:
        """What some parts hold, one fetched after the other. Raises PartCorrupt."""
        for part in parts:
            yield from self._entries(manifest, part)

    def _entries(self, manifest: Manifest, part: Part) -> Entries:
        name, path, folder = manifest.part_name(part), self._scratch / part.name, self._scratch / f"{part.name}.store"
        self.read += Counter(parts=1, bytes=part.size_bytes)
        try:
            self._objects.fetch_to(name, path)
            check_digest(part, name, path.stat().st_size, digest_file(path))
            store = RocksStore(folder)
            try:
                store.ingest([path])
                yield from store.scan()
            except StoreCorrupt as error:
                raise PartCorrupt(f"a part cannot be read: {error.what}", where=name) from error
            finally:
                store.close()
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

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


class SnapshotState:
    """A snapshot's parts."""

    def __init__(self, side: ObjectsSide, manifest: Manifest) -> None:
        self.name = side.name
        self.side = side
        self.manifest = manifest
        self.root = manifest.root

    def entries(self, parts: Sequence[Part]) -> Entries:
        return self.side.entries(self.manifest, parts)


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


# States


def differing_keys(a: StoreState | SnapshotState, b: StoreState | SnapshotState) -> Iterator[Difference]:
    """Keys that differ between two states, read part by part where partials differ, and no others."""
    if isinstance(a, SnapshotState) and isinstance(b, SnapshotState):
        for one, two in differing_runs(a.manifest.parts, b.manifest.parts):
            yield from differing_entries(a.entries(one), b.entries(two))
    elif isinstance(a, StoreState) and isinstance(b, StoreState):
        yield from differing_entries(a.store.scan(), b.store.scan())
    elif isinstance(a, SnapshotState) and isinstance(b, StoreState):
        yield from _against_store(a, b)
    else:
        assert isinstance(b, SnapshotState) and isinstance(a, StoreState)
        yield from (one._replace(a=one.b, b=one.a) for one in _against_store(b, a))


def _against_store(snapshot: SnapshotState, held: StoreState) -> Iterator[Difference]:
    """The store's entries up to the end of each part are hashed; a part of other partials is fetched."""
    parts = snapshot.manifest.parts
    starts = [b"", *(part.last_key + b"\0" for part in parts)]
    for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
        found = audit(held.store.scan(start, stop))
        vectors = {table_id: vector for table_id, vector in found.vectors.items() if any(vector)}
        if (vectors, found.keys) != (part.partials, part.keys):
            yield from differing_entries(snapshot.entries([part]), held.store.scan(start, stop))
    yield from differing_entries(iter(()), chain(held.store.scan(starts[-1])))
