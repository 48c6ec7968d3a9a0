"""Who is in force on the blocks topic, and where the walk stands: the same for a source, which sees nothing but the
topic, for a primary, whose state refuses more than the topic shows, and for one that starts again anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from walks import GENERATION, NO_PARENT, block, ref

from pipeline.block import BlockRef, Connect, Event, Rewind, SourceEpoch, SourceStamp, decode_event, encode_event
from pipeline.errors import BlockInvalid, CorruptInput, EventCorrupt, WalkGap, WrongChain
from pipeline.floor import EventsFloor
from pipeline.inlet import NO_SOURCE, EventReader, Source, SourcePosition, Stuck
from pipeline.position import LogMark
from pipeline.sources.branch import Branch
from pipeline.walk import Apply, Reign, Stand, Undo, plan

BAD = b"!"
"""How the hash of a block ends that the state refuses, whatever the topic shows."""
GARBAGE = b"no event"


def by_topic(records: list[bytes], floor: EventsFloor | None = None) -> SourcePosition:
    """What a source sees. ``floor``: where the topic begins by now."""
    position = SourcePosition(GENERATION, floor)
    for _ in walk_along(position, records):
        pass
    return position


def walk_along(position: SourcePosition, records: list[bytes]) -> Iterator[SourcePosition]:
    """The same position behind each record from where it stands."""
    reader = EventReader(GENERATION.generation, with_ops=False)
    for offset in range(position.next_offset, len(records)):
        try:
            found = reader.feed(records[offset], offset, position.source)
        except EventCorrupt:
            position.meet_bad_record()
        else:
            if found is not None:
                position.follow(found[0])
        yield position


@dataclass
class Reader:
    """A primary's side of the rule, with a state that refuses blocks by their names. ``marks``: where it can start
    again from: what a store would hold after each event that was applied."""

    next: int = 0
    walk: int = 0
    source: Source = NO_SOURCE
    stuck: Stuck | None = None
    applied: list[Event] = field(default_factory=list)
    marks: list[tuple[int, int, Source]] = field(default_factory=lambda: [(0, 0, NO_SOURCE)])

    @property
    def branch(self) -> Branch:
        branch = Branch()
        for event in self.applied:
            if isinstance(event, Connect):
                branch.connect(event.block.ref, event.block.parent_hash)
            elif isinstance(event, Rewind):
                branch.rewind(event.to)
        return branch

    def read(self, records: list[bytes]) -> Reader:
        reader = EventReader(GENERATION.generation)
        while self.next < len(records):
            offset, self.next = self.next, self.next + 1
            event = None
            try:
                found = reader.feed(records[offset], offset, self.source if self.stuck is None else self.stuck.source)
                if found is None:
                    continue
                event = found[0]
                if self.stuck is None:
                    self._take(event)
                elif self.stuck.mended_by(event):
                    self.source, self.stuck = self.stuck.source, None
            except (CorruptInput, WalkGap, WrongChain):
                if self.stuck is None:
                    self.stuck = Stuck(GENERATION.chain_id, GENERATION.generation, self.source, self.walk)
                    if event is not None:
                        self.stuck.mended_by(event)
        return self

    def _take(self, event: Event) -> None:
        branch = self.branch
        at = Stand(
            chain_id=GENERATION.chain_id,
            generation=GENERATION.generation,
            source=self.source,
            walk=self.walk,
            tip=branch.tip,
            final_height=-1,
        )
        match plan(event, at, lambda height: branch.at(height).block_hash):  # type: ignore[union-attr]
            case Reign(source=source):
                self.source = source
            case Apply(block=found) if found.ref.block_hash.endswith(BAD):
                raise BlockInvalid("it spends nothing")
            case Apply() | Undo():
                self.walk += 1
                self.applied.append(event)
                self.marks.append((self.next, self.walk, self.source))

    def again(self, mark: int) -> Reader:
        """One that starts from a store of that time."""
        offset, walk, source = self.marks[mark]
        return Reader(next=offset, walk=walk, source=source, applied=self.applied[:walk])

    @property
    def in_force(self) -> Source:
        return self.source if self.stuck is None else self.stuck.source


class Topic:
    """Records, by sources of all kinds."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.records: list[bytes] = []
        self.stamp = SourceStamp(chain_id="walk", generation=GENERATION.generation, epoch=0, writer=bytes(16))
        self.older = self.stamp
        self.position = by_topic([])

    def open(self, resume: int | None = None, *, voids: bool = False) -> None:
        """A source begins: where the topic stands, or at a number that it was told."""
        self.position = by_topic(self.records)
        epoch = self.position.source[0] + 1
        self.older = self.stamp
        self.stamp = replace(self.stamp, epoch=epoch, writer=self.random.randbytes(16))
        self.say(SourceEpoch(stamp=self.stamp, resume_walk=resume or self.position.walk + 1, voids=voids))
        if resume is not None and not voids:
            self.position.take_back_to(resume - 1)

    def say(self, event: Event) -> None:
        self.records.append(encode_event(event))
        self.position.follow(event)

    def connect(self, *, bad: bool = False, **stamp: object) -> None:
        tip = self.position.branch.tip
        name = self.random.randbytes(31) + (BAD if bad else b".")
        at = BlockRef(0 if tip is None else tip.height + 1, name)
        made = block(at, NO_PARENT if tip is None else tip.block_hash)
        self.say(Connect(stamp=replace(self.stamp, **stamp), walk=self.position.walk + 1, block=made))  # type: ignore[arg-type]

    def rewind(self) -> None:
        tip = self.position.branch.tip
        if tip is not None and tip.height > 0:
            to = self.position.branch.at(self.random.randrange(tip.height))
            assert to is not None
            self.say(Rewind(stamp=self.stamp, walk=self.position.walk + 1, to=to))

    def spoil(self) -> None:
        """Something that a reader must stop at, or pass by."""
        walk, stamp = self.position.walk, self.stamp
        match self.random.randrange(9):
            case 0:
                self.records.append(GARBAGE)
                self.position.meet_bad_record()
            case 1:
                self.say(Connect(stamp=stamp, walk=walk + 3, block=block(ref(walk), NO_PARENT)))
            case 2:
                self.say(Connect(stamp=stamp, walk=walk + 1, block=block(ref(77, "x"), b"p" * 32)))
            case 3:
                self.connect(bad=True)
            case 4:
                self.say(replace(SourceEpoch(stamp=self.older, resume_walk=walk + 1), voids=True))
            case 5:
                self.say(
                    SourceEpoch(stamp=replace(stamp, epoch=stamp.epoch + 1, writer=b"z" * 16), resume_walk=walk + 9)
                )
            case 6:
                self.connect(writer=self.older.writer, epoch=self.older.epoch)
            case 7:
                self.connect(chain_id="another")
            case 8:
                self.connect(generation=b"o" * 16)

    def publish(self, count: int) -> None:
        for _ in range(count):
            if self.random.random() < 0.3:
                self.rewind()
            else:
                self.connect()


def agrees(reader: Reader, position: SourcePosition) -> bool:
    found, seen = reader.branch.tip, position.branch.tip
    return (reader.walk, found, reader.in_force) == (position.walk, seen, position.source)


def disorderly(seed: int) -> Topic:
    """Sources that come and go, and records that they should not have written, in any order."""
    random = Random(seed)
    topic = Topic(random)
    for _ in range(random.randrange(1, 8)):
        if random.random() < 0.3 and topic.position.walk:
            topic.open(random.randint(1, topic.position.walk + 1), voids=random.random() < 0.5)
        else:
            topic.open()
        topic.publish(random.randrange(6))
        if random.random() < 0.7:
            topic.spoil()
        topic.publish(random.randrange(4))
    return topic


@given(st.integers(0, 1 << 32))
def test_all_agree_on_who_is_in_force(seed: int) -> None:
    """It follows from the EPOCHs alone, whatever is wrong with what stands between them."""
    topic = disorderly(seed)
    reader = Reader().read(topic.records)
    position = by_topic(topic.records)

    assert reader.in_force == position.source == topic.position.source


@given(st.integers(0, 1 << 32))
def test_a_start_anywhere_ends_the_same(seed: int) -> None:
    """Whoever goes on from what a store held, after any event, ends where the one ends that never stopped."""
    topic = disorderly(seed)
    undisturbed = Reader().read(topic.records)
    for mark in range(len(undisturbed.marks)):
        found = undisturbed.again(mark).read(topic.records)

        assert (found.walk, found.applied, found.in_force) == (
            undisturbed.walk,
            undisturbed.applied,
            undisturbed.in_force,
        )
        assert (found.stuck is None) == (undisturbed.stuck is None)


@given(st.integers(0, 1 << 32), st.booleans(), st.booleans())
@example(3, True, False)
def test_resuming_where_the_primary_stopped_mends(seed: int, voids: bool, later: bool) -> None:
    """Behind any disorder: a source that resumes behind the last event that was applied makes all readers agree, and
    the next source, which is told nothing, goes on from there."""
    topic = disorderly(seed)
    reader = Reader().read(topic.records)
    resume = reader.walk + 1
    position = by_topic(topic.records)
    if not _same_walk(reader, position):
        return  # a source took back what had taken effect: `test_what_took_effect_stays`
    topic.open(resume, voids=voids)
    assert topic.position.branch.tip == reader.branch.tip
    topic.connect()
    topic.publish(3)
    if later:
        topic.open()
        topic.publish(3)
    reader.read(topic.records)

    assert reader.stuck is None
    assert agrees(reader, by_topic(topic.records))
    for mark in range(len(reader.marks)):
        assert agrees(reader.again(mark).read(topic.records), by_topic(topic.records))


@given(st.integers(0, 1 << 32))
@example(1)
def test_what_is_left_of_a_topic_says_the_same(seed: int) -> None:
    """Behind any event that was applied and is never taken back: whoever reads on from there knows what one knows that
    read all."""
    topic = disorderly(seed)
    reader, whole = Reader().read(topic.records), by_topic(topic.records)
    for mark in range(1, len(reader.marks)):
        offset, walk, source = reader.marks[mark]
        tip = reader.again(mark).branch.tip
        assert tip is not None
        floor = EventsFloor(ref=tip, mark=LogMark(next_offset=offset, last_digest=b""), walk=walk, source=source)
        along = list(_facts(SourcePosition(GENERATION), topic.records, tip))
        is_same = along[offset - 1] == (source, walk, True, False)
        stays = all(at >= walk and stands for _, at, stands, _ in along[offset:])
        if is_same and stays and not _says_again(topic.records[offset:], walk):
            left = by_topic(topic.records, floor)

            assert (left.source, left.walk, left.branch.tip) == (whole.source, whole.walk, whole.branch.tip)
            assert left.is_stuck == whole.is_stuck


def _says_again(records: list[bytes], walk: int) -> bool:
    """Whether a source resumes at or below a number that has taken effect, which no source of ours does."""
    for record in records:
        with suppress(EventCorrupt):
            event = decode_event(record)
            if isinstance(event, SourceEpoch) and event.resume_walk <= walk:
                return True
    return False


def _facts(position: SourcePosition, records: list[bytes], tip: BlockRef) -> Iterator[tuple[Source, int, bool, bool]]:
    """Behind each record: who is in force, the walk, whether ``tip`` stands on the branch, and whether it is stuck."""
    for at in walk_along(position, records):
        yield at.source, at.walk, at.branch.ref(tip.block_hash) is not None, at.is_stuck


def test_below_a_floor_there_is_no_way_back() -> None:
    """Its walk number is the lowest that can be resumed from, its block the lowest that can be rewound to."""
    at = LogMark(next_offset=40, last_digest=b"")
    floor = EventsFloor(ref=BlockRef(7, b"7" * 32), mark=at, walk=12, source=(3, b"s" * 16))
    position = SourcePosition(GENERATION, floor)
    stamp = SourceStamp(chain_id="walk", generation=GENERATION.generation, epoch=3, writer=b"s" * 16)
    position.follow(Connect(stamp=stamp, walk=13, block=block(BlockRef(8, b"8" * 32), b"7" * 32)))
    position.follow(Rewind(stamp=stamp, walk=14, to=floor.ref))
    assert (position.walk, position.branch.tip, position.is_stuck) == (14, floor.ref, False)
    with pytest.raises(WalkGap, match="from 13 to 15"):
        position.take_back_to(11)

    position.follow(Rewind(stamp=stamp, walk=15, to=BlockRef(6, b"6" * 32)))
    assert (position.walk, position.is_stuck) == (14, True)


def _same_walk(reader: Reader, position: SourcePosition) -> bool:
    """Whether the topic still says what the reader applied."""
    if position.walk < reader.walk:
        return False
    position.take_back_to(reader.walk)
    return position.branch.tip == reader.branch.tip


def test_a_refused_block_is_final_without_it() -> None:
    """A source that is told nothing goes on above a block that only the state refuses; the primary does not."""
    topic = Topic(Random(1))
    topic.open()
    topic.publish(4)
    stands = topic.position.walk
    topic.connect(bad=True)
    topic.publish(2)
    topic.open()
    topic.publish(2)
    reader = Reader().read(topic.records)
    assert (reader.walk, reader.stuck is None) == (stands, False)
    assert by_topic(topic.records).walk > stands

    topic.open(stands + 1, voids=True)
    assert by_topic(topic.records).walk == stands
    topic.connect()
    assert agrees(reader.read(topic.records), by_topic(topic.records))
    assert (reader.walk, reader.source[0]) == (stands + 1, 3)


@pytest.mark.parametrize("walk", [-1, 6])
def test_resuming_where_there_is_nothing(walk: int) -> None:
    topic = Topic(Random(1))
    topic.open()
    for _ in range(5):
        topic.connect()

    with pytest.raises(WalkGap, match="from 1 to 6"):
        topic.position.take_back_to(walk)


@given(st.integers(0, 1 << 32))
def test_taking_back_is_never_having_walked(seed: int) -> None:
    """From any walk to any number of it: branch, tip and what was left are those of the walk that ended there."""
    random = Random(seed)
    topic = Topic(random)
    topic.open()
    tips = [topic.position.branch.tip]
    left = [set[bytes]()]
    hashes: set[bytes] = set()
    for _ in range(random.randrange(1, 25)):
        before = topic.position.walk
        topic.publish(1)
        if topic.position.walk > before:
            tip = topic.position.branch.tip
            assert tip is not None
            hashes.add(tip.block_hash)
            tips.append(tip)
            left.append({one for one in hashes if topic.position.branch.was_left(one)})
    for walk in range(topic.position.walk, -1, -1):
        topic.position.take_back_to(walk)

        assert topic.position.branch.tip == tips[walk]
        assert {one for one in hashes if topic.position.branch.was_left(one)} == left[walk]
