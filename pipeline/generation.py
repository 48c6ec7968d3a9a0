"""Generations: one unbroken history of topics and seqs, and where the records that open them stand.

A chain's broker has a small topic `generations`. Its first valid record opens the first generation; each later valid
one names the one it follows. Whoever loses a race to append finds the other's record first and takes that. Offsets and
seqs mean something only inside a generation; each has its own `blocks` and `diffs` topics.

The first record of a `diffs` partition is a GENERATION frame whose body is the `Opening`: the generation and what the
first primary fixed for its lifetime. FORMAT.md, "Generations".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from pipeline import frame
from pipeline.block import CHAIN_ID_BYTES_MAX, BlockRef
from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS
from pipeline.errors import FrameCorrupt, SettingsConflict, Unsupported, UsageError
from pipeline.frame import Header, Kind
from pipeline.position import BEFORE_FIRST_HEIGHT, NO_WRITER, Meta, Tip
from pipeline.shards import check_shards
from pipeline.state import SCHEMAS

GENERATIONS_TOPIC = "generations"
FINALITY_DEFAULT = 100
"""Blocks: Bitcoin's coinbase maturity, deeper than any reorg its main chain has seen; 17 hours of blocks."""

_MAGIC = b"SFge"
_VERSION = 1
_HEAD_BYTES = len(_MAGIC) + 1 + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """``base``: the block whose state the manifest holds; None: the walk starts before the first block."""

    generation: bytes  # 16 random bytes
    chain_id: str
    number: int = 1  # how many there were, this one included
    previous: bytes = NO_WRITER  # the generation it follows; zeroes for the first
    base: BlockRef | None = None
    base_vectors: Mapping[int, bytes] | None = None  # None: the empty state
    base_counts: Mapping[int, int] | None = None  # keys by table id; None: the empty state
    base_manifest: str = ""  # name of the manifest in the object store; empty: there is none
    shards: int = 1

    @property
    def blocks_topic(self) -> str:
        return self._topic("blocks")

    @property
    def shard_blocks_topic(self) -> str:
        return self._topic("shard-blocks")

    @property
    def events_topic(self) -> str:
        """What primaries read: a partition a shard, as `diffs` has."""
        return self.blocks_topic if self.shards == 1 else self.shard_blocks_topic

    @property
    def diffs_topic(self) -> str:
        return self._topic("diffs")

    @property
    def anchors_topic(self) -> str:
        return self._topic("anchors")

    def _topic(self, name: str) -> str:
        return name if self.number == 1 else f"{name}-{self.generation.hex()[:12]}"

    @property
    def tip(self) -> Tip:
        return Tip(
            ref=self.base, vectors=self.base_vectors or EMPTY_VECTORS, seq=0, counts=self.base_counts or EMPTY_COUNTS
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the first record of a diffs partition says."""

    generation: Generation
    finality: int
    shard: int = 0

    def meta(self, *, offset: int, digest: bytes) -> Meta:
        """The position of a store that holds the base state and has read nothing but this record."""
        tip = self.generation.tip
        base_height = BEFORE_FIRST_HEIGHT if tip.ref is None else tip.ref.height
        return Meta(
            chain_id=self.generation.chain_id,
            generation=self.generation.generation,
            generation_number=self.generation.number,
            finality=self.finality,
            shard=self.shard,
            shards=self.generation.shards,
            tip=tip,
            base_height=base_height,
            highest=base_height,
            journal_first_height=base_height + 1,
            archived_to=base_height + 1,
        ).with_diffs(offset=offset, digest=digest)


def encode_generation(generation: Generation) -> bytes:
    """The value of a record of the topic `generations`."""
    payload: bytes = msgpack.packb(_fields(generation), use_bin_type=True)
    return _MAGIC + bytes([_VERSION]) + xxhash.xxh3_64_digest(payload) + payload


def decode_generation(data: bytes) -> Generation:
    """The inverse of `encode_generation`. Raises FrameCorrupt, Unsupported."""
    if data[: len(_MAGIC)] != _MAGIC or len(data) <= _HEAD_BYTES:
        raise FrameCorrupt("a record of the generations topic does not begin as one")
    if data[len(_MAGIC)] != _VERSION:
        raise Unsupported(f"a generation record of version {data[len(_MAGIC)]}", way_out="upgrade")
    payload = data[_HEAD_BYTES:]
    if xxhash.xxh3_64_digest(payload) != data[len(_MAGIC) + 1 : _HEAD_BYTES]:
        raise FrameCorrupt("the checksum of a generation record does not match its bytes")
    return _generation(_unpack(payload))


def history(records: Iterable[bytes]) -> list[Generation]:
    """All generations, from all records of the topic in order; the last one is in force. Each valid one follows the one
    before. The first follows none, or one whose broker lost its topics."""
    found: list[Generation] = []
    for record in records:
        try:
            candidate = decode_generation(record)
        except FrameCorrupt:
            continue  # void: any writer may have been cut off
        if found:
            last = found[-1]
            follows = (candidate.previous, candidate.number, candidate.chain_id) == (
                last.generation,
                last.number + 1,
                last.chain_id,
            )
        else:
            follows = (candidate.number == 1) == (candidate.previous == NO_WRITER)
        if follows:
            found.append(candidate)
    return found


def encode_opening(opening: Opening) -> bytes:
    """The GENERATION frame that is the first record of a diffs partition."""
    generation = opening.generation
    body = msgpack.packb(
        {
            "generation": _fields(generation),
            "finality": opening.finality,
            "tables": {schema.name: table_id for table_id, schema in sorted(SCHEMAS.items())},
        },
        use_bin_type=True,
    )
    header = Header(
        kind=Kind.GENERATION,
        codec=Codec.NONE,
        generation=generation.generation,
        epoch=0,
        writer=NO_WRITER,
        shard=opening.shard,
        shards=generation.shards,
        chain_id=generation.chain_id,
        table_roots={},
    )
    return frame.encode(header, body)


def decode_opening(data: bytes) -> Opening:
    """The inverse of `encode_opening`. Raises FrameCorrupt, Unsupported, SettingsConflict (other tables)."""
    decoded = frame.decode(data)
    if decoded.header.kind is not Kind.GENERATION:
        raise FrameCorrupt("the first record of the diffs topic is not a GENERATION frame")
    fields = _unpack(decoded.body)
    tables = {schema.name: table_id for table_id, schema in SCHEMAS.items()}
    if fields.get("tables") != tables:
        raise SettingsConflict(
            f"the generation has the tables {fields.get('tables')}, this build has {tables}",
            way_out="run the version that opened the generation, or start a new one",
        )
    finality = fields.get("finality")
    if not isinstance(finality, int) or finality < 0:
        raise FrameCorrupt("a GENERATION frame without finality")
    return Opening(generation=_generation(fields.get("generation")), finality=finality, shard=decoded.header.shard)


def encode_end(successor: Generation, ended: Generation, *, shard: int = 0, epoch: int, writer: bytes) -> bytes:
    """The GENERATION frame that ends a partition of ``ended``. It is valid as an EPOCH is: ``epoch`` is the one in
    force + 1."""
    header = Header(
        kind=Kind.GENERATION,
        codec=Codec.NONE,
        generation=ended.generation,
        epoch=epoch,
        writer=writer,
        shard=shard,
        shards=ended.shards,
        chain_id=ended.chain_id,
        table_roots={},
    )
    return frame.encode(header, msgpack.packb(_fields(successor), use_bin_type=True))


def decode_end(body: bytes) -> Generation:
    """The successor that an ending GENERATION frame names. Raises FrameCorrupt."""
    return _generation(_unpack(body))


def _fields(generation: Generation) -> dict[str, Any]:
    base, vectors = generation.base, generation.base_vectors
    shards = {} if generation.shards == 1 else {"shards": generation.shards}
    return shards | {
        "generation": generation.generation,
        "chain": generation.chain_id,
        "number": generation.number,
        "previous": generation.previous,
        "height": BEFORE_FIRST_HEIGHT if base is None else base.height,
        "hash": b"" if base is None else base.block_hash,
        "vectors": [] if vectors is None else [[table_id, vectors[table_id]] for table_id in sorted(vectors)],
        "counts": sorted((generation.base_counts or {}).items()),
        "manifest": generation.base_manifest,
    }


def _unpack(payload: bytes) -> Any:
    try:
        fields = msgpack.unpackb(payload, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameCorrupt(f"a generation record is not a MessagePack map: {error}") from error
    if not isinstance(fields, dict):
        raise FrameCorrupt("a generation record is not a MessagePack map")
    return fields


def _generation(fields: Any) -> Generation:
    try:
        height, block_hash = fields["height"], fields["hash"]
        vectors = {int(table_id): bytes(vector) for table_id, vector in fields["vectors"]}
        result = Generation(
            generation=fields["generation"],
            chain_id=fields["chain"],
            number=fields["number"],
            previous=fields["previous"],
            base=BlockRef(height, block_hash) if block_hash else None,
            base_vectors=vectors or None,
            base_counts={int(table_id): int(count) for table_id, count in fields["counts"]} or None,
            base_manifest=fields["manifest"],
            shards=check_shards(fields.get("shards", 1)),
        )
        sizes = (len(result.generation), len(result.previous), len(block_hash) in (0, 32))
        if sizes != (16, 16, True) or any(len(vector) != lthash.VECTOR_BYTES for vector in vectors.values()):
            raise ValueError("an id, hash or vector of the wrong size")
        if not 0 < len(result.chain_id.encode()) <= CHAIN_ID_BYTES_MAX:
            raise ValueError("a chain id that cannot be")
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise FrameCorrupt(f"a generation record is malformed: {error!r}") from error
    return result
