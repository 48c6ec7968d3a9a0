"""What an archived segment says of itself: index, resume record and filters, read by ranges, without its frames.

One request, of as many bytes from the segment's beginning as that takes as a rule. A second one reads what is missing:
where filters are longer, and in segments whose frames stand first. The segment's digest covers all of it and is not
checked here: whoever takes state from a segment opens it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.archive import INDEX_BYTES_EACH, LAYOUT, IndexEntry, Section, decode_index
from pipeline.archive_names import SegmentName
from pipeline.errors import CorruptInput, SegmentCorrupt
from pipeline.key_filter import may_hold, split_filters
from pipeline.position import Meta, decode_meta
from pipeline.sections import TABLE_BYTES_MAX
from pipeline.state import Schema

ReadRange = Callable[[int, int], bytes]
"""Bytes ``start <= at < stop`` of the segment."""

_RESUME_BYTES = 8 << 10
"""With the table of sections: the vectors of three tables, 2 KiB each, links, marks."""
_FILTERS_SHARE = 16
"""Filters take 2 bytes a route, changes 40 and more: so many times the filters, a segment is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentIndex:
    """``entries``: a frame each, ascending by one height; their places count from ``frames_at``. ``filters``: of each
    frame; None where a segment has none, or they were not asked for."""

    name: SegmentName
    frames_at: int
    entries: tuple[IndexEntry, ...]
    resume: Meta
    filters: list[bytes] | None

    @classmethod
    def read(cls, name: SegmentName, size_bytes: int, read: ReadRange, *, with_filters: bool = False) -> SegmentIndex:
        """Raises SegmentCorrupt, also if it is another's, and Unsupported."""
        try:
            guessed = (name.last - name.first + 1) * INDEX_BYTES_EACH + _RESUME_BYTES
            guessed += size_bytes // _FILTERS_SHARE if with_filters else 0
            head = read(0, min(max(guessed, TABLE_BYTES_MAX), size_bytes))
            places = LAYOUT.places(head, size_bytes)
            kinds = [Section.INDEX, Section.RESUME, *([Section.FILTERS] if with_filters else [])]
            wanted = {kind: places[kind] for kind in kinds if kind in places}
            found = _sections(wanted, head, read)
            entries = decode_index(found[Section.INDEX])
            resume = decode_meta(found[Section.RESUME])
            filters = split_filters(found[Section.FILTERS], len(entries)) if Section.FILTERS in found else None
        except CorruptInput as error:
            raise SegmentCorrupt(
                f"the index of a segment cannot be read: {error.what}",
                where=str(name),
                way_out="delete it: a primary whose journal has those blocks archives them again",
            ) from error
        (frames_at, frames_stop), last = places[Section.FRAMES], entries[-1]
        said = SegmentName(resume.chain_id, resume.generation, resume.shard, entries[0].ref.height, last.ref.height)
        if said != name:
            raise SegmentCorrupt("a segment stands under another's name", where=str(name))
        if last.offset + last.length != frames_stop - frames_at:
            raise SegmentCorrupt("the index of a segment does not describe its frames", where=str(name))
        if (resume.tip.ref, resume.tip.root) != (last.ref, last.post_root):
            raise SegmentCorrupt("a segment resumes from another block than its last", where=str(name))
        return cls(name=name, frames_at=frames_at, entries=entries, resume=resume, filters=filters)

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


def _sections(places: dict[Section, tuple[int, int]], head: bytes, read: ReadRange) -> dict[Section, bytes]:
    """Sections, of which ``head`` may have some: what lies between the others' ends is read at once."""
    base, held = 0, head
    start, stop = min(start for start, _ in places.values()), max(stop for _, stop in places.values())
    if stop > len(head):
        base = 0 if start < len(head) else start
        held = (b"" if base else head) + read(max(start, len(head)), stop)
        if len(held) != stop - base:
            raise SegmentCorrupt(f"a segment ends {stop - base - len(held)} bytes early")
    return {kind: held[start - base : stop - base] for kind, (start, stop) in places.items()}
