"""A replica that also proposes: from an event to frames, and what reading them back confirms.

`Primary.propose` computes ahead of the log: each event on top of what was proposed before it, on dirty layers. The
frames are produced in order. When one is read back, its digest is that of the oldest proposal and the step prepared
for it is accepted without decoding it again. A valid EPOCH of somebody else means that this writer is no longer in
force: nothing that it proposed and did not read back has taken effect, here or anywhere.

Most of a frame's work needs nothing of the frame before it: `begin` nets the block, lays what it writes on the dirty
layers, and hands that work to whoever seals (`pipeline.seal`), maybe in another process. `finish` links what came back
into a frame. So the next block is read and netted while this one is hashed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from pipeline import chunk, frame, walk
from pipeline.apply import Effect, apply_block
from pipeline.block import Block, Connect, Event, Rewind, SourceEpoch
from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.errors import Fenced, RewindTooDeep, SeqConflict, WalkInvalid
from pipeline.frame import Feature, Header, Kind
from pipeline.frame_reader import Ended, Next, Reign
from pipeline.group import Step
from pipeline.position import LogMark, Meta, Tip
from pipeline.replica import Applied, Outcome, Replica, as_whole
from pipeline.seal import Pending, Seal, Sealer, seal_at_once


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One frame to produce: its records, in order. ``digest`` is that of the whole frame."""

    step: Step
    records: list[bytes]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Where an event stood on the blocks topic: ``first`` and ``last`` offset of its records, the digest of its last
    record, and of the record before its first."""

    first: int
    last: int
    digest: bytes
    previous_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A block's frame, but for what depends on the frames before it. ``header`` lacks roots, links and id."""

    header: Header
    effect: Effect
    counts: dict[int, int]
    sealing: Pending


def epoch_frame(meta: Meta, writer: bytes) -> bytes:
    """The EPOCH with which ``writer`` asks to be next after the one in force."""
    return frame.encode(_epoch_header(meta, writer), b"")


def _epoch_header(meta: Meta, writer: bytes) -> Header:
    return Header(
        kind=Kind.EPOCH,
        codec=Codec.NONE,
        generation=meta.generation,
        epoch=meta.epoch + 1,
        writer=writer,
        shard=meta.shard,
        shards=meta.shards,
        chain_id=meta.chain_id,
        table_roots={},
    )


def take_back_frame(replica: Replica, writer: bytes, event: SourceEpoch, reading: Reading) -> bytes:
    """The EPOCH with which a shard's ``writer`` makes void all that came of the events that ``event`` makes void: from
    there on the shard stands where one does that refused the first of them. Raises RewindTooDeep if the journal does
    not reach that far."""
    meta, walk = replica.meta, event.resume_walk - 1
    stays = replica.recent.header_of_walk(walk, meta) if walk else None
    height = meta.base_height if stays is None else stays.ref.height - (stays.kind is Kind.UNDO)
    if (stays is None and (walk or meta.journal_first_seq > 1)) or (stays and height < meta.archived_to - 1):
        raise RewindTooDeep(
            f"events from {event.resume_walk} on are void, but this shard cannot take them back: its journal begins "
            f"with frame {meta.journal_first_seq}, blocks below {meta.archived_to} are archived",
            way_out="begin a generation from a snapshot below: `stateferry generation new --height`",
        )
    return frame.encode(
        replace(
            _epoch_header(meta, writer),
            required=Feature.TAKES_BACK,
            seq=0 if stays is None else stays.seq,
            walk=walk,
            prev_frame_id=frame.NO_HASH if stays is None else stays.frame_id,
            source_epoch=event.stamp.epoch,
            source_writer=event.stamp.writer,
            next_input_offset=reading.last + 1,
            input_digest=reading.digest,
        ),
        b"",
    )


def check_repeat(replica: Replica, event: Event) -> None:
    """An event with a number that was applied already. Raises WalkInvalid if it is not the one that was, as far as the
    journal tells: then the topic lost that one, and others took its place."""
    if isinstance(event, SourceEpoch) or (applied := replica.recent.header_of_walk(event.walk, replica.meta)) is None:
        return
    match event:
        case Connect(block=block):
            is_same = (applied.kind, applied.ref) == (Kind.APPLY, block.ref)
        case Rewind(to=to):
            is_same = (applied.kind, applied.parent_hash) == (Kind.UNDO, to.block_hash)
    if not is_same:
        said = "a rewind" if isinstance(event, Rewind) else f"block {event.block.ref}"
        raise WalkInvalid(
            f"event {event.walk} is {said}, but another one was applied under this number: {applied.kind.name} "
            f"{applied.ref}",
            way_out="the topic lost events, and others took their place: publish the branch that was applied again, "
            "with --again, then the other; `stateferry generation new` begins again from a snapshot",
        )


class Primary:
    """Proposes on top of a `Replica` whose meta names this writer as the one in force.

    * `ahead` is the meta as it will be when everything begun was read back. While `is_sealing`, its roots, its frame id
      and its vectors are not known yet: those in it are older.
    * Proposals are finished and read back in the order in which they were begun.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        codec: Codec = Codec.ZSTD,
        record_bytes_max: int = chunk.RECORD_BYTES_MAX,
        sealer: Sealer = seal_at_once,
    ) -> None:
        self.replica = replica
        self.ahead = replica.meta
        self._codec = codec
        self._record_bytes_max = record_bytes_max
        self._sealer = sealer
        self._last = replica.meta  # as it will be when everything finished was read back
        self._begun: deque[_Draft | Proposal] = deque()
        self._proposed: deque[Proposal] = deque()
        self.proposed_bytes = 0  # of the records in flight

    @property
    def in_flight(self) -> int:
        """Frames begun and not read back."""
        return len(self._begun) + len(self._proposed)

    @property
    def begun(self) -> int:
        """Frames begun and not finished."""
        return len(self._begun)

    @property
    def is_sealing(self) -> bool:
        return any(isinstance(begun, _Draft) for begun in self._begun)

    @property
    def sealing(self) -> Pending | None:
        """What `finish` would wait for."""
        oldest = self._begun[0] if self._begun else None
        return oldest.sealing if isinstance(oldest, _Draft) else None

    # Proposing

    def propose(self, event: Event, reading: Reading) -> list[Proposal]:
        """The frames that follow from an event, begun and finished. Raises as `begin` does."""
        self.begin(event, reading)
        return [self.finish() for _ in range(self.begun)]

    def begin(self, event: Event, reading: Reading) -> None:
        """Start the frames that follow from an event, on dirty layers: none for an event that is ignored.

        A rewind needs the roots of what it takes back: it must not be begun while `is_sealing`. Raises what `walk.plan`
        and `apply_block` raise; nothing of the event is kept then.
        """
        ahead = self.ahead
        at = walk.Stand(
            chain_id=ahead.chain_id,
            generation=ahead.generation,
            source=(ahead.source_epoch, ahead.source_writer),
            walk=ahead.walk,
            tip=ahead.tip.ref,
            final_height=ahead.final_height,
        )
        match walk.plan(event, at, lambda height: self.replica.recent.header_at(height + 1).parent_hash):
            case walk.Ignore(why=why):
                if why == "repeat":
                    check_repeat(self.replica, event)
            case walk.Reign(source=source):
                self.take_over(source)
            case walk.Apply(block=block, walk=number):
                done = LogMark(next_offset=reading.last + 1, last_digest=reading.digest)
                self._begin_block(block, number, done)
            case walk.Undo(count=count, walk=number):
                assert not self.is_sealing
                again = LogMark(next_offset=reading.first, last_digest=reading.previous_digest)
                done = LogMark(next_offset=reading.last + 1, last_digest=reading.digest)
                for left in range(count - 1, -1, -1):
                    self._begun.append(self._undo(number, done) if left == 0 else self._undo(ahead.walk, again))

    def take_over(self, source: tuple[int, bytes]) -> None:
        """A source's EPOCH that mends is in force: (epoch, writer)."""
        epoch, writer = source
        self.ahead = replace(self.ahead, source_epoch=epoch, source_writer=writer)

    def finish(self) -> Proposal:
        """The frame begun first, computed: it is in flight from here on. Waits for its seal."""
        begun = self._begun[0]
        proposal = begun if isinstance(begun, Proposal) else self._link(begun, begun.sealing.result())
        self._begun.popleft()
        self._proposed.append(proposal)
        self.proposed_bytes += sum(map(len, proposal.records))
        return proposal

    def _begin_block(self, block: Block, number: int, done: LogMark) -> None:
        ahead = self.ahead
        applied = apply_block(block, self.replica.layers.read)
        diff = applied.diff
        header = replace(
            self._header(Kind.APPLY, number, done),
            ref=block.ref,
            parent_hash=block.parent_hash,
            block_time_s=block.time_s,
            op_count=diff.op_count,
        )
        sealing = self._sealer(diff, applied.shared, self._codec)
        counts = diff.count(ahead.tip.counts)
        self.replica.lay(header.seq, applied.effect)
        self._begun.append(_Draft(header=header, effect=applied.effect, counts=counts, sealing=sealing))
        after = replace(ahead.tip, ref=block.ref, seq=header.seq, counts=counts)
        self.ahead = ahead.after(header, after, offset=0, digest=b"")

    def _link(self, draft: _Draft, seal: Seal) -> Proposal:
        """A draft on top of the frame finished before it."""
        before = self._last.tip
        after = Tip(
            ref=draft.header.ref,
            vectors=lthash.combine(before.vectors, seal.gains),
            seq=draft.header.seq,
            counts=draft.counts,
        )
        header = self._linked(draft.header, after)
        header = replace(header, frame_id=frame.frame_id(header, seal.digests))
        whole = frame.join(as_whole(header), seal.whole)
        step = Step(header=header, effect=draft.effect, before=before, after=after, whole=whole)
        self.replica.pushed(step)
        proposal = self._cut(step, frame.join(header, seal.wire))
        if not any(isinstance(begun, _Draft) for begun in list(self._begun)[1:]):
            ahead = self.ahead
            self.ahead = replace(self._last, source_epoch=ahead.source_epoch, source_writer=ahead.source_writer)
        return proposal

    def _undo(self, number: int, done: LogMark) -> Proposal:
        undone = self.replica.recent.entry(self.ahead.tip.seq)
        header = replace(
            self._header(Kind.UNDO, number, done),
            ref=undone.header.ref,
            parent_hash=undone.header.parent_hash,
            block_time_s=undone.header.block_time_s,
        )
        header = self._linked(header, undone.before)
        header = replace(header, frame_id=frame.frame_id(header, undone.digests))
        step = self.replica.undo_step(header, undone, self.ahead.tip)
        self.replica.push(step)
        proposal = self._cut(step, frame.encode(header, b""))
        self.ahead = self._last
        return proposal

    def _header(self, kind: Kind, number: int, done: LogMark) -> Header:
        """What is known of the next frame before those below it are finished."""
        ahead = self.ahead
        return Header(
            kind=kind,
            codec=self._codec,
            generation=ahead.generation,
            epoch=ahead.epoch,
            writer=ahead.writer,
            shard=ahead.shard,
            shards=ahead.shards,
            chain_id=ahead.chain_id,
            seq=ahead.seq + 1,
            walk=number,
            source_epoch=ahead.source_epoch,
            source_writer=ahead.source_writer,
            next_input_offset=done.next_offset,
            input_digest=done.last_digest or frame.NO_HASH,
            table_roots={},
        )

    def _linked(self, header: Header, after: Tip) -> Header:
        last = self._last
        return replace(
            header,
            prev_root=last.tip.root,
            post_root=after.root,
            prev_frame_id=last.frame_id,
            table_roots=after.table_roots,
        )

    def _cut(self, step: Step, message: bytes) -> Proposal:
        header = step.header
        records = chunk.cut(
            message,
            generation=header.generation,
            epoch=header.epoch,
            writer=header.writer,
            number=header.seq,
            record_bytes_max=self._record_bytes_max,
        )
        self._last = self._last.after(header, step.after, offset=0, digest=b"")
        return Proposal(step=step, records=records, digest=frame.digest_of(message))

    # Reading back

    def follow(self, record: bytes, offset: int) -> Outcome:
        """One record of the own partition. Raises Fenced when somebody else is in force, or this generation ended."""
        replica = self.replica
        digest = frame.digest_of(record)
        if self._is_oldest(digest) and (replica.meta.epoch, replica.meta.writer) == (
            self.ahead.epoch,
            self.ahead.writer,
        ):
            replica.reader.forget_chunks()
            return self._confirm(offset, digest)
        judged = replica.reader.feed(record, replica.meta)
        match judged:
            case Next(header=header, message=message):
                if self._is_oldest(frame.digest_of(message)):
                    return self._confirm(offset, digest)
                raise SeqConflict(f"frame {header.seq} of this writer was read back, but was not proposed")
            case Reign(header=header):
                raise Fenced(
                    f"writer {header.writer.hex()} is in force since epoch {header.epoch}; this one was in epoch "
                    f"{self.ahead.epoch}",
                    way_out="let one primary run; start this one again to take over, or as a replica",
                )
            case Ended(successor=successor):
                raise Fenced(
                    f"generation {self.ahead.generation.hex()} has ended; {successor.generation.hex()} follows it",
                    way_out="restore from a snapshot into an empty data directory",
                )
            case _:
                return judged

    def _is_oldest(self, digest: bytes) -> bool:
        return bool(self._proposed) and self._proposed[0].digest == digest

    def _confirm(self, offset: int, digest: bytes) -> Applied:
        proposal = self._proposed.popleft()
        self.proposed_bytes -= sum(map(len, proposal.records))
        self.replica.accept(proposal.step, offset=offset, digest=digest)
        return Applied(step=proposal.step)
