"""Shards of one chain stay within sight of each other: none goes on where another cannot follow.

A shard may refuse a block that the others apply: its own ops do not meet its state. The source then says the block
again, and what the others made of it, and of all behind it, is void (`Lead`). They can take back what is not final and
not archived. So a shard waits, before it takes in an event, until no other is further behind than that: those of this
worker by what they are, those of others by what they say on the topic `anchors`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from pipeline.anchors import decode_anchor
from pipeline.errors import FrameCorrupt, NotFound
from pipeline.generation import Generation
from pipeline.position import Meta
from pipeline.primary import Primary
from pipeline.replica import MEETING_BLOCKS
from topology import log_check, topics
from topology.anchors import Anchoring
from topology.lead import State
from topology.node import Node
from topology.transports.base import Broker

_FRAMES_MIN = 32
"""So far ahead a shard may always be, however small finality is: its archive has whole segments of 64 blocks."""
_PAUSE_S = 0.05
_PATIENCE = 20
"""So many pauses others may just be busy. Then it is looked whether a source said the next event again."""
_ASK_S = 0.5
"""Between two looks at what other workers say."""


class Abreast:
    """Of a primary's worker. Holds of every other worker's shard the seq that it said last."""

    def __init__(self, nodes: Sequence[Node], broker: Broker, generation: Generation, anchoring: Anchoring) -> None:
        self._nodes = nodes
        self._broker = broker
        self._generation = generation
        self._anchoring = anchoring
        self._said: dict[int, int] = {}
        self._searches: dict[int, tuple[int, log_check.MendSearch]] = {}  # by shard, with the session of each
        self._next_anchor = 0
        self._asked_s = 0.0
        self._asking = asyncio.Lock()

    async def wait(self, node: Node, offset: int) -> None:
        """Before an event, at an offset: until no shard is too far behind this one; or until it is known that the event
        is void, because a source has said it again since. Then the node passes it by."""
        session, patience = node.session, _PATIENCE
        while node.session == session and not node.stopping.is_set() and (primary := self._far_ahead(node)) is not None:
            if any(self._seq_here(other) is None for other in self._nodes):
                await self._ask()
            await asyncio.sleep(_PAUSE_S)
            patience -= 1
            if patience < 0 and await self._is_void(node, offset, primary.ahead):
                lead = node.lead
                if lead is not None and lead.primary is primary and node.session == session:
                    lead.pass_by()
                return

    async def _is_void(self, node: Node, offset: int, ahead: Meta) -> bool:
        """As far as it was looked."""
        session, search = self._searches.get(node.shard, (-1, None))
        if search is None or session != node.session:
            source = (ahead.source_epoch, ahead.source_writer)
            search = log_check.MendSearch(self._broker, self._generation, node.shard, offset, source)
            self._searches[node.shard] = node.session, search
        await search.look()
        return search.is_void(offset, ahead.walk)

    def _far_ahead(self, node: Node) -> Primary | None:
        """What a node would propose with, if it is to wait for others."""
        lead = node.lead
        if lead is None or lead.primary is None or lead.passes_by:
            return None
        ahead = lead.primary.ahead
        furthest = max(_FRAMES_MIN, min(MEETING_BLOCKS, ahead.finality))
        return lead.primary if ahead.seq - min(map(self._seq, self._nodes)) >= furthest else None

    def _seq(self, node: Node) -> int:
        here = self._seq_here(node)
        return self._said.get(node.shard, 0) if here is None else here

    @staticmethod
    def _seq_here(node: Node) -> int | None:
        """Where a shard stands that this worker leads. One that is followed or restored here may stand far above."""
        return node.committed_meta.seq if node.is_owned and node.state is State.LEADING else None

    async def _ask(self) -> None:
        """What others say by now; and say again what they wait for, as the topic may have lost it."""
        async with self._asking:
            now_s = asyncio.get_running_loop().time()
            if now_s < self._asked_s + _ASK_S:
                return
            self._asked_s = now_s
            for node in self._nodes:
                if self._seq_here(node) is not None:
                    self._anchoring.stands(node.committed_meta)
            topic = self._generation.anchors_topic
            try:
                first, end = await self._broker.bounds(topic, 0)
                start = first if self._next_anchor > end else max(first, self._next_anchor)
                async for record in topics.records(self._broker, topic, start):
                    self._hear(record.value)
                    self._next_anchor = record.offset + 1
            except NotFound:
                return

    def _hear(self, record: bytes) -> None:
        """What was said last counts: a shard may have taken frames back since."""
        with suppress(FrameCorrupt):
            anchor = decode_anchor(record)
            if (anchor.generation, anchor.shards) == (self._generation.generation, self._generation.shards):
                self._said[anchor.shard] = anchor.tip.seq
