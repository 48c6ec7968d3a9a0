"""Audits below hashing: do the records of a store, and the objects of an archive, say the same of each other.

`pipeline.verify` turns content into vectors; here is what can be told without: positions against the journal, parts
against manifests, segments against each other and against snapshots. Each check raises the error of what it found, and
names the object.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from pipeline import journal
from pipeline.archive import Segment
from pipeline.archive_names import RangeName, SegmentName
from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.diff import Diff
from pipeline.errors import (
    ArchiveConflict,
    AuditFailed,
    NotFound,
    PartCorrupt,
    SegmentCorrupt,
    StateferryError,
    StoreCorrupt,
)
from pipeline.frame import Kind
from pipeline.key_filter import build_filters, split_filters
from pipeline.meeting import own_final
from pipeline.parts import Part
from pipeline.position import Meta, Tip
from pipeline.ranges import RangeDiff
from pipeline.segment_index import SegmentIndex
from pipeline.snapshot import Manifest
from pipeline.stores.base import Store
from pipeline.verify import Audited, audit

_RESTORE = "restore this data directory from a snapshot"
_ANOTHER = "restore from another snapshot with --height: `stateferry status` lists them"


class Level(enum.Enum):
    """How much an audit reads. Each level of objects does what those before it do; FULL is of the store alone."""

    QUICK = "quick"  # records: positions, journal, manifests, indexes, names and sizes
    STORED = "stored"  # all bytes: checksums of the store, digests of parts and segments
    CONTENT = "content"  # keys of every part, hashed to its partials
    FULL = "full"  # keys of the store, hashed to its vectors
    REPLAY = "replay"  # archived frames and range diffs applied to an empty state, or the lowest snapshot


class Point(NamedTuple):
    """A state that somebody says a block leaves behind. ``where``: who says so."""

    where: str
    ref: BlockRef | None
    root: bytes


# Stores


def check_journal(store: Store, meta: Meta) -> int:
    """Follow the journal to the store's position; how many frames it has. Raises StoreCorrupt."""
    after: journal.Entry | None = None
    for seq in range(meta.journal_first_seq, meta.seq + 1):
        data = store.get_undo(journal.entry_key(seq))
        if data is None:
            raise StoreCorrupt(f"the journal lacks frame {seq}", way_out=_RESTORE)
        entry = journal.decode_entry(data)
        header, before = entry.header, entry.before
        if after is not None:
            _check_step(after, before)
        if (header.seq, header.prev_frame_id, header.prev_root) != (seq, before.frame_id, before.tip.root):
            raise StoreCorrupt(f"frame {seq} of the journal does not follow the position before it", way_out=_RESTORE)
        if header.kind is Kind.APPLY and before.tip.block_hash != header.parent_hash:
            raise StoreCorrupt(f"block {header.ref} of the journal stands on another than its parent", way_out=_RESTORE)
        after = entry
    if after is not None:
        _check_step(after, meta)
    return max(0, meta.seq - meta.journal_first_seq + 1)


def _check_step(entry: journal.Entry, after: Meta) -> None:
    header = entry.header
    block_hash = header.ref.block_hash if header.kind is Kind.APPLY else header.parent_hash
    found = (after.seq, after.frame_id, after.tip.root, after.tip.block_hash)
    if found != (header.seq, header.frame_id, header.post_root, block_hash):
        raise StoreCorrupt(
            f"the position behind frame {header.seq} is not the one that this frame leads to",
            where=f"block {header.ref}",
            way_out=_RESTORE,
        )


def store_points(store: Store, meta: Meta, where: str) -> Iterator[Point]:
    """The final states that a store knows: its own, if it is final, and those its journal goes back to. What is above
    may be of a branch that others have left."""
    final = own_final(meta)
    if meta.tip.ref is not None and meta.tip.height <= final:
        yield Point(where, meta.tip.ref, meta.tip.root)
    for height in range(meta.journal_first_height, final + 2):
        seq = store.get_undo(journal.height_key(height)) if height >= 0 else None
        data = None if seq is None else store.get_undo(journal.entry_key(int.from_bytes(seq, "big")))
        if data is not None:
            before = journal.decode_entry(data).before.tip
            yield Point(where, before.ref, before.root)


# Objects


def check_parts_there(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[StateferryError]:
    """What a listing says is wrong with a snapshot's parts."""
    for part in manifest.parts:
        name = manifest.part_name(part)
        size = sizes.get(name)
        if size is None:
            yield NotFound("a part that a manifest names is not there", where=name, way_out=_ANOTHER)
        elif size != part.size_bytes:
            yield PartCorrupt(
                f"a part has {size} bytes, its manifest says {part.size_bytes}", where=name, way_out=_ANOTHER
            )


def check_digest(part: Part, name: str, size: int, digest: bytes) -> None:
    """Raises PartCorrupt."""
    if (size, digest) != (part.size_bytes, part.digest):
        raise PartCorrupt(
            f"a part has {size} bytes and digest {digest.hex()}, the manifest says {part.size_bytes} and "
            f"{part.digest.hex()}",
            where=name,
            way_out=_ANOTHER,
        )


def check_content(part: Part, name: str, entries: Iterable[tuple[bytes, bytes]]) -> Audited:
    """Hash what a part holds. Raises AuditFailed if that is not what its manifest says, PartCorrupt if it is none."""
    first_key = last_key = b""

    def noted() -> Iterator[tuple[bytes, bytes]]:
        nonlocal first_key, last_key
        for entry in entries:
            last_key = entry[0]
            first_key = first_key or last_key
            yield entry

    try:
        found = audit(noted())
    except StoreCorrupt as error:
        raise PartCorrupt(f"a part is malformed: {error.what}", where=name, way_out=_ANOTHER) from error
    held = {table_id: vector for table_id, vector in found.vectors.items() if any(vector)}
    if (held, found.keys, first_key, last_key) != (part.partials, part.keys, part.first_key, part.last_key):
        raise AuditFailed(
            f"a part holds {found.keys} keys that do not make its partials; its manifest says {part.keys} keys",
            where=name,
            way_out=_ANOTHER,
        )
    return found


def check_filters(name: SegmentName, segment: Segment) -> None:
    """A segment's filters, if it has any, are those of its frames: else a trace would pass by what they leave out.
    Raises SegmentCorrupt."""
    data = segment.data
    index = SegmentIndex.read(name, len(data), lambda start, stop: data[start:stop], with_filters=True)
    if index.filters is not None:
        found = split_filters(build_filters(list(segment.frames())), len(segment.entries))
        if found != index.filters:
            raise SegmentCorrupt(
                "the filters of a segment are not those of its frames",
                where=str(name),
                way_out="delete it: a primary whose journal has those blocks archives them again",
            )


def check_range(one: RangeDiff) -> None:
    """What a range diff changes, taken from the vectors that it leads to, gives the root that it starts from. Raises
    AuditFailed, RangeCorrupt."""
    before: Mapping[int, bytes] = one.resume.tip.vectors
    for table in one.chunks():
        back = Diff(tables={table.schema.table_id: table}).inverted()
        before = back.advance(before)
    if lthash.state_root(before) != one.prev_root:
        raise AuditFailed(
            f"what a range diff changes does not lead from root {one.prev_root.hex()} to block {one.ref}, root "
            f"{one.resume.tip.root.hex()}",
            where=str(one.name),
            way_out="delete its pieces: `stateferry archive squash` makes it again",
        )


def check_overlap(one: SegmentIndex, other: SegmentIndex) -> None:
    """Two segments of one shard tell the same of the heights that both have. Raises ArchiveConflict."""
    for entry in other.entries:
        known = one.entry(entry.ref.height)
        if known is not None and known[:3] != entry[:3]:
            raise ArchiveConflict(
                f"two segments hold different blocks {entry.ref} and {known.ref}, or other states behind them",
                where=f"{other.name} and {one.name}",
                way_out="audit the nodes that archived them, then delete the wrong one",
            )


def check_snapshot(manifest: Manifest, index: SegmentIndex) -> None:
    """A snapshot of a height that a segment of its generation has is of that block and state. Raises AuditFailed."""
    entry = index.entry(manifest.height)
    tip = manifest.resumes[index.name.shard].tip
    if entry is not None and (tip.ref, tip.root) != (entry.ref, entry.post_root):
        raise AuditFailed(
            f"a snapshot is of block {tip.ref}, root {tip.root.hex()}, the archive has {entry.ref}, root "
            f"{entry.post_root.hex()}",
            where=f"{manifest.name} and {index.name}",
            way_out="audit the nodes that published them, then delete the wrong one",
        )


def check_replayed(tip: Tip, manifest: Manifest, shard: int) -> None:
    """A replay that came by a snapshot's height has its state. Raises AuditFailed."""
    said = manifest.resumes[shard].tip
    if replace(tip, seq=said.seq) != said:
        raise AuditFailed(
            f"a replay of the archive leads to {tip.ref}, root {tip.root.hex()}, the snapshot is of {said.ref}, root "
            f"{said.root.hex()}",
            where=manifest.name,
            way_out="delete this manifest and take a new snapshot",
        )


def check_ranged(tip: Tip, name: RangeName, led_to: Tip) -> None:
    """A replay that came to a range diff's last height has the state that this one led to. Raises AuditFailed."""
    if replace(tip, seq=led_to.seq) != led_to:
        raise AuditFailed(
            f"a replay of the archive leads to {tip.ref}, root {tip.root.hex()}, a range diff to {led_to.ref}, root "
            f"{led_to.root.hex()}",
            where=str(name),
            way_out="delete its pieces: `stateferry archive squash` makes it again",
        )


def check_point(tip: Tip, point: Point) -> None:
    """A replay that came by a store's height has its root. Raises AuditFailed."""
    if (tip.ref, tip.root) != (point.ref, point.root):
        raise AuditFailed(
            f"a replay of the archive leads to {tip.ref}, root {tip.root.hex()}, the store has {point.ref}, root "
            f"{point.root.hex()}",
            where=point.where,
            way_out="`stateferry verify --level full` says whether the store holds what it says",
        )
