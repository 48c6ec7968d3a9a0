"""Shards: a state cut into contiguous runs of key groups, each with a primary of its own, and put together again.

A generation fixes how many shards it has: a power of two, so that a shard's run of key groups is given by the leading
bits of a key's route. Every block goes to every shard, with the ops of its keys, often none. A shard emits one frame
for a block put on and one for a block taken off, whatever it holds of it: **equal seqs are equal positions**. Shards
hold disjoint keys and vectors are sums, so the vectors of all shards at one seq add up to those of a run with one
shard, and so do the counts; the root follows from them by the same formula. That is the *global* root: the same
whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress

from pipeline.block import Block, Op, Ops
from pipeline.commitment import lthash
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS, Vectors
from pipeline.errors import NotFound, UsageError
from pipeline.position import Meta, Tip
from pipeline.state import KEY_GROUPS, key_group

SHARDS_MAX = 64
"""Each costs a store, and a partition of two topics."""

_HAS_VALUE = bytes(code != Op.DELETE for code in range(256))
_FIRST_BYTES = 256
assert _FIRST_BYTES % SHARDS_MAX == 0, "the first byte of a key decides its shard"


def check_shards(shards: int) -> int:
    """The number itself. Raises UsageError for one that no generation can have."""
    if not 1 <= shards <= SHARDS_MAX or shards & (shards - 1):
        raise UsageError(
            f"a generation cannot have {shards} shards", way_out=f"choose a power of two from 1 to {SHARDS_MAX}"
        )
    return shards


def groups_of(shard: int, shards: int) -> range:
    """The key groups of a shard."""
    size = KEY_GROUPS // shards
    return range(shard * size, (shard + 1) * size)


def before_group(group: int) -> bytes:
    """Where the storage keys of a group begin; empty: of the first, and behind the last."""
    return group.to_bytes(2, "big") if 0 < group < KEY_GROUPS else b""


def shard_of(storage_key: bytes, shards: int) -> int:
    """The shard that a storage key belongs to."""
    return key_group(storage_key) * shards // KEY_GROUPS


def split_block(block: Block, shards: int) -> list[Block]:
    """What each shard gets of a block: the block, with the ops of that shard's keys in their order."""
    split = {name: _split_ops(ops, shards) for name, ops in block.tables.items()}
    return [
        replace(block, tables={name: parts[shard] for name, parts in split.items() if parts[shard].codes})
        for shard in range(shards)
    ]


def _split_ops(ops: Ops, shards: int) -> list[Ops]:
    # Every key begins with its route, and shards are powers of two: the first byte says it all.
    of_byte = bytes(byte * shards // _FIRST_BYTES for byte in range(_FIRST_BYTES))
    places = bytes([key[0] for key in ops.keys]).translate(of_byte)
    value_places = bytes(compress(places, ops.codes.translate(_HAS_VALUE)))
    parts = []
    for shard in range(shards):
        is_here = bytes(place == shard for place in range(_FIRST_BYTES))
        chosen = places.translate(is_here)
        parts.append(
            Ops(
                codes=bytes(compress(ops.codes, chosen)),
                keys=list(compress(ops.keys, chosen)),
                values=list(compress(ops.values, value_places.translate(is_here))),
            )
        )
    return parts


def sum_vectors(parts: Iterable[Vectors]) -> dict[int, bytes]:
    """The vectors of what all parts hold together, table by table."""
    sums = {table_id: lthash.Accumulator() for table_id in EMPTY_VECTORS}
    for part in parts:
        for table_id, vector in part.items():
            sums[table_id].combine(vector)
    return {table_id: one.vector() for table_id, one in sums.items()}


def join_tips(tips: Sequence[Tip]) -> Tip:
    """The tip of all shards, from those of each at one seq."""
    first = tips[0]
    if len(tips) == 1:
        return first
    assert all((tip.ref, tip.seq) == (first.ref, first.seq) for tip in tips), [(tip.ref, tip.seq) for tip in tips]
    counts = {table_id: sum(tip.counts.get(table_id, 0) for tip in tips) for table_id in EMPTY_COUNTS}
    return Tip(ref=first.ref, vectors=sum_vectors(tip.vectors for tip in tips), seq=first.seq, counts=counts)


def stand_together(metas: Sequence[Meta]) -> bool:
    """Whether these positions, one a shard, are one position: no shard is ahead of another."""
    first = metas[0]
    return all((meta.seq, meta.tip.ref) == (first.seq, first.tip.ref) for meta in metas)


def check_all_here(metas: Sequence[Meta]) -> None:
    """Raises NotFound unless there is a position for every shard."""
    if [meta.shard for meta in metas] != list(range(metas[0].shards)):
        raise NotFound(
            f"shards {[meta.shard for meta in metas]} of {metas[0].shards} are here, and not all",
            way_out="ask a replica, which holds all of them",
        )


def join_metas(metas: Sequence[Meta]) -> Meta:
    """The position of all shards, from that of each: vectors and counts summed; links, epochs and offsets are the
    first shard's. Raises NotFound unless they stand together, and are all there are."""
    first = metas[0]
    check_all_here(metas)
    if len(metas) == 1:
        return first
    if not stand_together(metas):
        stands = ", ".join(f"{meta.shard} at {meta.tip.ref}" for meta in metas)
        raise NotFound(
            f"the shards do not stand at one block: {stands}",
            way_out="run a worker until all have caught up, or ask a replica, which keeps them together",
        )
    return replace(
        first,
        tip=join_tips([meta.tip for meta in metas]),
        final_floor=min(meta.final_floor for meta in metas),
        journal_first_height=max(meta.journal_first_height for meta in metas),
        archived_to=min(meta.archived_to for meta in metas),
    )
