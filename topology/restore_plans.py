"""Plans of restores: made from what an object store lists, and written down before anything is fetched."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.archive import parse_segment_name
from pipeline.errors import ManifestCorrupt, ObjectMissing, UsageError
from pipeline.objects import ObjectStore
from pipeline.objects.files import written_whole
from pipeline.restore import RestorePlan, SegmentObject, newest_names, plan
from pipeline.snapshot import Manifest, ManifestName, decode_manifest, parse_manifest_name
from topology.fetching import open_segment

_PLAN_FILE = "plan.json"
_MANIFEST_FILE = "manifest.json"
_LISTINGS_MAX = 8
"""A store that lists for good what it has not is not to be asked for ever."""


class Request(NamedTuple):
    """What a restore was asked for. ``chain`` None: the only one there is. ``generation`` None: the newest that leads
    to ``height``; ``height`` None: as far as it leads. ``shard`` None: all of them."""

    chain: str | None = None
    generation: bytes | None = None
    height: int | None = None
    shard: int | None = None

    def fields(self) -> list[Any]:
        return [self.chain, self.generation and self.generation.hex(), self.height, self.shard]


def plan_restore(objects: ObjectStore, request: Request) -> RestorePlan:
    """What a restore would fetch; reads names, and one manifest of each generation, or its first segment. If a sweep
    took one of them since they were listed, it lists again.

    Raises NotFound, UsageError (several chains), ManifestCorrupt, SegmentCorrupt, Unsupported, ArchiveConflict.
    """
    for _ in range(_LISTINGS_MAX - 1):
        with suppress(ObjectMissing):
            return _plan_listed(objects, request)
    return _plan_listed(objects, request)


def _plan_listed(objects: ObjectStore, request: Request) -> RestorePlan:
    manifests: list[ManifestName] = []
    segments: list[SegmentObject] = []
    for info in objects.list("" if request.chain is None else f"{request.chain}/"):
        manifest, segment = parse_manifest_name(info.name), parse_segment_name(info.name)
        found = manifest or segment
        if found is None or request.generation not in (None, found.generation):
            continue
        if manifest is not None:
            manifests.append(manifest)
        elif segment is not None:
            segments.append(SegmentObject(segment, info.size_bytes))
    chains = {name.chain_id for name in manifests} | {segment.name.chain_id for segment in segments}
    if len(chains) > 1:
        raise UsageError(
            f"the object store holds several chains: {', '.join(sorted(chains))}", way_out="say which one: --chain"
        )
    read = [read_manifest(objects, str(name)) for name in newest_names(manifests, request.height)]
    shards = {manifest.generation: manifest.shards for manifest in read}
    for _, name in sorted((segment.name.first, segment.name) for segment in segments):
        if name.generation not in shards:
            shards[name.generation] = open_segment(objects.get(str(name)), name).resume.shards
    planned = plan(read, segments, request.height, shards=shards)
    if request.shard is None:
        return planned
    return replace(planned, segments=tuple(planned.segments_of(request.shard)), only=request.shard)


def read_manifest(objects: ObjectStore, name: str) -> Manifest:
    """Raises NotFound, ManifestCorrupt (also one that stands under another's name), Unsupported."""
    return _named_manifest(objects.get(name), name)


def _named_manifest(data: bytes, name: str) -> Manifest:
    try:
        manifest = decode_manifest(data)
    except ManifestCorrupt as error:
        raise ManifestCorrupt(
            error.what, where=name, way_out="restore another height, or delete it and take a new snapshot"
        ) from error
    if manifest.name != name:
        raise ManifestCorrupt(f"the manifest of {manifest.name} stands under another name", where=name)
    return manifest


# Written down


def write_plan(folder: Path, objects: ObjectStore, request: Request, made: RestorePlan) -> None:
    """Into a folder that is emptied for it: the manifest first, so that a plan never stands there without."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if made.manifest is not None:
        with written_whole(folder / _MANIFEST_FILE) as draft:
            draft.write_bytes(objects.get(made.manifest.name))
    fields = {
        "request": request.fields(),
        "chain": made.chain_id,
        "generation": made.generation.hex(),
        "height": made.height,
        "shards": made.shards,
        "manifest": "" if made.manifest is None else made.manifest.name,
        "segments": [[str(segment.name), segment.size_bytes] for segment in made.segments],
    }
    with written_whole(folder / _PLAN_FILE) as draft:
        draft.write_bytes(json.dumps(fields, indent=1).encode())


def written_plan(folder: Path, request: Request) -> RestorePlan | None:
    """The plan of an interrupted restore that asked for the same; None without one. Raises ManifestCorrupt."""
    try:
        held = json.loads((folder / _PLAN_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if held.get("request") != request.fields():
        return None
    manifest = None
    if held["manifest"]:
        manifest = _named_manifest((folder / _MANIFEST_FILE).read_bytes(), held["manifest"])
    names = [(parse_segment_name(name), size) for name, size in held["segments"]]
    return RestorePlan(
        chain_id=held["chain"],
        generation=bytes.fromhex(held["generation"]),
        height=held["height"],
        manifest=manifest,
        segments=tuple(SegmentObject(name, size) for name, size in names if name is not None),
        shards=held["shards"],
        only=request.shard,
    )
