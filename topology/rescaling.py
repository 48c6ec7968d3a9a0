"""Rescaling: a snapshot's state as the base of a generation with another number of shards.

Shards are powers of two and contiguous runs of key groups, so fewer shards hold the same parts, put together; with
more shards a part may have keys of several, and is written again as several. The vectors of the new shards sum up to
those of the old ones, or nothing is published: the global root is the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.diff import EMPTY_COUNTS
from pipeline.errors import AuditFailed, PartCorrupt
from pipeline.generation import Generation
from pipeline.objects import ObjectStore
from pipeline.parts import Part, WrittenPart, digest_file, sum_parts, write_parts
from pipeline.position import Meta
from pipeline.shards import before_group, groups_of, join_tips, shard_of
from pipeline.signature import SigningKey
from pipeline.snapshot import Manifest, base_resume, parts_of
from pipeline.state import UTXO
from pipeline.stores.rocksdb import RocksStore
from topology.children import Report, no_report
from topology.snapshotter import publish, scratch_folder

_COPY = "copy"


def rescale(
    objects: ObjectStore,
    manifest: Manifest,
    generation: Generation,
    scratch: Path,
    *,
    key: SigningKey | None = None,
    report: Report = no_report,
) -> Manifest:
    """The base of ``generation``, which has other shards than ``manifest``. ``scratch``: made and removed, with room
    for all parts.

    Raises PartCorrupt, AuditFailed, NotFound (a part is missing), DiskFull.
    """
    with scratch_folder(scratch):
        written: list[WrittenPart] = []
        for part in manifest.parts:
            written += _cut(objects, manifest, part, generation.shards, scratch, len(written))
            report("parts", len(written), 0)
        resumes = _resumes(manifest, [one.part for one in written], generation)
        return publish(objects, written, resumes, report, key=key)


def _cut(
    objects: ObjectStore, manifest: Manifest, part: Part, shards: int, scratch: Path, number: int
) -> Iterator[WrittenPart]:
    """One part as parts that have keys of one shard each, numbered from ``number`` on."""
    fetched = scratch / f"{part.name}.fetched"
    objects.fetch_to(manifest.part_name(part), fetched)
    if digest_file(fetched) != part.digest:
        raise PartCorrupt(
            f"part {part.name} is not what its manifest says",
            where=manifest.name,
            way_out="begin from another height: --height",
        )
    first, last = shard_of(part.first_key, shards), shard_of(part.last_key, shards)
    if first == last:
        named = replace(part, name=f"part-{number:05d}-{part.digest[:8].hex()}.sst")
        yield WrittenPart(named, fetched.rename(scratch / named.name))
        return
    store = RocksStore(scratch / _COPY)
    try:
        store.ingest([fetched])
        for shard in range(first, last + 1):
            run = groups_of(shard, shards)
            entries = store.scan(before_group(run.start), before_group(run.stop) or None)
            for one in write_parts(entries, scratch, first_number=number):
                number += 1
                yield one
    finally:
        store.close()
        shutil.rmtree(scratch / _COPY)


def _resumes(manifest: Manifest, parts: Sequence[Part], generation: Generation) -> list[Meta]:
    """Where each of the new shards begins. Raises AuditFailed."""
    shards, resumes = generation.shards, []
    for shard in range(shards):
        if shards < manifest.shards:
            together = manifest.shards // shards
            tip = join_tips([one.tip for one in manifest.resumes[shard * together : (shard + 1) * together]])
            vectors, counts = tip.vectors, tip.counts
        else:
            found = sum_parts(parts_of(parts, shard, shards))
            vectors, counts = found.vectors, EMPTY_COUNTS | {UTXO.table_id: found.keys}
        resumes.append(base_resume(generation, shard, vectors, counts, manifest.finality))
    if join_tips([one.tip for one in resumes]).root != manifest.root:
        raise AuditFailed(
            "the parts of a snapshot do not hold the state that its manifest names",
            where=manifest.name,
            way_out="begin from another height: --height",
        )
    return resumes
