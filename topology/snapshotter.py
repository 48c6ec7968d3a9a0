"""The snapshotter: a node's state at a final height, published while the node goes on.

The worker makes a checkpoint of its store, by hard links, and starts this module as a process of its own. That takes
frames back in the copy until it stands at a final height, writes parts, checks that they sum up to the position, and
only then puts anything: parts first, the manifest last. With several shards there is a copy of each, and they meet at
one height (`pipeline.meeting`). Whatever ends it before, nothing is visible; the scratch directory is removed by
whoever started it, or by the next attempt.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline import failpoints
from pipeline.archive_names import archive_prefix, parse_segment_name
from pipeline.errors import NotFound
from pipeline.leases import Kind
from pipeline.meeting import meeting_height, own_final
from pipeline.objects import AlreadyThere, ObjectStore, open_objects
from pipeline.parts import PART_RAW_BYTES_MAX, WrittenPart, write_parts
from pipeline.plans import SegmentObject, lead
from pipeline.position import Meta, decode_meta
from pipeline.replica import Replica
from pipeline.restore import Replay
from pipeline.shards import check_all_here, join_metas
from pipeline.signature import SigningKey
from pipeline.snapshot import (
    MANIFEST_FILE,
    Manifest,
    decode_manifest,
    encode_manifest,
    make_manifest,
    snapshot_folder,
)
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from topology import children
from topology.children import Report, no_report
from topology.fetching import open_segment
from topology.holding import CLOCK, Clock, held, wait_for_sweeps
from topology.signing import signing_key

SCRATCH_FOLDER = "snapshotting"
_COPY = "copy"
_PARTS = "parts"
_PUTTING_THREADS = 4
_NICENESS = 19
"""A snapshot has time; blocks have none."""
_LOOKS_MAX = 60
"""At what was published, before it is given up: somebody else's manifest lacks parts that nobody puts again."""
_LOOK_S = 1.0


async def snapshot_in_process(
    stores: Sequence[RocksStore],
    data_dir: Path,
    objects_url: str,
    *,
    height: int | None = None,
    sign_key_file: Path | None = None,
    report: Report = no_report,
) -> Manifest:
    """Snapshot open stores, one a shard, which go on meanwhile, in another process. Raises as `take_snapshot` does, and
    SecretUnusable.

    Cancelled, it ends that process and leaves nothing behind.
    """
    scratch = data_dir / SCRATCH_FOLDER
    async with children.alone_in(scratch):
        with scratch_folder(scratch):
            arguments = ["--scratch", str(scratch / _PARTS), "--objects", objects_url]
            for number, store in enumerate(stores):
                copy = scratch / f"{_COPY}-{number:02d}"
                store.checkpoint(copy)
                arguments += ["--store", str(copy)]
            failpoints.hit("snapshot.checkpointed")
            if height is not None:
                arguments += ["--height", str(height)]
            if sign_key_file is not None:
                arguments += ["--sign-key-file", str(sign_key_file)]
            name = await children.run(__spec__.name, arguments, report)
    return decode_manifest(open_objects(objects_url).get(name))


def take_snapshot(
    store_paths: Sequence[Path],
    scratch: Path,
    objects: ObjectStore,
    *,
    height: int | None = None,
    key: SigningKey | None = None,
    report: Report = no_report,
    part_raw_bytes_max: int = PART_RAW_BYTES_MAX,
    clock: Clock = CLOCK,
) -> Manifest:
    """Snapshot copies of stores, one a shard, which are used up by it. ``height``: None for the highest that all can be
    brought to; else one that they still reach. ``key``: to sign it with.

    A snapshot of the same height and root that exists is returned as it is, signed or not. Raises UsageError (no such
    final height), NotFound (not all shards are there), AuditFailed (nothing is published then), DiskFull.
    """
    with ExitStack() as stack:
        stores = []
        for path in store_paths:
            stores.append(RocksStore(path))
            stack.callback(stores[-1].close)
        resumes = _bring_together(stores, objects, height, report)
        failpoints.hit("snapshot.rolled_back")
        root = join_metas(resumes).tip.root
        with suppress(NotFound):
            folder = snapshot_folder(resumes[0].chain_id, resumes[0].generation, resumes[0].tip.height, root)
            published = decode_manifest(objects.get(f"{folder}/{MANIFEST_FILE}"))
            if not _lacking(objects, published):
                return published
        with scratch_folder(scratch):
            total = sum(sum(resume.tip.counts.values()) for resume in resumes)
            written = write_all((store.scan() for store in stores), scratch, total, part_raw_bytes_max, report)
            return publish(objects, written, resumes, report, key=key, clock=clock)


# To one height


def _bring_together(
    stores: Sequence[RocksStore], objects: ObjectStore, height: int | None, report: Report
) -> list[Meta]:
    """Take each store back, or forward, to one final height, and to one seq. Returns where they stand."""
    replicas = [_replica(store) for store in stores]
    metas = [replica.meta for replica in replicas]
    check_all_here(metas)
    archived = [_archived(objects, meta) if len(metas) > 1 else [] for meta in metas]
    reaches = [lead(one, _start(meta, one), None)[1] for one, meta in zip(archived, metas, strict=True)]
    target = meeting_height(metas, reaches, height)
    for replica in replicas:
        _roll_back(replica, target, report)
    for at, replica in enumerate(replicas):
        if replica.meta.tip.height != target:
            replicas[at] = _roll_forward(replica, objects, archived[at], target, report)
    lowest = min(replica.meta.seq for replica in replicas)
    for replica, meta in zip(replicas, metas, strict=True):
        # One may have been copied between frames that took blocks off, down to the final one.
        while replica.meta.seq > lowest and own_final(meta) >= target:
            replica.take_back()
    return [replica.meta for replica in replicas]


def _replica(store: RocksStore) -> Replica:
    data = store.get_meta(META_KEY)
    if data is None:
        raise NotFound("the store has no position yet", where=str(store.path))
    return Replica(store, decode_meta(data))


def _archived(objects: ObjectStore, meta: Meta) -> list[SegmentObject]:
    """What the archive has of a shard above a store's own final height."""
    infos = objects.list(archive_prefix(meta.chain_id, meta.generation, meta.shard))
    names = [(parse_segment_name(info.name), info.size_bytes) for info in infos]
    return [SegmentObject(name, size) for name, size in names if name is not None and name.last > own_final(meta)]


def _start(meta: Meta, archived: Sequence[SegmentObject]) -> int:
    """The height from which the archive is to lead on. A chain's first block may have any."""
    if meta.tip.ref is None and archived:
        return min(segment.name.first for segment in archived) - 1
    return own_final(meta)


def _roll_back(replica: Replica, target: int, report: Report) -> None:
    """Take frames back, in the log's order, to the last time the block at ``target`` was the tip; at least to where all
    is final, so that the archive leads on."""
    highest, frames = replica.meta.tip.height, 0
    target = min(target, own_final(replica.meta))
    while replica.meta.tip.height != target:
        replica.take_back()
        frames += 1
        report("frames taken back", frames, max(highest - target, frames))


def _roll_forward(
    replica: Replica, objects: ObjectStore, archived: Sequence[SegmentObject], target: int, report: Report
) -> Replica:
    """Apply archived frames up to ``target``."""
    replay = Replay(replica.store, replica.meta)
    hops, _ = lead(archived, _start(replica.meta, archived), target)
    for hop in hops:
        for header in replay.run(open_segment(objects.get(str(hop.name)), hop.name), target):
            report("blocks from the archive", header.ref.height, target)
    return Replica(replica.store, replay.meta)


# Parts and manifest


def publish(
    objects: ObjectStore,
    written: Sequence[WrittenPart],
    resumes: Sequence[Meta],
    report: Report,
    *,
    key: SigningKey | None = None,
    clock: Clock = CLOCK,
) -> Manifest:
    """Put parts that were just written, then their manifest; another one's that is there stands. Raises AuditFailed
    before anything is put, NotFound if the other one's lacks a part.

    An intent keeps sweeps from what is put. What one of them was about to delete all the same is looked at once it has
    ended, and put again.
    """
    manifest = make_manifest([one.part for one in written], resumes, key)
    with held(objects, manifest.chain_id, Kind.INTENT, [f"{manifest.folder}/"], clock=clock):
        _put_parts(objects, manifest, written, report)
        failpoints.hit("snapshot.before_manifest")
        with suppress(AlreadyThere):
            objects.put_new(manifest.name, encode_manifest(manifest))
        failpoints.hit("snapshot.after_manifest")
        for _ in range(_LOOKS_MAX):
            published, lacking = _look_again(objects, manifest, clock)
            if not lacking:
                return published
            if published != manifest:
                clock.sleep(_LOOK_S)  # who published it puts it again
                continue
            _put_parts(objects, manifest, [one for one in written if one.part.name in lacking], report)
            with suppress(AlreadyThere):
                objects.put_new(manifest.name, encode_manifest(manifest))
    raise NotFound(
        f"the manifest that is there lacks {lacking[0]}",
        where=manifest.name,
        way_out="`stateferry gc` removes it: then take the snapshot again",
    )


def _look_again(objects: ObjectStore, manifest: Manifest, clock: Clock) -> tuple[Manifest, list[str]]:
    """The manifest that stands under this one's name, ours without any, and which objects it lacks, by the last part of
    their names. A sweep that may delete some of them has ended then."""
    published = manifest
    with suppress(NotFound):
        published = decode_manifest(objects.get(manifest.name))
    wait_for_sweeps(objects, manifest.chain_id, _names(published), clock)
    return published, _lacking(objects, published)


def _names(manifest: Manifest) -> list[str]:
    return [manifest.name, *map(manifest.part_name, manifest.parts)]


def _lacking(objects: ObjectStore, manifest: Manifest) -> list[str]:
    """Which of its objects are not there, by the last part of their names."""
    there = {info.name for info in objects.list(f"{manifest.folder}/")}
    return [name.rpartition("/")[2] for name in _names(manifest) if name not in there]


def write_all(
    shards: Iterable[Iterable[tuple[bytes, bytes]]], folder: Path, total: int, raw_bytes_max: int, report: Report
) -> list[WrittenPart]:
    """The entries of each shard as parts in a folder: none has keys of two. ``total``: keys; 0: not known."""
    written: list[WrittenPart] = []
    keys = 0
    for entries in shards:
        for one in write_parts(entries, folder, first_number=len(written), raw_bytes_max=raw_bytes_max):
            written.append(one)
            keys += one.part.keys
            report("keys written", keys, total)
    return written


def _put_parts(objects: ObjectStore, manifest: Manifest, written: Sequence[WrittenPart], report: Report) -> None:
    """Put all parts, some at a time. One that is there has the same digest in its name."""

    def put(one: WrittenPart) -> int:
        with suppress(AlreadyThere):
            objects.put_file_new(manifest.part_name(one.part), one.path)
        failpoints.hit("snapshot.part_put")
        return one.part.size_bytes

    done = 0
    with ThreadPoolExecutor(_PUTTING_THREADS) as threads:
        for size in threads.map(put, written):
            done += size
            report("bytes put", done, manifest.size_bytes)


@contextmanager
def scratch_folder(path: Path) -> Iterator[None]:
    """A fresh directory that goes afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """The helper process: publish a snapshot of copies of stores, and print the manifest's name."""
    parser = argparse.ArgumentParser(prog="python -m topology.snapshotter", description=main.__doc__)
    parser.add_argument("--store", type=Path, action="append", required=True, help="a shard's copy, which is used up")
    parser.add_argument("--scratch", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--height", type=int)
    parser.add_argument("--sign-key-file", type=Path)
    given = parser.parse_args()

    def work(report: Report) -> str:
        os.nice(_NICENESS)
        return take_snapshot(
            given.store,
            given.scratch,
            open_objects(given.objects),
            height=given.height,
            key=signing_key(given.sign_key_file),
            report=report,
        ).name

    return children.serve(work)


if __name__ == "__main__":
    sys.exit(main())
