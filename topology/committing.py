"""When a shard's store is written: frames that were followed collect in a group, and one write batch takes it.

At the tip nothing waits; far behind, some milliseconds do, so that a group is worth its write. Shards that are kept
together write a frame once all of them have it, so that their stores stand at one position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pipeline.block import BlockRef
from pipeline.frame import Header
from pipeline.group import Step
from topology import logs
from topology.ending import Ending
from topology.shard_store import ShardStore

log = logs.get()

GROUP_WAIT_S = 0.005
"""How long a group waits for more frames while more are known to come."""
GROUP_FRAMES_MAX = 64
"""Frames in one write batch, whatever their size."""


class Committing:
    """One shard's frames, from when they are followed until they are in its store.

    * What one shard has and those kept together with it lack stays below the bound of a group: `wait_for_others`.
    """

    def __init__(self, stored: ShardStore, *, group_bytes_max: int, ending: Ending) -> None:
        self.kept_together: list[Committing] = []  # this one among them; empty: it writes by itself
        self.progressed = asyncio.Event()  # something was committed; cleared by who waits for it
        self.on_commit: list[Callable[[list[Step]], None]] = []
        self._stored = stored
        self._group_bytes_max = group_bytes_max
        self._ending = ending
        self._steps: list[Step] = []
        self._is_due = False
        self._others_moved = asyncio.Event()  # one of `kept_together` took a frame in

    @property
    def is_done(self) -> bool:
        """Whether all that was followed is written, but for what others lack."""
        ready = self._ready_seq()
        return not self._is_due and all(step.header.seq > ready for step in self._steps)

    async def wait_for_others(self) -> None:
        """Until what this shard has and others lack is below the bound of a group."""
        replica = self._stored.replica
        while (ready := self._ready_seq()) < replica.meta.seq and not self._ending.stopping.is_set():
            if self._is_full:
                self.commit()
            if self._is_full and self._is_left_behind(ready):
                replica.leave(ready)
            if not self._is_full:
                return
            self._others_moved.clear()
            await self._others_moved.wait()

    def _ready_seq(self) -> int:
        """The seq up to which frames may be written: all shards have them, and as one position."""
        own = self._stored.replica
        if not self.kept_together:
            return own.meta.seq
        replicas = [one._stored.replica for one in self.kept_together]
        ready = min(replica.meta.seq for replica in replicas)
        written = max(replica.written_seq for replica in replicas)
        while ready > written and len({_stand(replica.recent.header(ready)) for replica in replicas}) > 1:
            ready -= 1  # one of them applied what another refused: it is taken back
        return ready

    def _is_left_behind(self, ready_seq: int) -> bool:
        """Whether another shard went on from a frame of a later source: what this one has above is void."""
        own, seq = self._stored.replica, ready_seq + 1
        others = [one._stored.replica for one in self.kept_together]
        return any(
            other.meta.seq >= seq > other.written_seq
            and own.meta.seq >= seq > own.written_seq
            and other.recent.header(seq).source_epoch > own.recent.header(seq).source_epoch
            for other in others
        )

    @property
    def _is_full(self) -> bool:
        replica = self._stored.replica
        return replica.group_length >= GROUP_FRAMES_MAX or replica.group_bytes >= self._group_bytes_max

    def take(self, step: Step, *, more_come: bool) -> None:
        """A frame was followed: commit it once nothing more is waiting, or at once when the group is full."""
        self._steps.append(step)
        if self._is_full:
            self._commit_all()
        elif not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(GROUP_WAIT_S if more_come else 0, self._commit_or_fail)
        for one in self.kept_together:
            one._others_moved.set()

    def _commit_or_fail(self) -> None:
        self._is_due = False
        if not self._stored.is_open or self._ending.stopping.is_set():
            return
        try:
            self._commit_all()
        except Exception as error:
            self._ending.fail(error)

    def _commit_all(self) -> None:
        """What this shard's last frames made ready, here and elsewhere."""
        for one in self.kept_together or [self]:
            one.commit()

    def commit(self) -> None:
        """Write what is ready."""
        stored = self._stored
        seq = stored.replica.meta.seq
        self._steps = [step for step in self._steps if step.header.seq <= seq]  # an EPOCH may have taken some back
        stored.committed = stored.replica.commit(self._ready_seq())
        count = sum(step.header.seq <= stored.committed.seq for step in self._steps)
        if count == 0:
            return
        steps, self._steps = self._steps[:count], self._steps[count:]
        last = steps[-1]
        log.info(
            "group_committed",
            height=last.after.height,
            seq=last.header.seq,
            blocks=len(steps),
            changes=sum(step.header.op_count for step in steps),
            bytes=sum(len(step.whole) for step in steps),
        )
        self.progressed.set()
        for listener in self.on_commit:
            listener(steps)

    async def wait_for_progress(self) -> None:
        """Until something was committed, or the worker stops."""
        self.progressed.clear()
        waits = [asyncio.create_task(self.progressed.wait()), asyncio.create_task(self._ending.stopping.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


def _stand(header: Header) -> tuple[int, int, BlockRef]:
    """What two shards' frames of one seq have in common if they are of one position."""
    return header.source_epoch, header.walk, header.ref
