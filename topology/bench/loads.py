"""What benchmarks run on: real blocks on their base coins, and made-up blocks of a size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import frame
from pipeline.apply import apply_block
from pipeline.block import Block, BlockRef, Connect, SourceEpoch, SourceStamp, decode_event, encode_event
from pipeline.diff import EMPTY_COUNTS, EMPTY_VECTORS, Diff
from pipeline.generation import FINALITY_DEFAULT, Generation, Opening, encode_opening
from pipeline.position import Meta
from pipeline.primary import Primary, Proposal, Reading, epoch_frame
from pipeline.replica import Replica
from pipeline.seal import Sealer, seal_at_once
from pipeline.sources import synthetic
from pipeline.sources.bitcoin import parse_block, parse_header
from pipeline.sources.bitcoin_files import read_base_coins, read_blocks
from pipeline.state import UTXO
from pipeline.stores.base import Batch, Store
from pipeline.table_diff import TableDiff

DATA = Path(__file__).parents[2] / "tests/data/bitcoin"
"""Where the real blocks are in a checkout."""
WITHOUT_DATA = "The real blocks were not found (--data names their folder): only synthetic rows were run."
CHAIN = "bench"

_REAL = {367_891: ("mainnet_block_367891", "raw.zst"), 300_025: ("block300025_undo", "block300025.raw")}
_COINS = "snapshot_before.jsonl.gz"
_WRITER = bytes(15) + b"\x01"
_GENERATION = bytes(15) + b"\x02"
_STAMP = SourceStamp(chain_id=CHAIN, generation=_GENERATION, epoch=1, writer=_WRITER)
_COINS_PER_BATCH = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RealBlock:
    """A block of Bitcoin's main chain, and where the coins that it spends stand in a file."""

    block: Block
    coins_path: Path

    @property
    def base(self) -> BlockRef:
        return BlockRef(self.block.ref.height - 1, self.block.parent_hash)


def real_block(height: int, data: Path) -> RealBlock | None:
    """367,891 or 300,025; None where its files are not."""
    folder, file = _REAL[height]
    path = data / folder / file
    if not path.exists():
        return None
    (raw,) = read_blocks(path)
    assert parse_header(raw.data), height
    return RealBlock(block=parse_block(raw.data, height), coins_path=data / folder / _COINS)


def synthetic_blocks(count: int, changes: int) -> Iterator[Block]:
    return synthetic.blocks(count, changes=changes, seed=1)


def event_of(block: Block, walk: int) -> bytes:
    return encode_event(Connect(stamp=_STAMP, walk=walk, block=block))


def source_epoch() -> SourceEpoch:
    """What precedes the first event."""
    return SourceEpoch(stamp=_STAMP, resume_walk=1)


def open_replica(
    store: Store, real: RealBlock | None = None, *, archives: bool = False, finality: int = FINALITY_DEFAULT
) -> Replica:
    """A replica on an empty store, at a real block's base coins or before the first block, with its writer in
    force."""
    generation = Generation(generation=_GENERATION, chain_id=CHAIN)
    if real is not None:
        base = _put_coins(store, real.coins_path)
        generation = Generation(
            generation=_GENERATION,
            chain_id=CHAIN,
            base=real.base,
            base_vectors=base.advance(EMPTY_VECTORS),
            base_counts=base.count(EMPTY_COUNTS),
        )
    opening = Opening(generation=generation, finality=finality)
    replica = Replica(store, _meta(opening), archives=archives)
    replica.step(epoch_frame(replica.meta, _WRITER), 1)
    replica.commit()
    return replica


class ReadBack:
    """A primary whose frames are read back as soon as they are made, an event a commit, with no broker in between.
    Where events stand on the blocks topic does not matter."""

    def __init__(self, replica: Replica, *, sealer: Sealer = seal_at_once) -> None:
        self._replica = replica
        self._primary = Primary(replica, sealer=sealer)
        self._reading = Reading(first=0, last=0, digest=frame.NO_HASH, previous_digest=frame.NO_HASH)
        self._offset = replica.meta.diffs.next_offset
        self._primary.propose(source_epoch(), self._reading)

    def commit(self, event: bytes) -> Proposal:
        """The frame of an event that connects a block."""
        (proposal,) = self._primary.propose(decode_event(event), self._reading)
        for record in proposal.records:
            self._primary.follow(record, self._offset)
            self._offset += 1
        self._replica.commit()
        return proposal


def _meta(opening: Opening) -> Meta:
    return opening.meta(offset=0, digest=frame.digest_of(encode_opening(opening)))


def _put_coins(store: Store, path: Path) -> Diff:
    pairs = sorted(read_base_coins(path))
    keys, values = [key for key, _ in pairs], [value for _, value in pairs]
    state: dict[bytes, bytes | None] = {}
    for at, key, value in zip(UTXO.storage_keys(keys), keys, values, strict=True):
        state[at] = UTXO.with_value(key, state.get(at), value)
    items = list(state.items())
    for start in range(0, len(items), _COINS_PER_BATCH):
        store.write(Batch(state=dict(items[start : start + _COINS_PER_BATCH])))
    return Diff(tables={UTXO.table_id: created(keys, values)})


def created(keys: list[bytes], values: list[bytes]) -> TableDiff:
    """Coins that come into being, ascending."""
    return TableDiff(
        schema=UTXO,
        created_keys=keys,
        created_values=values,
        updated_keys=[],
        updated_befores=[],
        updated_afters=[],
        deleted_keys=[],
        deleted_befores=[],
    )


def net(block: Block, store: Store) -> tuple[TableDiff, dict[bytes, bytes | None]]:
    """What a block changes in the `utxo` table, and what that makes of stored bytes."""
    applied = apply_block(block, store.get)
    return applied.diff.tables[UTXO.table_id], dict(applied.effect.writes)
