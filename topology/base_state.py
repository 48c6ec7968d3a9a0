"""Base states: what a generation begins from, as a manifest published before its first frame."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline.errors import NotFound, WrongChain
from pipeline.generation import Generation
from pipeline.objects import AlreadyThere, ObjectStore
from pipeline.restore import newest_names
from pipeline.snapshot import Manifest, base_resume, encode_manifest, parse_manifest_name
from topology import logs, restorer

log = logs.get()


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
    return restorer.read_manifest(objects, str(found[0]))


def republish(objects: ObjectStore, manifest: Manifest, generation: Generation) -> Manifest:
    """The same state as the base of another generation: parts copied under its name, then a manifest of its own, so
    that either generation can be deleted without the other."""
    tip = manifest.tip
    resume = base_resume(with_base(generation, manifest), tip.vectors, tip.counts, manifest.resume.finality)
    copy = Manifest(resume=resume, parts=manifest.parts)
    with tempfile.TemporaryDirectory() as scratch:
        for part in manifest.parts:
            path = Path(scratch) / part.name
            objects.fetch_to(manifest.part_name(part), path)
            with contextlib.suppress(AlreadyThere):
                objects.put_file_new(copy.part_name(part), path)
            path.unlink()
    objects.put_new(copy.name, encode_manifest(copy))
    return copy


def fill(objects: ObjectStore, data_dir: Path, generation: Generation) -> None:
    """An empty data directory of a generation that has a base state gets it, as claimed. Raises what
    `restorer.restore` raises, WrongChain."""
    assert generation.base is not None
    restored = restorer.restore(
        objects,
        data_dir,
        chain=generation.chain_id,
        generation=generation.generation,
        height=generation.base.height,
        claimed=True,
    )
    if (restored.meta.generation, restored.ref) != (generation.generation, generation.base):
        raise WrongChain(
            f"the object store has no base state of generation {generation.generation.hex()}",
            way_out="name the object store that the source published it in: --objects",
        )
    log.info("base_restored", height=generation.base.height, keys=sum(restored.meta.tip.counts.values()))
