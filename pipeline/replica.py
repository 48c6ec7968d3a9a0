"""The follower: what one record of the diffs topic means to a store, on every node.

The rule, in the order in which it is asked, the same on every reader:

    damaged, another generation or shard, a writer not in force      -> Void: counted, passed by
    an EPOCH with the number in force + 1                            -> Reign; it may take frames of a shard back
    a GENERATION with the number in force + 1                        -> Ended: this history is over
    in force, of a version or feature unknown here                   -> Unsupported: stop
    in force, undecodable                                            -> FrameCorrupt: quarantine
    the seq and id applied last                                      -> Repeat
    seq + 1, links meet, root and id are as claimed                  -> Applied
    a gap                                                            -> SeqGap: bridge or restore
    another id at a seq, links that do not meet, another root        -> Diverged: quarantine

Applied steps collect in a group; `Replica.commit` writes the group in one batch. A primary uses the same class: it
computes steps ahead (`push`), and when it reads its own frame back it accepts the step it prepared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace

from blake3 import blake3

from pipeline import chunk, failpoints, frame, journal
from pipeline.apply import Effect, apply_references, apply_whole
from pipeline.codec import Codec
from pipeline.diff import Diff, decode_reference_body, decode_whole_body, join_tables, split_tables
from pipeline.errors import FrameCorrupt, LogLost, SeqConflict, SeqGap, StoreCorrupt
from pipeline.frame import Feature, Header, Kind
from pipeline.generation import Generation, decode_end
from pipeline.layers import Layers
from pipeline.position import Meta, Tip, encode_meta
from pipeline.stores.base import META_KEY, Batch, Store
from pipeline.verify import check_result, follows

MEETING_BLOCKS = 128
"""Final blocks that the journal of a shard keeps beside what finality needs: two segments of the archive. So far apart
may shards stand and still be taken back, and forward with what is archived, to one height."""
_STEP_BYTES = 8 << 10
"""What a step keeps beside its writes and its frame: header, vectors, position. Most of what a small block costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One numbered frame, computed and checked, not yet written."""

    header: Header
    effect: Effect
    before: Tip
    after: Tip
    whole: bytes  # the frame in whole form: the journal's, later the archive's


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What the log made valid and is not written yet: the position after it, and what it does to the journal."""

    meta: Meta
    undo: dict[bytes, bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """A record that no reader may follow. ``reason`` is one of a fixed few words, counted by it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A chunk of a message that is not complete yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    header: Header


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    successor: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """A frame in force that follows; what it changes is still to be computed."""

    header: Header
    message: bytes


Outcome = Applied | Repeat | Void | Partial | Reign | Ended
Judgement = Next | Repeat | Void | Partial | Reign | Ended


class Replica:
    """A store that follows one partition of frames.

    * `meta` is the position of all that was accepted; the store's own is that of the last `commit`.
    * A step is pushed (readable on top of the store), then accepted (the log made it valid), then committed.
    """

    def __init__(self, store: Store, meta: Meta, *, archives: bool = False) -> None:
        """``archives``: keep journal entries until `Meta.archived_to` passed them."""
        self.store = store
        self.meta = meta
        self._written = meta
        self.layers = Layers(store)
        self.voids: Counter[str] = Counter()
        self._archives = archives
        self._assembler = chunk.Assembler()
        self._steps: dict[int, Step] = {}  # pushed, not committed, by seq
        self._group: dict[int, Accepted] = {}  # not committed, by seq, ascending
        self._undo: dict[bytes, bytes | None] = {}  # of the group, all together
        self._group_is_dirty = False
        self._left = False  # what comes up to the next EPOCH that takes back is void

    # Reading

    @property
    def group_bytes(self) -> int:
        """What waits for `commit`, of what the layers hold."""
        return self.layers.lowest_bytes(len(self._group))

    @property
    def group_length(self) -> int:
        return len(self._group)

    @property
    def written_seq(self) -> int:
        return self._written.seq

    def accepted(self, seq: int) -> Header:
        """The header of a frame of the group."""
        return self._steps[seq].header

    @property
    def held_chunk_bytes(self) -> int:
        return self._assembler.held_bytes

    def judge(self, record: bytes) -> Judgement:
        """What a record is, without computing it. Raises as the module says."""
        if chunk.is_chunk(record):
            return self._judge_chunk(record)
        return self._judge_message(record)

    def _judge_chunk(self, record: bytes) -> Judgement:
        origin = chunk.peek_origin(record)
        if origin is None:
            return self._void("damaged")
        if origin.generation != self.meta.generation:
            return self._void("generation")
        if (origin.epoch, origin.writer) != (self.meta.epoch, self.meta.writer):
            return self._void("writer")
        message = self._assembler.feed(chunk.decode_chunk(record))
        return Partial() if message is None else self._judge_message(message)

    def _judge_message(self, message: bytes) -> Judgement:
        meta = self.meta
        prefix = frame.peek_prefix(message)
        if prefix is None:
            return self._void("damaged")
        if prefix.generation != meta.generation:
            return self._void("generation")
        if (prefix.shard, prefix.shards) != (meta.shard, meta.shards):
            return self._void("shard")
        if prefix.kind in (Kind.EPOCH, Kind.GENERATION):
            if prefix.epoch != meta.epoch + 1:
                return self._void("epoch")
            self.forget_chunks()
            if prefix.kind == Kind.GENERATION:
                return Ended(successor=decode_end(frame.decode(message).body))
            return Reign(header=frame.peek(message))
        if (prefix.epoch, prefix.writer) != (meta.epoch, meta.writer):
            return self._void("writer")
        self.forget_chunks()
        header = frame.peek(message)
        if self._left:
            return self._void("taken back")
        if not follows(header, meta):
            return Repeat(seq=header.seq)
        return Next(header=header, message=message)

    def is_ahead(self, record: bytes) -> bool:
        """Whether a record is of a later epoch than the one in force, by what it says of itself."""
        origin = chunk.peek_origin(record) if chunk.is_chunk(record) else frame.peek_prefix(record)
        return origin is not None and origin.generation == self.meta.generation and origin.epoch > self.meta.epoch

    def _void(self, reason: str) -> Void:
        self.voids[reason] += 1
        return Void(reason=reason)

    # Following

    def step(self, record: bytes, offset: int) -> Outcome:
        """Take one record in, up to the group. Raises as the module says; nothing of the record is kept then."""
        judged = self.judge(record)
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
                self._group_is_dirty = True
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
        undone = self.entry(self.meta.tip.seq)
        check_result(header, undone.before, frame.frame_id(header, undone.digests))
        return self.undo_step(header, undone, self.meta.tip)

    def undo_step(self, header: Header, undone: Undone, before: Tip) -> Step:
        """The step that takes ``undone`` off ``before``."""
        effect = apply_whole(undone.diff.inverted(), self.layers.read)
        whole = frame.encode(as_whole(header), undone.body)
        return Step(header=header, effect=effect, before=before, after=undone.before, whole=whole)

    def forget_chunks(self) -> None:
        """A message in force came whole: what is incomplete stays so for every reader, restarted or not."""
        self._assembler.discard()

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
        self._steps[step.header.seq] = step

    def accept(self, step: Step, *, offset: int, digest: bytes) -> None:
        """The log made a pushed step valid: it belongs to the group now."""
        header, before = step.header, self.meta
        self.meta = before.after(header, step.after, offset=offset, digest=digest)
        entry = journal.Entry(before=before.common(), frame_bytes=step.whole)  # the same on every node
        undo: dict[bytes, bytes | None] = {
            journal.entry_key(header.seq): journal.encode_entry(entry),
            journal.height_key(header.ref.height): None if header.kind is Kind.UNDO else header.seq.to_bytes(8, "big"),
        }
        self._undo |= undo
        self._group[header.seq] = Accepted(meta=self.meta, undo=undo)
        self._group_is_dirty = True

    def commit(self, up_to_seq: int | None = None) -> Meta:
        """Write the group, or its frames up to a seq: the only commit point there is. Does nothing without one.

        Returns the position of the store.
        """
        group = self._group
        kept = {} if up_to_seq is None else {seq: one for seq, one in group.items() if seq > up_to_seq}
        if kept:
            ready = {seq: one for seq, one in group.items() if seq not in kept}
            if ready:
                self._write(list(ready), _joined(ready), list(ready.values())[-1].meta)
                self._group = {seq: self._group[seq] for seq in kept}
                self._undo = _joined(kept)
        elif self._group_is_dirty:
            self._write(list(group), self._undo, self.meta)
            self._group, self._undo, self._group_is_dirty = {}, {}, False
        return self._written

    def _write(self, seqs: list[int], undo: dict[bytes, bytes | None], meta: Meta) -> None:
        meta = self._prune(meta, undo)
        batch = Batch(
            state=_merge([self._steps[seq].effect for seq in seqs]), undo=undo, meta={META_KEY: encode_meta(meta)}
        )
        failpoints.hit("store.before_write")
        self.store.write(batch)
        failpoints.hit("store.after_write")
        self._written = meta
        for seq in seqs:
            self.layers.settle(seq)
            del self._steps[seq]

    def drop_proposed(self) -> None:
        """Forget every pushed step that was not accepted."""
        accepted = max(self._group, default=self.meta.seq)
        self.layers.revert(accepted if self._group else 0)
        self._steps = {seq: step for seq, step in self._steps.items() if seq <= accepted}

    def archived(self, archived_to: int) -> None:
        """Blocks below this height are in the archive: the next commit may prune them."""
        self.meta = replace(self.meta, archived_to=archived_to)
        self._group_is_dirty = True

    # The journal

    def entry(self, seq: int) -> Undone:
        """What taking a frame back needs, from the steps not yet written or from the journal."""
        step = self._steps.get(seq)
        if step is not None:
            return Undone.of(step.before, step.whole)
        entry = self._stored_entry(seq)
        return Undone.of(entry.before.tip, entry.frame_bytes)

    def _stored_entry(self, seq: int) -> journal.Entry:
        data = self._undo.get(journal.entry_key(seq)) or self.store.get_undo(journal.entry_key(seq))
        if data is None:
            raise StoreCorrupt(
                f"the journal has no entry for seq {seq} (it begins at {self.meta.journal_first_seq})",
                way_out="restore this data directory from a snapshot",
            )
        return journal.decode_entry(data)

    def seq_at(self, height: int) -> int | None:
        """The seq of the frame that connected the current branch's block at a height, while the journal has it."""
        for step in reversed(self._steps.values()):
            if step.header.ref.height == height:
                return None if step.header.kind is Kind.UNDO else step.header.seq
        return self._accepted_seq_at(height)

    def _accepted_seq_at(self, height: int, undo: dict[bytes, bytes | None] | None = None) -> int | None:
        key = journal.height_key(height)
        undo = self._undo if undo is None else undo
        data = undo[key] if key in undo else self.store.get_undo(key)
        return None if data is None else int.from_bytes(data, "big")

    def header_at(self, height: int) -> Header:
        """The header of the current branch's block at a height. Raises StoreCorrupt if the journal has none."""
        seq = self.seq_at(height)
        if seq is None:
            raise StoreCorrupt(f"the journal has no block at height {height}")
        return self._header(seq)

    def header_of_walk(self, walk: int) -> Header | None:
        """The header of the frame that ends an event; None where the journal does not reach it. The UNDO frames of a
        rewind, but its last one, carry the number of the event before it: the first frame of a number is its own."""
        seqs = range(self.meta.journal_first_seq, max(self._steps, default=self.meta.seq) + 1)
        at = bisect_left(seqs, walk, key=lambda seq: self._header(seq).walk)
        header = self._header(seqs[at]) if at < len(seqs) else None
        if header is None or header.walk != walk or (at == 0 and header.kind is Kind.UNDO):
            return None  # the journal may begin inside of a rewind
        return header

    def _header(self, seq: int) -> Header:
        step = self._steps.get(seq)
        return self._stored_entry(seq).header if step is None else step.header

    def _prune(self, meta: Meta, undo: dict[bytes, bytes | None]) -> Meta:
        """Drop what finality, and the archive where this node feeds one, no longer need. ``undo``: what is written with
        ``meta``, to which the deletions are added. Returns the meta that says so, and lets those that follow say so."""
        bound = min(meta.final_height, meta.archived_to - 1) if self._archives else meta.final_height
        if meta.shards > 1:
            bound -= MEETING_BLOCKS
        height, first = meta.journal_first_height, meta.journal_first_seq
        while height <= min(bound, meta.tip.height):
            seq = self._accepted_seq_at(height, undo)
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
        self._group = {seq: replace(one, meta=begin(one.meta)) for seq, one in self._group.items()}
        return begin(meta)

    def leave(self, seq: int) -> None:
        """Forget what was accepted and not written above a seq, and pass by all up to the EPOCH that takes it back: it
        will come, as another shard, which goes on otherwise, shows."""
        self._drop_above(seq)
        self._left = True

    def _drop_above(self, seq: int) -> None:
        """Forget steps that were accepted and not written."""
        assert self._written.seq <= seq, (self._written.seq, seq)
        kept = {number: one for number, one in self._group.items() if number <= seq}
        meta = list(kept.values())[-1].meta if kept else self._written
        self.layers.revert(max(kept, default=0))
        self._steps = {number: self._steps[number] for number in kept}
        self._group, self._undo = kept, _joined(kept)
        self.meta = replace(meta, epoch=self.meta.epoch, writer=self.meta.writer, archived_to=self.meta.archived_to)

    def _go_back(self, header: Header) -> None:
        """Take back every frame above an EPOCH's seq: from the group, or by the journal.

        Raises SeqGap if that frame was not followed, SeqConflict if it was another one, StoreCorrupt if the journal
        does not reach that far.
        """
        seq, meta = header.seq, self.meta
        if seq > meta.seq:
            raise SeqGap(f"epoch {header.epoch} goes back to frame {seq}, which is above the last one, {meta.seq}")
        stays = meta.frame_id if seq == meta.seq else self._header(seq + 1).prev_frame_id
        if stays != header.prev_frame_id:
            raise SeqConflict(f"epoch {header.epoch} goes back to frame {seq}, but another one was applied there")
        self._drop_above(max(seq, self._written.seq))
        while self.meta.seq > seq:
            self.take_back(is_lost=False)
        self._left = False
        self.meta = replace(self.meta, epoch=meta.epoch, writer=meta.writer)

    def take_back(self, *, is_lost: bool = True) -> None:
        """Undo the last frame: state and meta as before it, but the proof. Commits. ``is_lost``: the log lost it, or
        it never took effect everywhere.

        Raises LogLost when the journal does not reach that far.
        """
        assert not self._steps, "frames are in flight"
        self.forget_chunks()
        meta = self.meta
        if meta.seq < meta.journal_first_seq:
            raise LogLost(
                f"the log lost more frames than the journal can take back (it begins at seq {meta.journal_first_seq})",
                way_out="restore this data directory from a snapshot",
            )
        entry = self._stored_entry(meta.seq)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """A frame as its journal entry has it. ``diff``: the block's own changes, also of an UNDO frame's entry."""

    before: Tip
    header: Header
    body: bytes
    diff: Diff
    digests: dict[int, bytes]

    @classmethod
    def of(cls, before: Tip, whole: bytes) -> Undone:
        decoded = frame.decode(whole)
        digests = {table_id: blake3(view).digest() for table_id, view in split_tables(decoded.body).items()}
        return cls(
            before=before,
            header=decoded.header,
            body=decoded.body,
            diff=decode_whole_body(decoded.body),
            digests=digests,
        )


def as_whole(header: Header) -> Header:
    """The header of the same frame in whole form."""
    return replace(header, required=header.required | Feature.SELF_CONTAINED, codec=Codec.ZSTD)


def _joined(group: dict[int, Accepted]) -> dict[bytes, bytes | None]:
    return {key: value for one in group.values() for key, value in one.undo.items()}


def _merge(effects: list[Effect]) -> dict[bytes, bytes | None]:
    """A group's writes as one: the last write of a key stands; what came and went inside the group is left out."""
    if len(effects) == 1:
        return effects[0].writes
    merged: dict[bytes, bytes | None] = {}
    fresh: set[bytes] = set()
    for effect in effects:
        fresh.update(set(effect.fresh) - merged.keys())
        merged |= effect.writes
    for key in fresh:
        if merged[key] is None:
            del merged[key]
    return merged


def reign(message: bytes, meta: Meta) -> Header | None:
    """The header of a valid EPOCH, by the rule that `Replica.judge` follows; None for any other record."""
    prefix = frame.peek_prefix(message)
    if prefix is None or prefix.kind != Kind.EPOCH or prefix.generation != meta.generation:
        return None
    return frame.peek(message) if prefix.epoch == meta.epoch + 1 else None
