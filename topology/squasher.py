"""The squasher: range diffs of an archive, from what is archived alone.

A primary starts this module as a process of its own once segments have come into the archive; `stateferry archive
squash` does the same for an archive that nobody works on. One range diff after the other, lower levels first: what it
is made of is fetched into a scratch folder, squashed (`pipeline.squash`), checked, and put piece by piece, created if
absent. A range diff is there once its last piece is, so whatever ends this before leaves nothing that a restore would
take; the next attempt makes the same pieces again, and only looks at those that are there. Without one, a sweep takes
them. An intent keeps sweeps from what it reads and puts; one that was under way before is waited for, and whether all
pieces are there is looked at in the end, as publishers of snapshots do.

Scratch needs room for what one range diff is made of and for itself. The process gives way to others on the same core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline import failpoints
from pipeline.archive_names import (
    PieceName,
    RangeName,
    RangeObject,
    SegmentName,
    archive_prefix,
    parse_piece_name,
    parse_segment_name,
    ranges_prefix,
    whole_ranges,
)
from pipeline.errors import ArchiveConflict, NotFound, ObjectMissing, RangeCorrupt
from pipeline.leases import Kind
from pipeline.objects import AlreadyThere, ObjectStore, open_objects
from pipeline.range_pieces import Piece
from pipeline.ranges import RangeDiff
from pipeline.squash import Due, Lowest, due_ranges, is_aligned, squash_ranges
from topology import children
from topology.children import Report, no_report
from topology.fetching import open_piece, open_segment
from topology.holding import CLOCK, Clock, held, wait_for_sweeps
from topology.snapshotter import scratch_folder

_NICENESS = 10
_THREADS = 4
_LOOKS_MAX = 60
"""At pieces that were put: each time some are gone, a sweep has come by that began before the last look."""
_WORK = "work"
SCRATCH_FOLDER = "squashing"


class Archive(NamedTuple):
    """One shard's."""

    chain_id: str
    generation: bytes
    shard: int


class Squashed(NamedTuple):
    """A range diff that was put. ``sizes``: of its pieces in bytes. ``changes``: netted."""

    name: RangeName
    sizes: tuple[int, ...]
    changes: int


def archives(objects: ObjectStore, prefix: str = "") -> list[Archive]:
    """All that have segments or range diffs."""
    found: set[Archive] = set()
    for info in objects.list(prefix):
        segment, piece = parse_segment_name(info.name), parse_piece_name(info.name)
        name = segment or (piece and piece.of)
        if name is not None:
            found.add(Archive(name.chain_id, name.generation, name.shard))
    return sorted(found)


def squash(
    objects: ObjectStore, archive: Archive, scratch: Path, *, report: Report = no_report, clock: Clock = CLOCK
) -> Iterator[Squashed]:
    """Make what range diffs one archive lacks, each as the iterator is asked for it. ``scratch``: a folder of its own,
    made and removed.

    Raises ArchiveConflict (another one stands there), SegmentCorrupt, RangeCorrupt, NotFound, DiskFull.
    """
    if not _due(objects, archive)[0]:
        return
    folders = [archive_prefix(*archive), ranges_prefix(*archive)]
    with held(objects, archive.chain_id, Kind.INTENT, folders, clock=clock):
        names = [info.name for folder in folders for info in objects.list(folder)]
        wait_for_sweeps(objects, archive.chain_id, names, clock)
        yield from _squash(objects, archive, scratch, report, clock)


def _due(
    objects: ObjectStore, archive: Archive
) -> tuple[list[Due], list[SegmentName], dict[tuple[int, int], RangeObject]]:
    """What is to be made, and the segments and range diffs that are there."""
    listed = [parse_segment_name(info.name) for info in objects.list(archive_prefix(*archive))]
    segments = [name for name in listed if name is not None]
    have = {(one.name.first, one.name.last): one for one in _whole(objects, archive)}
    return due_ranges(segments, [one.name for one in have.values()]), segments, have


def _squash(objects: ObjectStore, archive: Archive, scratch: Path, report: Report, clock: Clock) -> Iterator[Squashed]:
    due, segments, have = _due(objects, archive)
    for number, one in enumerate(due):
        report("range diffs made", number, len(due))
        name = RangeName(*archive, one.first, one.last)
        with scratch_folder(scratch):
            if one.sources:
                sources = [have[source] for source in one.sources]
                paths = squash_ranges(_fetched(objects, sources, scratch), _made(scratch))
            else:
                paths = _lowest(objects, segments, one, scratch)
            made = _put(objects, name, paths, clock)
        have[one.first, one.last] = RangeObject(name, made.sizes)
        yield made
    report("range diffs made", len(due), len(due))


def _whole(objects: ObjectStore, archive: Archive) -> list[RangeObject]:
    listed = [(parse_piece_name(info.name), info.size_bytes) for info in objects.list(ranges_prefix(*archive))]
    return whole_ranges((name, size) for name, size in listed if name is not None)


def _lowest(objects: ObjectStore, segments: Sequence[SegmentName], due: Due, scratch: Path) -> list[Path]:
    """From segments, one of which is held at a time."""
    lowest = Lowest(due.first, due.last, scratch)
    at = due.first - 1
    while at < due.last:
        fitting = [name for name in segments if name.first <= at + 1 <= name.last <= due.last and is_aligned(name)]
        name = max(fitting, key=lambda one: one.last)
        lowest.add(open_segment(objects.get(str(name)), name))
        at = name.last
    return lowest.write(_made(scratch))


def _fetched(objects: ObjectStore, sources: Sequence[RangeObject], scratch: Path) -> list[RangeDiff]:
    """Range diffs as checked files."""

    def fetch(name: PieceName) -> Piece:
        path = scratch / f"{name.of.first:012d}-{name.number:05d}"
        objects.fetch_to(str(name), path)
        return open_piece(path, name)

    with ThreadPoolExecutor(_THREADS) as threads:
        return [RangeDiff.of(one.name, list(threads.map(fetch, one.pieces))) for one in sources]


def _made(scratch: Path) -> Path:
    path = scratch / "made"
    path.mkdir()
    return path


def _put(objects: ObjectStore, name: RangeName, paths: Sequence[Path], clock: Clock = CLOCK) -> Squashed:
    """Put all pieces, and those again that a sweep took which did not see the intent."""
    pieces = dict(zip(name.pieces(len(paths)), paths, strict=True))
    lacking = list(pieces)
    for _ in range(_LOOKS_MAX):
        for one in lacking:
            failpoints.hit("squash.before_put")
            try:
                objects.put_file_new(str(one), pieces[one])
            except AlreadyThere:
                with suppress(ObjectMissing):  # swept just now
                    _compare(objects, one, Piece.of_file(pieces[one], is_checked=True))
            failpoints.hit("squash.after_put")
        wait_for_sweeps(objects, name.chain_id, map(str, pieces), clock)
        there = {info.name for info in objects.list(f"{name}.")}
        lacking = [one for one in pieces if str(one) not in there]
        if not lacking:
            entries = (entry for path in paths for entry in Piece.of_file(path, is_checked=True).entries)
            return Squashed(name, tuple(path.stat().st_size for path in paths), sum(one.changes for one in entries))
    raise NotFound("a piece that was put again and again is not there", where=str(lacking[0]), way_out="try it again")


def _compare(objects: ObjectStore, name: PieceName, made: Piece) -> None:
    try:
        standing = Piece.of_bytes(objects.get(str(name)))
    except RangeCorrupt as error:
        raise RangeCorrupt(error.what, where=str(name), way_out="delete it: it is made again") from error
    if not standing.same_as(made):
        raise ArchiveConflict(
            f"the archive holds another range diff of heights {name.of.first} to {name.of.last} than its segments make",
            where=str(name),
            way_out="check the segments: `stateferry frame verify`; then delete what is wrong",
        )


async def squash_in_process(archive: Archive, scratch: Path, objects_url: str, *, report: Report = no_report) -> int:
    """`squash` to the end in another process: how many were made. Cancelled, it ends that process."""
    async with children.alone_in(scratch):
        with scratch_folder(scratch):
            arguments = ["--objects", objects_url, "--scratch", str(scratch / _WORK), "--chain", archive.chain_id]
            arguments += ["--generation", archive.generation.hex(), "--shard", str(archive.shard)]
            made: int = await children.run(__spec__.name, arguments, report)
    return made


def main() -> int:
    """The helper process: make what range diffs an archive lacks, and print how many that were."""
    parser = argparse.ArgumentParser(prog="python -m topology.squasher", description=main.__doc__)
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--scratch", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--chain", required=True)
    parser.add_argument("--generation", required=True)
    parser.add_argument("--shard", type=int, required=True)
    given = parser.parse_args()
    archive = Archive(given.chain, bytes.fromhex(given.generation), given.shard)

    def work(report: Report) -> int:
        os.nice(_NICENESS)
        return sum(1 for _ in squash(open_objects(given.objects), archive, given.scratch, report=report))

    return children.serve(work)


if __name__ == "__main__":
    sys.exit(main())
