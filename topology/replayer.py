"""The replayer: archived frames applied from the lowest state there is, compared with everything they come by.

Where a range diff begins, a second store, which shares its files with the first (`RocksStore.checkpoint`), takes it in
as a restore would: chunk by chunk, each before-value against the state. What it leads to is kept, a position of some
2 KiB a table, until the frames come to its last height. Of each level one range diff is under way at a time.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline import frame
from pipeline.archive import Segment
from pipeline.archive_names import RangeName, RangeObject, SegmentName
from pipeline.audits import Point, check_digest, check_point, check_ranged, check_replayed
from pipeline.errors import PartCorrupt, StoreCorrupt
from pipeline.frame import NO_HASH
from pipeline.parts import Part, digest_file
from pipeline.plans import SegmentObject, lead
from pipeline.position import Meta, Tip, encode_meta
from pipeline.ranges import RangeDiff
from pipeline.restore import Replay, before_first
from pipeline.snapshot import Manifest
from pipeline.stores.base import META_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from topology.fetching import open_segment
from topology.findings import Findings


class _Led(NamedTuple):
    """What a range diff led to."""

    name: RangeName
    tip: Tip


class Replayer:
    """The replay of one object store, in a store of its own in a scratch folder."""

    def __init__(
        self,
        found: Findings,
        scratch: Path,
        manifests: Sequence[Manifest],
        segments: Sequence[SegmentName],
    ) -> None:
        self._found = found
        self._scratch = scratch
        self._manifests = manifests
        self._segments = segments
        self._ranges: dict[tuple[bytes, int, int], list[RangeObject]] = defaultdict(list)  # by shard and first height
        for one in found.ranges:
            self._ranges[one.name.generation, one.name.shard, one.name.first].append(one)
        self._led: dict[tuple[bytes, int, int], list[_Led]] = defaultdict(list)  # by shard and last height

    def run(self, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """Every shard of every generation, from the lowest state that its segments lead on from."""
        self._found.counts.update(range_diffs=sum(map(len, self._ranges.values())))
        self._found.counts.update(dict.fromkeys(("frames", "snapshots_met", "points_met", "range_diffs_met"), 0))
        shards = {(name.generation, name.shard) for name in self._segments}
        for generation, shard in sorted(shards):
            manifests = sorted(
                (one for one in self._manifests if one.generation == generation and shard < one.shards),
                key=lambda manifest: manifest.height,
            )
            segments = [
                SegmentObject(name, self._found.sizes[str(name)])
                for name in self._segments
                if (name.generation, name.shard) == (generation, shard)
            ]
            self._replay_shard(shard, segments, manifests, points.get((generation, shard), ()))

    def _replay_shard(
        self, shard: int, segments: list[SegmentObject], manifests: list[Manifest], points: Sequence[Point]
    ) -> None:
        """A stretch of the archive after the other; a hole between them is passed by the next snapshot above it."""
        first = min(segments, key=lambda one: (one.name.first, -one.name.last))
        opens_chain = self._found.attempt(first.name, lambda: self._first_parent(first.name)) == NO_HASH
        starts: list[Manifest | None] = [*([None] if opens_chain else []), *manifests]
        reached: int | None = None
        for start in starts:
            if reached is not None and start is not None and start.height <= reached:
                continue
            at = first.name.first - 1 if start is None else start.height
            hops, end = lead(segments, at, None)
            if not hops:
                continue
            self._found.report("blocks replayed", at + 1, end)
            with self._found.noting(hops[0].name if start is None else start.name):
                self._replay_stretch(shard, start, hops, manifests, points)
            reached = end

    def _first_parent(self, name: SegmentName) -> bytes:
        index = self._found.read_index(name)
        return frame.peek(self._found.objects.get_range(str(name), *index.place(index.entries[0]))).parent_hash

    def _replay_stretch(
        self,
        shard: int,
        start: Manifest | None,
        hops: Sequence[SegmentObject],
        manifests: Sequence[Manifest],
        points: Sequence[Point],
    ) -> None:
        path = self._scratch / "replay"
        shutil.rmtree(path, ignore_errors=True)
        store = RocksStore(path)
        try:
            if start is None:
                meta = before_first(self._found.read_index(hops[0].name).resume)
            else:
                meta = start.resumes[shard]
                self._ingest(store, start, start.parts_of(shard))
            store.write(Batch(meta={META_KEY: encode_meta(meta)}))
            replay, end = Replay(store, meta), hops[-1].name.last
            self._meet_ranges(store, replay, hops[0].name.first - 1 if start is None else start.height)
            for hop in hops:
                for header in replay.run(self._segment(hop.name), hop.name.last):
                    self._found.counts["frames"] += 1
                    self._found.report("blocks replayed", header.ref.height, end)
                    self._compare(replay.meta, shard, manifests, points)
                    self._meet_ranges(store, replay, header.ref.height)
        finally:
            store.close()
            shutil.rmtree(path, ignore_errors=True)

    def _compare(self, meta: Meta, shard: int, manifests: Sequence[Manifest], points: Sequence[Point]) -> None:
        for manifest in manifests:
            if manifest.height == meta.tip.height:
                with self._found.noting(manifest.name):
                    check_replayed(meta.tip, manifest, shard)
                    self._found.counts["snapshots_met"] += 1
        for point in points:
            if point.ref is not None and point.ref.height == meta.tip.height:
                with self._found.noting(point.where):
                    check_point(meta.tip, point)
                    self._found.counts["points_met"] += 1

    def _meet_ranges(self, store: RocksStore, replay: Replay, height: int) -> None:
        """Compare range diffs that end here with the state, and apply those that begin here to a copy of it."""
        meta = replay.meta
        for led in self._led.pop((meta.generation, meta.shard, height), ()):
            with self._found.noting(led.name):
                check_ranged(meta.tip, led.name, led.tip)
                self._found.counts["range_diffs_met"] += 1
        for one in self._ranges.get((meta.generation, meta.shard, height + 1), ()):
            replay.commit()
            tip = self._found.attempt_range(one, self._scratch / "range", partial(self._applied, store, meta))
            if tip is not None:
                self._led[meta.generation, meta.shard, one.name.last].append(_Led(one.name, tip))

    def _applied(self, store: RocksStore, meta: Meta, one: RangeDiff) -> Tip:
        """Raises RangeCorrupt."""
        path = self._scratch / "ranged"
        store.checkpoint(path)
        copy = RocksStore(path)
        try:
            for _ in Replay(copy, meta).run_range(one):
                pass
        finally:
            copy.close()
            shutil.rmtree(path)
        return one.resume.tip

    def _segment(self, name: SegmentName) -> Segment:
        return open_segment(self._found.objects.get(str(name)), name)

    def _ingest(self, store: RocksStore, manifest: Manifest, parts: Sequence[Part]) -> None:
        folder = self._scratch / "parts"
        folder.mkdir(exist_ok=True)
        paths = []
        for part in parts:
            name, path = manifest.part_name(part), folder / part.name
            self._found.objects.fetch_to(name, path)
            check_digest(part, name, path.stat().st_size, digest_file(path))
            paths.append(path)
        with as_parts(manifest.name):
            if paths:
                store.ingest(paths)


@contextmanager
def as_parts(name: str) -> Iterator[None]:
    try:
        yield
    except StoreCorrupt as error:
        raise PartCorrupt(f"a part cannot be taken in: {error.what}", where=name) from error
