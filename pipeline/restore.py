"""Restore: from what a plan names to a store that can go on by itself.

The stages, in their order; each is taken up again after a crash:

    PLAN     what will be fetched is pinned, and written down (`plans`)
    FETCH    parts, range diffs and segments come in, each checked against its digest before it counts as here; if one
             of them was swept out of the object store, or a range diff is damaged, back to PLAN
    INGEST   the store takes the parts in as they are
    RANGES   range diffs are applied, each checked against the root before it and the vectors after it
    FRAMES   archived frames are applied one after the other, each root and id checked; range diffs may follow
    CLAIMED  the store stands at the height; what it holds is as claimed by the publisher's digests
    PROVE    this node hashes every key
    PROVEN   what it holds sums up to the position's vectors

A height in the middle of a segment has no resume record of its own. Its seq, frame id and walk number are known from
the links of the frame after it; epoch, writer and the mark in diffs are the last ones known before; so some frames
will be read again, and are repeats.

A range diff may be larger than what is written at once. How far it came in stands in the same batch (`RANGE_KEY`), so
that a restore goes on in the middle of it; until it is whole, the store's position is not what it holds, and nobody but
a restore has such a store.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import msgpack
from blake3 import blake3

from pipeline import frame
from pipeline.apply import Effect, apply_whole
from pipeline.archive import Segment, resume_record
from pipeline.archive_names import RangeName
from pipeline.commitment import lthash
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS, Diff, decode_whole_body, split_tables
from pipeline.errors import ApplyConflict, FrameCorrupt, NotFound, RangeCorrupt, RootMismatch, SegmentCorrupt
from pipeline.frame import NO_HASH, Header
from pipeline.position import BEFORE_FIRST_HEIGHT, NO_WRITER, START, Meta, Tip, encode_meta
from pipeline.ranges import RangeDiff
from pipeline.stores.base import META_KEY, Batch, Store
from pipeline.verify import check_result

PENDING_BYTES_MAX = 16 << 20
"""What a group of archived frames, or chunks of a range diff, may change before it is written: some thirty blocks of
recent Bitcoin."""

RANGE_KEY = b"range"
"""In the family `meta`, while a range diff is applied: which, how many of its chunks, and what they add up to."""
_ENTRY_OVERHEAD_BYTES = 160


class Stage(enum.Enum):
    PLAN = "plan"
    FETCH = "fetch"
    INGEST = "ingest"
    RANGES = "ranges"
    FRAMES = "frames"
    CLAIMED = "claimed"
    PROVE = "prove"
    PROVEN = "proven"

    def may_lead_to(self, other: Stage) -> bool:
        return other in SUCCESSORS[self]


SUCCESSORS: Mapping[Stage, frozenset[Stage]] = {
    Stage.PLAN: frozenset({Stage.FETCH}),
    Stage.FETCH: frozenset({Stage.INGEST, Stage.PLAN}),
    Stage.INGEST: frozenset({Stage.RANGES, Stage.FRAMES, Stage.CLAIMED, Stage.PLAN}),
    Stage.RANGES: frozenset({Stage.FRAMES, Stage.CLAIMED, Stage.PLAN}),
    Stage.FRAMES: frozenset({Stage.RANGES, Stage.CLAIMED, Stage.PLAN}),
    Stage.CLAIMED: frozenset({Stage.PROVE}),
    Stage.PROVE: frozenset({Stage.PROVEN}),
    Stage.PROVEN: frozenset(),
}


def before_first(resume: Meta) -> Meta:
    """The meta of the empty state before the first block of a chain whose resume record this is."""
    return replace(
        resume_record(resume),
        tip=Tip(ref=None, vectors=EMPTY_VECTORS, seq=0, counts=EMPTY_COUNTS),
        walk=0,
        base_height=BEFORE_FIRST_HEIGHT,
        highest=BEFORE_FIRST_HEIGHT,
        seq=0,
        frame_id=NO_HASH,
        epoch=0,
        writer=NO_WRITER,
        source_epoch=0,
        source_writer=NO_WRITER,
        blocks=START,
        diffs=START,
    )


def settled(meta: Meta) -> Meta:
    """The meta of a store that was just restored: nothing below can be taken off, its journal begins here."""
    height = meta.tip.height
    return replace(
        meta,
        base_height=height,
        highest=max(meta.highest, height),
        journal_first_seq=meta.seq + 1,
        journal_first_height=height + 1,
        archived_to=height + 1,
    )


class Ranged(NamedTuple):
    """What the first chunks of a range diff lead to. ``changes``: in them."""

    chunks: int
    changes: int
    vectors: dict[int, bytes]
    counts: dict[int, int]


def _encode_ranged(name: RangeName, so_far: Ranged) -> bytes:
    chunks, changes, vectors, counts = so_far
    packed: bytes = msgpack.packb([str(name), chunks, changes, sorted(vectors.items()), sorted(counts.items())])
    return packed


def _decode_ranged(data: bytes) -> tuple[str, Ranged]:
    """The store's own record, which nobody else ever sees."""
    name, chunks, changes, vectors, counts = msgpack.unpackb(data)
    return name, Ranged(chunks, changes, dict(vectors), dict(counts))


class Replay:
    """Archived frames and range diffs on top of a store, written in groups.

    * `meta` is that of all frames applied; the store's own is that of the last `commit`.
    * Epoch, writer and the mark in diffs stay as they were until a resume record is passed.
    """

    def __init__(self, store: Store, meta: Meta) -> None:
        self.meta = meta
        self.frames = 0
        self._store = store
        self._pending: dict[bytes, bytes | None] = {}
        self._fresh: set[bytes] = set()  # of the pending keys, those at which the store holds nothing
        self._pending_bytes = 0

    def run(self, segment: Segment, height: int) -> Iterable[Header]:
        """Apply a segment's frames up to ``height``, from where the store stands; yields after each. Then pass its
        resume record, or what is known of a height inside."""
        start = self.meta.tip.height + 1 if self.meta.tip.ref is not None else segment.first
        for data in segment.frames(start):
            header = frame.peek(data)
            if header.ref.height > height:
                break
            self.apply(data)
            yield header
        if self.meta.tip.height == segment.last:
            self._pass(segment.resume)
        elif self.meta.tip.height == height:
            following = frame.peek(segment.frame_at(height + 1))
            self.meta = replace(
                self.meta, seq=following.seq - 1, frame_id=following.prev_frame_id, walk=following.walk - 1
            )
        self.commit()

    def apply(self, data: bytes) -> None:
        """One frame, checked as a follower would. Raises FrameCorrupt, SegmentCorrupt, Diverged."""
        decoded = frame.decode(data)
        header, before = decoded.header, self.meta.tip
        self._check_link(header, before)
        diff = decode_whole_body(decoded.body)
        if header.op_count != diff.op_count:
            raise FrameCorrupt(f"frame {header.seq} announces {header.op_count} changes and has {diff.op_count}")
        effect = apply_whole(diff, self._read)
        self._hold(effect)
        after = Tip(
            ref=header.ref, vectors=diff.advance(before.vectors), seq=header.seq, counts=diff.count(before.counts)
        )
        digests = {table_id: blake3(view).digest() for table_id, view in split_tables(decoded.body).items()}
        check_result(header, after, frame.frame_id(header, digests))
        self.meta = replace(self.meta.after(header, after, offset=0, digest=b""), diffs=self.meta.diffs)
        self.frames += 1
        if self._pending_bytes > PENDING_BYTES_MAX:
            self.commit()

    def run_range(self, diff: RangeDiff) -> Iterator[int]:
        """Apply a range diff, from the position before it to its resume record, or what is left of it; yields how many
        changes that is so far. Raises RangeCorrupt: then the store may hold a part of it, and is of no use."""
        tip = self.meta.tip
        if (diff.resume.chain_id, diff.resume.generation, diff.resume.shard, diff.resume.shards) != (
            self.meta.chain_id,
            self.meta.generation,
            self.meta.shard,
            self.meta.shards,
        ):
            raise RangeCorrupt("a range diff is of another chain, generation or shard", where=str(diff.name))
        if (diff.parent, diff.prev_root) != (tip.block_hash, tip.root):
            raise RangeCorrupt(f"a range diff does not start from block {tip.ref}", where=str(diff.name))
        so_far = self._ranged(diff.name)
        for chunk in diff.chunks(so_far.chunks):
            one = Diff(tables={chunk.schema.table_id: chunk})
            try:
                self._hold(apply_whole(one, self._read))
            except ApplyConflict as error:
                raise RangeCorrupt(
                    f"a range diff does not meet the state: {error.what}", where=str(diff.name)
                ) from error
            so_far = Ranged(
                so_far.chunks + 1,
                so_far.changes + len(chunk),
                lthash.combine(so_far.vectors, one.gains()),
                one.count(so_far.counts),
            )
            if self._pending_bytes > PENDING_BYTES_MAX:
                self._write({RANGE_KEY: _encode_ranged(diff.name, so_far)})
            yield so_far.changes
        after = diff.resume.tip
        if (so_far.vectors, so_far.counts) != (dict(after.vectors), dict(after.counts)):
            raise RangeCorrupt(
                f"the values of a range diff do not lead to root {after.root.hex()}, but to "
                f"{lthash.state_root(so_far.vectors).hex()}",
                where=str(diff.name),
            )
        self.meta = replace(diff.resume, journal_first_seq=0, journal_first_height=0, archived_to=0)
        self._write({RANGE_KEY: None})

    def _ranged(self, name: RangeName) -> Ranged:
        """How far a range diff came in."""
        data, tip = self._store.get_meta(RANGE_KEY), self.meta.tip
        if data is None:
            return Ranged(0, 0, dict(tip.vectors), dict(tip.counts))
        begun, so_far = _decode_ranged(data)
        assert begun == str(name), (begun, name)  # a plan that changes begins with another store
        return so_far

    def _hold(self, effect: Effect) -> None:
        self._fresh.update(set(effect.fresh) - self._pending.keys())
        self._pending |= effect.writes
        self._pending_bytes += sum(
            len(key) + len(value or b"") + _ENTRY_OVERHEAD_BYTES for key, value in effect.writes.items()
        )

    def commit(self) -> None:
        """Write what was applied; what came and went meanwhile is left out."""
        self._write({})

    def _write(self, meta: dict[bytes, bytes | None]) -> None:
        state = {key: value for key, value in self._pending.items() if not (value is None and key in self._fresh)}
        self._store.write(Batch(state=state, meta=meta | {META_KEY: encode_meta(self.meta)}))
        self._pending, self._fresh, self._pending_bytes = {}, set(), 0

    def _read(self, storage_keys: list[bytes]) -> list[bytes | None]:
        pending = self._pending
        below = iter(self._store.get([key for key in storage_keys if key not in pending]))
        return [pending[key] if key in pending else next(below) for key in storage_keys]

    def _check_link(self, header: Header, tip: Tip) -> None:
        meta, where = self.meta, f"block {header.ref} on {tip.ref}"
        if (header.chain_id, header.generation) != (meta.chain_id, meta.generation):
            raise SegmentCorrupt("an archived frame is of another chain or generation", where=where)
        if (header.shard, header.shards) != (meta.shard, meta.shards):
            raise SegmentCorrupt(
                f"an archived frame is of shard {header.shard} of {header.shards}, this store is {meta.shard} of "
                f"{meta.shards}",
                where=where,
            )
        if tip.ref is None and header.parent_hash != NO_HASH:
            raise NotFound(
                f"the archive begins at height {header.ref.height}, above the first block, and no snapshot is below it",
                where=where,
            )
        if header.parent_hash != tip.block_hash or (tip.ref is not None and header.ref.height != tip.height + 1):
            raise SegmentCorrupt("an archived frame does not stand on the block before it", where=where)
        if header.prev_root != tip.root:
            raise RootMismatch(
                f"an archived frame starts from root {header.prev_root.hex()}, this store's is {tip.root.hex()}",
                where=where,
            )

    def _pass(self, resume: Meta) -> None:
        if resume.tip != self.meta.tip or resume.seq < self.meta.seq:
            raise SegmentCorrupt(
                "the resume record of a segment does not describe what its frames make", where=f"block {resume.tip.ref}"
            )
        self.meta = replace(resume, journal_first_seq=0, journal_first_height=0, archived_to=0)
