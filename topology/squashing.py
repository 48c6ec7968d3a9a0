"""When the archive of a primary is squashed: once it has been quiet for a while, or much has come into it.

While a primary catches up, its cores have better things to do; so range diffs are made in a helper process (`squasher`)
that gives way, of many segments at once. Trouble with the object store, or with what stands there, costs range diffs
and nothing else: restores take frames instead. Only another history under a range diff's name ends the worker, as it
does under a segment's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from pipeline.errors import Diverged, StateferryError
from pipeline.squash import LEVELS
from topology import logs
from topology.node import Node
from topology.squasher import SCRATCH_FOLDER, Archive, squash_in_process

log = logs.get()

QUIET_S = 30.0
"""Nothing was archived for so long."""
BLOCKS_MAX = LEVELS[1]
"""Archived blocks that wait for a quiet time: one range diff of the second level."""
_LOOK_S = 1.0


class Waiting:
    """What was archived of one shard and not yet squashed. Heights are those of the next block the archive wants."""

    def __init__(self) -> None:
        self.squashed_to = -1  # not known: what earlier workers left is looked for once
        self._archived_to = -1
        self._since_s = 0.0
        self._not_before_s = 0.0

    def failed(self, now_s: float) -> None:
        """It is tried again after a while."""
        self._not_before_s = now_s + QUIET_S

    def is_due(self, archived_to: int, now_s: float) -> bool:
        if archived_to != self._archived_to:
            self._archived_to, self._since_s = archived_to, now_s
        level = LEVELS[0]
        if archived_to // level <= self.squashed_to // level:
            return False
        is_much = self.squashed_to >= 0 and archived_to - self.squashed_to >= BLOCKS_MAX
        return (is_much or now_s - self._since_s >= QUIET_S) and now_s >= self._not_before_s


async def run(nodes: Sequence[Node], objects_url: str, stopping: asyncio.Event) -> None:
    """Until ``stopping``. Raises ArchiveConflict."""
    waiting = {node.shard: Waiting() for node in nodes}
    while not stopping.is_set():
        for node in nodes:
            archived_to = node.committed_meta.archived_to
            if node.is_owned and waiting[node.shard].is_due(archived_to, time.monotonic()):
                if await _squash(node, objects_url):
                    waiting[node.shard].squashed_to = archived_to
                else:
                    waiting[node.shard].failed(time.monotonic())
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _LOOK_S)


async def _squash(node: Node, objects_url: str) -> bool:
    generation, started_s = node.generation, time.monotonic()
    archive = Archive(generation.chain_id, generation.generation, node.shard)
    try:
        made = await squash_in_process(archive, node.data_dir.path / SCRATCH_FOLDER, objects_url)
    except Diverged:
        raise
    except StateferryError as error:
        log.warning("archive_not_squashed", shard=node.shard, error=error.name, message=str(error))
        return False
    log.info("archive_squashed", shard=node.shard, ranges=made, seconds=round(time.monotonic() - started_s, 3))
    return True
