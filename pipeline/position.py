"""Where a store stands, and how it got there: what every commit writes beside the state it belongs to.

`Meta` is the whole of it: one record, written in the same atomic batch as the state. Every journal entry holds the
`Meta` from before its frame, so going back is reading it. What an UNDO frame takes from it is the `Tip` alone (block,
vectors, root); coming back from a lost log takes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS
from pipeline.errors import StoreCorrupt
from pipeline.frame import NO_HASH, Feature, Header, Kind

NO_WRITER = bytes(16)
BEFORE_FIRST_HEIGHT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMark:
    """How far a topic's partition was followed: the next offset to read, and the digest of the record before it, by
    which a log that lost or changed records is noticed."""

    next_offset: int
    last_digest: bytes  # empty: nothing was read yet, or the digest is not known


START = LogMark(next_offset=0, last_digest=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tip:
    """The block whose state this is, the vectors of that state, how many keys it has, and the seq of the frame that
    put it on top."""

    ref: BlockRef | None  # None: before the first block
    vectors: Mapping[int, bytes]
    seq: int  # 0: the base state
    counts: Mapping[int, int] = field(default_factory=EMPTY_COUNTS.copy)  # keys by table id

    @property
    def height(self) -> int:
        return BEFORE_FIRST_HEIGHT if self.ref is None else self.ref.height

    @property
    def block_hash(self) -> bytes:
        """What a block on top must name as its parent."""
        return NO_HASH if self.ref is None else self.ref.block_hash

    @property
    def root(self) -> bytes:
        return lthash.state_root(self.vectors)

    @property
    def table_roots(self) -> dict[int, bytes]:
        return {table_id: lthash.table_root(vector) for table_id, vector in self.vectors.items()}


EMPTY_TIP = Tip(ref=None, vectors=EMPTY_VECTORS, seq=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """A store's position, links and marks.

    * ``final_height`` never goes back: it follows the highest tip ever, not the present one. ``highest`` is that of the
      log, equal on every node; what a node saw in a log that is lost stays in its ``final_floor``.
    * ``tip.seq`` <= ``seq``; the journal holds every seq from ``journal_first_seq`` to ``seq``.
    """

    chain_id: str
    generation: bytes
    generation_number: int = 1
    finality: int  # blocks below the highest tip that can still be taken off
    shard: int = 0
    shards: int = 1
    tip: Tip = EMPTY_TIP
    walk: int = 0  # of the last event applied whole
    base_height: int = BEFORE_FIRST_HEIGHT  # the base state's: nothing at or below it can be taken off
    highest: int = BEFORE_FIRST_HEIGHT
    seq: int = 0
    frame_id: bytes = NO_HASH
    epoch: int = 0
    writer: bytes = NO_WRITER
    source_epoch: int = 0
    source_writer: bytes = NO_WRITER
    blocks: LogMark = START
    diffs: LogMark = START
    journal_first_seq: int = 1
    journal_first_height: int = 0  # lowest height of the current branch that the journal can take off
    archived_to: int = 0  # height of the next block that the archive wants
    final_floor: int = BEFORE_FIRST_HEIGHT  # the final height that this node had when its log lost its end

    @property
    def final_height(self) -> int:
        """No block at or below it will be taken off."""
        return max(self.highest - self.finality, self.base_height, self.final_floor)

    def common(self) -> Meta:
        """The meta without how far this node's own journal and archive reach: equal on all that followed one log."""
        return replace(
            self, journal_first_seq=0, journal_first_height=0, archived_to=0, final_floor=BEFORE_FIRST_HEIGHT
        )

    def after(self, header: Header, tip: Tip, *, offset: int, digest: bytes) -> Meta:
        """The meta once a numbered frame, read at ``offset`` of diffs, is applied."""
        is_first = self.tip.ref is None  # of a chain without a base: the journal begins there, at whatever height
        highest = max(self.highest, tip.height)
        final = max(highest - self.finality, self.base_height)
        return replace(
            self,
            tip=tip,
            walk=header.walk,
            highest=highest,
            seq=header.seq,
            frame_id=header.frame_id,
            source_epoch=header.source_epoch,
            source_writer=header.source_writer,
            blocks=LogMark(
                next_offset=header.next_input_offset,
                last_digest=b"" if header.input_digest == NO_HASH else header.input_digest,
            ),
            journal_first_height=tip.height if is_first else self.journal_first_height,
            archived_to=tip.height if is_first else self.archived_to,
            final_floor=self.final_floor if self.final_floor > final else BEFORE_FIRST_HEIGHT,
        ).with_diffs(offset=offset, digest=digest)

    def after_epoch(self, header: Header, *, offset: int, digest: bytes) -> Meta:
        """The meta once a valid EPOCH, read at ``offset`` of diffs, is in force."""
        assert header.kind is Kind.EPOCH and header.epoch == self.epoch + 1, (header.epoch, self.epoch)
        meta = replace(self, epoch=header.epoch, writer=header.writer).with_diffs(offset=offset, digest=digest)
        if Feature.TAKES_BACK in header.required:
            assert (self.seq, self.frame_id) == (header.seq, header.prev_frame_id), (self.seq, header.seq)
            mark = LogMark(next_offset=header.next_input_offset, last_digest=header.input_digest)
            source = (header.source_epoch, header.source_writer)
            meta = replace(meta, blocks=mark, source_epoch=source[0], source_writer=source[1])
        return meta

    def with_diffs(self, *, offset: int, digest: bytes) -> Meta:
        """The meta with the record at ``offset`` of diffs as the last one followed."""
        return replace(self, diffs=LogMark(next_offset=offset + 1, last_digest=digest))


def encode_meta(meta: Meta) -> bytes:
    ref = meta.tip.ref
    fields: dict[str, Any] = {
        "chain": meta.chain_id,
        "generation": meta.generation,
        "generation_number": meta.generation_number,
        "finality": meta.finality,
        "shard": meta.shard,
        "shards": meta.shards,
        "height": meta.tip.height,
        "hash": b"" if ref is None else ref.block_hash,
        "vectors": sorted((table_id, vector) for table_id, vector in meta.tip.vectors.items()),
        "counts": sorted(meta.tip.counts.items()),
        "tip_seq": meta.tip.seq,
        "walk": meta.walk,
        "base_height": meta.base_height,
        "highest": meta.highest,
        "seq": meta.seq,
        "frame_id": meta.frame_id,
        "epoch": meta.epoch,
        "writer": meta.writer,
        "source_epoch": meta.source_epoch,
        "source_writer": meta.source_writer,
        "blocks": [meta.blocks.next_offset, meta.blocks.last_digest],
        "diffs": [meta.diffs.next_offset, meta.diffs.last_digest],
        "journal_first_seq": meta.journal_first_seq,
        "journal_first_height": meta.journal_first_height,
        "archived_to": meta.archived_to,
        "final_floor": meta.final_floor,
    }
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def decode_meta(data: bytes) -> Meta:
    """The inverse of `encode_meta`. Raises StoreCorrupt."""
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
        block_hash = fields.pop("hash")
        height = fields.pop("height")
        vectors = dict(fields.pop("vectors"))
        if any(len(vector) != lthash.VECTOR_BYTES for vector in vectors.values()):
            raise ValueError("a vector of the wrong size")
        blocks, diffs = fields.pop("blocks"), fields.pop("diffs")
        return Meta(
            chain_id=fields.pop("chain"),
            tip=Tip(
                ref=BlockRef(height, block_hash) if block_hash else None,
                vectors=vectors,
                seq=fields.pop("tip_seq"),
                counts=dict(fields.pop("counts")),
            ),
            blocks=LogMark(next_offset=blocks[0], last_digest=blocks[1]),
            diffs=LogMark(next_offset=diffs[0], last_digest=diffs[1]),
            **fields,
        )
    except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise StoreCorrupt(
            f"a position record cannot be read: {error}", way_out="restore this data directory from a snapshot"
        ) from error
