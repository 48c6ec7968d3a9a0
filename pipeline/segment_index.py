"""What an archived segment says of itself: index, resume record and filters, read by ranges, without its frames.

Two requests: the table of sections, then all that stands behind the frames. The segment's digest covers all of it and
is not checked here: whoever takes state from a segment opens it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.archive import LAYOUT, IndexEntry, Section, SegmentName, decode_index
from pipeline.errors import CorruptInput, SegmentCorrupt
from pipeline.key_filter import may_hold, split_filters
from pipeline.position import Meta, decode_meta
from pipeline.sections import TABLE_BYTES_MAX
from pipeline.state import Schema

ReadRange = Callable[[int, int], bytes]
"""Bytes ``start <= at < stop`` of the segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentIndex:
    """``entries``: a frame each, ascending by one height; their places count from ``frames_at``. ``filters``: of each
    frame; None where a segment has none."""

    name: SegmentName
    frames_at: int
    entries: tuple[IndexEntry, ...]
    resume: Meta
    filters: list[bytes] | None

    @classmethod
    def read(cls, name: SegmentName, size_bytes: int, read: ReadRange) -> SegmentIndex:
        """Raises SegmentCorrupt, also if it is another's, and Unsupported."""
        try:
            places = LAYOUT.places(read(0, min(TABLE_BYTES_MAX, size_bytes)), size_bytes)
            frames_at, start = places[Section.FRAMES]
            rest = read(start, size_bytes)
            if len(rest) != size_bytes - start:
                raise SegmentCorrupt(f"a segment of {size_bytes} bytes ends {size_bytes - start - len(rest)} early")

            def section(kind: Section) -> bytes:
                at, stop = places[kind]
                if at < start:
                    raise SegmentCorrupt(f"section {kind} of a segment does not stand behind the frames")
                return rest[at - start : stop - start]

            entries = decode_index(section(Section.INDEX))
            resume = decode_meta(section(Section.RESUME))
            filters = split_filters(section(Section.FILTERS), len(entries)) if Section.FILTERS in places else None
        except CorruptInput as error:
            raise SegmentCorrupt(
                f"the index of a segment cannot be read: {error.what}",
                where=str(name),
                way_out="delete it: a primary whose journal has those blocks archives them again",
            ) from error
        found, last = cls(name=name, frames_at=frames_at, entries=entries, resume=resume, filters=filters), entries[-1]
        said = SegmentName(resume.chain_id, resume.generation, resume.shard, entries[0].ref.height, last.ref.height)
        if said != name:
            raise SegmentCorrupt("a segment stands under another's name", where=str(name))
        if last.offset + last.length != start - frames_at:
            raise SegmentCorrupt("the index of a segment does not describe its frames", where=str(name))
        if (resume.tip.ref, resume.tip.root) != (last.ref, last.post_root):
            raise SegmentCorrupt("a segment resumes from another block than its last", where=str(name))
        return found

    def entry(self, height: int) -> IndexEntry | None:
        """The frame of a height; None if the segment does not have it."""
        at = height - self.name.first
        return self.entries[at] if 0 <= at < len(self.entries) else None

    def may_hold(self, schema: Schema, key: bytes) -> list[IndexEntry]:
        """The frames that may have changed a key: all of them without filters."""
        if self.filters is None:
            return list(self.entries)
        return [entry for entry, one in zip(self.entries, self.filters, strict=True) if may_hold(one, schema, key)]

    def place(self, entry: IndexEntry) -> tuple[int, int]:
        """Where a frame starts and stops in the segment."""
        start = self.frames_at + entry.offset
        return start, start + entry.length
