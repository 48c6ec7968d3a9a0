"""A replica that also proposes: from an event to frames, and what reading them back confirms.

`Primary.propose` computes ahead of the log: each event on top of what was proposed before it, on dirty layers. The
frames are produced in order. When one is read back, its digest is that of the oldest proposal and the step prepared
for it is accepted without decoding it again. A valid EPOCH of somebody else means that this writer is no longer in
force: nothing that it proposed and did not read back has taken effect, here or anywhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from pipeline import chunk, frame, walk
from pipeline.apply import apply_block
from pipeline.block import Block, Event
from pipeline.codec import Codec
from pipeline.delta import encode_references
from pipeline.diff import join_tables
from pipeline.errors import Fenced, SeqConflict
from pipeline.frame import Header, Kind
from pipeline.position import LogMark, Meta, Tip
from pipeline.replica import Applied, Ended, Next, Outcome, Reign, Replica, Step, as_whole


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


def epoch_frame(meta: Meta, writer: bytes) -> bytes:
    """The EPOCH with which ``writer`` asks to be next after the one in force."""
    return frame.encode(
        Header(
            kind=Kind.EPOCH,
            codec=Codec.NONE,
            generation=meta.generation,
            epoch=meta.epoch + 1,
            writer=writer,
            shard=meta.shard,
            shards=meta.shards,
            chain_id=meta.chain_id,
            table_roots={},
        ),
        b"",
    )


class Primary:
    """Proposes on top of a `Replica` whose meta names this writer as the one in force.

    * `ahead` is the meta as it will be when everything proposed was read back.
    * Proposals are read back in the order in which they were made.
    """

    def __init__(
        self, replica: Replica, *, codec: Codec = Codec.ZSTD, record_bytes_max: int = chunk.RECORD_BYTES_MAX
    ) -> None:
        self.replica = replica
        self.ahead = replica.meta
        self._codec = codec
        self._record_bytes_max = record_bytes_max
        self._proposed: deque[Proposal] = deque()
        self.proposed_bytes = 0  # of the records in flight

    @property
    def in_flight(self) -> int:
        return len(self._proposed)

    # Proposing

    def propose(self, event: Event, reading: Reading) -> list[Proposal]:
        """The frames that follow from an event, pushed as dirty layers. Empty for an event that is ignored.

        Raises what `walk.plan` and `apply_block` raise; nothing of the event is kept then.
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
        match walk.plan(event, at, lambda height: self.replica.header_at(height + 1).parent_hash):
            case walk.Ignore():
                return []
            case walk.Reign(source=(epoch, writer)):
                self.ahead = replace(ahead, source_epoch=epoch, source_writer=writer)
                return []
            case walk.Apply(block=block, walk=number):
                done = LogMark(next_offset=reading.last + 1, last_digest=reading.digest)
                return [self._apply(block, number, done)]
            case walk.Undo(count=count, walk=number):
                again = LogMark(next_offset=reading.first, last_digest=reading.previous_digest)
                done = LogMark(next_offset=reading.last + 1, last_digest=reading.digest)
                return [
                    self._undo(number, done) if left == 0 else self._undo(ahead.walk, again)
                    for left in range(count - 1, -1, -1)
                ]

    def _apply(self, block: Block, number: int, done: LogMark) -> Proposal:
        before = self.ahead.tip
        applied = apply_block(block, self.replica.layers.read)
        after = Tip(
            ref=block.ref,
            vectors=applied.diff.advance(before.vectors),
            seq=self.ahead.seq + 1,
            counts=applied.diff.count(before.counts),
        )
        created = applied.diff.created()
        body = applied.diff.encode(created)
        header = replace(
            self._header(Kind.APPLY, number, done, after),
            ref=block.ref,
            parent_hash=block.parent_hash,
            block_time_s=block.time_s,
            op_count=applied.diff.op_count,
        )
        header = replace(header, frame_id=frame.frame_id(header, body.digests))
        whole = frame.encode(as_whole(header), join_tables(body.columns))
        references = {
            table_id: encode_references(table, applied.shared[table_id], created[table_id])
            for table_id, table in applied.diff.tables.items()
        }
        step = Step(header=header, effect=applied.effect, before=before, after=after, whole=whole)
        return self._propose(step, frame.encode(header, join_tables(references)))

    def _undo(self, number: int, done: LogMark) -> Proposal:
        undone = self.replica.entry(self.ahead.tip.seq)
        header = replace(
            self._header(Kind.UNDO, number, done, undone.before),
            ref=undone.header.ref,
            parent_hash=undone.header.parent_hash,
            block_time_s=undone.header.block_time_s,
        )
        header = replace(header, frame_id=frame.frame_id(header, undone.digests))
        step = self.replica.undo_step(header, undone, self.ahead.tip)
        return self._propose(step, frame.encode(header, b""))

    def _header(self, kind: Kind, number: int, done: LogMark, after: Tip) -> Header:
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
            prev_root=ahead.tip.root,
            post_root=after.root,
            prev_frame_id=ahead.frame_id,
            next_input_offset=done.next_offset,
            input_digest=done.last_digest or frame.NO_HASH,
            table_roots=after.table_roots,
        )

    def _propose(self, step: Step, message: bytes) -> Proposal:
        header = step.header
        records = chunk.cut(
            message,
            generation=header.generation,
            epoch=header.epoch,
            writer=header.writer,
            number=header.seq,
            record_bytes_max=self._record_bytes_max,
        )
        proposal = Proposal(step=step, records=records, digest=frame.digest_of(message))
        self.replica.push(step)
        self._proposed.append(proposal)
        self.proposed_bytes += sum(map(len, records))
        self.ahead = self.ahead.after(header, step.after, offset=0, digest=b"")
        return proposal

    # Reading back

    def follow(self, record: bytes, offset: int) -> Outcome:
        """One record of the own partition. Raises Fenced when somebody else is in force, or this generation ended."""
        replica = self.replica
        digest = frame.digest_of(record)
        if self._is_oldest(digest) and (replica.meta.epoch, replica.meta.writer) == (
            self.ahead.epoch,
            self.ahead.writer,
        ):
            replica.forget_chunks()
            return self._confirm(offset, digest)
        judged = replica.judge(record)
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
