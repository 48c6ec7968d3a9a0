"""The applier: the Faust agent of a primary. Block events in, frames out.

It waits for nothing but room. Tasks of their own finish what it began and produce it, and check what the broker has
acknowledged, both in order. A send that fails ends the worker: only the log says what became of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from pipeline import failpoints
from topology.node import Node
from topology.shard_set import ShardSet


def make_agent(shard_set: ShardSet) -> Any:
    """The agent's function."""

    async def applier(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            try:
                await shard_set.on_blocks(message.partition, message.offset, message.value)
            except Exception as error:
                shard_set.fail(error)
            if shard_set.stopping.is_set():
                await asyncio.Event().wait()  # until the worker takes this task down: nothing more is handled

    return applier


async def finish_begun(node: Node, acknowledgements: asyncio.Queue[Awaitable[Any]]) -> None:
    """Produce every frame that the agent began, in order."""
    assert node.lead is not None
    while True:
        try:
            for sent in await node.lead.finish():
                await acknowledgements.put(sent)
        except Exception as error:
            node.fail(error)
            return


async def check_acknowledgements(shard_set: ShardSet, acknowledgements: asyncio.Queue[Awaitable[Any]]) -> None:
    """Await every send, in order."""
    while True:
        sent = await acknowledgements.get()
        try:
            await sent
        except Exception as error:
            shard_set.fail(error)
            return
        failpoints.hit("propose.produced")
