"""Fetching: what a plan names comes from the object store into a folder, and is checked before it counts as there.

    parts/         snapshot parts, by their names
    segments/      archived segments: SHARD-FIRST-LAST.seg
    ranges/        pieces of range diffs: SHARD-FIRST-LAST.PIECE-PIECES.rng

A file has its name only once its bytes were found to be right; so a crash costs what was on its way, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from pipeline import failpoints
from pipeline.archive import Segment
from pipeline.archive_names import PieceName, RangeObject, SegmentName
from pipeline.errors import PartCorrupt, RangeCorrupt, SegmentCorrupt, Unsupported
from pipeline.objects import ObjectStore
from pipeline.objects.files import written_whole
from pipeline.parts import Part, digest_file
from pipeline.plans import RestorePlan
from pipeline.range_pieces import Piece
from pipeline.ranges import RangeDiff
from pipeline.snapshot import Manifest

FOLDERS = ("parts", "segments", "ranges")
_THREADS = 8


class Fetching:
    """What is in a folder of what a plan needs."""

    def __init__(self, objects: ObjectStore, folder: Path) -> None:
        self.fetched_bytes = 0  # by this object
        self._objects = objects
        self._folder = folder

    def part_path(self, part: Part) -> Path:
        return self._folder / "parts" / part.name

    def segment_path(self, name: SegmentName) -> Path:
        return self._folder / "segments" / f"{name.shard:02d}-{name.first:012d}-{name.last:012d}.seg"

    def segment(self, name: SegmentName) -> Segment:
        """One that is here."""
        return open_segment(self.segment_path(name).read_bytes(), name)

    def piece_path(self, name: PieceName) -> Path:
        return self._folder / "ranges" / f"{name.of.shard:02d}-{str(name).rpartition('/')[2]}"

    def range_diff(self, found: RangeObject) -> RangeDiff:
        """One that is here. Raises RangeCorrupt."""
        pieces = [Piece.of_file(self.piece_path(name), is_checked=True) for name in found.pieces]
        return RangeDiff.of(found.name, pieces)

    def fetch(self, plan: RestorePlan, report: Callable[[int, int], None]) -> None:
        """Parts, segments and range diffs, several at a time; what is here already was checked before. ``report``:
        bytes that are here, of how many. Raises NotFound, PartCorrupt, SegmentCorrupt, RangeCorrupt, DiskFull."""
        for folder in FOLDERS:
            (self._folder / folder).mkdir(exist_ok=True)
        with _cleared_threads() as threads:
            pending: set[Future[int]] = set()
            for part in plan.parts:
                if not self.part_path(part).exists():
                    pending.add(threads.submit(self._fetch_part, plan.manifest, part))
            for piece in [piece for one in plan.ranges for piece in one.pieces]:
                if not self.piece_path(piece).exists():
                    pending.add(threads.submit(self._fetch_piece, piece))
            for segment in plan.segments:
                if not self.segment_path(segment.name).exists():
                    pending.add(threads.submit(self._fetch_segment, segment.name))
            here_bytes = self._here_bytes(plan)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                came_bytes = sum(future.result() for future in done)
                self.fetched_bytes += came_bytes
                here_bytes += came_bytes
                report(here_bytes, plan.size_bytes)

    def _here_bytes(self, plan: RestorePlan) -> int:
        paths = [self.part_path(part) for part in plan.parts]
        paths += [self.piece_path(piece) for one in plan.ranges for piece in one.pieces]
        paths += [self.segment_path(segment.name) for segment in plan.segments]
        return sum(path.stat().st_size for path in paths if path.exists())

    def _fetch_part(self, manifest: Manifest | None, part: Part) -> int:
        assert manifest is not None
        name = manifest.part_name(part)
        with self._incoming(name, self.part_path(part)) as path:
            size, digest = path.stat().st_size, digest_file(path)
            if (size, digest) != (part.size_bytes, part.digest):
                raise PartCorrupt(
                    f"a part has {size} bytes and digest {digest.hex()}, the manifest says {part.size_bytes} and "
                    f"{part.digest.hex()}",
                    where=name,
                    way_out="restore from another snapshot with --height: `stateferry status` lists them",
                )
        failpoints.hit("restore.part_fetched")
        return part.size_bytes

    def _fetch_segment(self, name: SegmentName) -> int:
        with self._incoming(str(name), self.segment_path(name)) as path:
            data = path.read_bytes()
            open_segment(data, name)
        return len(data)

    def _fetch_piece(self, name: PieceName) -> int:
        with self._incoming(str(name), self.piece_path(name)) as path:
            open_piece(path, name)
            size_bytes = path.stat().st_size
        failpoints.hit("restore.piece_fetched")
        return size_bytes

    @contextmanager
    def _incoming(self, name: str, path: Path) -> Iterator[Path]:
        """Fetch an object; it gets its path once the block inside found no fault."""
        with written_whole(path) as draft:
            self._objects.fetch_to(name, draft)
            yield draft


@contextmanager
def _cleared_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that do not go on with what is queued once one of them failed."""
    threads = ThreadPoolExecutor(_THREADS)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def open_segment(data: bytes, name: SegmentName) -> Segment:
    """A segment that was fetched under a name. Raises SegmentCorrupt, also if it is another's; Unsupported."""
    try:
        segment = Segment.open(data)
    except SegmentCorrupt as error:
        raise SegmentCorrupt(
            error.what,
            where=str(name),
            way_out="delete it: a primary whose journal has those blocks archives them again",
        ) from error
    resume = segment.resume
    if SegmentName(resume.chain_id, resume.generation, resume.shard, segment.first, segment.last) != name:
        raise SegmentCorrupt("a segment stands under another's name", where=str(name))
    return segment


def open_piece(path: Path, name: PieceName) -> Piece:
    """A piece of a range diff that was fetched under a name. Raises RangeCorrupt, also if it is another's, and
    Unsupported."""
    try:
        piece = Piece.of_file(path)
        piece.check_name(name)
    except (RangeCorrupt, Unsupported) as error:
        error.where = str(name)
        error.way_out = error.way_out or "delete it: `stateferry archive squash` makes it again"
        raise
    return piece
