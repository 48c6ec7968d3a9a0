"""Findings: what an audit of an object store saw, and what of it was wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.archive_names import RangeObject, SegmentName, parse_piece_name, whole_ranges
from pipeline.errors import CorruptInput, Diverged, NotFound, StateferryError, Unsupported, WrongChain
from pipeline.objects import ObjectStore
from pipeline.ranges import RangeDiff
from pipeline.segment_index import SegmentIndex
from topology.children import Report
from topology.fetching import open_piece

Result = TypeVar("Result")

FAULTS = (CorruptInput, Diverged, NotFound, Unsupported, WrongChain)
"""What an object can be wrong in; anything else (no access, no space, no answer) ends the audit."""


class Findings:
    """* ``faults``: all that was found wrong, each with the object in its ``where``.
    * ``counts``: what was looked at, and how much of it.
    * ``sizes``: of all objects, as they were listed.
    """

    def __init__(self, objects: ObjectStore, prefix: str, report: Report) -> None:
        self.objects = objects
        self.report = report
        self.faults: list[StateferryError] = []
        self.counts: Counter[str] = Counter(manifests=0, parts=0, segments=0, range_diffs=0, bytes=0)
        self.sizes = {info.name: info.size_bytes for info in objects.list(prefix)}

    @contextmanager
    def noting(self, name: object, objects: Sequence[object] = ()) -> Iterator[None]:
        """A fault of one object is noted, and no reason to stop; what was deleted since it was listed is no fault.
        ``objects``: what has that name, where it is several."""
        try:
            yield
        except FAULTS as error:
            error.where = error.where or str(name)
            if not (isinstance(error, NotFound) and any(self.is_gone(str(one)) for one in objects or [name])):
                self.faults.append(error)

    def attempt(self, name: object, work: Callable[[], Result]) -> Result | None:
        """What ``work`` gives; None if that is a fault."""
        found: list[Result] = []
        with self.noting(name):
            found.append(work())
        return found[0] if found else None

    def read_index(self, name: SegmentName) -> SegmentIndex:
        """Raises SegmentCorrupt, Unsupported, NotFound."""
        said = str(name)
        return SegmentIndex.read(name, self.sizes[said], lambda start, stop: self.objects.get_range(said, start, stop))

    @property
    def ranges(self) -> list[RangeObject]:
        """Range diffs that have all their pieces; what a crash left of others is no fault."""
        names = ((parse_piece_name(name), size) for name, size in self.sizes.items())
        return whole_ranges((name, size) for name, size in names if name is not None)

    def attempt_range(self, one: RangeObject, folder: Path, work: Callable[[RangeDiff], Result]) -> Result | None:
        """What ``work`` makes of a range diff, whose pieces are in ``folder`` meanwhile; None if that is a fault."""
        found: list[Result] = []
        folder.mkdir()
        try:
            with self.noting(one.name, one.pieces):
                pieces = []
                for piece in one.pieces:
                    path = folder / f"{piece.number}"
                    self.objects.fetch_to(str(piece), path)
                    pieces.append(open_piece(path, piece))
                found.append(work(RangeDiff.of(one.name, pieces)))
        finally:
            shutil.rmtree(folder)
        return found[0] if found else None

    def is_gone(self, name: str) -> bool:
        """Whether an object was deleted since it was listed."""
        try:
            self.objects.size(name)
        except NotFound:
            return name in self.sizes
        return False
