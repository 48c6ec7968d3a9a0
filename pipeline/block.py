"""Blocks and the events that carry them: what a source says, in the order in which it says it.

A source walks its chain. Each step is an **event** with a dense walk number: `Connect` a block on top of the position,
or `Rewind` to an earlier block of the current branch. A `SourceEpoch` opens the reign of one
source writer. FORMAT.md, "Events", gives the MessagePack maps; any language can write them.

The ops of a block stand in one ordered list per table, because a block may create and delete the same key. They are
kept as columns (codes, keys, values), because that is how they are encoded and applied: one pass, no object per op.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import xxhash

from pipeline import codec
from pipeline.errors import EventCorrupt, Unsupported
from pipeline.state import KEY_BYTES_MAX, SCHEMAS_BY_NAME, VALUE_BYTES_MAX, Schema

EVENT_MAGIC = b"SFev"
EVENT_VERSION = 1
EVENT_BYTES_MAX = 256 << 20
"""Bound of one event, decompressed: a block of 300,000 changes is some 40 MB."""
OPS_MAX = 4_000_000
"""Bound of the ops in one block; a 4 MB Bitcoin block cannot hold a tenth of it."""

_HASH_BYTES = 32
_ID_BYTES = 16
CHAIN_ID_BYTES_MAX = 32


class Op(enum.IntEnum):
    """What a source says about one key. On the wire as one byte an op."""

    CREATE = 1  # must find nothing
    DELETE = 2  # must find something
    PUT = 3  # finds either


@dataclass(frozen=True, slots=True, order=True)
class BlockRef:
    """A height never travels without its hash. ``block_hash`` is in hashing order, 32 bytes."""

    height: int
    block_hash: bytes

    def __str__(self) -> str:
        return f"{self.height}:{self.block_hash[::-1].hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One table's ops of one block, in order. ``values`` has one entry per CREATE and PUT, none per DELETE."""

    codes: bytes
    keys: Sequence[bytes]
    values: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one block does to the state. ``time_s``: the block's own time stamp, seconds since 1970."""

    ref: BlockRef
    parent_hash: bytes
    time_s: int
    tables: dict[str, Ops] = field(default_factory=dict)

    @property
    def op_count(self) -> int:
        return sum(len(ops.codes) for ops in self.tables.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStamp:
    """Who says it: chain, generation, and the source writer's epoch."""

    chain_id: str
    generation: bytes
    epoch: int
    writer: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Put a block on top of the position. Its parent must be the position's block."""

    stamp: SourceStamp
    walk: int
    block: Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """Take blocks off until ``to`` is the tip. ``to`` stands on the current branch."""

    stamp: SourceStamp
    walk: int
    to: BlockRef


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEpoch:
    """A new source writer, in force if its epoch is the one in force + 1. ``resume_walk``: the walk number from which
    it goes on; everything between a bad record and this one is void. ``voids``: events of that number or a higher one
    that came before are void too, also where nothing but the state can tell what is wrong with them."""

    stamp: SourceStamp
    resume_walk: int
    voids: bool = False


Event = Connect | Rewind | SourceEpoch

_KINDS: dict[type, str] = {Connect: "connect", Rewind: "rewind", SourceEpoch: "epoch"}


def encode_event(event: Event, *, zstd_level: int = codec.ZSTD_LEVEL) -> bytes:
    """One event as the value of a record: magic, version, checksum, MessagePack map."""
    stamp = event.stamp
    fields: dict[str, Any] = {
        "kind": _KINDS[type(event)],
        "chain": stamp.chain_id,
        "generation": stamp.generation,
        "epoch": stamp.epoch,
        "writer": stamp.writer,
    }
    match event:
        case Connect(walk=walk, block=block):
            tables = {
                name: {"ops": ops.codes, "keys": list(ops.keys), "values": list(ops.values)}
                for name, ops in sorted(block.tables.items())
            }
            raw = msgpack.packb(tables, use_bin_type=True)
            fields |= {
                "walk": walk,
                "height": block.ref.height,
                "hash": block.ref.block_hash,
                "parent": block.parent_hash,
                "time": block.time_s,
                "op_count": block.op_count,
                "tables": codec.compress(raw, codec.Codec.ZSTD, zstd_level=zstd_level),
            }
        case Rewind(walk=walk, to=to):
            fields |= {"walk": walk, "height": to.height, "hash": to.block_hash}
        case SourceEpoch(resume_walk=resume_walk, voids=voids):
            fields |= {"resume_walk": resume_walk} | ({"voids": True} if voids else {})
    payload: bytes = msgpack.packb(fields, use_bin_type=True)
    return EVENT_MAGIC + bytes([EVENT_VERSION]) + xxhash.xxh3_64_digest(payload) + payload


_PREFIX_BYTES = len(EVENT_MAGIC) + 1 + 8


def decode_event(data: bytes, *, with_ops: bool = True) -> Event:
    """The inverse of `encode_event`. ``with_ops`` False leaves a block's ops compressed and unread (an empty block):
    enough to know the branch.

    Raises EventCorrupt (not an event, or damaged) and Unsupported (a version this build does not know).
    """
    if len(data) > EVENT_BYTES_MAX:
        raise EventCorrupt(f"an event of {len(data)} bytes is over the bound of {EVENT_BYTES_MAX}")
    if data[: len(EVENT_MAGIC)] != EVENT_MAGIC or len(data) <= _PREFIX_BYTES:
        raise EventCorrupt(f"a record does not begin as an event does (first bytes {data[:8].hex()})")
    version = data[len(EVENT_MAGIC)]
    if version != EVENT_VERSION:
        raise Unsupported(
            f"an event of version {version}", way_out=f"this build reads version {EVENT_VERSION}: upgrade"
        )
    payload = memoryview(data)[_PREFIX_BYTES:]
    if xxhash.xxh3_64_digest(payload) != data[len(EVENT_MAGIC) + 1 : _PREFIX_BYTES]:
        raise EventCorrupt("an event's checksum does not match its bytes")
    reader = _Fields(_unpack(payload, "an event"))
    stamp = SourceStamp(
        chain_id=reader.text("chain", CHAIN_ID_BYTES_MAX),
        generation=reader.blob("generation", _ID_BYTES),
        epoch=reader.number("epoch"),
        writer=reader.blob("writer", _ID_BYTES),
    )
    kind = reader.text("kind", 16)
    event: Event
    match kind:
        case "connect":
            op_count = reader.number("op_count", OPS_MAX)
            packed = reader.blob("tables")
            event = Connect(
                stamp=stamp,
                walk=reader.number("walk"),
                block=Block(
                    ref=BlockRef(reader.number("height"), reader.blob("hash", _HASH_BYTES)),
                    parent_hash=reader.blob("parent", _HASH_BYTES),
                    time_s=reader.number("time"),
                    tables=_decode_tables(packed, op_count) if with_ops else {},
                ),
            )
        case "rewind":
            event = Rewind(
                stamp=stamp,
                walk=reader.number("walk"),
                to=BlockRef(reader.number("height"), reader.blob("hash", _HASH_BYTES)),
            )
        case "epoch":
            event = SourceEpoch(stamp=stamp, resume_walk=reader.number("resume_walk"), voids=reader.flag("voids"))
        case _:
            raise Unsupported(f"an event of kind {kind!r}", way_out="upgrade this build")
    reader.done()
    return event


def _unpack(payload: memoryview | bytes, what: str) -> Any:
    try:
        return msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_bin_len=EVENT_BYTES_MAX,
            max_str_len=1 << 10,
            max_array_len=min(OPS_MAX, len(payload)),  # an entry takes a byte: no list is made for what cannot come
            max_map_len=64,
            max_ext_len=0,
            object_pairs_hook=_map_of,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise EventCorrupt(f"{what} is not the MessagePack map it must be: {error}") from error


def _map_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands there twice")
    return fields


class _Fields:
    """Takes typed fields out of a decoded map, once each."""

    def __init__(self, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise EventCorrupt("an event is not a map")
        self._fields = fields

    def _take(self, name: str, kind: type) -> Any:
        value = self._fields.pop(name, None)
        if type(value) is not kind:
            raise EventCorrupt(f"an event's field {name!r} is not of type {kind.__name__}")
        return value

    def number(self, name: str, maximum: int = (1 << 63) - 1) -> int:
        value: int = self._take(name, int)
        if not 0 <= value <= maximum:
            raise EventCorrupt(f"an event's field {name!r} is {value}, not within 0..{maximum}")
        return value

    def flag(self, name: str) -> bool:
        """True where the field stands; it stands nowhere else."""
        if name not in self._fields:
            return False
        if not self._take(name, bool):
            raise EventCorrupt(f"an event's field {name!r} stands there and says no")
        return True

    def text(self, name: str, bytes_max: int) -> str:
        value: str = self._take(name, str)
        if not 0 < len(value.encode()) <= bytes_max:
            raise EventCorrupt(f"an event's field {name!r} is empty or longer than {bytes_max} bytes")
        return value

    def blob(self, name: str, size: int | None = None) -> bytes:
        value: bytes = self._take(name, bytes)
        if size is not None and len(value) != size:
            raise EventCorrupt(f"an event's field {name!r} has {len(value)} bytes, not {size}")
        return value

    def done(self) -> None:
        if self._fields:
            raise EventCorrupt(f"an event has fields that this version does not know: {sorted(self._fields)}")


def _decode_tables(packed: bytes, op_count: int) -> dict[str, Ops]:
    try:
        raw = codec.decompress(packed, codec.Codec.ZSTD, raw_bytes_max=EVENT_BYTES_MAX)
    except codec.CodecError as error:
        raise EventCorrupt(f"an event's tables cannot be decompressed: {error}") from error
    tables = _unpack(raw, "an event's tables")
    if not isinstance(tables, dict):
        raise EventCorrupt("an event's tables are not a map")
    decoded: dict[str, Ops] = {}
    for name, columns in tables.items():
        schema = SCHEMAS_BY_NAME.get(name)
        if schema is None:
            raise Unsupported(f"an event changes table {name!r}, which this build does not know")
        if not isinstance(columns, dict) or set(columns) != {"ops", "keys", "values"}:
            raise EventCorrupt(f"table {name!r} of an event does not have the columns ops, keys and values")
        decoded[name] = _check_ops(schema, Ops(codes=columns["ops"], keys=columns["keys"], values=columns["values"]))
    if sum(len(ops.codes) for ops in decoded.values()) != op_count:
        raise EventCorrupt("an event's op count is not the number of its ops")
    return decoded


_OP_BYTES = bytes(Op)


def _check_ops(schema: Schema, ops: Ops) -> Ops:
    codes, keys, values = ops.codes, ops.keys, ops.values
    where = f"table {schema.name} of an event"
    if not isinstance(codes, bytes) or not isinstance(keys, list) or not isinstance(values, list):
        raise EventCorrupt(f"{where}: a column has the wrong type")
    if codes.translate(None, _OP_BYTES):
        raise EventCorrupt(f"{where}: an op that is none of create, delete, put")
    if len(keys) != len(codes) or len(values) != len(codes) - codes.count(Op.DELETE):
        raise EventCorrupt(f"{where}: the columns do not have matching lengths")
    if set(map(type, keys)) - {bytes} or set(map(type, values)) - {bytes}:
        raise EventCorrupt(f"{where}: a key or value is not a byte string")
    if set(map(len, keys)) - {schema.key_bytes}:
        raise EventCorrupt(f"{where}: a key is not {schema.key_bytes} bytes long")
    if values and max(map(len, values)) > VALUE_BYTES_MAX:
        raise EventCorrupt(f"{where}: a value is longer than {VALUE_BYTES_MAX} bytes")
    return ops


assert max(schema.key_bytes for schema in SCHEMAS_BY_NAME.values()) <= KEY_BYTES_MAX
