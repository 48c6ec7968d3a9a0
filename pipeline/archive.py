"""The archive: every final block's frame, self-contained, for ever.

Once a block is final, nobody takes it off again. Its frame, in whole form, is what the journal holds already; a
**segment** is the frames of consecutive heights with an index and a **resume record**: the `Meta` from right before
the next block's frame, that is, of the last frame that made the segment's last height current. Whoever restores to
that height goes on reading the topics from there. UNDO frames are left out: parents and roots link the heights.

Segments are aligned: normally one covers heights [a, b] with b + 1 a multiple of 64. A flush may close a shorter one;
the next goes on from there to the alignment. Each is one object, created if absent:

    CHAIN/GENERATION/archive/SHARD/FIRST-LAST.seg      heights with 12 digits, generation in hex

A segment is a file of sections (`pipeline.sections`), magic "SFsg", version 1, in the order in which they are wanted,
so that one request has what is small (`pipeline.segment_index`):

    kind 2, index    per frame: height u64 · block hash 32 B · frame id 32 B · post root 32 B ·
                     offset u64 (in the frames section) · length u64                                 120 B each
    kind 3, resume   the `Meta`, encoded as stores encode it
    kind 4, filters  per frame, which keys it may have changed (`pipeline.key_filter`); optional
    kind 1, frames   the frames in ascending height, one after another

Segments that were written before have their frames first.

Two nodes' segments of the same heights hold the same history, not always the same bytes: epochs, offsets and
compression may differ. `same_history` compares what must be equal.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from pipeline import frame, journal
from pipeline.archive_names import SegmentName
from pipeline.block import BlockRef
from pipeline.errors import FrameCorrupt, SegmentCorrupt, StoreCorrupt
from pipeline.frame import Feature, Header, Kind
from pipeline.key_filter import build_filters
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.sections import Layout
from pipeline.stores.base import META_KEY, Store

SEGMENT_BLOCKS = 64
"""Blocks in a whole segment: some 20 MB of recent Bitcoin, ten hours of it. Large enough to be one cheap request."""

MAGIC = b"SFsg"
VERSION = 1

_ENTRY = Struct("<Q32s32s32sQQ")
INDEX_BYTES_EACH = _ENTRY.size
assert INDEX_BYTES_EACH == 120


class Section(enum.IntEnum):
    FRAMES = 1
    INDEX = 2
    RESUME = 3
    FILTERS = 4


LAYOUT = Layout(
    what="segment", magic=MAGIC, version=VERSION, kinds=Section, optional=frozenset({Section.FILTERS.value})
)


class IndexEntry(NamedTuple):
    """One frame of a segment; ``offset`` counts from the start of the frames section."""

    ref: BlockRef
    frame_id: bytes
    post_root: bytes
    offset: int
    length: int


def plan_segments(archived_to: int, final_height: int, *, flush: bool = False) -> list[tuple[int, int]]:
    """The (first, last) heights of the segments that are due, in order. ``archived_to``: the first height wanted.

    With ``flush`` the last one may end before the alignment.
    """
    due: list[tuple[int, int]] = []
    first = archived_to
    while first <= final_height:
        last = first - first % SEGMENT_BLOCKS + SEGMENT_BLOCKS - 1
        if last > final_height and not flush:
            break
        due.append((first, min(last, final_height)))
        first = last + 1
    return due


def covered_to(names: Iterable[SegmentName], archived_to: int) -> int:
    """The first height from ``archived_to`` on that no segment covers."""
    reach = archived_to
    for name in sorted(names, key=lambda name: (name.first, name.last)):
        if name.first <= reach:
            reach = max(reach, name.last + 1)
    return reach


class Contents(NamedTuple):
    """What `build_segment` makes a segment of, which takes some milliseconds a block."""

    frames: list[bytes]
    resume: Meta


class Committed:
    """What a store's last commit holds, whatever its replica has accepted since: only that is archived."""

    def __init__(self, store: Store) -> None:
        data = store.get_meta(META_KEY)
        self.meta: Meta | None = None if data is None else decode_meta(data)
        self._store = store

    def entry(self, height: int) -> journal.Entry | None:
        """The journal entry of the current branch's block at a height; None if the journal does not have it."""
        seq = self._store.get_undo(journal.height_key(height))
        if seq is None:
            return None
        data = self._store.get_undo(journal.entry_key(int.from_bytes(seq, "big")))
        return None if data is None else journal.decode_entry(data)

    def contents(self, first: int, last: int) -> Contents:
        """What a segment of final heights is made of, both inclusive. Raises StoreCorrupt if the journal lacks one."""
        entries = [self.entry(height) for height in range(first, last + 1)]
        following = self.entry(last + 1)
        resume = self.meta if following is None else following.before
        if resume is None or None in entries:
            raise StoreCorrupt(
                f"the journal lacks blocks of heights {first} to {last}, which are not archived yet",
                way_out="restore this data directory from a snapshot",
            )
        return Contents([entry.frame_bytes for entry in entries if entry is not None], resume_record(resume))


def resume_record(meta: Meta) -> Meta:
    """A meta as resume records keep it: how far one node's journal and archive reach is no part of history."""
    return meta.common()


def build_segment(frames: Sequence[bytes], resume: Meta) -> bytes:
    """The bytes of a segment, from whole frames of consecutive heights and the meta from before the next one.

    Raises SegmentCorrupt if they do not link, FrameCorrupt if one cannot be read.
    """
    offset, entries, headers = 0, [], []
    for data in frames:
        header = frame.peek(data)
        headers.append(header)
        entries.append(IndexEntry(header.ref, header.frame_id, header.post_root, offset, len(data)))
        offset += len(data)
    _check_links(headers, resume)
    index = b"".join(
        _ENTRY.pack(ref.height, ref.block_hash, frame_id, root, at, length)
        for ref, frame_id, root, at, length in entries
    )
    sections: dict[int, bytes] = {
        Section.INDEX: index,
        Section.RESUME: encode_meta(resume),
        Section.FILTERS: build_filters(frames),
        Section.FRAMES: b"".join(frames),
    }
    return LAYOUT.join(sections)


def _check_links(headers: Sequence[Header], resume: Meta) -> None:
    """What holds for the frames of every segment, on the way out and on the way in. Raises SegmentCorrupt."""

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise SegmentCorrupt(what)

    demand(bool(headers), "a segment without frames")
    previous: Header | None = None
    for header in headers:
        place = f"block {header.ref} of a segment"
        demand(header.kind is Kind.APPLY and Feature.SELF_CONTAINED in header.required, f"{place} is not a whole frame")
        demand((header.chain_id, header.generation) == (resume.chain_id, resume.generation), f"{place} is of elsewhere")
        demand((header.shard, header.shards) == (resume.shard, resume.shards), f"{place} is of another shard")
        if previous is not None:
            demand(header.ref.height == previous.ref.height + 1, f"{place} does not follow {previous.ref}")
            demand(header.parent_hash == previous.ref.block_hash, f"{place} does not stand on {previous.ref}")
            demand(header.prev_root == previous.post_root, f"{place} starts from another root than {previous.ref} left")
            demand(header.seq > previous.seq, f"{place} has a seq below that of {previous.ref}")
        previous = header
    assert previous is not None
    demand(resume.tip.ref == previous.ref, f"a segment to {previous.ref} resumes from {resume.tip.ref}")
    demand(resume.tip.root == previous.post_root, f"a segment to {previous.ref} resumes from another root")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment, checked: its digest, its index against its frames' headers, its links."""

    data: bytes
    frames_at: int
    entries: tuple[IndexEntry, ...]
    resume: Meta

    @classmethod
    def open(cls, data: bytes) -> Segment:
        """Raises SegmentCorrupt, Unsupported (a later version, or a section that must be known and is not)."""
        sections = LAYOUT.split(data)
        frames_at, frames_stop = sections[Section.FRAMES]
        index = data[slice(*sections[Section.INDEX])]
        try:
            resume = decode_meta(data[slice(*sections[Section.RESUME])])
            entries = decode_index(index)
            headers, stop = [], 0
            for entry in entries:
                header = frame.peek(data[frames_at + entry.offset : frames_at + entry.offset + entry.length])
                if entry.offset != stop or entry[:3] != (header.ref, header.frame_id, header.post_root):
                    raise SegmentCorrupt(f"the index of a segment does not describe its frame of block {header.ref}")
                headers.append(header)
                stop += entry.length
        except (FrameCorrupt, StoreCorrupt) as error:
            raise SegmentCorrupt(f"a segment holds what cannot be read: {error.what}") from error
        if frames_at + stop != frames_stop:
            raise SegmentCorrupt("bytes are left over after a segment's frames")
        _check_links(headers, resume)
        return cls(data=data, frames_at=frames_at, entries=entries, resume=resume)

    @property
    def first(self) -> int:
        return self.entries[0].ref.height

    @property
    def last(self) -> int:
        return self.entries[-1].ref.height

    def frames(self, first: int | None = None) -> Iterator[bytes]:
        """The frames in ascending height, from ``first`` on."""
        for entry in self.entries:
            if first is None or entry.ref.height >= first:
                yield self._frame(entry)

    def frame_at(self, height: int) -> bytes:
        """The frame of one height, which must be in the segment."""
        assert self.first <= height <= self.last, (self.first, height, self.last)
        return self._frame(self.entries[height - self.first])

    def _frame(self, entry: IndexEntry) -> bytes:
        start = self.frames_at + entry.offset
        return self.data[start : start + entry.length]


def decode_index(data: bytes) -> tuple[IndexEntry, ...]:
    """The index section. Raises SegmentCorrupt unless its frames follow each other, in height and in place."""
    if not data or len(data) % _ENTRY.size:
        raise SegmentCorrupt("the index of a segment is cut off")
    entries = tuple(
        IndexEntry(BlockRef(height, block_hash), frame_id, root, offset, length)
        for height, block_hash, frame_id, root, offset, length in _ENTRY.iter_unpack(data)
    )
    stop, first = 0, entries[0].ref.height
    for at, entry in enumerate(entries):
        if (entry.ref.height, entry.offset) != (first + at, stop):
            raise SegmentCorrupt(f"block {entry.ref} stands at a wrong place in the index of a segment")
        stop += entry.length
    return entries


def same_history(one: Segment, other: Segment) -> bool:
    """Whether two segments tell the same: heights, hashes, frame ids and roots; bytes may differ."""
    return [entry[:3] for entry in one.entries] == [entry[:3] for entry in other.entries]
