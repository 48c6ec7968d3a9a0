"""When a primary trims its topics (`trimmer`): once more is archived, if `trim_keep_blocks` says so.

Of several primaries the one does it that has the first shard. Trouble, with the object store or the broker, costs room
in the topics and nothing else: it is said in `status`, and tried again.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from pipeline.errors import StateferryError
from pipeline.objects import open_objects
from topology import logs, trimmer
from topology.shard_set import ShardSet
from topology.signing import required_signer

log = logs.get()

PAUSE_S = 60.0
"""Between two trims: a busy primary archives several segments in that time."""
_LOOK_S = 0.5


class Trimming:
    """Of one worker."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._shard_set = shard_set
        self._keep_blocks = shard_set.settings.trim_keep_blocks
        self._height: int | None = None  # of the last block whose records are gone, as far as this worker knows
        self._trouble: StateferryError | None = None

    @property
    def status(self) -> dict[str, Any] | None:
        """None: it is not to trim."""
        if self._keep_blocks is None:
            return None
        trouble = None if self._trouble is None else str(self._trouble)
        return {"keep_blocks": self._keep_blocks, "height": self._height, "trouble": trouble}

    async def run(self) -> None:
        """Until the worker stops."""
        if self._keep_blocks is None:
            return
        first, stopping = self._shard_set.nodes[0], self._shard_set.stopping
        trimmed_at, not_before_s = -1, 0.0
        while not stopping.is_set():
            archived_to = first.committed_meta.archived_to
            if first.is_owned and archived_to != trimmed_at and time.monotonic() >= not_before_s:
                if await self._trim(self._keep_blocks):
                    trimmed_at = archived_to
                not_before_s = time.monotonic() + PAUSE_S
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _LOOK_S)

    async def _trim(self, keep_blocks: int) -> bool:
        shard_set, settings = self._shard_set, self._shard_set.settings
        try:
            found = await trimmer.look(
                shard_set.broker,
                open_objects(settings.objects_url),
                shard_set.generation,
                keep_blocks,
                required_signer(settings),
            )
            await trimmer.trim(shard_set.broker, found)
        except StateferryError as error:
            if self._trouble is None:
                log.warning("topics_not_trimmed", error=error.name, message=str(error))
            self._trouble = error
            return False
        self._trouble = None
        if found.floor is not None:
            self._height = found.floor.ref.height
        return True
