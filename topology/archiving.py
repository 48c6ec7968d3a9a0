"""When a primary archives: whenever a whole segment of final blocks waits, one after the other, while frames flow.

An object store that cannot be used costs nothing but time: the journal keeps what is not archived. `status` says so.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pipeline.archive import plan_segments
from pipeline.errors import ObjectsUnavailable
from pipeline.objects import open_objects
from topology import logs
from topology.archiver import Archiver
from topology.node import Node

log = logs.get()

_PAUSE_S = 5.0
"""Between tries while the object store cannot be used."""


class Archiving:
    """Of one shard of a primary. `run` archives what is due, `flush` all there is; they take turns."""

    def __init__(self, node: Node) -> None:
        self.trouble: ObjectsUnavailable | None = None  # why nothing is archived now
        self._node = node
        self._archiver = Archiver(open_objects(node.settings.objects_url))

    async def run(self) -> None:
        """Until the worker stops. Raises what `Archiver.put` raises, but for a store that cannot be used."""
        node = self._node
        while not node.stopping.is_set():
            if not self.is_due:
                await node.committing.wait_for_progress()
                continue
            try:
                await self._once()  # frames and reads go in between
            except ObjectsUnavailable as error:
                # A primary need not stand still for an object store that does.
                if self.trouble is None:
                    log.warning("archive_waits", error=error.name, message=str(error))
                self.trouble = error
                with suppress(TimeoutError):
                    await asyncio.wait_for(node.stopping.wait(), _PAUSE_S)
            else:
                self.trouble = None

    @property
    def is_due(self) -> bool:
        """Whether a whole segment of final blocks waits for the archive."""
        stored = self._node.stored
        waits = bool(plan_segments(stored.committed.archived_to, stored.committed.final_height))
        return self._node.is_owned and stored.proof.proven and waits

    async def flush(self) -> None:
        """Archive all that is final, if the shard is this worker's. Raises what the object store raises."""
        if self._node.is_owned:
            while await self._once(flush=True):
                pass

    async def _once(self, *, flush: bool = False) -> bool:
        """Archive the next segment, or with ``flush`` what there is of it. False if there was nothing to do.

        The object store is asked in a thread: frames and reads go on meanwhile. Raises what it raises.
        """
        node, stored, archiver = self._node, self._node.stored, self._archiver
        async with stored.in_use:
            node.committing.commit()
            due = archiver.plan(stored.replica, proven=stored.proof.proven, flush=flush)
            if due is None:
                return False
            session = node.session
            gap = await asyncio.to_thread(archiver.put, due)
            if session == node.session and stored.is_open:
                archiver.done(stored.replica, due)
                node.committing.commit()
        if gap is not None:
            log.warning("archive_gap_left", first_height=gap[0], last_height=gap[1])
        if due.blocks:
            log.info("segment_archived", segment=due.name, blocks=due.blocks, bytes=due.frame_bytes)
        return True
