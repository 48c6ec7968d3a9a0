"""The auditor: what stands in an object store, against its own manifests, indexes, digests and history.

It notes every fault and goes on with the next object, so that one audit says all there is to say. What it needs on
disk is in a scratch folder: a part at a time of each process, or the store of a replay with the pieces of one range
diff. In memory it holds all names, the manifests, and four segments at most; at REPLAY two stores of 100 MB at most.
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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.archive_names import SegmentName, parse_segment_name
from pipeline.audits import (
    Level,
    Point,
    check_content,
    check_digest,
    check_filters,
    check_journal,
    check_overlap,
    check_parts_there,
    check_range,
    check_snapshot,
)
from pipeline.errors import Diverged, StoreCorrupt
from pipeline.objects import ObjectStore, open_objects
from pipeline.parts import Part, digest_file
from pipeline.position import decode_meta
from pipeline.ranges import RangeDiff
from pipeline.segment_index import SegmentIndex
from pipeline.signature import check_signature
from pipeline.snapshot import Manifest, parse_manifest_name
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from topology import children
from topology.children import Report, no_report
from topology.fetching import open_segment
from topology.findings import FAULTS, Findings
from topology.replayer import Replayer, as_parts
from topology.restore_plans import read_manifest

_THREADS = 4
_CORES = os.cpu_count() or 1


class Auditor:
    """One audit of one object store. ``found``: what it saw, and what was wrong."""

    def __init__(self, url: str, scratch: Path, *, chain: str | None = None, report: Report = no_report) -> None:
        self.found = Findings(open_objects(url), f"{chain}/" if chain else "", report)
        self.manifests: list[Manifest] = []
        self.segments: list[SegmentName] = []  # those whose index is sound
        self._url = url
        self._scratch = scratch

    def run(self, level: Level, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """``points``: by generation and shard, what stores say that blocks left behind."""
        self._read_records(points)
        if level in (Level.STORED, Level.CONTENT):
            self._read_segments(level)
            self._read_ranges(level)
            self._read_parts(level)
        elif level is Level.REPLAY:
            Replayer(self.found, self._scratch, self.manifests, self.segments).run(points)

    # Records

    def _read_records(self, points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        for name in self.found.sizes:
            if parse_manifest_name(name) is not None:
                self._read_manifest(name)
        names = sorted(name for name in map(parse_segment_name, self.found.sizes) if name is not None)
        for _, segments in itertools.groupby(names, lambda name: name[:3]):
            self._read_indexes(list(segments), points)

    def _read_manifest(self, name: str) -> None:
        with self.found.noting(name):
            manifest = read_manifest(self.found.objects, name)
            check_signature(manifest.signature, manifest.digest, None, name)
            self.manifests.append(manifest)
            self.found.counts["manifests"] += 1
            wrong = list(check_parts_there(manifest, self.found.sizes))
            if wrong and not self.found.is_gone(name):
                self.found.faults += wrong

    def _read_indexes(self, names: list[SegmentName], points: Mapping[tuple[bytes, int], Sequence[Point]]) -> None:
        """Of one shard, in the order of their heights."""
        furthest: SegmentIndex | None = None
        for name in names:
            index = self.found.attempt(name, partial(self.found.read_index, name))
            if index is None:
                continue
            self.segments.append(name)
            self.found.counts["segments"] += 1
            with self.found.noting(name):
                if furthest is not None:
                    check_overlap(furthest, index)
            if furthest is None or index.name.last >= furthest.name.last:
                furthest = index
            for manifest in self.manifests:
                if manifest.generation == name.generation and name.shard < manifest.shards:
                    with self.found.noting(name):
                        check_snapshot(manifest, index)
            for point in points.get((name.generation, name.shard), ()):
                self._check_entry(index, point)

    def _check_entry(self, index: SegmentIndex, point: Point) -> None:
        entry = None if point.ref is None else index.entry(point.ref.height)
        if entry is not None and (point.ref, point.root) != (entry.ref, entry.post_root):
            self.found.faults.append(
                Diverged(
                    f"the store's block {point.ref} has root {point.root.hex()}, the archive has {entry.ref} with "
                    f"{entry.post_root.hex()}",
                    where=f"{point.where} and {index.name}",
                    way_out="`stateferry verify --level full` says whether the store holds what it says",
                )
            )

    # Bytes

    def _read_segments(self, level: Level) -> None:
        def check(name: SegmentName) -> int:
            segment = open_segment(self.found.objects.get(str(name)), name)
            if level is Level.CONTENT:
                check_filters(name, segment)
            return len(segment.data)

        def read(name: SegmentName) -> int:
            return self.found.attempt(name, partial(check, name)) or 0

        with ThreadPoolExecutor(_THREADS) as threads:
            for done, size in enumerate(threads.map(read, self.segments), 1):
                self.found.counts["bytes"] += size
                self.found.report("segments read", done, len(self.segments))

    def _read_ranges(self, level: Level) -> None:
        def check(one: RangeDiff) -> bool:
            if level is Level.CONTENT:
                check_range(one)
            return True

        ranges = self.found.ranges
        for done, one in enumerate(ranges, 1):
            if self.found.attempt_range(one, self._scratch / "range", check):
                self.found.counts.update(range_diffs=1, bytes=one.size_bytes)
            self.found.report("range diffs read", done, len(ranges))

    def _read_parts(self, level: Level) -> None:
        missing = {fault.where for fault in self.found.faults}
        wanted = [
            [manifest.name, number]
            for manifest in self.manifests
            for number, part in enumerate(manifest.parts)
            if manifest.part_name(part) not in missing
        ]
        workers = min(_CORES, len(wanted))
        if level is Level.STORED or workers < 2:
            found = [read_parts(self.found.objects, wanted, self._scratch, level, self.found.report)]
        else:
            found = asyncio.run(self._in_processes([wanted[at::workers] for at in range(workers)], level))
        for fields in found:
            self.found.counts.update(fields["counts"])
            for fault in fields["faults"]:
                with self.found.noting(fault["where"]):
                    raise children.raised(fault)

    async def _in_processes(self, shares: list[list[list[Any]]], level: Level) -> list[dict[str, Any]]:
        total, done = sum(map(len, shares)), Counter[int]()

        async def run(number: int, share: list[list[Any]]) -> dict[str, Any]:
            def note(what: str, parts: int, _: int) -> None:
                done[number] = parts
                self.found.report(what, done.total(), total)

            folder = self._scratch / str(number)
            folder.mkdir()
            (folder / "wanted.json").write_text(json.dumps(share))
            arguments = ["--objects", self._url, "--scratch", str(folder), "--level", level.value]
            fields: dict[str, Any] = await children.run(__spec__.name, arguments, note)
            return fields

        return await children.together(run(number, share) for number, share in enumerate(shares))


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
        except FAULTS as error:
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
                with as_parts(name):
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
