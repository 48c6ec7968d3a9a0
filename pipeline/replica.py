"""The follower: what one record of the diffs topic means to a store, on every node.

What a record is, by the rule that is the same on every reader, says `frame_reader`. A frame that follows is computed
here: root and id are as claimed (Applied), or the two have Diverged, which ends in quarantine.

Applied steps collect in a group; `Replica.commit` writes the group in one batch. A primary uses the same class: it
computes steps ahead (`push`), and when it reads its own frame back it accepts the step it prepared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline import failpoints, frame, journal
from pipeline.apply import Effect, apply_references, apply_whole
from pipeline.codec import Codec
from pipeline.diff import decode_reference_body, decode_whole_body, join_tables
from pipeline.errors import FrameCorrupt, LogLost, SeqConflict, SeqGap
from pipeline.frame import Feature, Header, Kind
from pipeline.frame_reader import Ended, FrameReader, Next, Partial, Reign, Repeat, Void
from pipeline.group import Group, Step, Undo
from pipeline.layers import Layers
from pipeline.position import Meta, Tip, encode_meta
from pipeline.recent import Recent, Undone
from pipeline.stores.base import META_KEY, Batch, Store
from pipeline.verify import check_result

MEETING_BLOCKS = 128
"""Final blocks that the journal of a shard keeps beside what finality needs: two segments of the archive. So far apart
may shards stand and still be taken back, and forward with what is archived, to one height."""
_STEP_BYTES = 8 << 10
"""What a step keeps beside its writes and its frame: header, vectors, position. Most of what a small block costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    step: Step


Outcome = Applied | Repeat | Void | Partial | Reign | Ended


class Replica:
    """A store that follows one partition of frames.

    * `meta` is the position of all that was accepted; the store's own is that of the last `commit`.
    * `recent` has the last frames, written or not; `group` what is not written.
    * A step is pushed (readable on top of the store), then accepted (the log made it valid), then committed.
    """

    def __init__(self, store: Store, meta: Meta, *, archives: bool = False) -> None:
        """``archives``: keep journal entries until `Meta.archived_to` passed them."""
        self.store = store
        self.meta = meta
        self._written = meta
        self.layers = Layers(store)
        self.reader = FrameReader()
        self.group = Group()
        self.recent = Recent(store, self.group)
        self._archives = archives

    @property
    def group_bytes(self) -> int:
        """What waits for `commit`, of what the layers hold."""
        return self.layers.lowest_bytes(len(self.group.accepted))

    @property
    def group_length(self) -> int:
        return len(self.group.accepted)

    @property
    def written_seq(self) -> int:
        return self._written.seq

    # Following

    def step(self, record: bytes, offset: int) -> Outcome:
        """Take one record in, up to the group. Raises as the module says; nothing of the record is kept then."""
        judged = self.reader.feed(record, self.meta)
        match judged:
            case Next(header=header, message=message):
                step = self.compute(header, message)
                failpoints.hit("follow.stepped")
                self.push(step)
                self.accept(step, offset=offset, digest=frame.digest_of(record))
                return Applied(step=step)
            case Reign(header=header):
                if Feature.TAKES_BACK in header.required:
                    self._go_back(header)
                self.meta = self.meta.after_epoch(header, offset=offset, digest=frame.digest_of(record))
                self.group.is_dirty = True
                return judged
            case _:
                return judged

    def compute(self, header: Header, message: bytes) -> Step:
        """What a frame that follows does, checked against everything it claims."""
        before = self.meta.tip
        if header.kind is Kind.UNDO:
            return self.compute_undo(header)
        decoded = frame.decode(message)
        if Feature.SELF_CONTAINED in header.required:
            diff = decode_whole_body(decoded.body)
            effect = apply_whole(diff, self.layers.read)
        else:
            diff, effect = apply_references(decode_reference_body(decoded.body), self.layers.read)
        if header.op_count != diff.op_count:
            raise FrameCorrupt(f"frame {header.seq} announces {header.op_count} changes and has {diff.op_count}")
        after = Tip(
            ref=header.ref,
            vectors=diff.advance(before.vectors),
            seq=header.seq,
            counts=diff.count(before.counts),
        )
        body = diff.encode()
        check_result(header, after, frame.frame_id(header, body.digests))
        whole = frame.encode(as_whole(header), join_tables(body.columns))
        return Step(header=header, effect=effect, before=before, after=after, whole=whole)

    def compute_undo(self, header: Header) -> Step:
        """An UNDO frame: what it does comes from this node's own journal."""
        undone = self.recent.entry(self.meta.tip.seq)
        check_result(header, undone.before, frame.frame_id(header, undone.digests))
        return self.undo_step(header, undone, self.meta.tip)

    def undo_step(self, header: Header, undone: Undone, before: Tip) -> Step:
        """The step that takes ``undone`` off ``before``."""
        effect = apply_whole(undone.diff.inverted(), self.layers.read)
        whole = frame.encode(as_whole(header), undone.body)
        return Step(header=header, effect=effect, before=before, after=undone.before, whole=whole)

    def push(self, step: Step) -> None:
        """Make a computed step readable."""
        self.lay(step.header.seq, step.effect)
        self.pushed(step)

    def lay(self, seq: int, effect: Effect) -> None:
        """Make what a step does readable, before the step itself is `pushed`."""
        self.layers.push(seq, effect.writes)

    def pushed(self, step: Step) -> None:
        """The step whose effect was laid."""
        self.layers.hold(step.header.seq, _STEP_BYTES + len(step.whole))
        self.group.steps[step.header.seq] = step

    def accept(self, step: Step, *, offset: int, digest: bytes) -> None:
        """The log made a pushed step valid: it belongs to the group now."""
        before = self.meta
        self.meta = before.after(step.header, step.after, offset=offset, digest=digest)
        self.group.accept(step, before, self.meta)

    def commit(self, up_to_seq: int | None = None) -> Meta:
        """Write the group, or its frames up to a seq: the only commit point there is. Does nothing without one.

        Returns the position of the store.
        """
        group = self.group
        if up_to_seq is not None and up_to_seq < max(group.accepted, default=0):
            if (ready := group.up_to(up_to_seq)).accepted:
                self._write(ready, list(ready.accepted.values())[-1].meta)
        elif group.is_dirty:
            self._write(group, self.meta)
            group.is_dirty = False
        return self._written

    def _write(self, ready: Group, meta: Meta) -> None:
        seqs = list(ready.accepted)
        meta = self._prune(meta, ready.undo)
        batch = Batch(state=self.group.writes(seqs), undo=ready.undo, meta={META_KEY: encode_meta(meta)})
        failpoints.hit("store.before_write")
        self.store.write(batch)
        failpoints.hit("store.after_write")
        self._written = meta
        for seq in seqs:
            self.layers.settle(seq)
        self.group.written(seqs)

    def _prune(self, meta: Meta, undo: Undo) -> Meta:
        """Drop what finality, and the archive where this node feeds one, no longer need. ``undo``: what is written with
        ``meta``, to which the deletions are added. Returns the meta that says so, and lets those that follow say so."""
        bound = min(meta.final_height, meta.archived_to - 1) if self._archives else meta.final_height
        if meta.shards > 1:
            bound -= MEETING_BLOCKS
        height, first = meta.journal_first_height, meta.journal_first_seq
        while height <= min(bound, meta.tip.height):
            seq = self.recent.accepted_seq_at(height, undo)
            if seq is not None:
                for old in range(first, seq + 1):
                    undo[journal.entry_key(old)] = None
                first = seq + 1
            undo[journal.height_key(height)] = None
            height += 1
        if height == meta.journal_first_height:
            return meta

        def begin(other: Meta) -> Meta:
            return replace(other, journal_first_height=height, journal_first_seq=first)

        self.meta = begin(self.meta)
        accepted = self.group.accepted
        accepted.update({seq: replace(one, meta=begin(one.meta)) for seq, one in accepted.items()})
        return begin(meta)

    def drop_proposed(self) -> None:
        """Forget every pushed step that was not accepted."""
        self.layers.revert(max(self.group.accepted, default=0))
        self.group.drop_proposed()

    def archived(self, archived_to: int) -> None:
        """Blocks below this height are in the archive: the next commit may prune them."""
        self.meta = replace(self.meta, archived_to=archived_to)
        self.group.is_dirty = True

    # Taking back

    def leave(self, seq: int) -> None:
        """Forget what was accepted and not written above a seq, and pass by all up to the EPOCH that takes it back: it
        will come, as another shard, which goes on otherwise, shows."""
        self._drop_above(seq)
        self.reader.passes_by = True

    def _drop_above(self, seq: int) -> None:
        """Forget steps that were accepted and not written."""
        assert self._written.seq <= seq, (self._written.seq, seq)
        self.group.drop_above(seq)
        kept = self.group.accepted
        meta = list(kept.values())[-1].meta if kept else self._written
        self.layers.revert(max(kept, default=0))
        self.meta = replace(meta, epoch=self.meta.epoch, writer=self.meta.writer, archived_to=self.meta.archived_to)

    def _go_back(self, header: Header) -> None:
        """Take back every frame above an EPOCH's seq: from the group, or by the journal.

        Raises SeqGap if that frame was not followed, SeqConflict if it was another one, StoreCorrupt if the journal
        does not reach that far.
        """
        seq, meta = header.seq, self.meta
        if seq > meta.seq:
            raise SeqGap(f"epoch {header.epoch} goes back to frame {seq}, which is above the last one, {meta.seq}")
        stays = meta.frame_id if seq == meta.seq else self.recent.header(seq + 1).prev_frame_id
        if stays != header.prev_frame_id:
            raise SeqConflict(f"epoch {header.epoch} goes back to frame {seq}, but another one was applied there")
        self._drop_above(max(seq, self._written.seq))
        while self.meta.seq > seq:
            self.take_back(is_lost=False)
        self.reader.passes_by = False
        self.meta = replace(self.meta, epoch=meta.epoch, writer=meta.writer)

    def take_back(self, *, is_lost: bool = True) -> None:
        """Undo the last frame: state and meta as before it, but the proof. Commits. ``is_lost``: the log lost it, or
        it never took effect everywhere.

        Raises LogLost when the journal does not reach that far.
        """
        assert not self.group.steps, "frames are in flight"
        self.reader.forget_chunks()
        meta = self.meta
        if meta.seq < meta.journal_first_seq:
            raise LogLost(
                f"the log lost more frames than the journal can take back (it begins at seq {meta.journal_first_seq})",
                way_out="restore this data directory from a snapshot",
            )
        entry = self.recent.stored(meta.seq)
        header = entry.header
        effect = apply_whole(entry.diff().inverted(), self.layers.read)
        at_height = journal.height_key(header.ref.height)
        back_at = entry.before.tip.seq.to_bytes(8, "big") if header.kind is Kind.UNDO else None
        self.meta = self._written = replace(
            entry.before,
            journal_first_seq=meta.journal_first_seq,
            journal_first_height=meta.journal_first_height,
            archived_to=meta.archived_to,
            final_floor=meta.final_height if is_lost else meta.final_floor,  # it never goes back, whatever is lost
        )
        self.store.write(
            Batch(
                state=effect.writes,
                undo={journal.entry_key(meta.seq): None, at_height: back_at},
                meta={META_KEY: encode_meta(self.meta)},
            )
        )
        failpoints.hit("store.taken_back")

    def begin_again(self, meta: Meta) -> None:
        """The log lost what was followed and changed nothing: another position of the same state. Commits."""
        self.meta = self._written = meta
        self.store.write(Batch(meta={META_KEY: encode_meta(meta)}))


def as_whole(header: Header) -> Header:
    """The header of the same frame in whole form."""
    return replace(header, required=header.required | Feature.SELF_CONTAINED, codec=Codec.ZSTD)
