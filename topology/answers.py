"""Answers that take more than a look into the store: where a worker stands, prove, verify, snapshot.

The long ones work on a checkpoint and in processes of their own, so that whoever holds the store goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pipeline.commitment.lthash import state_root
from pipeline.errors import AuditFailed, StateferryError, StoreCorrupt
from pipeline.objects import open_objects
from pipeline.replica import Replica
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Audited, Proof, combine
from topology import anchors, buffers, children, lag, logs, reads, snapshotter, verifier, views
from topology.archiver import Archiver
from topology.data_dir import DataDir
from topology.lag import Stand
from topology.lead import State
from topology.node import Node
from topology.settings import Settings
from topology.shard_set import ShardSet
from topology.shard_store import Role
from topology.transports.base import Broker

log = logs.get()


async def status(shard_set: ShardSet) -> dict[str, Any]:
    """Where a worker stands, and how far behind the log: ``shards`` has an entry for each that it holds."""
    nodes = shard_set.nodes
    return await standing(shard_set) | {
        "running": True,
        "role": shard_set.role.value,
        "state": _state(shard_set),
        "instance": shard_set.data_dir.node_id,
        "in_flight": sum(node.in_flight for node in nodes),
        "splits": shard_set.splitting is not None and shard_set.splitting.is_running,
        "shards": list(await asyncio.gather(*(_shard(shard_set, node) for node in shard_set.owned or nodes))),
    }


async def standing(shard_set: ShardSet) -> dict[str, Any]:
    """The position of all shards, by what this worker holds of them, or else by what all of them say."""
    owned = shard_set.owned or shard_set.nodes
    document = reads.standing([node.committed_meta for node in owned], shard_set.proof)
    if document.get("root") is None:
        with suppress(StateferryError):
            anchored = await anchors.newest(shard_set.broker, shard_set.generation)
            document = reads.standing([node.committed_meta for node in owned], shard_set.proof, anchored)
    return document | {"void_records": dict(sum((node.following.voids for node in shard_set.nodes), Counter()))}


def _state(shard_set: ShardSet) -> str:
    """Of the shard that is furthest from leading."""
    order = [State.FOLLOWING, State.CLAIMING, State.LEADING]
    return min((node.state for node in shard_set.owned or shard_set.nodes), key=order.index).value


async def _shard(shard_set: ShardSet, node: Node) -> dict[str, Any]:
    meta, generation = node.committed_meta, node.generation
    trouble = shard_set.archiving[node.shard].trouble if shard_set.archiving else None
    stands = {"diffs": lag.diffs_stand(meta, generation.diffs_topic, node.shard)}
    if node.role is Role.PRIMARY:
        stands["blocks"] = lag.blocks_stand(meta, generation.events_topic, node.shard)
    return (
        reads.shard(meta)
        | {
            "owner": node.data_dir.node_id if node.is_owned else None,
            "state": node.state.value,
            "restoring": node.is_restoring,
            "in_force": node.state is State.LEADING,
            "void_records": dict(node.following.voids),
            "refused": None if node.lead is None or node.lead.refused is None else str(node.lead.refused),
            "archive_trouble": None if trouble is None else str(trouble),
            "frames_in_flight": node.in_flight,
            "prefetching": shard_set.prefetching[node.shard].status if shard_set.prefetching else None,
            "buffers": {name: held._asdict() for name, held in buffers.held_by(node).items()},
        }
        | await behind(node.broker, stands, node.settings.topic_prefix)
    )


async def behind(broker: Broker, stands: dict[str, Stand], topic_prefix: str) -> dict[str, Any]:
    """How far behind its topics a shard is. ``lag``: of what it applies, the first of ``stands`` that there is of
    blocks and diffs; None, with ``lag_unknown`` saying why, if the broker does not say it in time."""
    try:
        found = {name: await lag.measure(broker, stand, now_s=time.time()) for name, stand in stands.items()}
    except TimeoutError:
        return {"lag": None, "lag_unknown": f"the broker did not answer within {lag.ANSWER_S:.0f} s", "topics": {}}
    except StateferryError as error:
        return {"lag": None, "lag_unknown": str(error), "topics": {}}
    applied = found.get("blocks") or found["diffs"]
    return {
        "lag": {"blocks": applied.blocks, "seconds": round(applied.seconds, 3)},
        "topics": {
            name: {
                "topic": topic_prefix + stands[name].topic,
                "partition": stands[name].partition,
                "next_offset": stands[name].next_offset,
                "end_offset": one.end_offset,
                "records_behind": one.records,
                "blocks_behind": one.blocks,
                "seconds_behind": round(one.seconds, 3),
                "epoch": one.epoch,
                "writer": one.writer.hex(),
            }
            for name, one in found.items()
        },
    }


async def prove(store: RocksStore, data_dir: DataDir) -> tuple[Proof, Audited]:
    """Hash every key, write the proof down. A state that is not what its position says is put in quarantine.

    Raises AuditFailed, StoreCorrupt.
    """
    try:
        return await verifier.prove(store, data_dir.path)
    except (AuditFailed, StoreCorrupt) as error:
        data_dir.quarantine(error, b"", **reads.status(*_position(store)))
        raise


async def verify(stores: Sequence[tuple[RocksStore, DataDir]]) -> dict[str, Any]:
    """`prove` of every shard's store, as a document."""
    started_s = time.monotonic()
    proven = await children.together(prove(store, data_dir) for store, data_dir in stores)
    proofs, audits = [proof for proof, _ in proven], [audited for _, audited in proven]
    metas = [views.view_of(store).meta for store, _ in stores]
    heights = [-1 if proof.at is None else proof.at.height for proof in proofs]
    root = state_root(combine(audits).vectors).hex() if len({proof.at for proof in proofs}) == 1 else None
    found = reads.standing(metas, Proof(proven=True))
    return {name: found[name] for name in ("chain", "generation", "height", "block_hash", "root", "proof")} | {
        "verified": True,
        "verified_height": min(heights),
        "verified_root": root,
        "keys": sum(audited.keys for audited in audits),
        "seconds": round(time.monotonic() - started_s, 3),
    }


async def snapshot(
    stores: Sequence[RocksStore], data_dir: DataDir, settings: Settings, height: int | None
) -> dict[str, Any]:
    """Publish a snapshot of all shards, as a document."""
    started_s = time.monotonic()
    manifest = await snapshotter.snapshot_in_process(
        stores, data_dir.path, settings.objects_url, height=height, sign_key_file=settings.sign_key_file
    )
    document = {
        "chain": manifest.chain_id,
        "generation": manifest.generation.hex(),
        "height": manifest.height,
        "block_hash": manifest.tip.block_hash[::-1].hex(),
        "root": manifest.root.hex(),
        "keys": manifest.keys,
        "shards": manifest.shards,
        "parts": len(manifest.parts),
        "bytes": manifest.size_bytes,
        "manifest": manifest.name,
        "signer": None if manifest.signature is None else manifest.signature.signer.hex(),
        "seconds": round(time.monotonic() - started_s, 3),
    }
    log.info(
        "snapshot_taken",
        height=manifest.height,
        manifest=manifest.name,
        parts=len(manifest.parts),
        bytes=manifest.size_bytes,
        seconds=document["seconds"],
    )
    return document


def flush_archive(store: RocksStore, objects_url: str) -> None:
    """Archive all final blocks of a store that was a primary's last: what a running one does for itself."""
    view = views.view_of(store)
    if view.role != Role.PRIMARY.value:
        return
    replica = Replica(store, view.meta, archives=True)
    archiver = Archiver(open_objects(objects_url))
    while archiver.advance(replica, proven=view.proof.proven, flush=True):
        replica.commit()


def _position(store: RocksStore) -> tuple[Any, Proof]:
    view = views.view_of(store)
    return view.meta, view.proof
