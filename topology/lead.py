"""What a primary does beyond following: claim, propose, and read its own frames back.

It FOLLOWS its own partition as any replica does until it has read all that was there; it CLAIMS by appending an EPOCH
and following up to it; it LEADS once that EPOCH is in force. Nothing is computed from events before. Whatever ends a
lead (a fence, a failed send, a rebalance) drops all dirty layers.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from pipeline import failpoints
from pipeline.block import Rewind, SourceEpoch
from pipeline.codec import Codec
from pipeline.errors import CorruptInput, Fenced, RewindTooDeep, StateferryError, Unsupported, WalkGap, WrongChain
from pipeline.frame import Header
from pipeline.generation import Generation
from pipeline.inlet import EventReader, Stuck, takes_back
from pipeline.position import Meta
from pipeline.primary import Primary, Reading, epoch_frame, take_back_frame
from pipeline.replica import Outcome, Replica
from topology import log_check, logs
from topology.data_dir import DataDir
from topology.sealing import Sealing
from topology.settings import Settings
from topology.transports.base import Broker

log = logs.get()

Produce = Callable[[bytes], Awaitable[Awaitable[Any]]]
"""Hand a record to the broker; what comes back is done when the record is durable."""


BEGUN_MAX = 4
"""Blocks that are being sealed: enough that the process which does it never waits. Their frames are not counted yet."""


class State(enum.Enum):
    FOLLOWING = "following"
    CLAIMING = "claiming"
    LEADING = "leading"


class Lead:
    """A primary's side of a node.

    * `primary` exists while LEADING, and only then.
    * A writer id is used for one reign: whoever loses a claim takes a new one.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        broker: Broker,
        generation: Generation,
        replica: Replica,
        produce: Produce,
        sealing: Sealing,
    ) -> None:
        self.state = State.FOLLOWING
        self.primary: Primary | None = None
        self.next_blocks = 0  # the next offset of the blocks topic to handle
        self._settings = settings
        self._broker = broker
        self._generation = generation
        self._replica = replica
        self._produce = produce
        self._writer = b""
        self._led_epoch = 0  # the last one in which this node led, since it was started
        self._reader: log_check.Events = EventReader(generation.generation)
        self.refused: StateferryError | None = None  # why no event is taken in
        self._stuck: Stuck | None = None  # behind the refused event
        self._leading = asyncio.Event()
        self._room = asyncio.Event()
        self._begun = asyncio.Event()  # something may be there to finish
        self._finished = asyncio.Event()  # what was begun before is finished
        self._sealing = sealing

    def give_up(self) -> None:
        """Drop any lead, and what was proposed in it: at once, so that nothing is computed or produced on top of it."""
        self.primary = None
        self.state = State.FOLLOWING
        self._leading.clear()
        self._finished.set()
        self._stuck, self.refused = None, None
        self._replica.drop_proposed()

    def goes_on_with(self, replica: Replica) -> None:
        """The shard has another store, and nothing is led."""
        assert self.primary is None, self.state
        self._replica = replica

    async def start(self) -> int:
        """Find where events are read from: the offset. After every assignment, behind `give_up`."""
        assert self.primary is None, self.state
        self.next_blocks, self._reader = await log_check.find_events(self._broker, self._generation, self._replica)
        return self.next_blocks

    # Claiming

    async def claim(self) -> None:
        """Append the own EPOCH; it is in force once it was read back as valid."""
        writer = secrets.token_bytes(16)
        await self._claim(writer, epoch_frame(self._replica.meta, writer))

    async def _claim(self, writer: bytes, record: bytes) -> None:
        self.state = State.CLAIMING
        self._writer = writer
        await (await self._produce(record))
        failpoints.hit("propose.epoch")

    def meet_epoch(self, header: Header) -> None:
        """A valid EPOCH was followed: the own one opens the lead, another's has won the race."""
        if header.writer == self._writer:
            self.primary = Primary(
                self._replica, codec=Codec[self._settings.codec.upper()], sealer=self._sealing.submit
            )
            self.state = State.LEADING
            self._led_epoch = header.epoch
            self._leading.set()
            log.info("epoch_claimed", epoch=header.epoch, writer=header.writer.hex())
        elif header.epoch > self._led_epoch > 0 and header.shards == 1:
            # Others of a group get shards in turn. But who led the only one, and finds another there, has lost it, if
            # it slept past its session or not: to claim again would begin a duel.
            raise Fenced(
                f"writer {header.writer.hex()} is in force since epoch {header.epoch}; this one was before",
                way_out="let one primary run; start this one again to take over, or as a replica",
            )
        elif self.state is State.CLAIMING:
            log.warning("epoch_lost", epoch=header.epoch, writer=header.writer.hex())
            self.state = State.FOLLOWING

    # Proposing

    async def wait_for_room(self, stopping: asyncio.Event) -> None:
        """Until this writer is in force and what it computed ahead is below its bounds."""
        await self._leading.wait()
        while self._is_full and not stopping.is_set():
            self._room.clear()
            await self._room.wait()

    @property
    def _is_full(self) -> bool:
        begun = 0 if self.primary is None else self.primary.begun
        return begun >= BEGUN_MAX or self.ahead_bytes > self._settings.ahead_bytes_max

    def make_room(self) -> None:
        """Something was committed."""
        self._room.set()

    async def propose(self, offset: int, record: bytes) -> None:
        """Begin the frames that follow from one record of the blocks topic.

        An event that is refused ends nothing: from there on all is void up to an EPOCH that mends it, and `refused`
        says where and why. Raises what makes no sense to wait for, with the record's place.
        """
        primary = self.primary
        assert primary is not None, self.state
        if self._stuck is not None:
            await self._look_for_mend(primary, self._stuck, offset, record)
            return
        ahead, event = primary.ahead, None
        source = (ahead.source_epoch, ahead.source_writer)
        try:
            found = self._reader.feed(record, offset, source)
            if found is None:
                return
            event, reading = found
            if isinstance(event, SourceEpoch) and takes_back(event, ahead):
                await self._take_back(primary, event, reading)
                return
            if isinstance(event, Rewind):
                while primary.is_sealing:
                    self._finished.clear()
                    await self._finished.wait()
                if self.primary is not primary:
                    return  # no longer in force: whoever leads next reads it again
            primary.begin(event, reading)
        except (CorruptInput, WalkGap, RewindTooDeep, WrongChain) as error:
            resume = f"publish again from there: `stateferry ingest ... --resume-from {ahead.walk + 1}`"
            error.way_out = f"{error.way_out}; or {resume}" if error.way_out else resume
            self._refuse(self._located(error, offset), offset, record)
            self._stuck = self._stuck_at(ahead)
            if event is not None:
                self._stuck.mended_by(event)
        except StateferryError as error:
            raise self._located(error, offset) from error
        self._begun.set()

    def _refuse(self, error: StateferryError, offset: int, record: bytes) -> None:
        """Stop taking events in, and keep the evidence; reads go on."""
        self.refused = error
        aside = DataDir(self._settings.data_dir).set_aside(
            error, record, topic=self._generation.events_topic, partition=self._replica.meta.shard, offset=offset
        )
        log.error("event_refused", error=error.name, message=str(error), kept_in=str(aside))

    @property
    def passes_by(self) -> bool:
        """Whether all events are void up to one that mends."""
        return self._stuck is not None

    def pass_by(self) -> None:
        """A source has said again what comes next: nothing of it is applied, up to where it did."""
        assert self.primary is not None, self.state
        self._stuck = self._stuck_at(self.primary.ahead)

    @staticmethod
    def _stuck_at(ahead: Meta) -> Stuck:
        return Stuck(ahead.chain_id, ahead.generation, (ahead.source_epoch, ahead.source_writer), ahead.walk)

    async def _look_for_mend(self, primary: Primary, stuck: Stuck, offset: int, record: bytes) -> None:
        """One record behind a refused one."""
        try:
            found = self._reader.feed(record, offset, stuck.source)
        except (CorruptInput, Unsupported):
            return
        if found is not None and stuck.mended_by(found[0]):
            event, reading = found
            if isinstance(event, SourceEpoch) and takes_back(event, primary.ahead):
                await self._take_back(primary, event, reading)
            else:
                primary.take_over(stuck.source)
                self._stuck, self.refused = None, None
            log.warning("event_mended", offset=offset, source_epoch=stuck.source[0])

    async def _take_back(self, primary: Primary, event: SourceEpoch, reading: Reading) -> None:
        """Another shard refused what this one applied: end the reign with an EPOCH that takes it back, and lead on from
        there. If another's EPOCH comes first, whoever leads next meets the event again. Raises RewindTooDeep."""
        reader, replica = self._reader, self._replica
        while primary.in_flight and self.primary is primary:
            self._room.clear()
            await self._room.wait()
        while self._reader is reader and replica.meta.source_epoch < event.stamp.epoch:
            writer = secrets.token_bytes(16)
            record = take_back_frame(replica, writer, event, reading)
            self.give_up()
            log.warning("events_taken_back", from_walk=event.resume_walk, to_walk=replica.meta.walk)
            await self._claim(writer, record)
            await self._leading.wait()

    async def finish(self) -> list[Awaitable[Any]]:
        """The frame begun first, once it is sealed, produced. Returns what is done once it is durable."""
        while self.primary is None or not self.primary.begun:
            self._begun.clear()
            await self._begun.wait()
        primary = self.primary
        while (sealing := primary.sealing) is not None and not sealing.done():
            await self._sealing.advance(sealing)
            if self.primary is not primary:
                return []
        proposal = primary.finish()
        failpoints.hit("propose.computed")
        if not primary.is_sealing:
            self._finished.set()
        self._room.set()
        return [await self._produce(record) for record in proposal.records]

    def _located(self, error: StateferryError, offset: int) -> StateferryError:
        place = f"topic {self._generation.events_topic}, partition {self._replica.meta.shard}, offset {offset}"
        error.where = f"{error.where}, {place}" if error.where else place
        return error

    def follow(self, record: bytes, offset: int) -> Outcome:
        """One record of the own partition, while leading and before."""
        return self._replica.step(record, offset) if self.primary is None else self.primary.follow(record, offset)

    # Being asked

    @property
    def in_flight(self) -> int:
        """Frames begun and not read back."""
        return 0 if self.primary is None else self.primary.in_flight

    @property
    def proposed_bytes(self) -> int:
        return 0 if self.primary is None else self.primary.proposed_bytes

    @property
    def ahead_bytes(self) -> int:
        """What is held for blocks computed and not read back."""
        return self._replica.layers.dirty_bytes + self.proposed_bytes

    @property
    def held_event_bytes(self) -> int:
        return self._reader.held_bytes

    def stands_at(self, height: int) -> bool:
        """Whether everything up to a height is begun."""
        return self.primary is not None and self.primary.ahead.tip.height >= height
