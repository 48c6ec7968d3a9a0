"""Records of the blocks topic to events, for whoever reads it: a primary, and a source that wants to know where it is.

Unlike frames, a bad record here stops the reader: to skip it would lose data. What is void is only what a writer not
in force left behind, and everything between a bad record and the next valid EPOCH that resumes at or below it.
"""

from __future__ import annotations

from pipeline import chunk
from pipeline.block import BlockRef, Connect, Event, Rewind, SourceEpoch, decode_event
from pipeline.errors import EventCorrupt, FrameCorrupt, WalkInvalid
from pipeline.frame import NO_HASH, digest_of
from pipeline.position import NO_WRITER
from pipeline.primary import Reading
from pipeline.sources.branch import Branch

Source = tuple[int, bytes]
"""Epoch and writer in force on the blocks topic."""

NO_SOURCE: Source = (0, NO_WRITER)


class EventReader:
    """Puts events together from records in offset order, and says where each stood.

    * Holds at most one incomplete event.
    * Never guesses: a record that is no event raises EventCorrupt, and reading on is the caller's decision.
    """

    def __init__(self, generation: bytes, *, previous_digest: bytes = NO_HASH, with_ops: bool = True) -> None:
        """``previous_digest``: of the record before the first that will be fed."""
        self._generation = generation
        self._with_ops = with_ops
        self._assembler = chunk.Assembler()
        self._first = 0
        self._before_first = previous_digest
        self._previous = previous_digest

    @property
    def held_bytes(self) -> int:
        return self._assembler.held_bytes

    def feed(self, record: bytes, offset: int, source: Source) -> tuple[Event, Reading] | None:
        """One record; None for a chunk before the last, or one of a writer not in force.

        Raises EventCorrupt, Unsupported; the record counts as read.
        """
        previous, self._previous = self._previous, digest_of(record)
        message = record
        if chunk.is_chunk(record):
            whole = self._feed_chunk(record, offset, source, previous)
            if whole is None:
                return None
            message = whole
        else:
            self._assembler.discard()
            self._first, self._before_first = offset, previous
        event = decode_event(message, with_ops=self._with_ops)
        return event, Reading(first=self._first, last=offset, digest=self._previous, previous_digest=self._before_first)

    def _feed_chunk(self, record: bytes, offset: int, source: Source, previous: bytes) -> bytes | None:
        try:
            part = chunk.decode_chunk(record)
        except FrameCorrupt as error:
            raise EventCorrupt(f"a chunk of an event is damaged: {error}") from error
        if part.generation != self._generation or (part.epoch, part.writer) != source:
            return None
        if part.index == 0:
            self._first, self._before_first = offset, previous
        return self._assembler.feed(part)


def mends(event: Event, source: Source, walk: int) -> bool:
    """Whether this event makes a bad stretch before it void: a valid EPOCH that resumes at or below it."""
    return isinstance(event, SourceEpoch) and event.stamp.epoch == source[0] + 1 and event.resume_walk <= walk + 1


class SourcePosition:
    """Where the walk on the topic stands, from its records alone: what a source must know before it publishes."""

    def __init__(self, generation: bytes, base: BlockRef | None) -> None:
        self.generation = generation
        self.source: Source = NO_SOURCE
        self.walk = 0
        self.branch = Branch(base)
        self.is_stuck = False  # behind a bad record: all is void up to an EPOCH that mends it

    def meet_bad_record(self) -> None:
        """A record that no reader gets past without a mending EPOCH."""
        self.is_stuck = True

    def follow(self, event: Event) -> None:
        """Take one event in, if it is in force and follows. What is void is passed by."""
        stamp = event.stamp
        if stamp.generation != self.generation:
            return
        if isinstance(event, SourceEpoch):
            if mends(event, self.source, self.walk):
                self.source = (stamp.epoch, stamp.writer)
                self.is_stuck = False
            return
        if (stamp.epoch, stamp.writer) != self.source or self.is_stuck or event.walk <= self.walk:
            return
        if event.walk > self.walk + 1:
            self.meet_bad_record()
            return
        try:
            match event:
                case Connect(block=block):
                    self.branch.connect(block.ref, block.parent_hash)
                case Rewind(to=to):
                    self.branch.rewind(to)
        except WalkInvalid:
            self.meet_bad_record()
            return
        self.walk = event.walk
