"""Snapshots of a running worker: those that its policy asks for, and those that somebody does.

The policy looks at what the object store has, once in a while. Whatever goes wrong costs a snapshot and nothing else:
it is said in `status`, and tried again. A snapshot that takes too long, or is cancelled, ends with its process; parts
that it put are nobody's, and `gc` takes them.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from pipeline.archive import Committed
from pipeline.archive_names import parse_segment_name
from pipeline.errors import Diverged, SnapshotCancelled, StateferryError
from pipeline.meeting import own_final
from pipeline.objects import open_objects
from pipeline.policy import Due, Final, Last, Triggers, due
from pipeline.snapshot import ManifestName, parse_manifest_name
from topology import answers, logs
from topology.settings import Settings
from topology.shard_set import ShardSet
from topology.shard_store import Role

log = logs.get()

LOOK_S = 60.0
"""Between looks at the object store: a listing of the generation's objects each."""
_TICK_S = 0.2


def triggers_of(settings: Settings) -> Triggers:
    return Triggers(
        blocks=settings.snapshot_blocks,
        archived_bytes=settings.snapshot_archived_bytes,
        seconds=settings.snapshot_seconds,
        share=settings.snapshot_share,
    )


class Snapshotting:
    """Of one worker. `run` follows the policy, `take` is for whoever asks; they take turns (`snapshotter`)."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._shard_set = shard_set
        self._triggers = triggers_of(shard_set.settings)
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._last: Last | None = None
        self._due = Due(False, "on demand only" if not self._triggers.are_set else "not looked at yet")
        self._trouble: Exception | None = None

    @property
    def status(self) -> dict[str, Any]:
        """The last snapshot that the policy saw, what it waits for, and what went wrong."""
        last = self._last
        return {
            "running": len(self._running),
            "due": self._due.is_due,
            "why": self._due.why,
            "last_height": None if last is None else last.height,
            "last_put_s": None if last is None else round(last.put_s, 3),
            "trouble": None if self._trouble is None else str(self._trouble),
        }

    async def run(self) -> None:
        """Until the worker stops. Raises Diverged: what a snapshot finds wrong in a store is wrong."""
        stopping = self._shard_set.stopping
        next_s, seen = 0.0, -1
        while self._triggers.are_set and not stopping.is_set():
            height = self._archived_height()
            may_differ = height != seen or self._triggers.seconds or self._trouble or self._due.is_due
            if time.monotonic() >= next_s and may_differ:
                next_s, seen = time.monotonic() + LOOK_S, height
                await self._follow_policy()
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _TICK_S)

    async def _follow_policy(self) -> None:
        try:
            self._due = await asyncio.to_thread(self._look, self._final())
            if self._due.is_due and self._shard_set.proof.proven:
                taken = await self.take(None)
                self._due = Due(False, f"taken at height {taken['height']}")
            self._trouble = None
        except Diverged:
            raise
        except (StateferryError, OSError) as error:
            self._trouble = error
            log.warning("snapshot_not_taken", error=type(error).__name__, message=str(error))

    async def take(self, height: int | None) -> dict[str, Any]:
        """A snapshot, as `answers.snapshot`. Raises SnapshotCancelled, and what that raises."""
        shard_set = self._shard_set
        stores = [node.stored.store for node in shard_set.nodes]
        task = asyncio.create_task(answers.snapshot(stores, shard_set.data_dir, shard_set.settings, height))
        self._running.add(task)
        timeout_s = shard_set.settings.snapshot_timeout_s
        try:
            done, _ = await asyncio.wait([task], timeout=timeout_s)
            if not done:
                raise SnapshotCancelled(
                    f"a snapshot took longer than {timeout_s:g} s", way_out="raise snapshot_timeout_s, or look why"
                )
            if task.cancelled():
                raise SnapshotCancelled("the snapshot was cancelled", way_out="take it again: `stateferry snapshot`")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._running.discard(task)

    def cancel(self) -> int:
        """End those under way. How many."""
        for task in self._running:
            task.cancel()
        return len(self._running)

    def _archived_height(self) -> int:
        """Up to where all that is here is final and, of a primary's shards, archived."""
        nodes = self._shard_set.owned or self._shard_set.nodes
        archived = [node.committed_meta.archived_to - 1 for node in nodes if node.role is Role.PRIMARY]
        return min([*(own_final(node.committed_meta) for node in nodes), *archived])

    def _final(self) -> Final:
        """Its root is only looked up with one shard: with several, their tips have to meet first."""
        height, nodes = self._archived_height(), self._shard_set.nodes
        if len(nodes) > 1:
            return Final(height, None)
        following = Committed(nodes[0].stored.store).entry(height + 1)
        tip = nodes[0].committed_meta.tip if following is None else following.before.tip
        return Final(height, tip.root if tip.height == height else None)

    def _look(self, final: Final) -> Due:
        generation = self._shard_set.generation
        objects = open_objects(self._shard_set.settings.objects_url)
        infos = list(objects.list(f"{generation.chain_id}/{generation.generation.hex()}/"))
        names = [name for info in infos if (name := parse_manifest_name(info.name)) is not None]
        newest: ManifestName | None = max(names, key=lambda name: name.height, default=None)
        if newest is None:
            self._last = None
        else:
            size = sum(info.size_bytes for info in infos if info.name.startswith(f"{newest.folder}/"))
            self._last = Last(newest.height, newest.root_start, size, objects.modified_s(str(newest)))
        above = -1 if newest is None else newest.height
        segments = ((parse_segment_name(info.name), info.size_bytes) for info in infos)
        archived = sum(size for name, size in segments if name is not None and name.first > above)
        return due(self._triggers, self._last, final, archived, time.time())
