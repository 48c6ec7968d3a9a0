"""Findings: what an audit of an object store saw, and what of it was wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.archive import SegmentName
from pipeline.errors import CorruptInput, Diverged, NotFound, StateferryError, Unsupported, WrongChain
from pipeline.objects import ObjectStore
from pipeline.segment_index import SegmentIndex
from topology.children import Report

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
    def noting(self, name: object) -> Iterator[None]:
        """A fault of one object is noted, and no reason to stop; what was deleted since it was listed is no fault."""
        try:
            yield
        except FAULTS as error:
            error.where = error.where or str(name)
            if not (isinstance(error, NotFound) and self.is_gone(str(name))):
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

    def is_gone(self, name: str) -> bool:
        """Whether an object was deleted since it was listed."""
        try:
            self.objects.size(name)
        except NotFound:
            return name in self.sizes
        return False
