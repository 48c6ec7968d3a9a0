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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline import failpoints
from pipeline.archive_names import RangeName
from pipeline.block import BlockRef
from pipeline.errors import (
    AuditFailed,
    CorruptInput,
    Diverged,
    NotEmpty,
    NotFound,
    ObjectMissing,
    RangeCorrupt,
    StateferryError,
    StoreCorrupt,
    Unsupported,
)
from pipeline.leases import Kind
from pipeline.objects import ObjectStore, open_objects
from pipeline.objects.files import sync
from pipeline.plans import Estimate, RestorePlan
from pipeline.position import Meta
from pipeline.restore import Stage
from pipeline.shards import join_metas
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof
from topology import children, logs
from topology.building import Building, Course, Progress, ProgressReport, held_meta, no_progress
from topology.data_dir import DataDir
from topology.fetching import FOLDERS, Fetching
from topology.holding import held
from topology.restore_plans import Request, plan_restore, write_plan, written_plan
from topology.verifier import prove

log = logs.get()

WORK_FOLDER = "restoring"


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
    progress: ProgressReport = no_progress,
    workers: int | None = None,
) -> Restored:
    """Fill a data directory, which the caller has locked. ``claimed``: do not hash every key afterwards.

    Goes on with an interrupted restore that asked for the same; anything else found there is removed. Raises NotEmpty,
    NotFound, PartCorrupt, ManifestCorrupt, SegmentCorrupt, Diverged, DiskFull: then there is no store.
    """
    cores = 0 if claimed else workers or os.cpu_count() or 1
    return _Restorer(objects, DataDir(data_dir), request, progress, cores).run(claimed, workers)


class _Restorer:
    """One attempt.

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
        self.course = Course(progress)
        self.fetching = Fetching(objects, self.work)
        self.building = Building(self.work, self.draft, self.fetching, self.course)
        self.refused: dict[RangeName, StateferryError] = {}
        self.estimate: Estimate | None = None

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
            self.course.enter(Stage.PROVE)
            proof = self._prove(metas, workers)
            self.course.enter(Stage.PROVEN)
        shutil.rmtree(self.work, ignore_errors=True)
        return Restored(
            metas=metas,
            proof=proof,
            manifest_name=manifest_name,
            fetched_bytes=self.fetching.fetched_bytes,
            frames=self.building.frames,
            range_diffs=self.building.range_diffs,
            refused=[str(error) for error in self.refused.values()],
            seconds=self.course.seconds,
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
                metas = self.building.build(plan)
                break
            except (RangeCorrupt, Unsupported) as error:
                self._refuse(plan, error)
                plan, instead = None, plan
        self.course.enter(Stage.CLAIMED)
        self._publish()
        return metas, plan.manifest_name

    def _refuse(self, plan: RestorePlan, error: RangeCorrupt | Unsupported) -> None:
        """A range diff is not what it says: another plan goes without it, and begins with other stores. Raises the
        error if it is about something else."""
        refused = [one.name for one in plan.ranges if error.where.startswith(str(one.name))]
        if not refused:
            raise error
        log.warning("range_diff_refused", range=error.where, error=error.name, message=str(error))
        self.refused |= dict.fromkeys(refused, error)
        self.course.enter(Stage.PLAN)

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
                    self.course.enter(Stage.FETCH)
                    self.fetching.fetch(plan, lambda done, total: self.course.report(done, total, "bytes"))
                return plan
            except ObjectMissing:
                again = plan_restore(self.objects, self.request, refused=self.refused)
                if again == plan:
                    raise
                instead, plan, is_written = plan, again, False
                log.warning("restore_planned_again", height=plan.height, manifest=plan.manifest_name)
                if self.course.stage is Stage.FETCH:
                    self.course.enter(Stage.PLAN)
            except (RangeCorrupt, Unsupported) as error:
                self._refuse(plan, error)
                instead, plan, is_written = plan, None, False

    def _finished_before(self) -> tuple[list[Meta], str]:
        """Stores that a restore of the same request made, before it was interrupted. Raises NotEmpty for any other."""
        plan = written_plan(self.work, self.request)
        if plan is not None:
            metas = [meta for one in self.data_dir.shard_dirs if (meta := held_meta(one.store_path)) is not None]
            stands = {(meta.tip.height, meta.base_height) for meta in metas}
            if len(metas) == len(plan.wanted) and stands == {(plan.height, plan.height)}:
                self.course.begin(Stage.CLAIMED)
                return metas, plan.manifest_name
        raise NotEmpty(
            "this data directory holds a store already",
            where=str(self.data_dir.stores_path),
            way_out="restore into an empty directory, or remove this store first",
        )

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
                self.course.report(sum(done), total, "keys")

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


def main() -> int:
    """The helper process: the state of one shard, claimed, into a directory that has none."""
    parser = argparse.ArgumentParser(prog="python -m topology.restorer", description=main.__doc__)
    parser.add_argument("--objects", required=True, help="URL of the object store")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--chain", required=True)
    parser.add_argument("--generation", required=True)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--signer", type=bytes.fromhex, help="who must have signed the snapshot: a public key in hex")
    given = parser.parse_args()
    request = Request(
        chain=given.chain, generation=bytes.fromhex(given.generation), shard=given.shard, signer=given.signer
    )

    def work(report: children.Report) -> int:
        def note(at: Progress) -> None:
            report(at.stage.value, at.done, at.total)

        return restore(open_objects(given.objects), given.data_dir, request, claimed=True, progress=note).ref.height

    return children.serve(work)


if __name__ == "__main__":
    sys.exit(main())
