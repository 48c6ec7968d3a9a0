"""What a store answers: its position, single keys, scans, roots. The same for a worker and for a command without one.

Every answer carries the position it was read at. Reads of a claimed state are refused unless they were allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.anchors import Joined
from pipeline.apply import describe_key
from pipeline.commitment.muhash import MuHash
from pipeline.errors import NotFound, NotProven, UsageError
from pipeline.position import Meta
from pipeline.shards import join_metas, stand_together
from pipeline.sources import coins
from pipeline.state import SCHEMAS, UTXO, Schema, schema_of_storage_key
from pipeline.verify import Proof

_MUHASH_BATCH = 4096


class Readable(Protocol):
    """What reads need of a store, or of several."""

    def get(self, storage_keys: list[bytes]) -> list[bytes | None]: ...

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A store and the position it stands at."""

    store: Readable
    meta: Meta
    proof: Proof
    role: str  # as which it was run last; empty: never


def check_serving(proof: Proof, serve: str) -> None:
    """Raises NotProven if the state is claimed and reads of claimed states are not allowed."""
    if not proof.proven and serve != "claimed":
        raise NotProven(
            "this node has not proven its state yet: it is claimed by whoever published it",
            way_out="wait for the worker to prove it, run `stateferry verify --level full`, or allow --serve claimed",
        )


def position(meta: Meta, proof: Proof) -> dict[str, Any]:
    """The part of every answer that says what it is about."""
    tip = meta.tip
    return {
        "chain": meta.chain_id,
        "generation": meta.generation.hex(),
        "height": tip.height,
        "block_hash": tip.block_hash[::-1].hex(),
        "root": tip.root.hex(),
        "proof": "proven" if proof.proven else "claimed",
    }


def status(meta: Meta, proof: Proof) -> dict[str, Any]:
    """A node's whole position."""
    return position(meta, proof) | {
        "proven": proof.proven,
        "walk": meta.walk,
        "epoch": meta.epoch,
        "writer": meta.writer.hex(),
        "seq": meta.seq,
        "frame_id": meta.frame_id.hex(),
        "finality": meta.finality,
        "final_height": meta.final_height,
        "journal_first_height": meta.journal_first_height,
        "archived_to": meta.archived_to,
        "offsets": {"blocks": meta.blocks.next_offset, "diffs": meta.diffs.next_offset},
        "keys": sum(meta.tip.counts.values()),
        "coins": meta.tip.counts.get(UTXO.table_id, 0),
        "tables": {SCHEMAS[table_id].name: count for table_id, count in sorted(meta.tip.counts.items())},
    }


def standing(metas: Sequence[Meta], proof: Proof, anchored: Joined | None = None) -> dict[str, Any]:
    """`status` of all shards that are here. If they are not all, or do not stand at one block, ``anchored`` is what
    shards said of themselves last; without it, the shard that is furthest behind says where, and there is no root."""
    lowest = min(metas, key=lambda meta: meta.seq)
    if len(metas) == lowest.shards and stand_together(metas):
        return status(join_metas(metas), proof)
    if anchored is not None:
        meta = replace(lowest, tip=anchored.tip, walk=anchored.walk, seq=anchored.tip.seq)
        return status(meta, Proof(proven=False)) | {"position_of": "anchors"}
    return status(lowest, proof) | {"root": None, "position_of": f"shard {lowest.shard}"}


def shard(meta: Meta) -> dict[str, Any]:
    """One shard's position, in a list of them."""
    tip = meta.tip
    return {
        "shard": meta.shard,
        "shards": meta.shards,
        "height": tip.height,
        "block_hash": tip.block_hash[::-1].hex(),
        "root": tip.root.hex(),
        "seq": meta.seq,
        "walk": meta.walk,
        "epoch": meta.epoch,
        "writer": meta.writer.hex(),
    }


def parse_key(schema: Schema, text: str) -> bytes:
    """A key as people write it: `txid:index` for a coin, hex of the whole key for any. Raises UsageError."""
    try:
        if schema is UTXO and ":" in text:
            txid, _, index = text.partition(":")
            key = bytes.fromhex(txid)[::-1] + int(index).to_bytes(4, "big")
        else:
            key = bytes.fromhex(text)
        if len(key) != schema.key_bytes:
            raise ValueError(f"a key of table {schema.name} has {schema.key_bytes} bytes, not {len(key)}")
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{text!r} is no key of table {schema.name}: {error}", way_out="write txid:index") from error
    return key


def show(schema: Schema, key: bytes, value: bytes) -> dict[str, Any]:
    """One key and its value, as people and programs read them."""
    shown: dict[str, Any] = {"key": describe_key(schema, key), "value": value.hex()}
    if schema is UTXO:
        coin = coins.decode(value)
        shown |= {
            "coin": {
                "height": coin.height,
                "coinbase": coin.is_coinbase,
                "amount_sat": coin.amount_sat,
                "script": coin.script.hex(),
            }
        }
    return shown


def get(store: Readable, schema: Schema, texts: list[str]) -> list[dict[str, Any]]:
    """Point reads, one multi-get. Raises NotFound, naming the first key that is not there."""
    keys = [parse_key(schema, text) for text in texts]
    values = schema.find_all(keys, store.get(schema.storage_keys(keys)))
    found = []
    for text, key, value in zip(texts, keys, values, strict=True):
        if value is None:
            raise NotFound(f"there is no {schema.name} {text} in this state")
        found.append(show(schema, key, value))
    return found


def scan(store: Readable, schema: Schema, *, prefix: bytes, after: bytes | None) -> Iterator[tuple[bytes, bytes]]:
    """(whole key, value) pairs in storage order, of the keys that begin with ``prefix`` (in hashing order), behind
    the key ``after``. The state as it was when the scan began."""
    start, passing = b"", after is None
    if after is not None:
        (start,) = schema.storage_keys([after])
    elif len(prefix) >= 2:
        group = (prefix[0] << 4) | (prefix[1] >> 4)
        start = group.to_bytes(2, "big") + bytes([schema.table_id]) + prefix[: schema.short_at]
    for storage_key, stored in store.scan(start):
        if len(prefix) >= 2 and storage_key[:2] > ((prefix[0] << 4) | (prefix[1] >> 4)).to_bytes(2, "big"):
            return
        if storage_key[2] != schema.table_id:
            continue
        for key, value in schema.items(storage_key, stored):
            if not passing:
                # Only entries of the one bucket that `after` stands in can still be behind us.
                if storage_key == start and key <= (after or b""):
                    continue
                passing = storage_key > start or key > (after or b"")
            if key.startswith(prefix):
                yield key, value


def muhash(store: Readable) -> str:
    """MuHash3072 of all coins, as Bitcoin Core prints it. Raises StoreCorrupt, CoinsCorrupt."""
    total, batch = MuHash(), []
    for storage_key, stored in store.scan():
        if schema_of_storage_key(storage_key) is not UTXO:
            continue
        for key, value in UTXO.items(storage_key, stored):
            batch.append(coins.element(key, value))
        if len(batch) >= _MUHASH_BATCH:
            total.insert_all(batch)
            batch.clear()
    total.insert_all(batch)
    return total.digest()[::-1].hex()
