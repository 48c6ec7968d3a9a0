"""The replicator: the Faust agent of every node. Frames in, one atomic store write a group out."""

from __future__ import annotations

import asyncio
from typing import Any

from topology.shard_set import ShardSet


def make_agent(shard_set: ShardSet) -> Any:
    """The agent's function."""

    async def replicator(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            try:
                await shard_set.nodes[message.partition].on_diffs(message.offset, message.value)
            except Exception as error:
                shard_set.fail(error)
            if shard_set.stopping.is_set():
                await asyncio.Event().wait()  # until the worker takes this task down: nothing more is handled

    return replicator
