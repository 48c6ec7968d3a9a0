"""Plans of restores: made from what an object store lists, and written down before anything is fetched."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.archive_names import PieceName, RangeName, parse_piece_name, parse_segment_name, whole_ranges
from pipeline.errors import ManifestCorrupt, ObjectMissing, SignatureMissing
from pipeline.objects import ObjectStore
from pipeline.objects.files import written_whole
from pipeline.plans import RestorePlan, SegmentObject, SnapshotObject, check_one_chain, newest_names
from pipeline.routes import History, find_route
from pipeline.signature import check_signature
from pipeline.snapshot import Manifest, ManifestName, decode_manifest, parse_manifest_name
from topology.fetching import open_segment
from topology.rates import measured_rates

_PLAN_FILE = "plan.json"
_MANIFEST_FILE = "manifest.json"
_LISTINGS_MAX = 8
"""A store that lists for good what it has not is not to be asked for ever."""


class Request(NamedTuple):
    """What a restore was asked for. ``chain`` None: the only one there is. ``generation`` None: the newest that leads
    to ``height``; ``height`` None: as far as it leads. ``shard`` None: all of them. ``signer``: the public key that
    must have signed the snapshot that it begins with; None: nobody needs to have."""

    chain: str | None = None
    generation: bytes | None = None
    height: int | None = None
    shard: int | None = None
    signer: bytes | None = None

    def fields(self) -> list[Any]:
        generation, signer = (one and one.hex() for one in (self.generation, self.signer))
        return [self.chain, generation, self.height, self.shard, signer]


class _Listing:
    """What an object store has of one chain."""

    def __init__(self, objects: ObjectStore, request: Request, refused: Collection[RangeName]) -> None:
        """Raises UsageError (several chains)."""
        manifests: list[ManifestName] = []
        pieces: list[tuple[PieceName, int]] = []
        sizes: dict[str, list[int]] = defaultdict(list)  # of snapshots' parts, by their folders
        self.segments: list[SegmentObject] = []
        chains: set[str] = set()
        for name, size, *_ in objects.list("" if request.chain is None else f"{request.chain}/"):
            manifest, segment, piece = parse_manifest_name(name), parse_segment_name(name), parse_piece_name(name)
            sizes[name.rpartition("/")[0]].append(size)
            found = manifest or segment or (piece and piece.of)
            if found is None or request.generation not in (None, found.generation):
                continue
            chains.add(found.chain_id)
            if manifest is not None:
                manifests.append(manifest)
            elif segment is not None:
                self.segments.append(SegmentObject(segment, size))
            elif piece is not None and piece.of not in refused:
                pieces.append((piece, size))
        check_one_chain(chains)
        self.ranges = whole_ranges(pieces)
        self.snapshots = [
            SnapshotObject(name, sum(sizes[name.folder]), len(sizes[name.folder]) - 1)
            for name in manifests
            if request.height is None or name.height <= request.height
        ]


def plan_restore(
    objects: ObjectStore, request: Request, *, refused: Collection[RangeName] = frozenset()
) -> RestorePlan:
    """What a restore would fetch; reads names, and one manifest of each generation, or its first segment. If a sweep
    took one of them since they were listed, it lists again. ``refused``: range diffs that are not to be used.

    Raises NotFound, UsageError (several chains), ManifestCorrupt, SegmentCorrupt, Unsupported, ArchiveConflict,
    SignatureMissing, SignatureWrong.
    """
    for _ in range(_LISTINGS_MAX - 1):
        with suppress(ObjectMissing):
            return _plan_listed(objects, request, refused)
    return _plan_listed(objects, request, refused)


def _plan_listed(objects: ObjectStore, request: Request, refused: Collection[RangeName]) -> RestorePlan:
    listing = _Listing(objects, request, refused)
    newest = newest_names([one.name for one in listing.snapshots], request.height)
    read = {name: read_manifest(objects, str(name)) for name in newest}
    histories = {one.generation: History(one.generation_number, one.shards) for one in read.values()}
    for _, segment in sorted((one.name.first, one.name) for one in listing.segments):
        if segment.generation not in histories:
            resume = open_segment(objects.get(str(segment)), segment).resume
            histories[segment.generation] = History(resume.generation_number, resume.shards)
    ranges = [one for one in listing.ranges if one.name.generation in histories]
    probed = max(listing.segments, key=lambda one: one.size_bytes, default=None)
    rates = measured_rates(objects, None if probed is None else str(probed.name))
    route = find_route(
        listing.snapshots,
        listing.segments,
        ranges,
        request.height,
        histories=histories,
        needs_snapshot=request.signer is not None,
        rates=rates,
    )
    name = route.snapshot
    manifest = None if name is None else read.get(name) or read_manifest(objects, str(name))
    _check_signer(manifest, request)
    planned = RestorePlan(
        chain_id=(listing.segments or listing.snapshots)[0].name.chain_id,
        generation=route.generation,
        height=route.height,
        manifest=manifest,
        segments=route.segments,
        ranges=route.ranges,
        shards=histories[route.generation].shards,
        rates=rates,
    )
    if request.shard is None:
        return planned
    return replace(
        planned,
        segments=tuple(one for one in route.segments if one.name.shard == request.shard),
        ranges=tuple(one for one in route.ranges if one.name.shard == request.shard),
        only=request.shard,
    )


def _check_signer(manifest: Manifest | None, request: Request) -> None:
    """Raises SignatureMissing, SignatureWrong."""
    if manifest is not None:
        check_signature(manifest.signature, manifest.digest, request.signer, manifest.name)
    elif request.signer is not None:
        raise SignatureMissing(
            f"the archive alone leads there, and is not signed; {request.signer.hex()} is required",
            way_out="restore a height above a signed snapshot",
        )


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


def write_plan(
    folder: Path, objects: ObjectStore, request: Request, made: RestorePlan, *, instead: RestorePlan | None = None
) -> None:
    """Into a folder that is emptied for it: the manifest first, so that a plan never stands there without. What was
    fetched for the one that it stands ``instead`` of stays, if it is of the same generation."""
    if instead is None or (instead.chain_id, instead.generation) != (made.chain_id, made.generation):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PLAN_FILE).unlink(missing_ok=True)
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
        "ranges": [
            [str(piece), size] for one in made.ranges for piece, size in zip(one.pieces, one.sizes, strict=True)
        ],
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
    _check_signer(manifest, request)
    names = [(parse_segment_name(name), size) for name, size in held["segments"]]
    pieces = [(parse_piece_name(name), size) for name, size in held.get("ranges", [])]
    return RestorePlan(
        chain_id=held["chain"],
        generation=bytes.fromhex(held["generation"]),
        height=held["height"],
        manifest=manifest,
        segments=tuple(SegmentObject(name, size) for name, size in names if name is not None),
        ranges=tuple(whole_ranges((name, size) for name, size in pieces if name is not None)),
        shards=held["shards"],
        only=request.shard,
    )
