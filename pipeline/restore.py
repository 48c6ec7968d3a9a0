"""Restore: from what the object store holds to a store that can go on by itself.

A plan is decided first, from names and manifests alone: the newest snapshot at or below the height wanted, then the
archived segments that lead on from it. Without any snapshot, the archive is enough where it begins at the first block.
Several shards are restored together, all to one height: each by its own segments, as far as those of every shard lead.

The stages, in their order; each is taken up again after a crash:

    PLAN     what will be fetched is pinned, and written down
    FETCH    parts and segments come in, each checked against its digest before it counts as here; if one of them was
             swept out of the object store, back to PLAN
    INGEST   the store takes the parts in as they are
    FRAMES   archived frames are applied one after the other, each root and id checked
    CLAIMED  the store stands at the height; what it holds is as claimed by the publisher's digests
    PROVE    this node hashes every key
    PROVEN   what it holds sums up to the position's vectors

A height in the middle of a segment has no resume record of its own. Its seq, frame id and walk number are known from
the links of the frame after it; epoch, writer and the mark in diffs are the last ones known before; so some frames
will be read again, and are repeats.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from blake3 import blake3

from pipeline import frame
from pipeline.apply import apply_whole
from pipeline.archive import Segment, SegmentName, resume_record
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS, decode_whole_body, split_tables
from pipeline.errors import ArchiveConflict, FrameCorrupt, NotFound, RootMismatch, SegmentCorrupt
from pipeline.frame import NO_HASH, Header
from pipeline.parts import Part
from pipeline.position import BEFORE_FIRST_HEIGHT, NO_WRITER, START, Meta, Tip, encode_meta
from pipeline.snapshot import Manifest, ManifestName
from pipeline.stores.base import META_KEY, Batch, Store
from pipeline.verify import check_result

PENDING_BYTES_MAX = 16 << 20
"""What a group of archived frames may change before it is written: some thirty blocks of recent Bitcoin."""

_ENTRY_OVERHEAD_BYTES = 160


class Stage(enum.Enum):
    PLAN = "plan"
    FETCH = "fetch"
    INGEST = "ingest"
    FRAMES = "frames"
    CLAIMED = "claimed"
    PROVE = "prove"
    PROVEN = "proven"

    def may_lead_to(self, other: Stage) -> bool:
        return other in SUCCESSORS[self]


SUCCESSORS: Mapping[Stage, frozenset[Stage]] = {
    Stage.PLAN: frozenset({Stage.FETCH}),
    Stage.FETCH: frozenset({Stage.INGEST, Stage.PLAN}),
    Stage.INGEST: frozenset({Stage.FRAMES}),
    Stage.FRAMES: frozenset({Stage.CLAIMED}),
    Stage.CLAIMED: frozenset({Stage.PROVE}),
    Stage.PROVE: frozenset({Stage.PROVEN}),
    Stage.PROVEN: frozenset(),
}


class SegmentObject(NamedTuple):
    """A segment as a listing shows it."""

    name: SegmentName
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """``manifest`` None: from the empty state before the first block. ``segments`` lead every shard from there to
    ``height``. ``only``: the one shard that is wanted; None: all."""

    chain_id: str
    generation: bytes
    height: int
    manifest: Manifest | None
    segments: tuple[SegmentObject, ...]
    shards: int = 1
    only: int | None = None

    @property
    def wanted(self) -> Sequence[int]:
        """The shards."""
        return range(self.shards) if self.only is None else [self.only]

    @property
    def parts(self) -> list[Part]:
        """Of the shards that are wanted."""
        if self.manifest is None:
            return []
        return [part for shard in self.wanted for part in self.manifest.parts_of(shard)]

    @property
    def manifest_name(self) -> str:
        """Empty without one."""
        return "" if self.manifest is None else self.manifest.name

    @property
    def names(self) -> list[str]:
        """The objects that it reads."""
        manifest = self.manifest
        parts = [] if manifest is None else [manifest.name, *map(manifest.part_name, self.parts)]
        return parts + [str(segment.name) for segment in self.segments]

    def segments_of(self, shard: int) -> list[SegmentObject]:
        """In the order of their heights."""
        return [segment for segment in self.segments if segment.name.shard == shard]

    @property
    def size_bytes(self) -> int:
        """What will be fetched."""
        return sum(part.size_bytes for part in self.parts) + sum(segment.size_bytes for segment in self.segments)

    @property
    def requests(self) -> int:
        return len(self.parts) + len(self.segments)

    @property
    def frames(self) -> int:
        """How many archived frames will be applied; one more or less where a chain begins above height 0."""
        start = self.segments[0].name.first if self.manifest is None else self.manifest.height + 1
        return (self.height - start + 1) * len(self.wanted)


def newest_names(names: Iterable[ManifestName], height: int | None) -> list[ManifestName]:
    """Of each generation, the newest manifest at or below ``height``: those that `plan` should be given.

    Raises ArchiveConflict if two snapshots of one height and generation have different roots.
    """
    newest: dict[bytes, ManifestName] = {}
    for name in names:
        if height is not None and name.height > height:
            continue
        other = newest.get(name.generation)
        if other is not None and other.height == name.height and other.root_start != name.root_start:
            raise ArchiveConflict(
                f"two snapshots of height {name.height} have different roots: {other} and {name}",
                way_out="audit the nodes that published them, then delete the wrong one's manifest",
            )
        if other is None or name.height > other.height:
            newest[name.generation] = name
    return list(newest.values())


def plan(
    manifests: Sequence[Manifest],
    segments: Sequence[SegmentObject],
    height: int | None = None,
    *,
    shards: Mapping[bytes, int],
) -> RestorePlan:
    """How to get to ``height`` (None: as far as the archive leads), all of one chain. Newer generations are
    preferred, then newer snapshots. ``shards``: of each generation. Raises NotFound, naming what is missing."""
    numbers = {manifest.generation: manifest.generation_number for manifest in manifests}
    starts: list[tuple[int, int, bytes, Manifest | None]] = [
        (manifest.generation_number, manifest.height, manifest.generation, manifest)
        for manifest in manifests
        if height is None or manifest.height <= height
    ]
    # Only the first generation can begin before the first block; later ones begin from a manifest.
    archived = {segment.name.generation for segment in segments if numbers.get(segment.name.generation, 1) == 1}
    starts += [(1, BEFORE_FIRST_HEIGHT, generation, None) for generation in archived]
    missing = ""
    for _, at, generation, manifest in sorted(starts, key=lambda start: start[:3], reverse=True):
        here = [segment for segment in segments if segment.name.generation == generation]
        by_shard = [[one for one in here if one.name.shard == shard] for shard in range(shards[generation])]
        if manifest is None:
            at = min(segment.name.first for segment in here) - 1
            if height is not None and height <= at:
                missing = missing or f": the archive begins at height {at + 1}"
                continue
        reaches = [lead(one, at, height)[1] for one in by_shard]
        reached = min(reaches)
        if reached == height or (height is None and (manifest is not None or reached > at)):
            hops = [lead(one, at, reached)[0] for one in by_shard]
            return RestorePlan(
                chain_id=here[0].name.chain_id if manifest is None else manifest.chain_id,
                generation=generation,
                height=reached,
                manifest=manifest,
                segments=tuple(itertools.chain.from_iterable(hops)),
                shards=len(by_shard),
            )
        of_shard = f" of shard {reaches.index(reached)}" if len(by_shard) > 1 else ""
        block = f"block {reached + 1}{of_shard} is missing"
        missing = missing or f": from height {at} the archive leads to {reached}, {block}"
    wanted = "any height" if height is None else f"height {height}"
    raise NotFound(
        f"nothing in the object store leads to {wanted}{missing or ': no snapshot and no archive is there'}",
        way_out="`stateferry status` lists what there is",
    )


def lead(segments: Sequence[SegmentObject], at: int, height: int | None) -> tuple[list[SegmentObject], int]:
    """The fewest segments that lead on from the block at ``at``, and how far they reach."""
    hops: list[SegmentObject] = []
    while height is None or at < height:
        fitting = [segment for segment in segments if segment.name.first <= at + 1 <= segment.name.last]
        if not fitting:
            break
        hops.append(max(fitting, key=lambda segment: (segment.name.last, segment.name.first)))
        at = hops[-1].name.last
    return hops, at if height is None else min(at, height)


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


class Replay:
    """Archived frames on top of a store, written in groups.

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
        after = Tip(
            ref=header.ref, vectors=diff.advance(before.vectors), seq=header.seq, counts=diff.count(before.counts)
        )
        digests = {table_id: blake3(view).digest() for table_id, view in split_tables(decoded.body).items()}
        check_result(header, after, frame.frame_id(header, digests))
        self._fresh.update(set(effect.fresh) - self._pending.keys())
        self._pending |= effect.writes
        self._pending_bytes += sum(
            len(key) + len(value or b"") + _ENTRY_OVERHEAD_BYTES for key, value in effect.writes.items()
        )
        self.meta = replace(self.meta.after(header, after, offset=0, digest=b""), diffs=self.meta.diffs)
        self.frames += 1
        if self._pending_bytes > PENDING_BYTES_MAX:
            self.commit()

    def commit(self) -> None:
        """Write what was applied; what came and went meanwhile is left out."""
        state = {key: value for key, value in self._pending.items() if not (value is None and key in self._fresh)}
        self._store.write(Batch(state=state, meta={META_KEY: encode_meta(self.meta)}))
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
