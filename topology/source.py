"""Publishing a source's walk on the blocks topic, from where the topic itself says that it stands.

A source keeps no state of its own. It reads what the topic holds (headers only), knows from it the branch, the walk
number and the epoch in force, opens its own epoch with the first event it has to say, and appends. A second source
that starts later is in force from its EPOCH on; what the first still appends is void to every reader.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline import chunk, failpoints
from pipeline.block import Block, BlockRef, Connect, Event, Rewind, SourceEpoch, SourceStamp, encode_event
from pipeline.errors import BlockOrphan, EventCorrupt
from pipeline.generation import Generation
from pipeline.inlet import EventReader, SourcePosition
from pipeline.sources import branch
from topology import topics
from topology.transports.base import Broker

BATCH_BYTES_MAX = 4 << 20
"""Events encoded and not yet appended; a batch is one append."""
BATCH_RECORDS_MAX = 64


class Offer(NamedTuple):
    """A block that a source has, before its height is known. ``make`` gives the block at a height."""

    block_hash: bytes
    parent_hash: bytes
    make: Callable[[int], Block]
    where: str


class Published(NamedTuple):
    """What came of one offer."""

    ref: BlockRef | None  # None: skipped
    rewound_to: BlockRef | None


async def read_position(broker: Broker, generation: Generation) -> SourcePosition:
    """Where the walk on the topic stands."""
    position = SourcePosition(generation.generation, generation.base)
    reader = EventReader(generation.generation, with_ops=False)
    async for record in topics.records(broker, generation.blocks_topic):
        try:
            found = reader.feed(record.value, record.offset, position.source)
        except EventCorrupt:
            position.meet_bad_record()
            continue
        if found is not None:
            position.follow(found[0])
    return position


class Publisher:
    """One writer's reign on the blocks topic.

    * Nothing is appended before there is something to say: publishing the same blocks again changes nothing.
    * `flush` before the end, or the last batch is lost; what was appended is durable.
    """

    def __init__(self, broker: Broker, generation: Generation, position: SourcePosition) -> None:
        self.position = position
        self._broker = broker
        self._generation = generation
        self._writer = secrets.token_bytes(16)
        self._is_open = False
        self._reached_branch = False
        self._first_below_base: Offer | None = None
        self._batch: list[tuple[bytes | None, bytes]] = []
        self._batch_bytes = 0

    async def offer(self, offer: Offer, *, again: bool = False) -> Published:
        """Publish a block where it belongs, rewinding first if it stands on another branch. Raises BlockOrphan,
        WrongChain, and what ``offer.make`` raises."""
        if self._is_below_base(offer):
            self._first_below_base = self._first_below_base or offer
            return Published(ref=None, rewound_to=None)
        try:
            planned = branch.plan(
                self.position.branch, offer.parent_hash, offer.block_hash, again=again, where=offer.where
            )
        except BlockOrphan:
            offer.make(0)  # garbage has an unknown parent too, but that is not what is wrong with it
            raise
        match planned:
            case branch.Skip():
                return Published(ref=None, rewound_to=None)
            case branch.Connect(height=height):
                await self._say_connect(offer.make(height))
                return Published(ref=BlockRef(height, offer.block_hash), rewound_to=None)
            case branch.RewindThenConnect(to=to, height=height):
                block = offer.make(height)  # before the rewind: a block that cannot be read rewinds nothing
                await self._say(Rewind(stamp=self._stamp(), walk=self.position.walk + 1, to=to))
                await self._say_connect(block)
                return Published(ref=block.ref, rewound_to=to)

    def _is_below_base(self, offer: Offer) -> bool:
        """Whether the blocks offered have not reached the base yet: files begin where the chain does."""
        if self._reached_branch or self._generation.base is None:
            return False
        known = self.position.branch
        hashes = (offer.block_hash, offer.parent_hash)
        self._reached_branch = any(known.ref(one) is not None or known.was_left(one) for one in hashes)
        return not self._reached_branch

    def check_reached(self) -> None:
        """Raises BlockOrphan if blocks were offered and none of them meets the branch."""
        first = self._first_below_base
        if first is not None and not self._reached_branch:
            branch.plan(self.position.branch, first.parent_hash, first.block_hash, where=first.where)

    async def _say_connect(self, block: Block) -> None:
        await self._say(Connect(stamp=self._stamp(), walk=self.position.walk + 1, block=block))

    def _stamp(self) -> SourceStamp:
        epoch, _ = self.position.source
        return SourceStamp(
            chain_id=self._generation.chain_id,
            generation=self._generation.generation,
            epoch=epoch if self._is_open else epoch + 1,
            writer=self._writer,
        )

    async def _say(self, event: Event) -> None:
        if not self._is_open:
            opening = SourceEpoch(stamp=self._stamp(), resume_walk=self.position.walk + 1)
            self._collect(opening, 0)
            self._is_open = True
        assert not isinstance(event, SourceEpoch)
        self._collect(event, event.walk)
        if self._batch_bytes >= BATCH_BYTES_MAX or len(self._batch) >= BATCH_RECORDS_MAX:
            await self.flush()

    def _collect(self, event: Event, number: int) -> None:
        stamp = event.stamp
        records = chunk.cut(
            encode_event(event), generation=stamp.generation, epoch=stamp.epoch, writer=stamp.writer, number=number
        )
        self._batch += [(None, record) for record in records]
        self._batch_bytes += sum(map(len, records))
        self.position.follow(event)
        assert not self.position.is_stuck, f"an event that does not follow: {event}"

    async def flush(self) -> None:
        """Append what was collected."""
        if self._batch:
            await self._broker.append(self._generation.blocks_topic, 0, self._batch)
            self._batch, self._batch_bytes = [], 0
            failpoints.hit("ingest.published")


def offers(blocks: Iterable[Block]) -> Iterator[Offer]:
    """Blocks whose heights are known already, as offers."""
    for block in blocks:

        def make(height: int, block: Block = block) -> Block:
            assert height == block.ref.height, (height, block.ref)
            return block

        yield Offer(
            block_hash=block.ref.block_hash, parent_hash=block.parent_hash, make=make, where=f"block {block.ref}"
        )
