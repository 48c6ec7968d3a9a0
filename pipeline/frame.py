"""The wire: one message of the replication topic, and one record of the archive and the journal.

A frame is a fixed prefix, a header, a compressed body and a checksum. The prefix stands at the same bytes in every
version, so that any reader can tell whose frame it is before it knows what it means: that decides between *void*
(skipped) and *unsupported* (stop). FORMAT.md, "Frames", has the byte table.

Two bodies exist. On the topic an APPLY frame carries references, which need the reader's state. In the archive and in
journals the same frame carries whole columns (the flag SELF_CONTAINED): same header, same id, no state needed.

The **frame id** is over content and links only. Codec, delta, epochs, writers, offsets and chunking are left out, so
that another build's re-emission of the same block has the same id.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import xxhash
from blake3 import blake3

from pipeline import codec
from pipeline.block import CHAIN_ID_BYTES_MAX, BlockRef
from pipeline.codec import Codec
from pipeline.diff import BODY_BYTES_MAX
from pipeline.errors import FrameCorrupt, Unsupported

MAGIC = b"SFfr"
VERSION = 1
FRAME_BYTES_MAX = 256 << 20
NO_HASH = bytes(32)

_ID_TAG = b"stateferry/frame/1"


class Kind(enum.IntEnum):
    APPLY = 1  # a block was connected
    UNDO = 2  # the tip was taken off; the reader uses its own journal
    EPOCH = 3  # a new writer
    GENERATION = 4  # opens, or ends, a partition


class Feature(enum.IntFlag):
    """Required features: a reader that does not know one must stop."""

    SELF_CONTAINED = 1  # the body is in whole form
    TAKES_BACK = 2  # of an EPOCH of a shard: frames above its seq are void


NO_FEATURES = Feature(0)
NO_BLOCK = BlockRef(0, NO_HASH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything about a frame but its columns. Hashes and roots are 32 bytes, ids of writers and generations 16.

    For APPLY, ``ref`` is the block connected and ``parent_hash`` the tip before. For UNDO, ``ref`` is the block taken
    off and ``parent_hash`` the tip after. EPOCH and GENERATION take no seq and no links: those fields are zero. But an
    EPOCH that TAKES_BACK names the last frame that stays (``seq``, ``walk``, ``prev_frame_id``), and from where, under
    which source, events are read on.
    """

    kind: Kind
    codec: Codec
    required: Feature = NO_FEATURES
    optional: int = 0
    generation: bytes
    epoch: int
    writer: bytes
    shard: int = 0
    shards: int = 1
    chain_id: str
    seq: int = 0
    walk: int = 0  # of the event; an event's earlier frames carry the number before it
    source_epoch: int = 0
    source_writer: bytes = bytes(16)
    ref: BlockRef = NO_BLOCK
    parent_hash: bytes = NO_HASH
    prev_root: bytes = NO_HASH
    post_root: bytes = NO_HASH
    prev_frame_id: bytes = NO_HASH
    frame_id: bytes = NO_HASH
    next_input_offset: int = 0  # where the writer goes on reading events once this frame is in force
    input_digest: bytes = NO_HASH  # of the last event record before that offset
    block_time_s: int = 0
    op_count: int = 0
    table_roots: Mapping[int, bytes]

    @property
    def is_numbered(self) -> bool:
        """Whether the frame takes a seq and changes state."""
        return self.kind in (Kind.APPLY, Kind.UNDO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What every version says at the same place."""

    version: int
    kind: int
    generation: bytes
    epoch: int
    writer: bytes
    shard: int
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A header and its body, decompressed."""

    header: Header
    body: bytes


# Version-independent: magic, version, kind, codec, required, optional, generation, epoch, writer, shard, shards.
_PREFIX = Struct("<4sHBBII16sQ16sHH")
assert _PREFIX.size == 60
# chain id, seq, walk, source epoch, source writer, height, block hash, parent hash, prev root, post root, previous
# frame id, frame id, next input offset, input digest, block time, op count, raw body bytes, packed body bytes, tables.
_HEADER = Struct("<32sQQQ16sQ32s32s32s32s32s32sQ32sqIIIB")
assert _HEADER.size == 333
_TABLE_ROOT = Struct("<B32s")
_CHECKSUM_BYTES = 16
SMALLEST_FRAME_BYTES = _PREFIX.size + _HEADER.size + _CHECKSUM_BYTES


def digest_of(record: bytes) -> bytes:
    """The digest that stores keep of the last record they followed, and that a proposer compares."""
    return blake3(record).digest()


def frame_id(header: Header, content_digests: Mapping[int, bytes]) -> bytes:
    """The id of a numbered frame: content digests by table, and links. ``header.frame_id`` is not read."""
    parts = [
        _ID_TAG,
        bytes([header.kind, len(content_digests)]),
        *(bytes([table_id]) + content_digests[table_id] for table_id in sorted(content_digests)),
        header.generation,
        header.shard.to_bytes(2, "little") + header.shards.to_bytes(2, "little"),
        header.seq.to_bytes(8, "little"),
        header.ref.height.to_bytes(8, "little") + header.ref.block_hash,
        header.parent_hash,
        header.prev_root,
        header.post_root,
        bytes([len(header.table_roots)]),
        *(bytes([table_id]) + header.table_roots[table_id] for table_id in sorted(header.table_roots)),
        header.prev_frame_id,
    ]
    return blake3(b"".join(parts)).digest()


class Packed(NamedTuple):
    """A frame's body as it stands in the frame."""

    codec: Codec
    data: bytes
    raw_bytes: int


def pack(body: bytes, body_codec: Codec, *, is_own: bool = False) -> Packed:
    """A body compressed, or as it is where that would not help. ``is_own``: written by every node, sent by none."""
    level = codec.ZSTD_LEVEL_FAST if is_own else codec.ZSTD_LEVEL
    packed = codec.compress(body, body_codec, zstd_level=level)
    if len(packed) >= len(body):
        return Packed(Codec.NONE, body, len(body))
    return Packed(body_codec, packed, len(body))


def encode(header: Header, body: bytes) -> bytes:
    """A whole frame, its body packed with ``header.codec``."""
    return join(header, pack(body, header.codec, is_own=Feature.SELF_CONTAINED in header.required))


def join(header: Header, packed: Packed) -> bytes:
    """A whole frame, of a body that is packed already."""
    _check(header, packed.raw_bytes)
    tables = sorted(header.table_roots)
    start = b"".join(
        (
            _PREFIX.pack(
                MAGIC,
                VERSION,
                header.kind,
                packed.codec,
                header.required,
                header.optional,
                header.generation,
                header.epoch,
                header.writer,
                header.shard,
                header.shards,
            ),
            _HEADER.pack(
                header.chain_id.encode(),
                header.seq,
                header.walk,
                header.source_epoch,
                header.source_writer,
                header.ref.height,
                header.ref.block_hash,
                header.parent_hash,
                header.prev_root,
                header.post_root,
                header.prev_frame_id,
                header.frame_id,
                header.next_input_offset,
                header.input_digest,
                header.block_time_s,
                header.op_count,
                packed.raw_bytes,
                len(packed.data),
                len(tables),
            ),
            *(_TABLE_ROOT.pack(table_id, header.table_roots[table_id]) for table_id in tables),
            packed.data,
        )
    )
    return start + xxhash.xxh3_128_digest(start)


def peek_prefix(data: bytes) -> Prefix | None:
    """Whose frame this is, whatever its version; None for anything that is no undamaged frame: void."""
    if not SMALLEST_FRAME_BYTES <= len(data) <= FRAME_BYTES_MAX or data[:4] != MAGIC:
        return None
    if xxhash.xxh3_128_digest(memoryview(data)[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
        return None
    _, version, kind, _, _, _, generation, epoch, writer, shard, shards = _PREFIX.unpack_from(data)
    return Prefix(
        version=version, kind=kind, generation=generation, epoch=epoch, writer=writer, shard=shard, shards=shards
    )


def peek(data: bytes) -> Header:
    """A frame's header; the body stays as it is. Raises FrameCorrupt, Unsupported."""
    return _parse(data)[0]


def decode(data: bytes) -> Frame:
    """The inverse of `encode`. Raises FrameCorrupt (damaged, or not canonical) and Unsupported, before it allocates."""
    header, packed, raw_bytes = _parse(data)
    try:
        body = codec.decompress(packed, header.codec, raw_bytes_max=BODY_BYTES_MAX, raw_bytes=raw_bytes)
    except codec.CodecError as error:
        raise FrameCorrupt(f"the body of frame {header.seq} cannot be decompressed: {error}") from error
    return Frame(header=header, body=body)


def _parse(data: bytes) -> tuple[Header, memoryview, int]:
    if peek_prefix(data) is None:
        raise FrameCorrupt(
            f"not an undamaged frame: magic, size or checksum is wrong ({len(data)} bytes, first {data[:8].hex()})"
        )
    _, version, kind, codec_id, required, optional, generation, epoch, writer, shard, shards = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise Unsupported(f"a frame of version {version}", way_out=f"this build reads version {VERSION}: upgrade")
    if required & ~int(Feature.SELF_CONTAINED | Feature.TAKES_BACK):  # a flag's complement knows its own bits only
        raise Unsupported(f"a frame that requires unknown features ({required:#x})", way_out="upgrade")
    if kind not in set(Kind) or codec_id not in set(Codec):
        raise Unsupported(f"a frame of kind {kind}, codec {codec_id}", way_out="upgrade")
    (
        chain_id,
        seq,
        walk,
        source_epoch,
        source_writer,
        height,
        block_hash,
        parent_hash,
        prev_root,
        post_root,
        prev_frame_id,
        this_frame_id,
        next_input_offset,
        input_digest,
        block_time_s,
        op_count,
        raw_bytes,
        packed_bytes,
        table_count,
    ) = _HEADER.unpack_from(data, _PREFIX.size)
    at = _PREFIX.size + _HEADER.size
    stop = at + table_count * _TABLE_ROOT.size
    if stop + packed_bytes + _CHECKSUM_BYTES != len(data):
        raise FrameCorrupt(f"the lengths of frame {seq} do not sum up to its {len(data)} bytes")
    table_roots = dict(_TABLE_ROOT.iter_unpack(data[at:stop]))
    if list(table_roots) != sorted(table_roots) or len(table_roots) != table_count:
        raise FrameCorrupt(f"the table roots of frame {seq} are out of order")
    try:
        chain = chain_id.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError as error:
        raise FrameCorrupt(f"the chain id of frame {seq} is not ASCII") from error
    header = Header(
        kind=Kind(kind),
        codec=Codec(codec_id),
        required=Feature(required),
        optional=optional,
        generation=generation,
        epoch=epoch,
        writer=writer,
        shard=shard,
        shards=shards,
        chain_id=chain,
        seq=seq,
        walk=walk,
        source_epoch=source_epoch,
        source_writer=source_writer,
        ref=BlockRef(height, block_hash),
        parent_hash=parent_hash,
        prev_root=prev_root,
        post_root=post_root,
        prev_frame_id=prev_frame_id,
        frame_id=this_frame_id,
        next_input_offset=next_input_offset,
        input_digest=input_digest,
        block_time_s=block_time_s,
        op_count=op_count,
        table_roots=table_roots,
    )
    _check(header, raw_bytes)
    return header, memoryview(data)[stop : stop + packed_bytes], raw_bytes


def _check(header: Header, raw_bytes: int) -> None:
    """What holds for every frame, on the way out and on the way in. Raises FrameCorrupt."""

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise FrameCorrupt(f"frame {header.seq}: {what}")

    demand(0 < len(header.chain_id) <= CHAIN_ID_BYTES_MAX and header.chain_id.isascii(), "a chain id that cannot be")
    demand("\0" not in header.chain_id, "a chain id that cannot be")
    demand(header.shard < header.shards, f"shard {header.shard} of {header.shards}")
    demand(raw_bytes <= BODY_BYTES_MAX, f"a body of {raw_bytes} bytes, over the bound of {BODY_BYTES_MAX}")
    if header.is_numbered:
        demand(header.seq > 0 and header.epoch > 0, "a numbered frame without seq or epoch")
        demand(bool(header.table_roots), "no table roots")
        bare = header.kind is Kind.UNDO and Feature.SELF_CONTAINED not in header.required
        demand(not (bare and raw_bytes), "an UNDO frame with a body that nobody reads")
        demand(Feature.TAKES_BACK not in header.required, "a numbered frame that takes back others")
    elif header.required:
        takes_back = header.kind is Kind.EPOCH and header.required == Feature.TAKES_BACK
        demand(takes_back and header.shards > 1, "an EPOCH or GENERATION frame with features")
    else:
        demand(header.seq == 0, "an EPOCH or GENERATION frame with a seq")
