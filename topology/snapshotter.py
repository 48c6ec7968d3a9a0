"""The snapshotter: a node's state at a final height, published while the node goes on.

The worker makes a checkpoint of its store, by hard links, and starts this module as a process of its own. That takes
frames back in the copy until it stands at a final height, writes parts, checks that they sum up to the position, and
only then puts anything: parts first, the manifest last. Whatever ends it before, nothing is visible; the scratch
directory is removed by whoever started it, or by the next attempt.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from pipeline import failpoints
from pipeline.block import BlockRef
from pipeline.diff import EMPTY_COUNTS
from pipeline.errors import CoinsCorrupt, NotFound, UsageError
from pipeline.generation import Generation
from pipeline.objects import AlreadyThere, ObjectStore, open_objects
from pipeline.parts import PART_RAW_BYTES_MAX, WrittenPart, sum_parts, write_parts
from pipeline.position import BEFORE_FIRST_HEIGHT, Meta, decode_meta
from pipeline.replica import Replica
from pipeline.snapshot import (
    MANIFEST_FILE,
    Manifest,
    base_resume,
    decode_manifest,
    encode_manifest,
    make_manifest,
    snapshot_folder,
)
from pipeline.state import UTXO, Schema
from pipeline.stores.base import META_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from topology import children
from topology.children import Report, no_report

SCRATCH_FOLDER = "snapshotting"
_COPY = "copy"
_PARTS = "parts"
_PUTTING_THREADS = 4
_REPORT_KEYS = 1 << 16
_IMPORT_KEYS = 1 << 14


async def snapshot_in_process(
    store: RocksStore,
    data_dir: Path,
    objects_url: str,
    *,
    height: int | None = None,
    report: Report = no_report,
) -> Manifest:
    """Snapshot an open store, which goes on meanwhile, in another process. Raises as `take_snapshot` does.

    Cancelled, it ends that process and leaves nothing behind.
    """
    scratch = data_dir / SCRATCH_FOLDER
    async with children.alone_in(scratch):
        with _scratch(scratch):
            copy = scratch / _COPY
            store.checkpoint(copy)
            failpoints.hit("snapshot.checkpointed")
            arguments = ["--store", str(copy), "--scratch", str(scratch / _PARTS), "--objects", objects_url]
            if height is not None:
                arguments += ["--height", str(height)]
            name = await children.run(__spec__.name, arguments, report)
    return decode_manifest(open_objects(objects_url).get(name))


def take_snapshot(
    store_path: Path,
    scratch: Path,
    objects: ObjectStore,
    *,
    height: int | None = None,
    report: Report = no_report,
    part_raw_bytes_max: int = PART_RAW_BYTES_MAX,
) -> Manifest:
    """Snapshot a copy of a store, which is used up by it. ``height``: None for the final height, the newest there can
    be; else one that the copy's journal still reaches.

    A snapshot of the same height and root that exists is returned as it is. Raises UsageError (no such final height),
    AuditFailed (nothing is published then), DiskFull.
    """
    store = RocksStore(store_path)
    try:
        data = store.get_meta(META_KEY)
        if data is None:
            raise NotFound("the store has no position yet", where=str(store_path))
        replica = Replica(store, decode_meta(data))
        target = _target(replica.meta, height)
        existing = _existing(objects, replica, target)
        if existing is not None:
            return existing
        _roll_back(replica, target, report)
        failpoints.hit("snapshot.rolled_back")
        with _scratch(scratch):
            total = sum(replica.meta.tip.counts.values())
            written = _write(store, scratch, total, part_raw_bytes_max, report)
            return _publish(objects, written, replica.meta, report)
    finally:
        store.close()


def _target(meta: Meta, height: int | None) -> int:
    final = meta.final_height
    if meta.tip.ref is None or final == BEFORE_FIRST_HEIGHT:
        raise UsageError(
            f"no block is final yet: the tip is {meta.tip.ref}, finality {meta.finality} blocks",
            way_out=f"wait until {meta.finality} blocks stand on top of the first one",
        )
    lowest = max(meta.journal_first_height - 1, meta.base_height, 0)
    target = final if height is None else height
    if not lowest <= target <= min(final, meta.tip.height):
        raise UsageError(
            f"height {target} cannot be snapshotted: this node can go back to height {lowest}, and blocks are final up "
            f"to height {final}",
            way_out="`stateferry restore --height` reaches any archived height",
        )
    return target


def _existing(objects: ObjectStore, replica: Replica, target: int) -> Manifest | None:
    """The snapshot of that height and root, if there is one."""
    meta = replica.meta
    root = meta.tip.root if target == meta.tip.height else replica.header_at(target + 1).prev_root
    with suppress(NotFound):
        folder = snapshot_folder(meta.chain_id, meta.generation, target, root)
        return decode_manifest(objects.get(f"{folder}/{MANIFEST_FILE}"))
    return None


def _roll_back(replica: Replica, target: int, report: Report) -> None:
    """Take frames back, in the log's order, to the last time the block at ``target`` was the tip."""
    highest, frames = replica.meta.tip.height, 0
    while replica.meta.tip.height != target:
        replica.take_back()
        frames += 1
        report("frames taken back", frames, max(highest - target, frames))


def _publish(objects: ObjectStore, written: list[WrittenPart], resume: Meta, report: Report) -> Manifest:
    """Put parts that were just written, then their manifest. Raises AuditFailed before anything is put."""
    manifest = make_manifest([one.part for one in written], resume)
    _put_parts(objects, manifest, written, report)
    failpoints.hit("snapshot.before_manifest")
    try:
        objects.put_new(manifest.name, encode_manifest(manifest))
    except AlreadyThere:
        return decode_manifest(objects.get(manifest.name))
    failpoints.hit("snapshot.after_manifest")
    return manifest


def _write(store: RocksStore, folder: Path, total: int, raw_bytes_max: int, report: Report) -> list[WrittenPart]:
    written: list[WrittenPart] = []
    keys = 0
    for one in write_parts(store.scan(), folder, raw_bytes_max=raw_bytes_max):
        written.append(one)
        keys += one.part.keys
        report("keys written", keys, total)
    return written


def _put_parts(objects: ObjectStore, manifest: Manifest, written: list[WrittenPart], report: Report) -> None:
    """Put all parts, some at a time. One that is there has the same digest in its name."""

    def put(one: WrittenPart) -> int:
        with suppress(AlreadyThere):
            objects.put_file_new(manifest.part_name(one.part), one.path)
        one.path.unlink()
        failpoints.hit("snapshot.part_put")
        return one.part.size_bytes

    done = 0
    with ThreadPoolExecutor(_PUTTING_THREADS) as threads:
        for size in threads.map(put, written):
            done += size
            report("bytes put", done, manifest.size_bytes)


def publish_base(
    objects: ObjectStore,
    scratch: Path,
    generation: Generation,
    finality: int,
    coins: Iterable[tuple[bytes, bytes]],
    *,
    schema: Schema = UTXO,
    report: Report = no_report,
    part_raw_bytes_max: int = PART_RAW_BYTES_MAX,
) -> Manifest:
    """A base state, known before the first frame, as a snapshot: whole keys and values in any order.

    ``generation`` names its block (`Generation.base`) and not yet its vectors, which are computed here: take them from
    the manifest's tip. ``scratch`` must have room for the state twice. Raises CoinsCorrupt if a key comes twice.
    """
    assert generation.base is not None
    with _scratch(scratch):
        store = RocksStore(scratch / _COPY)
        try:
            _import(store, coins, schema, generation.base, report)
            parts_folder = scratch / _PARTS
            parts_folder.mkdir()
            written = _write(store, parts_folder, 0, part_raw_bytes_max, report)
        finally:
            store.close()
        found = sum_parts([one.part for one in written])
        resume = base_resume(generation, found.vectors, EMPTY_COUNTS | {schema.table_id: found.keys}, finality)
        return _publish(objects, written, resume, report)


def _import(
    store: RocksStore, coins: Iterable[tuple[bytes, bytes]], schema: Schema, base: BlockRef, report: Report
) -> None:
    """Let a store sort the coins, whatever their order."""
    iterator, keys = iter(coins), 0
    while batch := list(islice(iterator, _IMPORT_KEYS)):
        storage_keys = schema.storage_keys([key for key, _ in batch])
        held = dict(zip(storage_keys, store.get(storage_keys), strict=True))
        for at, (key, value) in zip(storage_keys, batch, strict=True):
            stored = held[at]
            if schema.find(key, stored) is not None:
                raise CoinsCorrupt(f"{schema.name} {key.hex()} comes twice in the base state of block {base}")
            held[at] = schema.with_value(key, stored, value)
        store.write(Batch(state=held))
        keys += len(batch)
        if keys % _REPORT_KEYS < _IMPORT_KEYS:
            report("keys sorted", keys, 0)


@contextmanager
def _scratch(path: Path) -> Iterator[None]:
    """A fresh directory that goes afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """The helper process: publish a snapshot of a copy of a store, and print the manifest's name."""
    parser = argparse.ArgumentParser(prog="python -m topology.snapshotter", description=main.__doc__)
    parser.add_argument("--store", type=Path, required=True, help="a copy, which is used up")
    parser.add_argument("--scratch", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--height", type=int)
    given = parser.parse_args()

    def work(report: Report) -> str:
        return take_snapshot(
            given.store,
            given.scratch,
            open_objects(given.objects),
            height=given.height,
            report=report,
        ).name

    return children.serve(work)


if __name__ == "__main__":
    sys.exit(main())
