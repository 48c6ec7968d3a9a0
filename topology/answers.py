"""Long answers about an open store, given by a worker or by a command that owns the store: prove, verify, snapshot.

All of them work on a checkpoint and in processes of their own, so that whoever holds the store goes on meanwhile.
"""

from __future__ import annotations

import time
from typing import Any

from pipeline.errors import AuditFailed, StoreCorrupt
from pipeline.objects import open_objects
from pipeline.replica import Replica
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Audited, Proof
from topology import reads, snapshotter, verifier
from topology.archiver import Archiver
from topology.data_dir import DataDir
from topology.node import Role


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
    return {
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
