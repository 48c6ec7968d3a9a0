"""A node: one store that follows one partition, on one broker, in one process.

The node is what the agents call and what commands ask. It holds no rule of the system: what a record means is said by
`pipeline.replica`, what an event makes by `pipeline.primary`. It decides when: when to open, to claim, to commit, to
wait, to stop.

A primary passes through three states. It FOLLOWS its own partition as any replica does until it has read all that was
there; it CLAIMS by appending an EPOCH and following up to it; it LEADS once that EPOCH is in force. Nothing is computed
from events before. Whatever ends a lead (a fence, a failed send, a rebalance) drops all dirty layers.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline import failpoints
from pipeline.archive import plan_segments
from pipeline.codec import Codec
from pipeline.errors import (
    CorruptInput,
    Diverged,
    EventCorrupt,
    FrameCorrupt,
    Gap,
    LogLost,
    NotProven,
    OffsetOutOfRange,
    StateferryError,
    WalkGap,
    WrongChain,
    disk_full,
)
from pipeline.frame import NO_HASH, digest_of
from pipeline.generation import Generation, Opening
from pipeline.inlet import NO_SOURCE, EventReader, SourcePosition, mends
from pipeline.position import LogMark, Meta, decode_meta, encode_meta
from pipeline.primary import Primary, epoch_frame
from pipeline.replica import Applied, Ended, Outcome, Reign, Replica, Step, Void
from pipeline.stores.base import META_KEY, PROOF_KEY, ROLE_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, decode_proof, encode_proof
from topology import logs, topics
from topology.archiver import Archiver
from topology.data_dir import DataDir
from topology.settings import Settings
from topology.transports.base import Broker

log = logs.get()

GROUP_WAIT_S = 0.005
"""How long a group waits for more frames while more are known to come."""
GROUP_FRAMES_MAX = 64
"""Frames in one write batch, whatever their size."""

Produce = Callable[[bytes], Awaitable[Awaitable[Any]]]
"""Hand a record to the broker; what comes back is done when the record is durable."""


class Role(enum.Enum):
    PRIMARY = "primary"
    REPLICA = "replica"


class State(enum.Enum):
    FOLLOWING = "following"
    CLAIMING = "claiming"
    LEADING = "leading"


@dataclass(slots=True, kw_only=True)
class Ends:
    """End offsets of the topics as they were when the node started: what `--until-idle` waits for."""

    blocks: int = 0
    diffs: int = 0


class Node:
    """One worker's store and what it does with records. All methods run on the worker's event loop.

    * `failure` is the error that ended it, None for a clean end; `stopping` is set either way.
    * Nothing is accepted or proposed after `stopping` is set.
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
        until_height: int | None = None,
    ) -> None:
        self.settings = settings
        self.role = role
        self.broker = broker
        self.data_dir = data_dir
        self.opening = opening
        self.generation: Generation = opening.generation
        self.until_height = until_height  # a node that stands there ends
        self.failure: StateferryError | None = None
        self.stopping = asyncio.Event()
        self.progressed = asyncio.Event()  # something was committed; set and cleared by `_commit`
        self.on_commit: list[Callable[[list[Step]], None]] = []
        self.state = State.FOLLOWING
        self.ends = Ends()
        self.next_diffs = 0  # the next offset to handle
        self.next_blocks = 0
        self.last_progress_s = time.monotonic()
        self.store: RocksStore
        self.replica: Replica
        self.proof = Proof(proven=False)
        self.voids: Counter[str] = Counter()
        self._opening_record = opening_record
        self._writer = secrets.token_bytes(16)
        self._primary: Primary | None = None
        self._reader = EventReader(self.generation.generation)
        self._produce: Produce
        self._committed: Meta
        self._leading = asyncio.Event()
        self._room = asyncio.Event()
        self._commit_is_due = False
        self._uncommitted: list[Step] = []
        self._skip_blocks_to = 0
        self._opened = False
        self._started = False  # the ends of the topics are known
        self._handling = 0  # records taken, and not yet known to be good
        self.archiver: Archiver | None = None

    # Opening and closing

    def open(self, produce: Produce) -> None:
        """Open the store. Raises WrongChain, NotProven and what the store raises."""
        self._produce = produce
        self.store = RocksStore(self.data_dir.store_path)
        try:
            self._load()
        except BaseException:
            self.store.close()
            raise
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
        self._check_generation(meta)
        if meta.seq == 0 and meta.diffs.next_offset == 0:
            # A base state, published before the opening was: it takes finality and shards from there.
            meta = self._base_meta()
            self.store.write(Batch(meta={META_KEY: encode_meta(meta)}))
        if self.store.get_meta(ROLE_KEY) != self.role.value.encode():
            self.store.write(Batch(meta={ROLE_KEY: self.role.value.encode()}))
        self.proof = decode_proof(self.store.get_meta(PROOF_KEY))
        self.replica = Replica(self.store, meta, archives=self.role is Role.PRIMARY)
        self._committed = meta

    def _base_meta(self) -> Meta:
        return self.opening.meta(offset=0, digest=digest_of(self._opening_record))

    def _check_generation(self, meta: Meta) -> None:
        topics.check_chain(meta.chain_id, self.generation.chain_id, str(self.data_dir.path))
        if meta.generation != self.generation.generation:
            raise WrongChain(
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
                if self.failure is None:
                    self._commit()
                self.store.flush()
            except Exception as error:
                self.failure = self.failure or self._named(error)
            try:
                self.store.close()
            except Exception as error:
                # What ended the node comes first: a store whose disk is full can be neither flushed nor closed.
                self.failure = self.failure or self._named(error)
            log.info("node_closed", height=self.replica.meta.tip.height, seq=self.replica.meta.seq)

    def fail(self, error: BaseException) -> None:
        """End the worker with an error: the first one counts."""
        if not self.stopping.is_set():
            self.failure = self._named(error)
            self.stopping.set()

    def _named(self, error: BaseException) -> StateferryError:
        if isinstance(error, StateferryError):
            return error
        if isinstance(error, OSError) and (full := disk_full(error)) is not None:
            return full
        log.error("worker_failed", error=type(error).__name__, exc_info=error)
        return StateferryError(f"{error!r}")

    def stop(self) -> None:
        self.stopping.set()

    # Starting to follow

    async def start(self) -> dict[str, int]:
        """Compare the store with the logs, and say from where to read: topic -> offset. After every assignment."""
        self._drop_lead()
        await self._check_diffs()
        self.next_diffs = self.replica.meta.diffs.next_offset
        _, self.ends.diffs = await self.broker.bounds(self.generation.diffs_topic, 0)
        offsets = {self.generation.diffs_topic: self.next_diffs}
        if self.role is Role.PRIMARY:
            self.next_blocks = await self._check_blocks()
            _, self.ends.blocks = await self.broker.bounds(self.generation.blocks_topic, 0)
            offsets[self.generation.blocks_topic] = self.next_blocks
        self.last_progress_s = time.monotonic()
        self._started = True
        return offsets

    def _drop_lead(self) -> None:
        self._commit()
        self.replica.drop_proposed()
        self._primary = None
        self.state = State.FOLLOWING
        self._leading.clear()

    async def _record_at(self, topic: str, offset: int) -> bytes | None:
        """The record at an offset, or None if the log does not hold it."""
        first, end = await self.broker.bounds(topic, 0)
        if not first <= offset < end:
            return None
        found = await self.broker.read(topic, 0, offset, bytes_max=1)
        return found[0].value if found and found[0].offset == offset else None

    async def _holds(self, topic: str, mark: LogMark) -> bool:
        """Whether the log still holds what the mark says was followed."""
        first, end = await self.broker.bounds(topic, 0)
        if mark.next_offset == 0 or (mark.next_offset == first and first <= end):
            return True  # nothing was read, or what was read is deleted by now
        if not mark.last_digest or mark.last_digest == NO_HASH:
            return mark.next_offset <= end
        record = await self._record_at(topic, mark.next_offset - 1)
        return record is not None and digest_of(record) == mark.last_digest

    async def _check_diffs(self) -> None:
        """Take back every frame that the log lost. Raises LogLost, OffsetOutOfRange."""
        topic, replica = self.generation.diffs_topic, self.replica
        first, _ = await self.broker.bounds(topic, 0)
        if replica.meta.diffs.next_offset < first:
            raise OffsetOutOfRange(
                f"the diffs topic begins at offset {first}, this store follows from {replica.meta.diffs.next_offset}",
                where=topic,
                way_out="restore from a snapshot into an empty data directory: `stateferry restore`",
            )
        from_seq, frames = replica.meta.seq, 0
        while not await self._holds(topic, replica.meta.diffs):
            if replica.meta.seq == 0 and replica.meta.epoch > 0:
                # Nothing but EPOCHs was followed, and the log lost one: begin after the opening again.
                replica.meta = replace(self._base_meta(), tip=replica.meta.tip)
                self.store.write(Batch(meta={META_KEY: encode_meta(replica.meta)}))
                continue
            if replica.meta.seq == 0:
                raise LogLost("the diffs topic is not the one that this store followed", where=topic)
            replica.take_back()
            frames += 1
        if frames:
            log.warning(
                "log_taken_back",
                frames=frames,
                from_seq=from_seq,
                to_seq=replica.meta.seq,
                why="the log lost its end: it holds no record, or another one, where this store had read one",
            )

    async def _check_blocks(self) -> int:
        """The offset from which to read events. A log that lost its end is read from the start: what was applied is
        known by its walk number."""
        topic, replica = self.generation.blocks_topic, self.replica
        mark = replica.meta.blocks
        first, end = await self.broker.bounds(topic, 0)
        if await self._holds(topic, mark):
            if mark.next_offset < first:
                raise OffsetOutOfRange(f"the blocks topic begins at offset {first}", where=topic)
            self._new_reader(mark.last_digest or NO_HASH)
            return mark.next_offset
        log.warning("blocks_log_shorter", stored_offset=mark.next_offset, end_offset=end)
        position = SourcePosition(self.generation.generation, self.generation.base)
        reader = EventReader(self.generation.generation, with_ops=False)
        last, follow_on = NO_HASH, first
        async for record in topics.records(self.broker, topic):
            if record.offset >= min(mark.next_offset, end):
                break
            follow_on, last = record.offset + 1, digest_of(record.value)
            try:
                found = reader.feed(record.value, record.offset, position.source)
            except EventCorrupt:
                position.meet_bad_record()
                continue
            if found is not None:
                position.follow(found[0])
        epoch, writer = position.source if position.source[0] else NO_SOURCE
        replica.meta = replace(replica.meta, source_epoch=epoch, source_writer=writer)
        self._new_reader(last)
        return follow_on

    def _new_reader(self, previous_digest: bytes) -> None:
        self._reader = EventReader(self.generation.generation, previous_digest=previous_digest)
        self._skip_blocks_to = 0

    # Frames

    async def on_diffs(self, offset: int, record: bytes) -> None:
        """One record of the diffs topic, in order."""
        if offset < self.next_diffs or self.stopping.is_set():
            return
        self.next_diffs = offset + 1
        self.last_progress_s = time.monotonic()
        failpoints.hit("follow.read")
        self._handling += 1
        try:
            await self._follow(offset, record)
        finally:
            self._handling -= 1

    async def _follow(self, offset: int, record: bytes) -> None:
        try:
            if self.state is State.LEADING and self._primary is not None:
                outcome = self._primary.follow(record, offset)
            else:
                outcome = self.replica.step(record, offset)
        except Gap:
            self._commit()
            await self._check_diffs()  # the log may have changed under us: that is the first thing to know
            raise
        except (Diverged, FrameCorrupt) as error:
            self._quarantine(error, record, offset)
            raise
        self._take(outcome, offset)
        await self.claim_if_caught_up()

    def _take(self, outcome: Outcome, offset: int) -> None:
        match outcome:
            case Applied(step=step):
                self._uncommitted.append(step)
                self._commit_soon()
                if self.has_arrived:
                    self.stop()  # here and not later: the next record may stand above
            case Reign(header=header):
                self._commit_soon()
                if header.writer == self._writer:
                    self._lead()
                elif self.state is State.CLAIMING:
                    log.warning("epoch_lost", epoch=header.epoch, writer=header.writer.hex())
                    self.state = State.FOLLOWING
            case Void(reason=reason):
                self.voids[reason] += 1
                log.info("record_voided", topic=self.generation.diffs_topic, offset=offset, reason=reason)
            case Ended(successor=successor):
                log.warning("generation_ended", successor=successor.generation.hex())
                raise WrongChain(
                    f"generation {self.generation.generation.hex()} ended here; {successor.generation.hex()} follows",
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
        replica = self.replica
        if replica.group_length >= GROUP_FRAMES_MAX or self._group_bytes() >= self.settings.group_bytes_max:
            self._commit()
        elif not self._commit_is_due:
            # Far behind, frames are worth waiting for; at the tip nothing waits.
            self._commit_is_due = True
            is_behind = self.next_diffs < self.ends.diffs or self.in_flight > 1
            asyncio.get_running_loop().call_later(GROUP_WAIT_S if is_behind else 0, self._commit_or_fail)

    def _group_bytes(self) -> int:
        return sum(len(step.whole) for step in self._uncommitted) * 2

    def _commit_or_fail(self) -> None:
        self._commit_is_due = False
        if not self._opened or self.stopping.is_set():
            return
        try:
            self._commit()
        except Exception as error:
            self.fail(error)

    def _commit(self) -> None:
        self.replica.commit()
        self._committed = self.replica.meta
        if not self._uncommitted:
            return
        steps, self._uncommitted = self._uncommitted, []
        last = steps[-1]
        log.info(
            "group_committed",
            height=last.after.height,
            seq=last.header.seq,
            blocks=len(steps),
            changes=sum(step.header.op_count for step in steps),
            bytes=sum(len(step.whole) for step in steps),
        )
        self._room.set()
        self.progressed.set()
        for listener in self.on_commit:
            listener(steps)

    # Leading

    async def claim_if_caught_up(self) -> None:
        """A primary that has read all there was appends its EPOCH, and follows up to it."""
        if self.role is not Role.PRIMARY or self.state is not State.FOLLOWING or self.stopping.is_set():
            return
        if self.next_diffs < self.ends.diffs:
            return
        _, end = await self.broker.bounds(self.generation.diffs_topic, 0)
        if self.next_diffs < end:
            return
        self.state = State.CLAIMING
        self._writer = secrets.token_bytes(16)  # one reign, one writer
        await (await self._produce(epoch_frame(self.replica.meta, self._writer)))
        failpoints.hit("propose.epoch")

    def _lead(self) -> None:
        self._commit()
        self._primary = Primary(self.replica, codec=Codec[self.settings.codec.upper()])
        self.state = State.LEADING
        self._leading.set()
        log.info("epoch_claimed", epoch=self.replica.meta.epoch, writer=self._writer.hex())

    async def on_blocks(self, offset: int, record: bytes) -> list[Awaitable[Any]]:
        """One record of the blocks topic: propose what follows. Returns what is done once the frames are durable."""
        await self._leading.wait()
        while self._ahead_bytes() > self.settings.ahead_bytes_max and not self.stopping.is_set():
            self._room.clear()
            await self._room.wait()
        primary = self._primary
        if offset < self.next_blocks or self.stopping.is_set() or primary is None:
            return []
        if self.until_height is not None and primary.ahead.tip.height >= self.until_height:
            await self.stopping.wait()  # what is proposed already ends this node when it is read back
            return []
        self.next_blocks = offset + 1
        self.last_progress_s = time.monotonic()
        self._handling += 1
        try:
            return await self._propose(primary, offset, record)
        finally:
            self._handling -= 1

    async def _propose(self, primary: Primary, offset: int, record: bytes) -> list[Awaitable[Any]]:
        ahead = primary.ahead
        source = (ahead.source_epoch, ahead.source_writer)
        try:
            found = self._reader.feed(record, offset, source)
            if found is None or offset < self._skip_blocks_to:
                return []
            proposals = primary.propose(*found)
        except (CorruptInput, WalkGap) as error:
            mended_at = await self._mended_at(offset + 1, source, ahead.walk)
            if mended_at is None:
                raise self._located(error, offset) from error
            self._skip_blocks_to = mended_at
            return []
        except StateferryError as error:
            raise self._located(error, offset) from error
        if proposals:
            failpoints.hit("propose.computed")
        return [await self._produce(record) for proposal in proposals for record in proposal.records]

    def _ahead_bytes(self) -> int:
        return self.replica.layers.dirty_bytes + (self._primary.proposed_bytes if self._primary is not None else 0)

    def _located(self, error: StateferryError, offset: int) -> StateferryError:
        error.where = (
            f"{error.where + ', ' if error.where else ''}topic {self.generation.blocks_topic}, offset {offset}"
        )
        return error

    async def _mended_at(self, start: int, source: tuple[int, bytes], walk: int) -> int | None:
        """The offset of a valid EPOCH behind a bad record, which makes the stretch up to it void; None without one."""
        reader = EventReader(self.generation.generation, with_ops=False)
        async for record in topics.records(self.broker, self.generation.blocks_topic, start):
            try:
                found = reader.feed(record.value, record.offset, source)
            except CorruptInput:
                continue
            if found is not None and mends(found[0], source, walk):
                return record.offset
        return None

    # Being asked

    @property
    def proof_word(self) -> str:
        return "proven" if self.proof.proven else "claimed"

    @property
    def in_flight(self) -> int:
        return 0 if self._primary is None else self._primary.in_flight

    @property
    def has_consumed_all(self) -> bool:
        """Whether everything that was in the topics at the start is consumed, and own frames are committed."""
        if not self._started or self._handling or self._uncommitted or self._commit_is_due:
            return False
        if self.next_diffs < self.ends.diffs:
            return False
        if self.role is Role.REPLICA:
            return True
        return self.state is State.LEADING and self.next_blocks >= self.ends.blocks and self.in_flight == 0

    @property
    def has_arrived(self) -> bool:
        """Whether the height at which the node was to end is in what it accepted."""
        return self.until_height is not None and self.replica.meta.tip.height >= self.until_height

    @property
    def committed_meta(self) -> Meta:
        """The position of the store itself: what reads are answered at."""
        return self._committed

    @property
    def committed_height(self) -> int:
        return self._committed.tip.height

    @property
    def buffers_bytes(self) -> dict[str, int]:
        """What every buffer holds now; its bounds are in the settings."""
        return {
            "dirty_layers": self.replica.layers.dirty_bytes,
            "proposed_frames": 0 if self._primary is None else self._primary.proposed_bytes,
            "frame_chunks": self.replica.held_chunk_bytes,
            "event_chunks": self._reader.held_bytes,
            "group": self._group_bytes(),
        }

    async def wait_for_progress(self) -> None:
        """Until something was committed, or the node stops."""
        self.progressed.clear()
        waits = [asyncio.create_task(self.progressed.wait()), asyncio.create_task(self.stopping.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def adopt_stop(self, stopping: asyncio.Event) -> None:
        """Stop when this event is set: it is set by signals since before the node was there."""
        self.stopping = stopping

    def proven(self, proof: Proof) -> None:
        self.proof = proof
        self.progressed.set()

    # Archiving

    @property
    def archive_is_due(self) -> bool:
        """Whether a whole segment of final blocks waits for the archive."""
        meta = self._committed
        waits = bool(plan_segments(meta.archived_to, meta.final_height))
        return self.archiver is not None and self.proof.proven and waits

    def archive_once(self, *, flush: bool = False) -> bool:
        """Archive the next segment, or with ``flush`` what there is of it. False if there was nothing to do."""
        if self.archiver is None:
            return False
        self._commit()
        blocks = self.archiver.advance(self.replica, proven=self.proof.proven, flush=flush)
        self._commit()
        if blocks and self.archiver.last_put is not None:
            name, size = self.archiver.last_put
            log.info("segment_archived", segment=name, blocks=blocks, bytes=size)
        return blocks > 0

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
