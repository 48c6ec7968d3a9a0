"""Publishing a source's walk on the blocks topic, from where the topic itself says that it stands.

A source keeps no state of its own. It reads what the topic holds (headers only), knows from it the branch, the walk
number and the epoch in force, opens its own epoch before the first event it has to say, and appends. A second source
that starts later is in force from its EPOCH on; what the first still appends is void to every reader, and the first
ends when it finds records of others between its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pipeline import chunk, failpoints, frame
from pipeline.block import Block, BlockRef, Connect, Event, Rewind, SourceEpoch, SourceStamp, encode_event
from pipeline.errors import BlockOrphan, EventCorrupt, Fenced, FrameCorrupt, Unsupported, UsageError
from pipeline.frame import Feature
from pipeline.generation import Generation
from pipeline.inlet import EventReader, Source, SourcePosition, source_after
from pipeline.sources import branch
from topology import floors, topics
from topology.transports.base import Broker

BATCH_BYTES_MAX = 4 << 20
"""Events encoded and not yet appended; a batch is one append."""
BATCH_RECORDS_MAX = 64
_TAIL_RECORDS = 64
"""Read first from the end of a topic, in search of the last frame there."""


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
    """Where the walk on the topic stands. Raises OffsetOutOfRange if its beginning was deleted and no floor says
    what it was."""
    floor = await floors.of_blocks(broker, generation)
    position = SourcePosition(generation, floor)
    reader = EventReader(generation.generation, with_ops=False)
    async for record in topics.records(broker, generation.blocks_topic, position.next_offset):
        position.next_offset = record.offset + 1
        try:
            found = reader.feed(record.value, record.offset, position.source)
        except EventCorrupt:
            position.meet_bad_record()
            continue
        if found is not None:
            position.follow(found[0])
    return position


async def applied_walk(broker: Broker, generation: Generation) -> int:
    """The last walk number that took effect, in all shards, by the frames at the end of the diffs topic; 0 without any.

    It looks at the end only. Whoever wrote a frame was in force when it did, so the highest epoch there is. Where no
    frame is left, all of them were archived: the floor says their walk.
    """
    said = [floor.blocks.walk for floor in await floors.of(broker, generation)]
    return max([*said, min([await _applied_walk(broker, generation, shard) for shard in range(generation.shards)])])


async def _applied_walk(broker: Broker, generation: Generation, shard: int) -> int:
    topic = generation.diffs_topic
    first, end = await broker.bounds(topic, shard)
    count = _TAIL_RECORDS
    while True:
        start = max(first, end - count)
        assembler = chunk.Assembler()
        found = [(0, 0, 0)]
        async for record in topics.records(broker, topic, start, partition=shard):
            message: bytes | None = record.value
            with suppress(FrameCorrupt, Unsupported):
                if chunk.is_chunk(record.value):
                    message = assembler.feed(chunk.decode_chunk(record.value))
                header = None if message is None else frame.peek(message)
                says = header is not None and (header.is_numbered or Feature.TAKES_BACK in header.required)
                if header is not None and says and header.generation == generation.generation:
                    found.append((header.epoch, header.seq, header.walk))
        if len(found) > 1 or start == first:
            return max(found)[2]
        count *= 16


async def open_publisher(broker: Broker, generation: Generation, resume_from: int | None = None) -> Publisher:
    """A publisher that stands where the topic does; or at a walk number from which all is to be said again.

    Raises WalkGap if the topic does not reach that number, UsageError if what would be void has taken effect.
    """
    publisher = Publisher(broker, generation, await read_position(broker, generation))
    if resume_from is None:
        return publisher
    applied = await applied_walk(broker, generation)
    if resume_from <= applied:
        raise UsageError(
            f"event {applied} has taken effect: what is published again from {resume_from} on would contradict it",
            where=generation.blocks_topic,
            way_out=f"--resume-from {applied + 1}, or above; a block that should not be there is left by publishing "
            "another branch",
        )
    await publisher.resume(resume_from)
    return publisher


class Publisher:
    """One writer's reign on the blocks topic.

    * Nothing is appended before there is something to say: publishing the same blocks again changes nothing.
    * Its EPOCH is in the topic, and what others appended before it is read, before anything is said in it.
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
        WrongChain, Fenced, and what ``offer.make`` raises."""
        if self._is_below_base(offer):
            self._first_below_base = self._first_below_base or offer
            return Published(ref=None, rewound_to=None)
        planned = self._plan(offer, again=again)
        if not self._is_open and not isinstance(planned, branch.Skip):
            await self._open()
            planned = self._plan(offer, again=again)  # another source may have published it meanwhile
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

    def _plan(self, offer: Offer, *, again: bool) -> branch.Plan:
        known = self.position.branch
        try:
            return branch.plan(known, offer.parent_hash, offer.block_hash, again=again, where=offer.where)
        except BlockOrphan:
            offer.make(0)  # garbage has an unknown parent too, but that is not what is wrong with it
            raise

    def _is_below_base(self, offer: Offer) -> bool:
        """Whether the blocks offered have not reached the base yet: files begin where the chain does."""
        known = self.position.branch
        if self._reached_branch or known.base is None:
            return False
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

    async def resume(self, walk: int) -> None:
        """Make void what the topic says from a walk number on, and go on from there. Raises WalkGap, Fenced."""
        self.position.take_back_to(walk - 1)
        await self._open(voids=True)

    async def _open(self, *, voids: bool = False) -> None:
        """Append the own EPOCH, and read what came before it. Raises Fenced if another source's came first."""
        next_offset = self.position.next_offset
        self._collect(SourceEpoch(stamp=self._stamp(), resume_walk=self.position.walk + 1, voids=voids), 0)
        (offset,) = await self._append()
        self._is_open = True
        if offset != next_offset:
            self.position = await read_position(self._broker, self._generation)
            self._check_in_force(self.position.source)

    async def _say(self, event: Event) -> None:
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
        """Append what was collected. Raises Fenced if another source is in force by now."""
        if not self._batch:
            return
        source, expected = self.position.source, self.position.next_offset
        offsets = await self._append()
        if offsets != list(range(expected, expected + len(offsets))):
            self._check_in_force(await self._source_after(source, expected))
        failpoints.hit("ingest.published")

    async def _append(self) -> list[int]:
        offsets = await self._broker.append(self._generation.blocks_topic, 0, self._batch)
        self._batch, self._batch_bytes = [], 0
        self.position.next_offset = offsets[-1] + 1
        return offsets

    async def _source_after(self, source: Source, start: int) -> Source:
        """Who is in force at the end of the topic, if ``source`` was at ``start``."""
        reader = EventReader(self._generation.generation, with_ops=False)
        async for record in topics.records(self._broker, self._generation.blocks_topic, start):
            with suppress(EventCorrupt):
                found = reader.feed(record.value, record.offset, source)
                if found is not None:
                    source = source_after(found[0], self._generation.generation, source)
        return source

    def _check_in_force(self, found: Source) -> None:
        epoch, writer = found
        if writer != self._writer:
            raise Fenced(
                f"another source is in force on the blocks topic: writer {writer.hex()}, since source epoch {epoch}; "
                "what this one published behind that is void",
                where=self._generation.blocks_topic,
                way_out="let one source publish; start this one again to take over from there",
            )


def offers(blocks: Iterable[Block]) -> Iterator[Offer]:
    """Blocks whose heights are known already, as offers."""
    for block in blocks:

        def make(height: int, block: Block = block) -> Block:
            assert height == block.ref.height, (height, block.ref)
            return block

        yield Offer(
            block_hash=block.ref.block_hash, parent_hash=block.parent_hash, make=make, where=f"block {block.ref}"
        )
