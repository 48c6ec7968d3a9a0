"""Base states: what a generation begins from, as a manifest published before its first frame."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pipeline.block import BlockRef
from pipeline.diff import EMPTY_COUNTS
from pipeline.errors import CoinsCorrupt, NotFound, WrongChain
from pipeline.generation import Generation
from pipeline.leases import Kind
from pipeline.objects import AlreadyThere, ObjectStore
from pipeline.parts import PART_RAW_BYTES_MAX, sum_parts
from pipeline.plans import check_one_chain, newest_names
from pipeline.shards import before_group, groups_of
from pipeline.signature import SigningKey
from pipeline.snapshot import Manifest, base_resume, encode_manifest, parse_manifest_name, parts_of, signed
from pipeline.state import UTXO, Schema
from pipeline.stores.base import Batch
from pipeline.stores.rocksdb import RocksStore
from topology import logs, restorer
from topology.children import Report, no_report
from topology.holding import held
from topology.restore_plans import Request, read_manifest
from topology.snapshotter import publish, scratch_folder, write_all

log = logs.get()

_COPY = "copy"
_PARTS = "parts"
_REPORT_KEYS = 1 << 16
_IMPORT_KEYS = 1 << 14


def with_base(generation: Generation, manifest: Manifest) -> Generation:
    """The generation with the base state that a manifest holds."""
    tip = manifest.tip
    return replace(
        generation, base=tip.ref, base_vectors=tip.vectors, base_counts=tip.counts, base_manifest=manifest.name
    )


def newest_manifest(objects: ObjectStore, generation: Generation, height: int | None) -> Manifest:
    """The newest snapshot of a generation at or below a height. Raises NotFound, ManifestCorrupt."""
    prefix = f"{generation.chain_id}/{generation.generation.hex()}/"
    names = [parse_manifest_name(info.name) for info in objects.list(prefix)]
    found = newest_names([name for name in names if name is not None], height)
    if not found:
        limit = "" if height is None else f" at or below height {height}"
        raise NotFound(
            f"generation {generation.generation.hex()} has no snapshot{limit}",
            where=prefix,
            way_out="take one: `stateferry snapshot`",
        )
    return read_manifest(objects, str(found[0]))


def newest_of_all(objects: ObjectStore, chain_id: str, height: int | None) -> Manifest:
    """The newest snapshot, at or below a height, of the newest generation that has one. ``chain_id`` empty: the only
    chain there is. Raises NotFound, UsageError (several chains), ManifestCorrupt."""
    names = [name for info in objects.list() if (name := parse_manifest_name(info.name)) is not None]
    chains = {name.chain_id for name in names} & ({chain_id} if chain_id else {name.chain_id for name in names})
    check_one_chain(chains)
    found = newest_names([name for name in names if name.chain_id in chains], height)
    if not found:
        raise NotFound(
            "the object store has no such snapshot",
            way_out="make one of what is archived: `stateferry restore` into an empty directory, then `stateferry "
            "snapshot` there",
        )
    return max((read_manifest(objects, str(name)) for name in found), key=lambda one: one.generation_number)


def publish_base(
    objects: ObjectStore,
    scratch: Path,
    generation: Generation,
    finality: int,
    coins: Iterable[tuple[bytes, bytes]],
    *,
    schema: Schema = UTXO,
    key: SigningKey | None = None,
    report: Report = no_report,
    part_raw_bytes_max: int = PART_RAW_BYTES_MAX,
) -> Manifest:
    """A base state, known before the first frame, as a snapshot: whole keys and values in any order.

    ``generation`` names its block (`Generation.base`) and not yet its vectors, which are computed here: take them from
    the manifest's tip. ``scratch`` must have room for the state twice. Raises CoinsCorrupt if a key comes twice.
    """
    assert generation.base is not None
    with scratch_folder(scratch):
        store = RocksStore(scratch / _COPY)
        try:
            _import(store, coins, schema, generation.base, report)
            parts_folder = scratch / _PARTS
            parts_folder.mkdir()
            runs = [groups_of(shard, generation.shards) for shard in range(generation.shards)]
            entries = (store.scan(before_group(run.start), before_group(run.stop) or None) for run in runs)
            written = write_all(entries, parts_folder, 0, part_raw_bytes_max, report)
        finally:
            store.close()
        parts, resumes = [one.part for one in written], []
        for shard in range(generation.shards):
            found = sum_parts(parts_of(parts, shard, generation.shards))
            counts = EMPTY_COUNTS | {schema.table_id: found.keys}
            resumes.append(base_resume(generation, shard, found.vectors, counts, finality))
        return publish(objects, written, resumes, report, key=key)


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


def republish(
    objects: ObjectStore,
    manifest: Manifest,
    generation: Generation,
    key: SigningKey | None = None,
    *,
    target: ObjectStore | None = None,
) -> Manifest:
    """The same state as the base of another generation: parts copied under its name, then a manifest of its own, so
    that either generation can be deleted without the other. ``target``: another object store to put it in."""
    target = target or objects
    resumes = [
        base_resume(generation, one.shard, one.tip.vectors, one.tip.counts, one.finality) for one in manifest.resumes
    ]
    copy = signed(Manifest(resumes=tuple(resumes), parts=manifest.parts), key)
    read = [manifest.name, *map(manifest.part_name, manifest.parts)]
    with (
        held(objects, manifest.chain_id, Kind.PIN, read),
        held(target, manifest.chain_id, Kind.INTENT, [f"{copy.folder}/"]),
        tempfile.TemporaryDirectory() as scratch,
    ):
        for part in manifest.parts:
            path = Path(scratch) / part.name
            objects.fetch_to(manifest.part_name(part), path)
            with contextlib.suppress(AlreadyThere):
                target.put_file_new(copy.part_name(part), path)
            path.unlink()
        target.put_new(copy.name, encode_manifest(copy))
    return copy


def fill(objects: ObjectStore, data_dir: Path, generation: Generation, signer: bytes | None = None) -> None:
    """An empty data directory of a generation that has a base state gets it, as claimed. ``signer``: as of a `Request`.
    Raises what `restorer.restore` raises, WrongChain."""
    assert generation.base is not None
    request = Request(
        chain=generation.chain_id, generation=generation.generation, height=generation.base.height, signer=signer
    )
    restored = restorer.restore(objects, data_dir, request, claimed=True)
    tip = restored.meta.tip
    if (restored.meta.generation, tip.ref, tip.root) != (
        generation.generation,
        generation.base,
        generation.tip.root,
    ):
        raise WrongChain(
            f"the object store has no base state of generation {generation.generation.hex()}",
            way_out="name the object store that the source published it in: --objects",
        )
    log.info("base_restored", height=generation.base.height, keys=restored.keys)
