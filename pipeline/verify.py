"""Checks: does a frame follow from a position, does a store hold what its vectors say.

`follows` is the links' part of a replica's rule. `audit` hashes a whole store, key by key: it is what turns *claimed*
into *proven*, and what finds a bit that rotted in a value nobody touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from operator import lt
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
    remaining, previous, count = iter(entries), b"", 0
    while chunk := list(islice(remaining, _AUDIT_CHUNK)):
        storage_keys, stored = zip(*chunk, strict=True)
        if not all(map(lt, (previous, *storage_keys), storage_keys)):
            key = next(key for before, key in pairwise((previous, *storage_keys)) if before >= key)
            raise StoreCorrupt(f"storage key {key.hex()} does not ascend")
        previous = storage_keys[-1]
        for table_id, keys, values in _items(storage_keys, stored):
            accumulators[table_id].add(lthash.elements(table_id, keys, values))
            count += len(keys)
    return Audited(vectors={table_id: one.vector() for table_id, one in accumulators.items()}, keys=count)


def _items(
    storage_keys: Sequence[bytes], stored: Sequence[bytes]
) -> Iterator[tuple[int, Sequence[bytes], Sequence[bytes]]]:
    """Table ids with whole keys and values, together all that a run of entries holds. Raises StoreCorrupt."""
    first = schema_of_storage_key(storage_keys[0])
    plain = first.plain_items(storage_keys, stored)
    if plain is not None:
        yield first.table_id, *plain
        return
    found: dict[int, list[tuple[bytes, bytes]]] = {}
    for storage_key, held in zip(storage_keys, stored, strict=True):
        schema = schema_of_storage_key(storage_key)  # raises: nobody would look for the key in another group
        found.setdefault(schema.table_id, []).extend(schema.items(storage_key, held))
    for table_id, items in found.items():
        keys, values = zip(*items, strict=True)
        yield table_id, keys, values


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
