"""The restorer: from the object store alone to stores that a replica, or a primary, can go on with.

It works in `restoring/` inside the data directory, and takes up after a crash what it finds there:

    plan.json           what was asked for, and what will be fetched (`restore_plans`)
    manifest.json       the manifest, as fetched
    parts/ ranges/ segments/    what is here and was checked (`fetching`)
    store/              the store that will be, or `shards/` with one for each; it has a position once its parts are in

Renaming that folder to its place is the one moment at which the data directory has a store, or all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline import failpoints
from pipeline.archive import Segment
from pipeline.block import BlockRef
from pipeline.errors import (
    AuditFailed,
    CorruptInput,
    Diverged,
    NotEmpty,
    NotFound,
    ObjectMissing,
    PartCorrupt,
    RangeCorrupt,
    StateferryError,
    StoreCorrupt,
    Unsupported,
)
from pipeline.leases import Kind
from pipeline.objects import ObjectStore, open_objects
from pipeline.objects.files import sync
from pipeline.plans import Estimate, Hop, RestorePlan
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.range_names import RangeName, RangeObject
from pipeline.ranges import RangeDiff
from pipeline.restore import Replay, Stage, before_first, settled
from pipeline.shards import join_metas
from pipeline.stores.base import META_KEY, PROOF_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, encode_proof
from topology import children, logs
from topology.data_dir import DataDir
from topology.fetching import FOLDERS, Fetching
from topology.holding import held
from topology.restore_plans import Request, plan_restore, write_plan, written_plan
from topology.verifier import prove

log = logs.get()

WORK_FOLDER = "restoring"


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
    """``metas``: of each shard. ``proof.proven`` False: what the stores hold is claimed. ``seconds``: by stage passed
    in this run."""

    metas: list[Meta]
    proof: Proof
    manifest_name: str  # empty: from the archive alone
    fetched_bytes: int  # in this run
    frames: int  # applied in this run
    range_diffs: int  # applied in this run
    refused: list[str]  # range diffs that are damaged, or lead elsewhere: frames were taken instead
    seconds: dict[Stage, float]
    estimate: Estimate | None  # None: a part was done before this run

    @property
    def meta(self) -> Meta:
        return join_metas(self.metas)

    @property
    def keys(self) -> int:
        return sum(sum(meta.tip.counts.values()) for meta in self.metas)

    @property
    def ref(self) -> BlockRef:
        ref = self.metas[0].tip.ref
        assert ref is not None
        return ref


def restore(
    objects: ObjectStore,
    data_dir: Path,
    request: Request,
    *,
    claimed: bool = False,
    progress: ProgressReport = _no_progress,
    workers: int | None = None,
) -> Restored:
    """Fill a data directory, which the caller has locked. ``claimed``: do not hash every key afterwards.

    Goes on with an interrupted restore that asked for the same; anything else found there is removed. Raises NotEmpty,
    NotFound, PartCorrupt, ManifestCorrupt, SegmentCorrupt, Diverged, DiskFull: then there is no store.
    """
    cores = 0 if claimed else workers or os.cpu_count() or 1
    return _Restorer(objects, DataDir(data_dir), request, progress, cores).run(claimed, workers)


class _Restorer:
    """One attempt. `_enter` is the only way from stage to stage.

    * `draft` is the directory as it will be, inside of `restoring/`.
    """

    def __init__(
        self, objects: ObjectStore, data_dir: DataDir, request: Request, progress: ProgressReport, cores: int
    ) -> None:
        """``cores``: that prove in the end; 0: it stays claimed."""
        self.cores = cores
        self.objects = objects
        self.data_dir = data_dir
        self.work = data_dir.path / WORK_FOLDER
        self.draft = DataDir(self.work)
        self.request = request
        self.progress = progress
        self.fetching = Fetching(objects, self.work)
        self.stage = Stage.PLAN
        self.seconds: dict[Stage, float] = {}
        self.frames = 0
        self.range_diffs = 0
        self.refused: dict[RangeName, StateferryError] = {}
        self.estimate: Estimate | None = None
        self._since = time.monotonic()

    def run(self, claimed: bool, workers: int | None) -> Restored:
        if self._has_store():
            metas, manifest_name = self._finished_before()
        else:
            try:
                metas, manifest_name = self._restore()
            except (CorruptInput, Diverged, NotFound, Unsupported) as error:
                shutil.rmtree(self.work, ignore_errors=True)  # what was planned and fetched leads nowhere
                if self.refused and isinstance(error, NotFound):
                    raise list(self.refused.values())[-1] from error
                raise
        proof = Proof(proven=False)
        if not claimed:
            self._enter(Stage.PROVE)
            proof = self._prove(metas, workers)
            self._enter(Stage.PROVEN)
        shutil.rmtree(self.work, ignore_errors=True)
        return Restored(
            metas=metas,
            proof=proof,
            manifest_name=manifest_name,
            fetched_bytes=self.fetching.fetched_bytes,
            frames=self.frames,
            range_diffs=self.range_diffs,
            refused=[str(error) for error in self.refused.values()],
            seconds=self.seconds,
            estimate=self.estimate,
        )

    def _restore(self) -> tuple[list[Meta], str]:
        plan, instead = written_plan(self.work, self.request), None
        is_new = plan is None
        while True:
            plan = self._fetch(plan, instead)
            if is_new:
                self.estimate = plan.estimate(cores=self.cores)
            try:
                metas = self._build(plan)
                break
            except (RangeCorrupt, Unsupported) as error:
                self._refuse(plan, error)
                plan, instead = None, plan
        self._enter(Stage.CLAIMED)
        self._publish()
        return metas, plan.manifest_name

    def _build(self, plan: RestorePlan) -> list[Meta]:
        self._enter(Stage.INGEST)
        failpoints.hit("restore.before_ingest")
        paths = {shard: self.draft.shard(shard, len(plan.wanted)).store_path for shard in plan.wanted}
        for shard, path in paths.items():
            self._ingest(path, plan, shard)
        return [self._replay(path, plan, shard) for shard, path in paths.items()]

    def _refuse(self, plan: RestorePlan, error: RangeCorrupt | Unsupported) -> None:
        """A range diff is not what it says: another plan goes without it, and begins with other stores. Raises the
        error if it is about something else."""
        refused = [one.name for one in plan.ranges if error.where.startswith(str(one.name))]
        if not refused:
            raise error
        log.warning("range_diff_refused", range=error.where, error=error.name, message=str(error))
        self.refused |= dict.fromkeys(refused, error)
        self._enter(Stage.PLAN)

    def _fetch(self, plan: RestorePlan | None, instead: RestorePlan | None) -> RestorePlan:
        """A plan, with all that it names here. What it names is pinned meanwhile; if a sweep was faster, or a range
        diff is damaged, there is another plan. ``plan``: one that is written down. Raises NotFound if there is none."""
        is_written = plan is not None
        while True:
            plan = plan or plan_restore(self.objects, self.request, refused=self.refused)
            try:
                with held(self.objects, plan.chain_id, Kind.PIN, plan.names):
                    if not is_written:
                        shutil.rmtree(self.draft.stores_path, ignore_errors=True)  # made by another plan
                        write_plan(self.work, self.objects, self.request, plan, instead=instead)
                        failpoints.hit("restore.planned")
                    self._enter(Stage.FETCH)
                    self.fetching.fetch(plan, lambda done, total: self._report(done, total, "bytes"))
                return plan
            except ObjectMissing:
                again = plan_restore(self.objects, self.request, refused=self.refused)
                if again == plan:
                    raise
                instead, plan, is_written = plan, again, False
                log.warning("restore_planned_again", height=plan.height, manifest=plan.manifest_name)
                if self.stage is Stage.FETCH:
                    self._enter(Stage.PLAN)
            except (RangeCorrupt, Unsupported) as error:
                self._refuse(plan, error)
                instead, plan, is_written = plan, None, False

    def _enter(self, stage: Stage) -> None:
        assert self.stage.may_lead_to(stage), (self.stage, stage)
        now = time.monotonic()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._since
        self.stage, self._since = stage, now

    def _report(self, done: int, total: int, unit: str) -> None:
        self.progress(Progress(self.stage, done, total, unit))

    def _finished_before(self) -> tuple[list[Meta], str]:
        """Stores that a restore of the same request made, before it was interrupted. Raises NotEmpty for any other."""
        plan = written_plan(self.work, self.request)
        if plan is not None:
            metas = [meta for one in self.data_dir.shard_dirs if (meta := held_meta(one.store_path)) is not None]
            stands = {(meta.tip.height, meta.base_height) for meta in metas}
            if len(metas) == len(plan.wanted) and stands == {(plan.height, plan.height)}:
                self.stage = Stage.CLAIMED
                return metas, plan.manifest_name
        raise NotEmpty(
            "this data directory holds a store already",
            where=str(self.data_dir.stores_path),
            way_out="restore into an empty directory, or remove this store first",
        )

    # Ingest and frames

    def _ingest(self, path: Path, plan: RestorePlan, shard: int) -> None:
        """A store with what the snapshot has of a shard, or with nothing, and its position."""
        if held_meta(path) is not None:
            return
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        store = RocksStore(path)
        try:
            if plan.manifest is not None:
                meta = plan.manifest.resumes[shard]
                self._take_parts(store, plan, shard)
            else:
                meta = before_first(self._opened(plan.hops_of(shard)[0]).resume)
            failpoints.hit("restore.after_ingest")
            store.write(Batch(meta={META_KEY: encode_meta(meta)}))
        finally:
            store.close()

    def _take_parts(self, store: RocksStore, plan: RestorePlan, shard: int) -> None:
        manifest = plan.manifest
        assert manifest is not None
        parts = manifest.parts_of(shard)
        if not parts:
            return
        # Links, so that the checked parts are still here if this is interrupted.
        links = self.work / "ingesting"
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        for part in parts:
            os.link(self.fetching.part_path(part), links / part.name)
        try:
            store.ingest([links / part.name for part in parts])
        except StoreCorrupt as error:
            raise PartCorrupt(f"a part cannot be taken in: {error.what}", where=manifest.name) from error
        self._report(len(parts), len(plan.parts), "parts")

    def _replay(self, path: Path, plan: RestorePlan, shard: int) -> Meta:
        """A shard's archived frames, up to the plan's height; then its store is as it will be, and synced."""
        store = RocksStore(path)
        try:
            data = store.get_meta(META_KEY)
            assert data is not None, path
            replay = Replay(store, decode_meta(data))
            for hop in plan.hops_of(shard):
                self._apply(replay, hop, plan)
            if replay.meta.tip.height != plan.height:
                raise NotFound(
                    f"the restore ended at block {replay.meta.tip.ref}, not at height {plan.height}",
                    way_out="run it again",
                )
            meta = settled(replay.meta)
            store.write(Batch(meta={META_KEY: encode_meta(meta), PROOF_KEY: encode_proof(Proof(proven=False))}))
            store.flush()
        finally:
            store.close()
        return meta

    def _apply(self, replay: Replay, hop: Hop, plan: RestorePlan) -> None:
        """A range diff, or a segment's frames. What is in the store already is passed by."""
        found, at = self._opened(hop), replay.meta.tip.height
        if isinstance(found, Segment):
            if hop.name.last >= at:
                self._go_to(Stage.FRAMES)
                for header in replay.run(found, plan.height):
                    failpoints.hit("restore.frame_applied")
                    self.frames += 1
                    self._report(header.ref.height, plan.height, "blocks")
        elif hop.name.last > at:
            self._go_to(Stage.RANGES)
            for changes in replay.run_range(found):
                failpoints.hit("restore.chunk_applied")
                self._report(changes, found.changes, "changes")
            self.range_diffs += 1

    def _opened(self, hop: Hop) -> Segment | RangeDiff:
        return self.fetching.range_diff(hop) if isinstance(hop, RangeObject) else self.fetching.segment(hop.name)

    def _go_to(self, stage: Stage) -> None:
        if self.stage is not stage:
            self._enter(stage)

    # Publish and prove

    def _has_store(self) -> bool:
        """A directory that was never written to whole holds nothing."""
        found = [one.store_path for one in (self.data_dir, *self.data_dir.shard_dirs)]
        return any((path / "CURRENT").exists() or any(path.glob("*.sst")) for path in found)

    def _publish(self) -> None:
        shutil.rmtree(self.data_dir.stores_path, ignore_errors=True)  # what `_has_store` says holds nothing
        draft = self.draft.stores_path
        draft.rename(self.data_dir.path / draft.name)
        sync(self.data_dir.path)
        for folder in (*FOLDERS, "ingesting"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def _prove(self, metas: list[Meta], workers: int | None) -> Proof:
        """Of all shards. Raises AuditFailed, StoreCorrupt: then there is no store any more."""
        total, done = sum(sum(meta.tip.counts.values()) for meta in metas), [0] * len(metas)

        async def prove_one(shard: int, store: RocksStore, folder: Path) -> Proof:
            def note(what: str, keys: int, _: int) -> None:
                done[shard] = keys
                self._report(sum(done), total, "keys")

            return (await prove(store, folder, workers=workers, report=note))[0]

        async def prove_all() -> list[Proof]:
            return await children.together(prove_one(shard, *one) for shard, one in enumerate(opened))

        with ExitStack() as stack:
            opened = []
            for one in self.data_dir.shard_dirs:
                opened.append((RocksStore(one.store_path), one.path))
                stack.callback(opened[-1][0].close)
            try:
                proofs = asyncio.run(prove_all())
            except (AuditFailed, StoreCorrupt):
                stack.close()
                self.data_dir.stores_path.rename(self.work / "refused")
                shutil.rmtree(self.work)
                raise
        return proofs[0] if len(proofs) == 1 else Proof(proven=True)


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


def main() -> int:
    """The helper process: the state of one shard, claimed, into a directory that has none."""
    parser = argparse.ArgumentParser(prog="python -m topology.restorer", description=main.__doc__)
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--chain", required=True)
    parser.add_argument("--generation", required=True)
    parser.add_argument("--shard", type=int, required=True)
    given = parser.parse_args()
    request = Request(chain=given.chain, generation=bytes.fromhex(given.generation), shard=given.shard)

    def work(report: children.Report) -> int:
        def note(at: Progress) -> None:
            report(at.stage.value, at.done, at.total)

        return restore(open_objects(given.objects), given.data_dir, request, claimed=True, progress=note).ref.height

    return children.serve(work)


if __name__ == "__main__":
    sys.exit(main())
