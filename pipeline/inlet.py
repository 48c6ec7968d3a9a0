"""Records of the blocks topic to events, for whoever reads it: a primary, and a source that wants to know where it is.

Unlike frames, a bad record here stops the reader: to skip it would lose data. What is void is only what a writer not
in force left behind, and everything between a bad record and the next EPOCH in force that resumes at or below it.

Who is in force is said by the EPOCHs alone: by their order and numbers, not by what stands between them or by what a
state refuses. So all readers agree on it, one that is stuck with one that is not. Where the walk stands, a reader with
a state knows better than one that sees the topic only; an EPOCH that `voids` tells both. FORMAT.md, "Block events".
"""

from __future__ import annotations

from pipeline import chunk
from pipeline.block import Connect, Event, Rewind, SourceEpoch, decode_event
from pipeline.errors import EventCorrupt, FrameCorrupt, WalkGap, WalkInvalid
from pipeline.floor import EventsFloor
from pipeline.frame import NO_HASH, digest_of
from pipeline.generation import Generation
from pipeline.position import NO_WRITER, Meta
from pipeline.primary import Reading
from pipeline.sources.branch import Branch, Connected, Rewound

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


def source_after(event: Event, generation: bytes, source: Source) -> Source:
    """Who is in force behind an event, if ``source`` was before it: the same for every reader, stuck or not."""
    stamp = event.stamp
    if isinstance(event, SourceEpoch) and stamp.generation == generation and stamp.epoch == source[0] + 1:
        return stamp.epoch, stamp.writer
    return source


def takes_back(event: SourceEpoch, ahead: Meta) -> bool:
    """Whether a source's EPOCH that came in force behind ``ahead`` makes void what a shard has applied. One shard may
    apply what another refuses; with one shard alone that cannot be, and what took effect stands."""
    ours = (event.stamp.generation, event.stamp.chain_id) == (ahead.generation, ahead.chain_id)
    return ours and event.voids and ahead.shards > 1 and 0 < event.resume_walk <= ahead.walk


class Stuck:
    """A reader with a state, behind a record that it refuses: all is void up to an EPOCH that mends it.

    Fed with the refused event itself, where it is one, and with every event behind it.
    """

    def __init__(self, chain_id: str, generation: bytes, source: Source, walk: int) -> None:
        """``source`` in force before the refused record; ``walk``: the last number that was applied."""
        self.source = source
        self._chain_id = chain_id
        self._generation = generation
        self._walk = walk

    def mended_by(self, event: Event) -> bool:
        """Whether a reader goes on behind this event, as `source` says by then."""
        before, self.source = self.source, source_after(event, self._generation, self.source)
        is_ours = self.source != before and event.stamp.chain_id == self._chain_id
        return is_ours and isinstance(event, SourceEpoch) and event.resume_walk <= self._walk + 1


class SourcePosition:
    """Where the walk on the topic stands, from its records alone: what a source must know before it publishes.

    Holds a hash a block, and for each walk number what it takes to take it back. What is below a floor is not known:
    neither which blocks were left there, nor how to go back to it.
    """

    def __init__(self, generation: Generation, floor: EventsFloor | None = None) -> None:
        """``floor``: where the records begin that will be followed; None: with the first one."""
        self.source: Source = NO_SOURCE if floor is None else floor.source
        self.branch = Branch(generation.base if floor is None else floor.ref)
        self.is_stuck = False  # behind a bad record: all is void up to an EPOCH that mends it
        # Of the topic's record behind those that were read, which whoever reads it counts.
        self.next_offset = 0 if floor is None else floor.mark.next_offset
        self._generation = generation
        self._floor_walk = 0 if floor is None else floor.walk
        self._steps: list[Connected | Rewound] = []
        self._resumes = 0  # where the source in force goes on, until its first event

    @property
    def walk(self) -> int:
        """The last walk number; 0 before the first."""
        return self._floor_walk + len(self._steps)

    def meet_bad_record(self) -> None:
        """A record that no reader gets past without a mending EPOCH."""
        self.is_stuck = True

    def follow(self, event: Event) -> None:
        """Take one event in, if it is in force and follows. What is void is passed by."""
        stamp, generation = event.stamp, self._generation
        if stamp.generation != generation.generation:
            return
        before, self.source = self.source, source_after(event, generation.generation, self.source)
        if isinstance(event, SourceEpoch):
            if self.source == before:
                return
            if stamp.chain_id != generation.chain_id or event.resume_walk > self.walk + 1:
                self.meet_bad_record()
                return
            self.is_stuck, self._resumes = False, event.resume_walk
            if event.voids:
                self.take_back_to(max(event.resume_walk - 1, self._floor_walk))
        elif (stamp.epoch, stamp.writer) == self.source and not self.is_stuck:
            if self._floor_walk < event.walk == self._resumes <= self.walk:
                self.take_back_to(event.walk - 1)  # it says again what stood there: its state refused that
            self._resumes = 0
            self._follow(event)

    def _follow(self, event: Connect | Rewind) -> None:
        if event.stamp.chain_id != self._generation.chain_id or event.walk > self.walk + 1:
            self.meet_bad_record()
        elif event.walk == self.walk + 1:
            try:
                self._steps.append(self._step(event))
            except WalkInvalid:
                self.meet_bad_record()

    def _step(self, event: Connect | Rewind) -> Connected | Rewound:
        match event:
            case Connect(block=block):
                return self.branch.connect(block.ref, block.parent_hash)
            case Rewind(to=to) if to == self.branch.tip:
                raise WalkInvalid(f"a rewind to {to}, which is the tip")
            case Rewind(to=to):
                return self.branch.rewind(to)

    def take_back_to(self, walk: int) -> None:
        """Events above a walk number are void. Raises WalkGap if the walk does not reach it."""
        if not self._floor_walk <= walk <= self.walk:
            raise WalkGap(
                f"the walk on the topic cannot be resumed from number {walk + 1}: it stands at {self.walk}",
                way_out=f"name a walk number from {self._floor_walk + 1} to {self.walk + 1}",
            )
        while self.walk > walk:
            self.branch.take_back(self._steps.pop())
