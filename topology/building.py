"""Building: stores from what a restore fetched: a snapshot's parts, then range diffs and frames.

Whatever ends it is taken up again: a store has a position once its parts are in, and from there on the position says
what is in it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline import failpoints
from pipeline.archive import Segment
from pipeline.archive_names import RangeObject
from pipeline.errors import NotFound, PartCorrupt, StoreCorrupt
from pipeline.plans import Hop, RestorePlan
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.ranges import RangeDiff
from pipeline.restore import Replay, Stage, before_first, settled
from pipeline.stores.base import META_KEY, PROOF_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, encode_proof
from topology.data_dir import DataDir
from topology.fetching import Fetching


class Progress(NamedTuple):
    """How far a stage is. ``total`` 0: not known."""

    stage: Stage
    done: int
    total: int
    unit: str  # bytes, parts, changes, blocks, keys


ProgressReport = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """For callers that do not want to know."""


class Course:
    """Where a restore is, and what each stage took. `enter` is the only way from stage to stage."""

    def __init__(self, progress: ProgressReport) -> None:
        self.stage = Stage.PLAN
        self.seconds: dict[Stage, float] = {}
        self._progress = progress
        self._since = time.monotonic()

    def begin(self, stage: Stage) -> None:
        """What leads there was done by an earlier run."""
        self.stage = stage

    def enter(self, stage: Stage) -> None:
        assert self.stage.may_lead_to(stage), (self.stage, stage)
        now = time.monotonic()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._since
        self.stage, self._since = stage, now

    def go_to(self, stage: Stage) -> None:
        """Enter it, or stay in it."""
        if self.stage is not stage:
            self.enter(stage)

    def report(self, done: int, total: int, unit: str) -> None:
        self._progress(Progress(self.stage, done, total, unit))


class Building:
    """Stores in ``draft``, which is inside of ``work``."""

    def __init__(self, work: Path, draft: DataDir, fetching: Fetching, course: Course) -> None:
        self.frames = 0  # applied by this object
        self.range_diffs = 0
        self._work = work
        self._draft = draft
        self._fetching = fetching
        self._course = course

    def build(self, plan: RestorePlan) -> list[Meta]:
        """The stores of all shards of a plan, at its height. Raises RangeCorrupt: then they are of no use; PartCorrupt,
        Diverged, NotFound, DiskFull."""
        self._course.enter(Stage.INGEST)
        failpoints.hit("restore.before_ingest")
        paths = {shard: self._draft.shard(shard, len(plan.wanted)).store_path for shard in plan.wanted}
        for shard, path in paths.items():
            self._ingest(path, plan, shard)
        return [self._replay(path, plan, shard) for shard, path in paths.items()]

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
        links = self._work / "ingesting"
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        for part in parts:
            os.link(self._fetching.part_path(part), links / part.name)
        try:
            store.ingest([links / part.name for part in parts])
        except StoreCorrupt as error:
            raise PartCorrupt(f"a part cannot be taken in: {error.what}", where=manifest.name) from error
        self._course.report(len(parts), len(plan.parts), "parts")

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
                self._course.go_to(Stage.FRAMES)
                for header in replay.run(found, plan.height):
                    failpoints.hit("restore.frame_applied")
                    self.frames += 1
                    self._course.report(header.ref.height, plan.height, "blocks")
        elif hop.name.last > at:
            self._course.go_to(Stage.RANGES)
            for changes in replay.run_range(found):
                failpoints.hit("restore.chunk_applied")
                self._course.report(changes, found.changes, "changes")
            self.range_diffs += 1

    def _opened(self, hop: Hop) -> Segment | RangeDiff:
        return self._fetching.range_diff(hop) if isinstance(hop, RangeObject) else self._fetching.segment(hop.name)


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
