"""A node: one store that follows one partition, on one broker, in one process: a shard, or all there is.

The node is what the agents call and what commands ask. It holds no rule of the system: what a record means is said by
`pipeline.replica`. It decides whether a record is handled at all: whether the shard is this worker's, is ready, and is
to go on. Its parts do the rest: `ShardStore` has the store, `Following` gives records of the diffs topic their effect,
`Committing` writes, and the `Lead` of a primary proposes. What a worker does for all of its shards is its `ShardSet`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pipeline import failpoints
from pipeline.generation import Generation, Opening
from pipeline.position import Meta
from pipeline.verify import Proof
from topology.committing import Committing
from topology.data_dir import DataDir
from topology.ending import Ending
from topology.following import Ends, Following
from topology.lead import Lead, Produce, State
from topology.sealing import Sealing
from topology.settings import Settings
from topology.shard_store import Role, ShardStore
from topology.transports.base import Broker


class Node:
    """One shard's store and what it does with records. All methods run on the worker's event loop.

    * Nothing is accepted or proposed after `stopping` is set, nor while the shard is another worker's.
    * What was taken in one session (see `session`) has no effect in another.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        role: Role,
        broker: Broker,
        data_dir: DataDir,
        opening: Opening,
        opening_record: bytes,
        ending: Ending,
        until_height: int | None = None,
    ) -> None:
        self.settings = settings
        self.role = role
        self.broker = broker
        self.data_dir = data_dir
        self.generation: Generation = opening.generation
        self.shard = opening.shard
        self.is_owned = False  # by this worker, and started
        self.session = 0  # counts starts
        self.until_height = until_height  # a node that stands there takes nothing more in
        self.ends = Ends()
        self.last_progress_s = time.monotonic()
        self.on_lead: list[Callable[[], None]] = []  # its own EPOCH is in force
        self.stored = ShardStore(role=role, data_dir=data_dir, opening=opening, opening_record=opening_record)
        self.committing = Committing(self.stored, group_bytes_max=settings.group_bytes_max, ending=ending)
        self.following: Following
        self.lead: Lead | None = None  # of a primary
        self._ending = ending
        self._started = False  # the store was compared with the logs
        self._ready = asyncio.Event()  # cleared while the store that is to be is restored beside (`restoring`)
        self._ready.set()
        self._handling = 0  # records taken, and not yet known to be good

    # Opening and closing

    def open(self, produce: Produce, sealing: Sealing) -> None:
        """Open the store. Raises WrongChain, GenerationEnded and what the store raises."""
        self.stored.open()
        if self.role is Role.PRIMARY:
            self.lead = lead = Lead(
                settings=self.settings,
                broker=self.broker,
                generation=self.generation,
                replica=self.stored.replica,
                produce=produce,
                sealing=sealing,
            )
            self.committing.on_commit.append(lambda _: lead.make_room())
        self.following = Following(
            broker=self.broker,
            generation=self.generation,
            stored=self.stored,
            committing=self.committing,
            lead=self.lead,
            ends=self.ends,
            on_lead=self.on_lead,
        )

    def close(self) -> None:
        """Write what the log confirmed, forget the rest, close the store."""
        self.stored.close(self.committing.commit, self._ending)

    @property
    def stopping(self) -> asyncio.Event:
        return self._ending.stopping

    def fail(self, error: BaseException) -> None:
        """End the worker with an error: the first one counts."""
        self._ending.fail(error)

    # Starting to follow

    async def start(self) -> dict[str, int]:
        """Compare the store with the logs, and say from where to read: topic -> offset. After every assignment that
        gives this shard to this worker."""
        self.begin_session()
        self.is_owned = False
        self._ready.set()  # what was to be restored was given up with the shard
        self.committing.commit()
        offsets = await self._find_place()
        self.last_progress_s = time.monotonic()
        self.is_owned = self._started = True
        return offsets

    async def start_behind(self) -> None:
        """As `start`, for a store that lacks records which were deleted: another one will take its place."""
        self.rest()
        await self.look_at_ends()
        self.last_progress_s = time.monotonic()
        self.is_owned = self._started = True

    def begin_session(self) -> None:
        """What was taken before follows no more."""
        self.session += 1

    async def _find_place(self) -> dict[str, int]:
        offsets = {self.generation.diffs_topic: await self.following.find_place()}
        if self.lead is not None:
            offsets[self.generation.events_topic] = await self.lead.start()
        await self.look_at_ends()
        return offsets

    async def look_at_ends(self) -> None:
        """Where the topics end now."""
        _, self.ends.diffs = await self.broker.bounds(self.generation.diffs_topic, self.shard)
        if self.lead is not None:
            _, self.ends.blocks = await self.broker.bounds(self.generation.events_topic, self.shard)

    def rest(self) -> None:
        """The shard is another worker's now: keep what the log confirmed, forget the rest."""
        self.begin_session()
        self.is_owned = False
        self.committing.commit()
        if self.lead is not None:
            self.lead.give_up()

    # Another store, restored beside

    @property
    def is_restoring(self) -> bool:
        """Whether it waits for another store."""
        return not self._ready.is_set()

    def wait_for_store(self) -> None:
        """Take no record in until `take_store` or `go_on`."""
        self._ready.clear()

    async def take_store(self, put_in_place: Callable[[], None]) -> None:
        """Go on with another store of this shard, which ``put_in_place`` moves to where this one is."""
        async with self.stored.in_use:
            self.committing.commit()
            self.stored.replace(put_in_place)
        if self.lead is not None:
            self.lead.goes_on_with(self.stored.replica)

    async def go_on(self) -> None:
        """Take records in again, from where the store stands."""
        await self._find_place()
        self._ready.set()
        await self.claim_if_caught_up()

    # Records

    async def on_diffs(self, offset: int, record: bytes) -> None:
        """One record of the diffs topic, in order."""
        session = self.session
        await self._ready.wait()
        await self.follow_record(session, offset, record)

    async def follow_record(self, session: int, offset: int, record: bytes) -> None:
        """One record, taken in ``session``, also before the node is ready for those of its stream."""
        await self.committing.wait_for_others()
        following = self.following
        if offset < following.next_offset or session != self.session or not self._takes_records:
            return
        following.next_offset = offset + 1
        self.last_progress_s = time.monotonic()
        failpoints.hit("follow.read")
        self._handling += 1
        try:
            await following.follow(offset, record)
            await self.claim_if_caught_up()
        finally:
            self._handling -= 1

    @property
    def _takes_records(self) -> bool:
        # Once it has arrived, the next record may stand above.
        return self.is_owned and not self.stopping.is_set() and not self.has_arrived

    async def claim_if_caught_up(self) -> None:
        """A primary that has read all there was appends its EPOCH, and follows up to it."""
        lead, following = self.lead, self.following
        if lead is None or lead.state is not State.FOLLOWING or not self._takes_records or self.is_restoring:
            return
        if following.next_offset < self.ends.diffs:
            return
        _, end = await self.broker.bounds(self.generation.diffs_topic, self.shard)
        if following.next_offset >= end and self.is_owned and lead.state is State.FOLLOWING:
            await lead.claim()

    async def on_blocks(self, offset: int, record: bytes) -> None:
        """One record of the blocks topic: propose what follows."""
        lead = self.lead
        assert lead is not None, self.role
        session = self.session
        await lead.wait_for_room(self.stopping)
        if session != self.session or offset < lead.next_blocks or self.stopping.is_set() or lead.primary is None:
            return
        if self.until_height is not None and lead.stands_at(self.until_height):
            await self.stopping.wait()  # what is proposed already ends this node when it is read back
            return
        lead.next_blocks = offset + 1
        self.last_progress_s = time.monotonic()
        self._handling += 1
        try:
            await lead.propose(offset, record)
        finally:
            self._handling -= 1

    # Being asked

    @property
    def in_flight(self) -> int:
        return 0 if self.lead is None else self.lead.in_flight

    @property
    def state(self) -> State:
        return State.FOLLOWING if self.lead is None else self.lead.state

    @property
    def has_consumed_all(self) -> bool:
        """Whether everything up to `ends` is consumed, and own frames are committed."""
        if not self.is_owned or self._handling or not self.committing.is_done:
            return False
        if self.following.next_offset < self.ends.diffs:
            return False
        lead = self.lead
        if lead is None:
            return True
        return lead.state is State.LEADING and lead.next_blocks >= self.ends.blocks and lead.in_flight == 0

    @property
    def has_arrived(self) -> bool:
        """Whether the height at which the node was to end is in what it accepted."""
        arrived = self.until_height is not None and self.stored.replica.meta.tip.height >= self.until_height
        return arrived and self._started  # before, the log may still take frames back

    @property
    def committed_meta(self) -> Meta:
        """The position of the store itself: what reads are answered at."""
        return self.stored.committed

    def proven(self, proof: Proof) -> None:
        """Every key was hashed."""
        self.stored.proof = proof
        self.committing.progressed.set()  # what waits for it may be archived
