"""A node: one store that follows one partition, on one broker, in one process: a shard, or all there is.

The node is what the agents call and what commands ask. It holds no rule of the system: what a record means is said by
`pipeline.replica`. It decides when: when to open, to follow, to commit, to archive, to stop. What a primary does
beyond that is its `Lead`; what a worker does for all of its shards, its `ShardSet`.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline import chunk, failpoints
from pipeline.archive import plan_segments
from pipeline.errors import Diverged, FrameCorrupt, Gap, GenerationEnded, LogChanged, NotProven, StateferryError
from pipeline.frame import digest_of
from pipeline.generation import Generation, Opening
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.replica import Applied, Ended, Outcome, Reign, Replica, Step, Void
from pipeline.stores.base import META_KEY, PROOF_KEY, ROLE_KEY, Batch
from pipeline.stores.rocksdb import BLOCK_CACHE_BYTES, MEMTABLES_BYTES_MAX, RocksStore
from pipeline.verify import Proof, decode_proof, encode_proof
from topology import log_check, logs, topics
from topology.archiver import Archiver
from topology.data_dir import DataDir
from topology.ending import Ending
from topology.lead import Lead, Produce, State
from topology.sealing import Sealing
from topology.settings import Settings
from topology.transports.base import Broker

log = logs.get()

GROUP_WAIT_S = 0.005
"""How long a group waits for more frames while more are known to come."""
GROUP_FRAMES_MAX = 64
"""Frames in one write batch, whatever their size."""


class Role(enum.Enum):
    PRIMARY = "primary"
    REPLICA = "replica"


class Held(NamedTuple):
    """What a buffer holds, and its bound."""

    bytes: int
    bytes_max: int


@dataclass(slots=True, kw_only=True)
class Ends:
    """End offsets of the topics as they were when the node started: what `--until-idle` waits for."""

    blocks: int = 0
    diffs: int = 0


class Node:
    """One shard's store and what it does with records. All methods run on the worker's event loop.

    * Nothing is accepted or proposed after `stopping` is set, nor while the shard is another worker's.
    * Nodes that are `kept_together` write a frame once all of them have it.
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
        self.opening = opening
        self.generation: Generation = opening.generation
        self.shard = opening.shard
        self.is_owned = False  # by this worker, and started
        self.until_height = until_height  # a node that stands there takes nothing more in
        self.kept_together: list[Node] = []  # this one among them; empty: it writes by itself
        self.progressed = asyncio.Event()  # something was committed; set and cleared by `_commit`
        self.on_commit: list[Callable[[list[Step]], None]] = []
        self.on_lead: list[Callable[[], None]] = []  # its own EPOCH is in force
        self.lead: Lead | None = None  # of a primary
        self.ends = Ends()
        self.next_diffs = 0  # the next offset to handle
        self.last_progress_s = time.monotonic()
        self.store: RocksStore
        self.replica: Replica
        self.proof = Proof(proven=False)
        self.voids: Counter[str] = Counter()
        self._opening_record = opening_record
        self._committed: Meta
        self._commit_is_due = False
        self._uncommitted: list[Step] = []
        self._ending = ending
        self._opened = False
        self._started = False  # the store was compared with the logs
        self._session = 0  # counts starts: what was taken before one must not be followed after it
        self._others_moved = asyncio.Event()  # one of `kept_together` took a frame in
        self._ready = asyncio.Event()  # cleared while the store that is to be is restored beside (`restoring`)
        self._ready.set()
        self._handling = 0  # records taken, and not yet known to be good
        self.archiver: Archiver | None = None
        self.archive_trouble: StateferryError | None = None  # why nothing is archived now
        self._archiving = asyncio.Lock()

    # Opening and closing

    def open(self, produce: Produce, sealing: Sealing) -> None:
        """Open the store. Raises WrongChain, NotProven and what the store raises."""
        self.store = RocksStore(self.data_dir.store_path)
        try:
            self._load()
        except BaseException:
            self.store.close()
            raise
        if self.role is Role.PRIMARY:
            self.lead = Lead(
                settings=self.settings,
                broker=self.broker,
                generation=self.generation,
                replica=self.replica,
                produce=produce,
                sealing=sealing,
            )
        self._opened = True
        log.info("node_opened", role=self.role.value, proof=self.proof_word, **self._where())

    def _load(self) -> None:
        """The position of the store that was opened, or of a new one."""
        data = self.store.get_meta(META_KEY)
        if data is None:
            # Nothing was read and nothing is here: the empty state needs no proof.
            meta = self._base_meta()
            proof = Proof(proven=meta.tip.ref is None, at=None, root=meta.tip.root)
            self.store.write(Batch(meta={META_KEY: encode_meta(meta), PROOF_KEY: encode_proof(proof)}))
        else:
            meta = decode_meta(data)
        self.check_generation(meta)
        if meta.seq == 0 and meta.diffs.next_offset == 0:
            # A base state, published before the opening was: it takes finality from there.
            meta = replace(self._base_meta(), tip=meta.tip)
            self.store.write(Batch(meta={META_KEY: encode_meta(meta)}))
        if self.store.get_meta(ROLE_KEY) != self.role.value.encode():
            self.store.write(Batch(meta={ROLE_KEY: self.role.value.encode()}))
        self.proof = decode_proof(self.store.get_meta(PROOF_KEY))
        self.replica = Replica(self.store, meta, archives=self.role is Role.PRIMARY)
        self._committed = meta

    def _base_meta(self) -> Meta:
        return self.opening.meta(offset=0, digest=digest_of(self._opening_record))

    def check_generation(self, meta: Meta) -> None:
        """What a store here holds must be of the generation in force. Raises WrongChain, GenerationEnded."""
        topics.check_chain(meta.chain_id, self.generation.chain_id, str(self.data_dir.path))
        if meta.generation != self.generation.generation:
            raise GenerationEnded(
                f"this data directory holds generation {meta.generation.hex()}, the broker has "
                f"{self.generation.generation.hex()}",
                where=str(self.data_dir.path),
                way_out="restore the new generation into an empty data directory: `stateferry restore`",
            )

    def close(self) -> None:
        """Write what the log confirmed, forget the rest, close the store."""
        if self._opened:
            self._opened = False
            try:
                if self._ending.failure is None:
                    self._commit()
                self.store.flush()
            except Exception as error:
                self._ending.add(error)
            try:
                self.store.close()
            except Exception as error:
                self._ending.add(error)  # a store whose disk is full can be neither flushed nor closed
            log.info("node_closed", height=self.replica.meta.tip.height, seq=self.replica.meta.seq)

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
        self._commit()
        offsets = await self._find_place()
        self.last_progress_s = time.monotonic()
        self.is_owned = self._started = True
        return offsets

    def begin_session(self) -> None:
        """What was taken before follows no more."""
        self._session += 1

    async def _find_place(self) -> dict[str, int]:
        await self._check_diffs()
        self.next_diffs = self.replica.meta.diffs.next_offset
        offsets = {self.generation.diffs_topic: self.next_diffs}
        if self.lead is not None:
            offsets[self.generation.events_topic] = await self.lead.start()
        await self.look_at_ends()
        return offsets

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
        async with self._archiving:
            self._commit()
            self._opened = False
            self.store.close()
            put_in_place()
            self.store = RocksStore(self.data_dir.store_path)
            self._load()
            self._opened = True
        if self.lead is not None:
            self.lead.goes_on_with(self.replica)
        log.info("node_opened", role=self.role.value, proof=self.proof_word, **self._where())

    async def go_on(self) -> None:
        """Take records in again, from where the store stands."""
        await self._find_place()
        self._ready.set()
        await self.claim_if_caught_up()

    def rest(self) -> None:
        """The shard is another worker's now: keep what the log confirmed, forget the rest."""
        self._session += 1
        self.is_owned = False
        self._commit()
        if self.lead is not None:
            self.lead.give_up()

    async def look_at_ends(self) -> None:
        """Where the topics end now."""
        _, self.ends.diffs = await self.broker.bounds(self.generation.diffs_topic, self.shard)
        if self.lead is not None:
            _, self.ends.blocks = await self.broker.bounds(self.generation.events_topic, self.shard)

    async def _check_diffs(self) -> None:
        """Take back what the diffs topic lost. Raises LogLost, OffsetOutOfRange."""
        if self.lead is not None:
            self.lead.give_up()
        await log_check.follow_back(self.broker, self.generation.diffs_topic, self.replica, self._base_meta())
        self._committed = self.replica.meta

    async def _check_log(self) -> None:
        """Raises LogChanged if the diffs topic does not hold what was followed."""
        topic, meta = self.generation.diffs_topic, self.replica.meta
        if not await log_check.holds(self.broker, topic, meta.shard, meta.diffs):
            raise LogChanged(
                f"the record before offset {meta.diffs.next_offset} is not the one that was followed",
                where=topic,
                way_out="start again: what the log lost is taken back",
            )

    # Frames

    async def on_diffs(self, offset: int, record: bytes) -> None:
        """One record of the diffs topic, in order."""
        session = self._session
        await self._ready.wait()
        await self.follow_record(session, offset, record)

    @property
    def session(self) -> int:
        return self._session

    async def follow_record(self, session: int, offset: int, record: bytes) -> None:
        """One record, taken in ``session``, also before the node is ready for those of its stream."""
        await self._wait_for_others()
        if offset < self.next_diffs or session != self._session or not self._takes_records:
            return
        self.next_diffs = offset + 1
        self.last_progress_s = time.monotonic()
        failpoints.hit("follow.read")
        self._handling += 1
        try:
            await self._follow(offset, record)
        finally:
            self._handling -= 1

    @property
    def _takes_records(self) -> bool:
        # Once it has arrived, the next record may stand above.
        return self.is_owned and not self.stopping.is_set() and not self.has_arrived

    async def _wait_for_others(self) -> None:
        """Until what this node has and others lack is below the bound of a group."""
        while self._ready_seq() < self.replica.meta.seq and not self.stopping.is_set():
            if self._is_full:
                self._commit()
            if not self._is_full:
                return
            self._others_moved.clear()
            await self._others_moved.wait()

    def _ready_seq(self) -> int:
        """The seq up to which frames may be written."""
        return min(node.replica.meta.seq for node in self.kept_together or [self])

    @property
    def _is_full(self) -> bool:
        replica = self.replica
        return replica.group_length >= GROUP_FRAMES_MAX or replica.group_bytes >= self.settings.group_bytes_max

    async def _follow(self, offset: int, record: bytes) -> None:
        try:
            follower = self.replica.step if self.lead is None else self.lead.follow
            outcome = follower(record, offset)
        except (Diverged, FrameCorrupt, Gap) as error:
            await self._check_log()  # it may have changed under us: that is the first thing to know
            if not isinstance(error, Gap):
                self._quarantine(error, record, offset)
            raise
        if isinstance(outcome, Void) and self.replica.is_ahead(record):
            await self._check_log()  # of a writer whose EPOCH was never read here: maybe it stands where others stood
        self._take(outcome, offset)
        await self.claim_if_caught_up()

    def _take(self, outcome: Outcome, offset: int) -> None:
        match outcome:
            case Applied(step=step):
                self._uncommitted.append(step)
                self._commit_soon()
                for node in self.kept_together:
                    node._others_moved.set()
            case Reign(header=header):
                self._commit()
                if self.lead is not None:
                    self.lead.meet_epoch(header)
                    if self.lead.state is State.LEADING:
                        for begin in self.on_lead:
                            begin()
            case Void(reason=reason):
                self.voids[reason] += 1
                log.info("record_voided", topic=self.generation.diffs_topic, offset=offset, reason=reason)
            case Ended(successor=successor):
                ended, follows = self.generation.generation.hex(), successor.generation.hex()
                log.warning("generation_ended", generation=ended, successor=follows)
                raise GenerationEnded(
                    f"generation {ended} ended here; {follows} follows",
                    way_out="restore the new generation into an empty data directory: `stateferry restore`",
                )

    def _quarantine(self, error: StateferryError, record: bytes, offset: int) -> None:
        meta = self.replica.meta
        folder = self.data_dir.quarantine(
            error, record, topic=self.generation.diffs_topic, offset=offset, seq=meta.seq, **self._where()
        )
        log.error("node_quarantined", error=error.name, evidence=str(folder))

    def _commit_soon(self) -> None:
        """Commit once nothing more is waiting, or at once when the group is full."""
        if self._is_full:
            self._commit_all()
        elif not self._commit_is_due:
            # Far behind, frames are worth waiting for; at the tip nothing waits.
            self._commit_is_due = True
            is_behind = self.next_diffs < self.ends.diffs or self.in_flight > 1
            asyncio.get_running_loop().call_later(GROUP_WAIT_S if is_behind else 0, self._commit_or_fail)

    def _commit_or_fail(self) -> None:
        self._commit_is_due = False
        if not self._opened or self.stopping.is_set():
            return
        try:
            self._commit_all()
        except Exception as error:
            self.fail(error)

    def _commit_all(self) -> None:
        """What this node's last frames made ready, here and elsewhere."""
        for node in self.kept_together or [self]:
            node._commit()

    def _commit(self) -> None:
        self._committed = self.replica.commit(self._ready_seq())
        count = sum(step.header.seq <= self._committed.seq for step in self._uncommitted)
        if count == 0:
            return
        steps, self._uncommitted = self._uncommitted[:count], self._uncommitted[count:]
        last = steps[-1]
        log.info(
            "group_committed",
            height=last.after.height,
            seq=last.header.seq,
            blocks=len(steps),
            changes=sum(step.header.op_count for step in steps),
            bytes=sum(len(step.whole) for step in steps),
        )
        if self.lead is not None:
            self.lead.make_room()
        self.progressed.set()
        for listener in self.on_commit:
            listener(steps)

    # Events

    async def claim_if_caught_up(self) -> None:
        """A primary that has read all there was appends its EPOCH, and follows up to it."""
        lead = self.lead
        if lead is None or lead.state is not State.FOLLOWING or not self._takes_records or self.is_restoring:
            return
        if self.next_diffs < self.ends.diffs:
            return
        _, end = await self.broker.bounds(self.generation.diffs_topic, self.shard)
        if self.next_diffs >= end and self.is_owned and lead.state is State.FOLLOWING:
            await lead.claim()

    async def on_blocks(self, offset: int, record: bytes) -> None:
        """One record of the blocks topic: propose what follows."""
        lead = self.lead
        assert lead is not None, self.role
        session = self._session
        await lead.wait_for_room(self.stopping)
        if session != self._session or offset < lead.next_blocks or self.stopping.is_set() or lead.primary is None:
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
    def proof_word(self) -> str:
        return "proven" if self.proof.proven else "claimed"

    @property
    def in_flight(self) -> int:
        return 0 if self.lead is None else self.lead.in_flight

    @property
    def state(self) -> State:
        return State.FOLLOWING if self.lead is None else self.lead.state

    @property
    def has_consumed_all(self) -> bool:
        """Whether everything up to `ends` is consumed, and own frames are committed."""
        if not self.is_owned or self._handling or self._uncommitted or self._commit_is_due:
            return False
        if self.next_diffs < self.ends.diffs:
            return False
        lead = self.lead
        if lead is None:
            return True
        return lead.state is State.LEADING and lead.next_blocks >= self.ends.blocks and lead.in_flight == 0

    @property
    def has_arrived(self) -> bool:
        """Whether the height at which the node was to end is in what it accepted."""
        arrived = self.until_height is not None and self.replica.meta.tip.height >= self.until_height
        return arrived and self._started  # before, the log may still take frames back

    @property
    def committed_meta(self) -> Meta:
        """The position of the store itself: what reads are answered at."""
        return self._committed

    @property
    def committed_height(self) -> int:
        return self._committed.tip.height

    @property
    def buffers(self) -> dict[str, Held]:
        """What every buffer holds now. A bound is looked at before a block is taken in: one may stand above it."""
        lead, settings, memory = self.lead, self.settings, self.store.memory()
        dirty_bytes = self.replica.layers.dirty_bytes
        held = {
            "group": Held(self.replica.group_bytes, settings.group_bytes_max),
            "frame_chunks": Held(self.replica.held_chunk_bytes, chunk.MESSAGE_BYTES_MAX),
            "memtables": Held(memory.memtables_bytes, MEMTABLES_BYTES_MAX),
            "block_cache": Held(memory.block_cache_bytes, BLOCK_CACHE_BYTES),
        }
        if lead is None:
            return held | {"dirty_layers": Held(dirty_bytes, settings.group_bytes_max)}
        return held | {
            "computed_ahead": Held(lead.ahead_bytes, settings.ahead_bytes_max),  # the next two together
            "dirty_layers": Held(dirty_bytes, settings.ahead_bytes_max),
            "frames_in_flight": Held(lead.proposed_bytes, settings.ahead_bytes_max),
            "event_chunks": Held(lead.held_event_bytes, chunk.MESSAGE_BYTES_MAX),
        }

    async def wait_for_progress(self) -> None:
        """Until something was committed, or the node stops."""
        self.progressed.clear()
        waits = [asyncio.create_task(self.progressed.wait()), asyncio.create_task(self.stopping.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def proven(self, proof: Proof) -> None:
        self.proof = proof
        self.progressed.set()

    # Archiving

    @property
    def archive_is_due(self) -> bool:
        """Whether a whole segment of final blocks waits for the archive."""
        meta = self._committed
        waits = bool(plan_segments(meta.archived_to, meta.final_height))
        return self.archiver is not None and self.is_owned and self.proof.proven and waits

    async def archive_once(self, *, flush: bool = False) -> bool:
        """Archive the next segment, or with ``flush`` what there is of it. False if there was nothing to do.

        The object store is asked in a thread: frames and reads go on meanwhile. Raises what it raises.
        """
        archiver = self.archiver
        if archiver is None:
            return False
        async with self._archiving:
            self._commit()
            due = archiver.plan(self.replica, proven=self.proof.proven, flush=flush)
            if due is None:
                return False
            session = self._session
            gap = await asyncio.to_thread(archiver.put, due)
            if session == self._session and self._opened:
                archiver.done(self.replica, due)
                self._commit()
        if gap is not None:
            log.warning("archive_gap_left", first_height=gap[0], last_height=gap[1])
        if due.blocks:
            log.info("segment_archived", segment=due.name, blocks=due.blocks, bytes=due.frame_bytes)
        return True

    def _where(self) -> dict[str, Any]:
        tip = self.replica.meta.tip
        return {
            "height": tip.height,
            "block_hash": tip.block_hash[::-1].hex(),
            "root": tip.root.hex(),
            "generation": self.generation.generation.hex(),
            "data_dir": str(self.data_dir.path),
        }


def check_serving(proof: Proof, serve: str) -> None:
    """Raises NotProven if the state is claimed and reads of claimed states are not allowed."""
    if not proof.proven and serve != "claimed":
        raise NotProven(
            "this node has not proven its state yet: it is claimed by whoever published it",
            way_out="wait for the worker to prove it, run `stateferry verify --level full`, or allow --serve claimed",
        )
