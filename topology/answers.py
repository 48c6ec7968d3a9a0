"""Answers that take more than a look into the store: where a worker stands, prove, verify, snapshot.

The long ones work on a checkpoint and in processes of their own, so that whoever holds the store goes on meanwhile.
"""

from __future__ import annotations

import time
from typing import Any

from pipeline.errors import AuditFailed, StateferryError, StoreCorrupt
from pipeline.objects import open_objects
from pipeline.replica import Replica
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Audited, Proof
from topology import lag, logs, reads, snapshotter, verifier
from topology.archiver import Archiver
from topology.data_dir import DataDir
from topology.lag import Stand
from topology.lead import State
from topology.node import Node, Role
from topology.transports.base import Broker

log = logs.get()


async def status(node: Node) -> dict[str, Any]:
    """Where a worker stands, and how far behind the log: ``shards`` has an entry for each that it holds."""
    return reads.status(node.committed_meta, node.proof) | {
        "running": True,
        "role": node.role.value,
        "state": node.state.value,
        "instance": node.data_dir.node_id,
        "void_records": dict(node.voids),
        "in_flight": node.in_flight,
        "shards": [await _shard(node)],
    }


async def _shard(node: Node) -> dict[str, Any]:
    meta, generation = node.committed_meta, node.generation
    stands = {"diffs": lag.diffs_stand(meta, generation.diffs_topic, 0)}
    if node.role is Role.PRIMARY:
        stands["blocks"] = lag.blocks_stand(meta, generation.blocks_topic, 0)
    return (
        reads.shard(meta)
        | {
            "owner": node.data_dir.node_id,
            "state": node.state.value,
            "in_force": node.state is State.LEADING,
            "void_records": dict(node.voids),
            "refused": None if node.lead is None or node.lead.refused is None else str(node.lead.refused),
            "frames_in_flight": node.in_flight,
            "buffers": {name: held._asdict() for name, held in node.buffers.items()},
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


async def verify(store: RocksStore, data_dir: DataDir) -> dict[str, Any]:
    """`prove`, as a document."""
    started_s = time.monotonic()
    proof, audited = await prove(store, data_dir)
    meta, _ = _position(store)
    return reads.position(meta, proof) | {
        "verified": True,
        "verified_height": -1 if proof.at is None else proof.at.height,
        "verified_root": proof.root.hex(),
        "keys": audited.keys,
        "seconds": round(time.monotonic() - started_s, 3),
    }


async def snapshot(store: RocksStore, data_dir: DataDir, objects_url: str, height: int | None) -> dict[str, Any]:
    """Publish a snapshot, as a document."""
    started_s = time.monotonic()
    manifest = await snapshotter.snapshot_in_process(store, data_dir.path, objects_url, height=height)
    document = {
        "chain": manifest.chain_id,
        "generation": manifest.generation.hex(),
        "height": manifest.height,
        "block_hash": manifest.tip.block_hash[::-1].hex(),
        "root": manifest.root.hex(),
        "keys": manifest.keys,
        "parts": len(manifest.parts),
        "bytes": manifest.size_bytes,
        "manifest": manifest.name,
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
    view = reads.View.of(store)
    if view.role != Role.PRIMARY.value:
        return
    replica = Replica(store, view.meta, archives=True)
    archiver = Archiver(open_objects(objects_url))
    while archiver.advance(replica, proven=view.proof.proven, flush=True):
        replica.commit()


def _position(store: RocksStore) -> tuple[Any, Proof]:
    view = reads.View.of(store)
    return view.meta, view.proof
