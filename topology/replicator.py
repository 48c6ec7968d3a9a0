"""The replicator: the Faust agent of every node. Frames in, one atomic store write a group out."""

from __future__ import annotations

import asyncio
from typing import Any

from topology.node import Node


def make_agent(node: Node) -> Any:
    """The agent's function."""

    async def replicator(stream: Any) -> None:
        async for event in stream.events():
            try:
                await node.on_diffs(event.message.offset, event.message.value)
            except Exception as error:
                node.fail(error)
            if node.stopping.is_set():
                await asyncio.Event().wait()  # until the worker takes this task down: nothing more is handled

    return replicator
