"""Checks: does a frame follow from a position, does a store hold what its vectors say.

`follows` is the links' part of a replica's rule. `audit` hashes a whole store, key by key: it is what turns *claimed*
into *proven*, and what finds a bit that rotted in a value nobody touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack

from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.diff import EMPTY_VECTORS, Vectors
from pipeline.errors import AuditFailed, FrameIdMismatch, RootMismatch, SeqConflict, SeqGap, StoreCorrupt, WrongChain
from pipeline.frame import Header, Kind
from pipeline.position import Meta, Tip
from pipeline.state import SCHEMAS, schema_of_storage_key

_AUDIT_CHUNK = 4096
"""Stored entries hashed at a time: about 1 MiB in memory."""


def follows(header: Header, meta: Meta) -> bool:
    """Whether a numbered frame in force is the next one. False: it is a repeat of the last one.

    Raises WrongChain, SeqGap (frames are missing), SeqConflict (another frame where one was applied, or links that do
    not meet), RootMismatch (it starts from another state).
    """
    where = f"frame seq {header.seq}, block {header.ref}"
    if header.chain_id != meta.chain_id:
        raise WrongChain(f"a frame of chain {header.chain_id!r}, this directory holds {meta.chain_id!r}", where=where)
    if header.seq <= meta.seq:
        if header.seq == meta.seq and header.frame_id != meta.frame_id:
            raise SeqConflict(
                f"two frames have seq {header.seq}: {meta.frame_id.hex()} was applied, {header.frame_id.hex()} came",
                where=where,
            )
        return False
    if header.seq > meta.seq + 1:
        raise SeqGap(
            f"frame {header.seq} follows frame {meta.seq}: {header.seq - meta.seq - 1} are missing",
            where=where,
            way_out="restore this data directory from a snapshot",
        )
    if header.prev_frame_id != meta.frame_id:
        raise SeqConflict(f"frame {header.seq} links to another frame than the last one applied", where=where)
    tip = meta.tip
    if header.prev_root != tip.root:
        raise RootMismatch(
            f"frame {header.seq} starts from root {header.prev_root.hex()}, this node's is {tip.root.hex()}",
            where=where,
        )
    _check_branch(header, tip, where)
    return True


def _check_branch(header: Header, tip: Tip, where: str) -> None:
    if header.kind is Kind.UNDO:
        meets = header.ref == tip.ref
    else:
        meets = header.parent_hash == tip.block_hash and (tip.ref is None or header.ref.height == tip.height + 1)
    if not meets:
        raise SeqConflict(f"frame {header.seq} does not meet the tip {tip.ref}", where=where)


def check_result(header: Header, after: Tip, computed_id: bytes) -> None:
    """What this node computed against what the frame claims. Raises RootMismatch, FrameIdMismatch."""
    where = f"frame seq {header.seq}, block {header.ref}"
    root = after.root
    if header.post_root != root:
        raise RootMismatch(f"root {header.post_root.hex()} is claimed, {root.hex()} was computed", where=where)
    if dict(header.table_roots) != after.table_roots:
        raise RootMismatch("the table roots claimed are not the ones computed", where=where)
    if header.frame_id != computed_id:
        raise FrameIdMismatch(f"id {header.frame_id.hex()} is claimed, {computed_id.hex()} was computed", where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Whether this node hashed every key of the state it holds. ``at``: the block at which it had done so."""

    proven: bool
    at: BlockRef | None = None
    root: bytes = b""


def encode_proof(proof: Proof) -> bytes:
    at = proof.at
    packed: bytes = msgpack.packb(
        {
            "proven": proof.proven,
            "height": -1 if at is None else at.height,
            "hash": b"" if at is None else at.block_hash,
            "root": proof.root,
        }
    )
    return packed


def decode_proof(data: bytes | None) -> Proof:
    """The inverse of `encode_proof`; nothing written means claimed. Raises StoreCorrupt."""
    if data is None:
        return Proof(proven=False)
    try:
        fields: Any = msgpack.unpackb(data, raw=False)
        at = BlockRef(fields["height"], fields["hash"]) if fields["hash"] else None
        return Proof(proven=fields["proven"] is True, at=at, root=fields["root"])
    except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise StoreCorrupt(f"the record of the proof cannot be read: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """What a pass over stored entries found. Partials of disjoint ranges sum up with `combine`."""

    vectors: Vectors
    keys: int


def audit(entries: Iterable[tuple[bytes, bytes]]) -> Audited:
    """Hash every (storage key, stored bytes), ascending, into vectors. Raises StoreCorrupt: out of order, malformed."""
    accumulators = {table_id: lthash.Accumulator() for table_id in SCHEMAS}
    pending: dict[int, tuple[list[bytes], list[bytes]]] = {table_id: ([], []) for table_id in SCHEMAS}
    previous, keys = b"", 0
    schema, key_bytes, table_id = None, 0, 0
    for storage_key, stored in entries:
        if storage_key <= previous:
            raise StoreCorrupt(f"storage key {storage_key.hex()} does not ascend")
        previous = storage_key
        if schema is None or len(storage_key) != key_bytes or storage_key[2] != table_id:
            schema = schema_of_storage_key(storage_key)
            key_bytes, table_id = len(storage_key), schema.table_id
            table_keys, values = pending[table_id]
            middle, stop = 3 + schema.short_at, 1 + schema.route_bytes - schema.short_at
        if storage_key[0] << 8 | storage_key[1] != storage_key[3] << 4 | storage_key[4] >> 4:
            schema_of_storage_key(storage_key)  # raises: nobody would look for the key in this group
        if schema.is_short and len(stored) >= stop and stored[0] == 1:
            # `Schema.items`, for the one layout that all but a few entries have.
            table_keys.append(storage_key[3:middle] + stored[1:stop] + storage_key[middle:])
            values.append(stored[stop:])
        else:
            for key, value in schema.items(storage_key, stored):
                table_keys.append(key)
                values.append(value)
        if len(table_keys) >= _AUDIT_CHUNK:
            keys += _drain(accumulators, table_id, table_keys, values)
    for last_id, (table_keys, values) in pending.items():
        if table_keys:
            keys += _drain(accumulators, last_id, table_keys, values)
    return Audited(vectors={table_id: one.vector() for table_id, one in accumulators.items()}, keys=keys)


def _drain(accumulators: dict[int, lthash.Accumulator], table_id: int, keys: list[bytes], values: list[bytes]) -> int:
    count = len(keys)
    accumulators[table_id].add(lthash.elements(table_id, keys, values))
    keys.clear()
    values.clear()
    return count


def combine(partials: Iterable[Audited]) -> Audited:
    """The sum over disjoint parts."""
    accumulators = {table_id: lthash.Accumulator() for table_id in EMPTY_VECTORS}
    keys = 0
    for partial in partials:
        keys += partial.keys
        for table_id, vector in partial.vectors.items():
            accumulators[table_id].combine(vector)
    return Audited(vectors={table_id: one.vector() for table_id, one in accumulators.items()}, keys=keys)


def check_audit(found: Audited, tip: Tip) -> None:
    """Raises AuditFailed unless the content sums up to the vectors of the position."""
    for table_id, vector in tip.vectors.items():
        if found.vectors[table_id] != vector:
            raise AuditFailed(
                f"table {SCHEMAS[table_id].name} does not hold what its vector says: the content's root is "
                f"{lthash.table_root(found.vectors[table_id]).hex()}, the position's "
                f"{lthash.table_root(vector).hex()}",
                where=f"{found.keys} keys at block {tip.ref}",
                way_out="restore this data directory from a snapshot",
            )
