"""The restorer: from the object store alone to a store that a replica, or a primary, can go on with.

It works in `restoring/` inside the data directory, and takes up after a crash what it finds there:

    plan.json       what was asked for, and what will be fetched
    manifest.json   the manifest, as fetched
    parts/ segments/    what is here and was checked: a file has its name only then
    store/          the store that will be; it has a position once its parts are in

Renaming that store to `store` is the one moment at which the data directory has one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import failpoints
from pipeline.archive import Segment, SegmentName, parse_segment_name
from pipeline.block import BlockRef
from pipeline.errors import (
    AuditFailed,
    CorruptInput,
    Diverged,
    ManifestCorrupt,
    NotEmpty,
    NotFound,
    PartCorrupt,
    SegmentCorrupt,
    StoreCorrupt,
    UsageError,
)
from pipeline.objects import ObjectStore
from pipeline.parts import Part, digest_file
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.restore import (
    Replay,
    RestorePlan,
    SegmentObject,
    Stage,
    before_first,
    newest_names,
    plan,
    settled,
)
from pipeline.snapshot import Manifest, ManifestName, decode_manifest, parse_manifest_name
from pipeline.stores.base import META_KEY, PROOF_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, encode_proof
from topology.verifier import prove

WORK_FOLDER = "restoring"
STORE_FOLDER = "store"
_PLAN_FILE = "plan.json"
_MANIFEST_FILE = "manifest.json"
_FETCHING_THREADS = 8


class Progress(NamedTuple):
    """How far a stage is. ``total`` 0: not known."""

    stage: Stage
    done: int
    total: int
    unit: str  # bytes, parts, blocks, keys


ProgressReport = Callable[[Progress], None]


def _no_progress(progress: Progress) -> None:
    """For callers that do not want to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """``proof.proven`` False: what the store holds is claimed. ``seconds``: by stage passed in this run."""

    meta: Meta
    proof: Proof
    manifest_name: str  # empty: from the archive alone
    keys: int
    fetched_bytes: int  # in this run
    frames: int  # applied in this run
    seconds: dict[Stage, float]

    @property
    def ref(self) -> BlockRef:
        assert self.meta.tip.ref is not None
        return self.meta.tip.ref


# Planning


def plan_restore(
    objects: ObjectStore, *, chain: str | None = None, generation: bytes | None = None, height: int | None = None
) -> RestorePlan:
    """What a restore would fetch; reads names, and one manifest of each generation.

    ``chain`` None: the only one there is. ``generation`` None: the newest that leads to ``height``. Raises NotFound,
    UsageError (several chains), ManifestCorrupt, Unsupported, ArchiveConflict.
    """
    manifests: list[ManifestName] = []
    segments: list[SegmentObject] = []
    sharded: set[bytes] = set()
    for info in objects.list("" if chain is None else f"{chain}/"):
        manifest, segment = parse_manifest_name(info.name), parse_segment_name(info.name)
        if generation is not None and generation not in {name.generation for name in (manifest, segment) if name}:
            continue
        if manifest is not None:
            manifests.append(manifest)
        elif segment is not None and segment.shard > 0:
            sharded.add(segment.generation)
        elif segment is not None:
            segments.append(SegmentObject(segment, info.size_bytes))
    chains = {name.chain_id for name in manifests} | {segment.name.chain_id for segment in segments}
    if len(chains) > 1:
        raise UsageError(
            f"the object store holds several chains: {', '.join(sorted(chains))}", way_out="say which one: --chain"
        )
    read = [read_manifest(objects, str(name)) for name in newest_names(manifests, height)]
    planned = plan(read, segments, height)
    if planned.generation in sharded:
        raise UsageError(
            f"generation {planned.generation.hex()} has several shards: a restore of all of them cannot be made yet",
            way_out="run a replica: it follows the frames of all shards from their start",
        )
    return planned


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


# Restoring


def restore(
    objects: ObjectStore,
    data_dir: Path,
    *,
    chain: str | None = None,
    generation: bytes | None = None,
    height: int | None = None,
    claimed: bool = False,
    progress: ProgressReport = _no_progress,
    workers: int | None = None,
) -> Restored:
    """Fill a data directory, which the caller has locked. ``claimed``: do not hash every key afterwards.

    Goes on with an interrupted restore that asked for the same; anything else found there is removed. Raises NotEmpty,
    NotFound, PartCorrupt, ManifestCorrupt, SegmentCorrupt, Diverged, DiskFull: then there is no store.
    """
    request = Request(chain, generation, height)
    return _Restorer(objects, data_dir, request, progress).run(claimed, workers)


class Request(NamedTuple):
    """What a restore was asked for."""

    chain: str | None
    generation: bytes | None
    height: int | None

    def fields(self) -> list[Any]:
        return [self.chain, self.generation and self.generation.hex(), self.height]


class _Restorer:
    """One attempt. `_enter` is the only way from stage to stage."""

    def __init__(self, objects: ObjectStore, data_dir: Path, request: Request, progress: ProgressReport) -> None:
        self.objects = objects
        self.data_dir = data_dir
        self.work = data_dir / WORK_FOLDER
        self.store_path = data_dir / STORE_FOLDER
        self.request = request
        self.progress = progress
        self.stage = Stage.PLAN
        self.seconds: dict[Stage, float] = {}
        self.fetched_bytes = 0
        self.frames = 0
        self._since = time.monotonic()

    def run(self, claimed: bool, workers: int | None) -> Restored:
        if self._has_store():
            meta, manifest_name = self._finished_before()
        else:
            try:
                meta, manifest_name = self._restore()
            except (CorruptInput, Diverged, NotFound):
                shutil.rmtree(self.work, ignore_errors=True)  # what was planned and fetched leads nowhere
                raise
        proof = Proof(proven=False)
        if not claimed:
            self._enter(Stage.PROVE)
            proof = self._prove(workers)
            self._enter(Stage.PROVEN)
        shutil.rmtree(self.work, ignore_errors=True)
        return Restored(
            meta=meta,
            proof=proof,
            manifest_name=manifest_name,
            keys=sum(meta.tip.counts.values()),
            fetched_bytes=self.fetched_bytes,
            frames=self.frames,
            seconds=self.seconds,
        )

    def _restore(self) -> tuple[Meta, str]:
        plan = self._plan()
        self._enter(Stage.FETCH)
        self._fetch(plan)
        self._enter(Stage.INGEST)
        meta = self._build(plan)
        self._enter(Stage.CLAIMED)
        self._publish()
        return meta, "" if plan.manifest is None else plan.manifest.name

    def _enter(self, stage: Stage) -> None:
        assert self.stage.may_lead_to(stage), (self.stage, stage)
        now = time.monotonic()
        self.seconds[self.stage] = now - self._since
        self.stage, self._since = stage, now

    def _report(self, done: int, total: int, unit: str) -> None:
        self.progress(Progress(self.stage, done, total, unit))

    # Plan

    def _finished_before(self) -> tuple[Meta, str]:
        """A store that a restore of the same request made, before it was interrupted. Raises NotEmpty for any other."""
        held = self._held_plan()
        if held is not None:
            store = RocksStore(self.store_path)
            try:
                data = store.get_meta(META_KEY)
            finally:
                store.close()
            meta = None if data is None else decode_meta(data)
            if meta is not None and (meta.tip.height, meta.base_height) == (held["height"], held["height"]):
                self.stage = Stage.CLAIMED
                return meta, held["manifest"]
        raise NotEmpty(
            "this data directory holds a store already",
            where=str(self.store_path),
            way_out="restore into an empty directory, or remove this store first",
        )

    def _held_plan(self) -> dict[str, Any] | None:
        """The plan of an interrupted restore that asked for the same."""
        try:
            held: dict[str, Any] = json.loads((self.work / _PLAN_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return held if held.get("request") == self.request.fields() else None

    def _plan(self) -> RestorePlan:
        held = self._held_plan()
        if held is not None:
            return self._decode_plan(held)
        shutil.rmtree(self.work, ignore_errors=True)
        plan = plan_restore(self.objects, **self.request._asdict())
        (self.work / "parts").mkdir(parents=True)
        (self.work / "segments").mkdir()
        if plan.manifest is not None:
            _write_durably(self.work / _MANIFEST_FILE, self.objects.get(plan.manifest.name))
        fields = {
            "request": self.request.fields(),
            "chain": plan.chain_id,
            "generation": plan.generation.hex(),
            "height": plan.height,
            "manifest": "" if plan.manifest is None else plan.manifest.name,
            "segments": [[str(segment.name), segment.size_bytes] for segment in plan.segments],
        }
        _write_durably(self.work / _PLAN_FILE, json.dumps(fields, indent=1).encode())
        failpoints.hit("restore.planned")
        return plan

    def _decode_plan(self, held: dict[str, Any]) -> RestorePlan:
        manifest = None
        if held["manifest"]:
            manifest = _named_manifest((self.work / _MANIFEST_FILE).read_bytes(), held["manifest"])
        names = [(parse_segment_name(name), size) for name, size in held["segments"]]
        return RestorePlan(
            chain_id=held["chain"],
            generation=bytes.fromhex(held["generation"]),
            height=held["height"],
            manifest=manifest,
            segments=tuple(SegmentObject(name, size) for name, size in names if name is not None),
        )

    # Fetch

    def _fetch(self, plan: RestorePlan) -> None:
        """Parts and segments, several at a time; what is here already was checked before."""
        manifest = plan.manifest
        with self._cleared_threads() as threads:
            running: list[Future[int]] = []
            for part in () if manifest is None else manifest.parts:
                if not self._part_path(part).exists():
                    running.append(threads.submit(self._fetch_part, plan, part))
            for segment in plan.segments:
                if not self._segment_path(segment.name).exists():
                    running.append(threads.submit(self._fetch_segment, segment.name))
            pending = set(running)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                self.fetched_bytes += sum(future.result() for future in done)
                self._report(self.fetched_bytes, plan.size_bytes, "bytes")

    @contextmanager
    def _cleared_threads(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that do not go on with what is queued once one of them failed."""
        threads = ThreadPoolExecutor(_FETCHING_THREADS)
        try:
            yield threads
        finally:
            threads.shutdown(cancel_futures=True)

    def _part_path(self, part: Part) -> Path:
        return self.work / "parts" / part.name

    def _segment_path(self, name: SegmentName) -> Path:
        return self.work / "segments" / f"{name.first:012d}-{name.last:012d}.seg"

    def _fetch_part(self, plan: RestorePlan, part: Part) -> int:
        assert plan.manifest is not None
        name = plan.manifest.part_name(part)
        with self._incoming(name, self._part_path(part)) as path:
            size, digest = path.stat().st_size, digest_file(path)
            if (size, digest) != (part.size_bytes, part.digest):
                raise PartCorrupt(
                    f"a part has {size} bytes and digest {digest.hex()}, the manifest says {part.size_bytes} and "
                    f"{part.digest.hex()}",
                    where=name,
                    way_out="restore from another snapshot with --height: `stateferry status` lists them",
                )
        failpoints.hit("restore.part_fetched")
        return part.size_bytes

    def _fetch_segment(self, name: SegmentName) -> int:
        with self._incoming(str(name), self._segment_path(name)) as path:
            data = path.read_bytes()
            _open_segment(data, name)
        return len(data)

    @contextmanager
    def _incoming(self, name: str, path: Path) -> Iterator[Path]:
        """Fetch an object; it gets its path once the block inside found no fault."""
        draft = path.with_suffix(".new")
        self.objects.fetch_to(name, draft)
        try:
            yield draft
        except BaseException:
            draft.unlink()
            raise
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)

    # Ingest and frames

    def _build(self, plan: RestorePlan) -> Meta:
        """The store in `restoring/store`, at the plan's height, synced. Passes from INGEST to FRAMES."""
        path = self.work / STORE_FOLDER
        failpoints.hit("restore.before_ingest")
        meta = held_meta(path)
        if meta is None:
            shutil.rmtree(path, ignore_errors=True)
        store = RocksStore(path)
        try:
            if meta is None:
                meta = self._ingest(store, plan)
            self._enter(Stage.FRAMES)
            meta = settled(self._replay(store, plan, meta))
            store.write(Batch(meta={META_KEY: encode_meta(meta), PROOF_KEY: encode_proof(Proof(proven=False))}))
            store.flush()
        finally:
            store.close()
        return meta

    def _ingest(self, store: RocksStore, plan: RestorePlan) -> Meta:
        manifest = plan.manifest
        if manifest is not None and manifest.parts:
            # Links, so that the checked parts are still here if this is interrupted.
            links = self.work / "ingesting"
            shutil.rmtree(links, ignore_errors=True)
            links.mkdir()
            for part in manifest.parts:
                os.link(self._part_path(part), links / part.name)
            try:
                store.ingest([links / part.name for part in manifest.parts])
            except StoreCorrupt as error:
                raise PartCorrupt(f"a part cannot be taken in: {error.what}", where=manifest.name) from error
            self._report(len(manifest.parts), len(manifest.parts), "parts")
        failpoints.hit("restore.after_ingest")
        if manifest is not None:
            meta = manifest.resume
        else:
            first = plan.segments[0].name
            meta = before_first(_open_segment(self._segment_path(first).read_bytes(), first).resume)
        store.write(Batch(meta={META_KEY: encode_meta(meta)}))
        return meta

    def _replay(self, store: RocksStore, plan: RestorePlan, meta: Meta) -> Meta:
        replay = Replay(store, meta)
        for segment in plan.segments:
            if segment.name.last < replay.meta.tip.height:
                continue
            opened = _open_segment(self._segment_path(segment.name).read_bytes(), segment.name)
            for header in replay.run(opened, plan.height):
                failpoints.hit("restore.frame_applied")
                self.frames += 1
                self._report(header.ref.height, plan.height, "blocks")
        if replay.meta.tip.height != plan.height:
            raise NotFound(
                f"the restore ended at block {replay.meta.tip.ref}, not at height {plan.height}", way_out="run it again"
            )
        return replay.meta

    # Publish and prove

    def _has_store(self) -> bool:
        """A directory that was never written to whole holds nothing."""
        return (self.store_path / "CURRENT").exists() or any(self.store_path.glob("*.sst"))

    def _publish(self) -> None:
        shutil.rmtree(self.store_path, ignore_errors=True)  # what `_has_store` says holds nothing
        (self.work / STORE_FOLDER).rename(self.store_path)
        _sync(self.data_dir)
        for folder in ("parts", "segments", "ingesting"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def _prove(self, workers: int | None) -> Proof:
        store = RocksStore(self.store_path)
        try:
            proof, _ = asyncio.run(
                prove(
                    store,
                    self.data_dir,
                    workers=workers,
                    report=lambda _, done, total: self._report(done, total, "keys"),
                )
            )
        except (AuditFailed, StoreCorrupt):
            store.close()
            self.store_path.rename(self.work / STORE_FOLDER)
            shutil.rmtree(self.work)
            raise
        finally:
            store.close()
        return proof


def held_meta(path: Path) -> Meta | None:
    """The position of a store that nobody has open; None if there is none yet."""
    if not (path / "CURRENT").exists():
        return None
    store = RocksStore(path)
    try:
        data = store.get_meta(META_KEY)
    finally:
        store.close()
    return None if data is None else decode_meta(data)


def _open_segment(data: bytes, name: SegmentName) -> Segment:
    try:
        segment = Segment.open(data)
    except SegmentCorrupt as error:
        raise SegmentCorrupt(
            error.what,
            where=str(name),
            way_out="delete it: a primary whose journal has those blocks archives them again",
        ) from error
    resume = segment.resume
    if SegmentName(resume.chain_id, resume.generation, resume.shard, segment.first, segment.last) != name:
        raise SegmentCorrupt("a segment stands under another's name", where=str(name))
    return segment


def _write_durably(path: Path, data: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.write_bytes(data)
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
