"""The auditor: what stands in an object store, against its own manifests, indexes, digests and history.

It notes every fault and goes on with the next object, so that one audit says all there is to say. What it needs on
disk is in a scratch folder: a part at a time of each process, or the store of a replay.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline import frame
from pipeline.archive import Segment, SegmentName, parse_segment_name
from pipeline.audits import (
    Level,
    Point,
    check_content,
    check_digest,
    check_journal,
    check_overlap,
    check_parts_there,
    check_point,
    check_replayed,
    check_snapshot,
)
from pipeline.errors import (
    CorruptInput,
    Diverged,
    NotFound,
    PartCorrupt,
    StateferryError,
    StoreCorrupt,
    Unsupported,
    WrongChain,
)
from pipeline.frame import NO_HASH
from pipeline.objects import ObjectStore, open_objects
from pipeline.parts import Part, digest_file
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.plans import SegmentObject, lead
from pipeline.restore import Replay, before_first
from pipeline.segment_index import SegmentIndex
from pipeline.snapshot import Manifest, parse_manifest_name
from pipeline.stores.base import META_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from topology import children
from topology.children import Report, no_report
from topology.fetching import open_segment
from topology.restore_plans import read_manifest

Result = TypeVar("Result")

_THREADS = 4
_CORES = os.cpu_count() or 1
_FAULTS = (CorruptInput, Diverged, NotFound, Unsupported, WrongChain)
"""What an object can be wrong in; anything else (no access, no space, no answer) ends the audit."""


class Auditor:
    """One audit of one object store.

    * ``faults``: all that was found wrong, each with the object in its ``where``.
    * ``counts``: what was looked at, and how much of it.
    """

    def __init__(self, url: str, scratch: Path, *, chain: str | None = None, report: Report = no_report) -> None:
        self.faults: list[StateferryError] = []
        self.counts: Counter[str] = Counter(manifests=0, parts=0, segments=0, bytes=0)
        self.manifests: list[Manifest] = []
        self.indexes: dict[SegmentName, SegmentIndex] = {}
        self._url = url
        self._objects: ObjectStore = open_objects(url)
        self._scratch = scratch
        self._prefix = f"{chain}/" if chain else ""
        self._report = report
        self._sizes: dict[str, int] = {}

    def run(self, level: Level, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """``points``: by generation and shard, what stores say that blocks left behind."""
        self._read_records(points)
        if level in (Level.STORED, Level.CONTENT):
            self._read_segments()
            self._read_parts(level)
        elif level is Level.REPLAY:
            self._replay_all(points)

    @contextmanager
    def _noting(self, name: object) -> Iterator[None]:
        """A fault of one object is noted, and no reason to stop; what was deleted since it was listed is no fault."""
        try:
            yield
        except _FAULTS as error:
            error.where = error.where or str(name)
            if not (isinstance(error, NotFound) and self._is_gone(str(name))):
                self.faults.append(error)

    def _try(self, name: object, work: Callable[[], Result]) -> Result | None:
        """What ``work`` gives; None if that is a fault."""
        found: list[Result] = []
        with self._noting(name):
            found.append(work())
        return found[0] if found else None

    def _is_gone(self, name: str) -> bool:
        try:
            self._objects.size(name)
        except NotFound:
            return name in self._sizes
        return False

    # Records

    def _read_records(self, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        self._sizes = {info.name: info.size_bytes for info in self._objects.list(self._prefix)}
        for name in self._sizes:
            if parse_manifest_name(name) is not None:
                self._read_manifest(name)
        names = sorted(name for name in map(parse_segment_name, self._sizes) if name is not None)
        for _, segments in itertools.groupby(names, lambda name: name[:3]):
            self._read_indexes(list(segments), points)

    def _read_manifest(self, name: str) -> None:
        with self._noting(name):
            manifest = read_manifest(self._objects, name)
            self.manifests.append(manifest)
            self.counts["manifests"] += 1
            wrong = list(check_parts_there(manifest, self._sizes))
            if wrong and not self._is_gone(name):
                self.faults += wrong

    def _read_indexes(self, names: list[SegmentName], points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """Of one shard, in the order of their heights."""
        furthest: SegmentIndex | None = None
        for name in names:
            index = self._try(name, partial(self._read_index, name))
            if index is None:
                continue
            self.indexes[name] = index
            self.counts["segments"] += 1
            with self._noting(name):
                if furthest is not None:
                    check_overlap(furthest, index)
            if furthest is None or index.name.last >= furthest.name.last:
                furthest = index
            for manifest in self.manifests:
                if manifest.generation == name.generation and name.shard < manifest.shards:
                    with self._noting(name):
                        check_snapshot(manifest, index)
            for point in points.get((name.generation, name.shard), ()):
                self._check_entry(index, point)

    def _read_index(self, name: SegmentName) -> SegmentIndex:
        said = str(name)
        return SegmentIndex.read(
            name, self._sizes[said], lambda start, stop: self._objects.get_range(said, start, stop)
        )

    def _check_entry(self, index: SegmentIndex, point: Point) -> None:
        entry = None if point.ref is None else index.entry(point.ref.height)
        if entry is not None and (point.ref, point.root) != (entry.ref, entry.post_root):
            self.faults.append(
                Diverged(
                    f"the store's block {point.ref} has root {point.root.hex()}, the archive has {entry.ref} with "
                    f"{entry.post_root.hex()}",
                    where=f"{point.where} and {index.name}",
                    way_out="`stateferry verify --level full` says whether the store holds what it says",
                )
            )

    # Bytes

    def _read_segments(self) -> None:
        def read(name: SegmentName) -> int:
            return self._try(name, lambda: len(self._segment(name).data)) or 0

        with ThreadPoolExecutor(_THREADS) as threads:
            for done, size in enumerate(threads.map(read, self.indexes), 1):
                self.counts["bytes"] += size
                self._report("segments read", done, len(self.indexes))

    def _read_parts(self, level: Level) -> None:
        missing = {fault.where for fault in self.faults}
        wanted = [
            [manifest.name, number]
            for manifest in self.manifests
            for number, part in enumerate(manifest.parts)
            if manifest.part_name(part) not in missing
        ]
        workers = min(_CORES, len(wanted))
        if level is Level.STORED or workers < 2:
            found = [read_parts(self._objects, wanted, self._scratch, level, self._report)]
        else:
            found = asyncio.run(self._in_processes([wanted[at::workers] for at in range(workers)], level))
        for fields in found:
            self.counts += Counter(fields["counts"])
            for fault in fields["faults"]:
                with self._noting(fault["where"]):
                    raise children.raised(fault)

    async def _in_processes(self, shares: list[list[list[Any]]], level: Level) -> list[dict[str, Any]]:
        total, done = sum(map(len, shares)), Counter[int]()

        async def run(number: int, share: list[list[Any]]) -> dict[str, Any]:
            def note(what: str, parts: int, _: int) -> None:
                done[number] = parts
                self._report(what, done.total(), total)

            folder = self._scratch / str(number)
            folder.mkdir()
            (folder / "wanted.json").write_text(json.dumps(share))
            arguments = ["--objects", self._url, "--scratch", str(folder), "--level", level.value]
            fields: dict[str, Any] = await children.run(__spec__.name, arguments, note)
            return fields

        return await children.together(run(number, share) for number, share in enumerate(shares))

    # Replay

    def _replay_all(self, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """Every shard of every generation, from the lowest state that its segments lead on from."""
        self.counts["frames"] = self.counts["snapshots_met"] = self.counts["points_met"] = 0
        shards = {(name.generation, name.shard) for name in self.indexes}
        for generation, shard in sorted(shards):
            manifests = sorted(
                (one for one in self.manifests if one.generation == generation and shard < one.shards),
                key=lambda manifest: manifest.height,
            )
            segments = [
                SegmentObject(name, self._sizes[str(name)])
                for name in self.indexes
                if (name.generation, name.shard) == (generation, shard)
            ]
            self._replay_shard(shard, segments, manifests, points.get((generation, shard), ()))

    def _replay_shard(
        self, shard: int, segments: list[SegmentObject], manifests: list[Manifest], points: Sequence[Point]
    ) -> None:
        """A stretch of the archive after the other; a hole between them is passed by the next snapshot above it."""
        first = min(segments, key=lambda one: (one.name.first, -one.name.last))
        opens_chain = self._try(first.name, lambda: self._first_parent(first.name)) == NO_HASH
        starts: list[Manifest | None] = [*([None] if opens_chain else []), *manifests]
        reached: int | None = None
        for start in starts:
            if reached is not None and start is not None and start.height <= reached:
                continue
            at = first.name.first - 1 if start is None else start.height
            hops, end = lead(segments, at, None)
            if not hops:
                continue
            self._report("blocks replayed", at + 1, end)
            with self._noting(hops[0].name if start is None else start.name):
                self._replay_stretch(shard, start, hops, manifests, points)
            reached = end

    def _first_parent(self, name: SegmentName) -> bytes:
        index = self.indexes[name]
        return frame.peek(self._objects.get_range(str(name), *index.place(index.entries[0]))).parent_hash

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
                meta = before_first(self.indexes[hops[0].name].resume)
            else:
                meta = start.resumes[shard]
                self._ingest(store, start, start.parts_of(shard))
            store.write(Batch(meta={META_KEY: encode_meta(meta)}))
            replay, end = Replay(store, meta), hops[-1].name.last
            for hop in hops:
                for header in replay.run(self._segment(hop.name), hop.name.last):
                    self.counts["frames"] += 1
                    self._report("blocks replayed", header.ref.height, end)
                    self._compare(replay.meta, shard, manifests, points)
        finally:
            store.close()
            shutil.rmtree(path, ignore_errors=True)

    def _compare(self, meta: Meta, shard: int, manifests: Sequence[Manifest], points: Sequence[Point]) -> None:
        for manifest in manifests:
            if manifest.height == meta.tip.height:
                with self._noting(manifest.name):
                    check_replayed(meta.tip, manifest, shard)
                    self.counts["snapshots_met"] += 1
        for point in points:
            if point.ref is not None and point.ref.height == meta.tip.height:
                with self._noting(point.where):
                    check_point(meta.tip, point)
                    self.counts["points_met"] += 1

    def _segment(self, name: SegmentName) -> Segment:
        return open_segment(self._objects.get(str(name)), name)

    def _ingest(self, store: RocksStore, manifest: Manifest, parts: Sequence[Part]) -> None:
        folder = self._scratch / "parts"
        folder.mkdir(exist_ok=True)
        paths = []
        for part in parts:
            name, path = manifest.part_name(part), folder / part.name
            self._objects.fetch_to(name, path)
            check_digest(part, name, path.stat().st_size, digest_file(path))
            paths.append(path)
        with _as_parts(manifest.name):
            if paths:
                store.ingest(paths)


@contextmanager
def _as_parts(name: str) -> Iterator[None]:
    try:
        yield
    except StoreCorrupt as error:
        raise PartCorrupt(f"a part cannot be taken in: {error.what}", where=name) from error


def read_parts(
    objects: ObjectStore, wanted: Iterable[Sequence[Any]], scratch: Path, level: Level, report: Report
) -> dict[str, Any]:
    """Some parts, each as the name of its manifest and its number there: digests; at CONTENT all their keys too."""
    faults, counts, manifest = [], Counter[str](parts=0, bytes=0, keys=0), None
    for done, (name, number) in enumerate(wanted, 1):
        try:
            if manifest is None or manifest.name != name:
                manifest = read_manifest(objects, name)
            counts += _read_part(objects, manifest, manifest.parts[number], scratch, level)
        except _FAULTS as error:
            error.where = error.where or name
            faults.append(children.described(error))
        report("parts read", done, 0)
    return {"counts": dict(counts), "faults": faults}


def _read_part(objects: ObjectStore, manifest: Manifest, part: Part, scratch: Path, level: Level) -> Counter[str]:
    name, path, folder = manifest.part_name(part), scratch / part.name, scratch / "part"
    counts = Counter(parts=1, bytes=part.size_bytes)
    try:
        objects.fetch_to(name, path)
        check_digest(part, name, path.stat().st_size, digest_file(path))
        if level is Level.CONTENT:
            store = RocksStore(folder)
            try:
                with _as_parts(name):
                    store.ingest([path])
                counts["keys"] = check_content(part, name, store.scan()).keys
            finally:
                store.close()
    finally:
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return counts


# Stores


def audit_records(store: RocksStore, level: Level) -> Counter[str]:
    """A store that nobody writes to: its position and its journal; at STORED also every block's checksum.

    Raises StoreCorrupt.
    """
    data = store.get_meta(META_KEY)
    if data is None:
        raise StoreCorrupt("the store has no position", where=str(store.path))
    meta = decode_meta(data)
    counts = Counter(journal_frames=check_journal(store, meta))
    if level is Level.STORED:
        counts["entries"] = store.read_all()
    return counts


def main() -> int:
    """One helper process: read some parts."""
    parser = argparse.ArgumentParser(prog="python -m topology.auditor", description=main.__doc__)
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that is there, and what to read in it")
    parser.add_argument("--level", type=Level, required=True)
    given = parser.parse_args()
    wanted = json.loads((given.scratch / "wanted.json").read_text())
    return children.serve(
        lambda report: read_parts(open_objects(given.objects), wanted, given.scratch, given.level, report)
    )


if __name__ == "__main__":
    sys.exit(main())
