"""The verifier: hashes every key that a store holds, on all cores, and says whether it is what the position claims.

A live store is checkpointed first, by hard links; helper processes each audit a run of key groups of the copy; their
partials sum up to the vectors in the copy's own position, or the store does not hold what it says. From then on the
store is **proven**: since the copy was made, every step was checked by its own root. Stores of several shards are
audited side by side, with no more helper processes at once than there are cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import failpoints
from pipeline.errors import AuditFailed, NotFound
from pipeline.position import Meta, decode_meta
from pipeline.shards import groups_of
from pipeline.state import KEY_GROUPS, SCHEMAS, SCHEMAS_BY_NAME
from pipeline.stores.base import META_KEY, PROOF_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Audited, Proof, audit, check_audit, combine, encode_proof
from topology import children
from topology.children import Report, no_report

COPY_FOLDER = "proving"
_REPORT_ENTRIES = 1 << 16
_GROUP_BYTES = 2
_KEYS_A_HELPER = 100_000
"""Hashed in the time that another helper process takes to start: half a second."""
_CORES = os.cpu_count() or 1


def group_ranges(workers: int, groups: range) -> list[tuple[int, int]]:
    """All key groups in as many contiguous runs, start and stop, cut where they share ``groups`` evenly."""
    cuts = [groups.start + len(groups) * at // workers for at in range(1, workers)]
    return list(itertools.pairwise([0, *cuts, KEY_GROUPS]))


async def audit_store(path: Path, *, groups: range, workers: int = _CORES, report: Report = no_report) -> Audited:
    """Hash all of a store that nobody writes to. ``groups``: where its keys are. ``workers``: processes.

    Raises StoreCorrupt if the store cannot be read, or is malformed.
    """
    done: dict[int, int] = {}

    async def run(start: int, stop: int) -> Audited:
        def note(what: str, entries: int, _: int) -> None:
            done[start] = entries
            report(what, sum(done.values()), 0)

        return _decode(await children.run_in_turn(__spec__.name, [str(path), str(start), str(stop)], note))

    return combine(await children.together(run(*one) for one in group_ranges(workers, groups)))


async def audit_position(path: Path, *, workers: int | None = None, report: Report = no_report) -> tuple[Meta, Audited]:
    """`audit_store`, compared with the store's own position. ``workers`` None: its share of the cores, or fewer where
    they would only start.

    Raises AuditFailed, StoreCorrupt, NotFound.
    """
    store = RocksStore(path, read_only=True)
    try:
        data = store.get_meta(META_KEY)
    finally:
        store.close()
    if data is None:
        raise NotFound("the store has no position yet", where=str(path))
    meta = decode_meta(data)
    groups, keys = groups_of(meta.shard, meta.shards), sum(meta.tip.counts.values())
    workers = workers or min(-(-_CORES // meta.shards), 1 + keys // _KEYS_A_HELPER)
    found = await audit_store(path, groups=groups, workers=workers, report=report)
    check_audit(found, meta.tip)
    if found.keys != keys:
        raise AuditFailed(
            f"the store holds {found.keys} keys, its position says {keys}",
            where=f"block {meta.tip.ref}",
            way_out="restore this data directory from a snapshot",
        )
    return meta, found


async def prove(
    store: RocksStore, data_dir: Path, *, workers: int | None = None, report: Report = no_report
) -> tuple[Proof, Audited]:
    """Audit an open store, which may go on meanwhile, and write down that it is proven.

    Raises AuditFailed. Cancelled or failed, it leaves nothing behind; a copy that a crash left is removed first.
    """
    copy = data_dir / COPY_FOLDER
    async with children.alone_in(copy):
        shutil.rmtree(copy, ignore_errors=True)
        try:
            store.checkpoint(copy)
            meta, found = await audit_position(copy, workers=workers, report=report)
            failpoints.hit("prove.hashed")
            proof = Proof(proven=True, at=meta.tip.ref, root=meta.tip.root)
            store.write(Batch(meta={PROOF_KEY: encode_proof(proof)}))
            return proof, found
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _audit_range(path: Path, start: int, stop: int, report: Report) -> Audited:
    store = RocksStore(path, read_only=True)
    try:
        until = None if stop == KEY_GROUPS else stop.to_bytes(_GROUP_BYTES, "big")
        found = audit(_counted(store.scan(start.to_bytes(_GROUP_BYTES, "big"), until), report))
    finally:
        store.close()
    failpoints.hit("prove.range_hashed")
    return found


def _counted(entries: Iterable[tuple[bytes, bytes]], report: Report) -> Iterator[tuple[bytes, bytes]]:
    for count, entry in enumerate(entries, 1):
        yield entry
        if count % _REPORT_ENTRIES == 0:
            report("hashed", count, 0)


def _encode(audited: Audited) -> dict[str, Any]:
    vectors = {SCHEMAS[table_id].name: vector.hex() for table_id, vector in audited.vectors.items()}
    return {"keys": audited.keys, "vectors": vectors}


def _decode(fields: dict[str, Any]) -> Audited:
    vectors = {SCHEMAS_BY_NAME[name].table_id: bytes.fromhex(vector) for name, vector in fields["vectors"].items()}
    return Audited(vectors=vectors, keys=fields["keys"])


def main() -> int:
    """One helper process: audit a run of key groups."""
    parser = argparse.ArgumentParser(prog="python -m topology.verifier", description=main.__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int)
    given = parser.parse_args()
    return children.serve(lambda report: _encode(_audit_range(given.store, given.start, given.stop, report)))


if __name__ == "__main__":
    sys.exit(main())
