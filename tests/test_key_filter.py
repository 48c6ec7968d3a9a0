"""Filters never miss a key, seldom name a block for nothing, and cost an old reader nothing."""

from __future__ import annotations

from random import Random

import pytest

from pipeline import frame
from pipeline.archive import LAYOUT, Committed, Section, Segment, SegmentName, build_segment
from pipeline.diff import decode_whole_body
from pipeline.errors import SegmentCorrupt
from pipeline.key_filter import build_filters, may_hold, split_filters
from pipeline.segment_index import SegmentIndex
from pipeline.state import UTXO
from tests.walks import Node, drive, make_walk

NAME = SegmentName("walk", b"g" * 16, 0, 0, 63)


@pytest.fixture(scope="module")
def data() -> bytes:
    driven = drive(make_walk(7, 300), seed=7)
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    return Committed(node.store).segment(NAME.first, NAME.last)


def read(data: bytes) -> tuple[SegmentIndex, list[int]]:
    """An index, and the lengths of the ranges that it took."""
    ranges: list[int] = []

    def read_range(start: int, stop: int) -> bytes:
        ranges.append(stop - start)
        return data[start:stop]

    return SegmentIndex.read(NAME, len(data), read_range), ranges


def without_filters(data: bytes) -> bytes:
    """As segments were before there were filters."""
    segment = Segment.open(data)
    places = LAYOUT.split(data)
    sections = {kind: data[slice(*places[kind])] for kind in (Section.FRAMES, Section.INDEX, Section.RESUME)}
    assert segment.entries

    return LAYOUT.join(sections)


def test_no_key_is_missed(data: bytes) -> None:
    """Every frame that changed a key is among those named, and others hardly ever."""
    index, ranges = read(data)
    segment, named, changed, random = Segment.open(data), 0, 0, Random(1)
    for entry, one in zip(segment.entries, segment.frames(), strict=True):
        for table in decode_whole_body(frame.decode(one).body).tables.values():
            for change in table.changes():
                assert entry in index.may_hold(UTXO, change.key)
                changed += 1
    for _ in range(2000):
        named += len(index.may_hold(UTXO, random.randbytes(36)))

    assert changed > 100
    assert named < 2000 * 64 * 0.005  # the fewer keys a filter has, the more often it errs
    assert len(ranges) == 2 and sum(ranges) < len(data) / 2


def test_frames_without_changes() -> None:
    """An empty filter holds nothing, and takes its length alone."""
    driven = drive(make_walk(3, 40, ops_max=1), seed=3)
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    segment = Segment.open(Committed(node.store).segment(0, 9))
    section = build_filters(list(segment.frames()))

    assert section == bytes(4 * 10)
    assert not any(may_hold(one, UTXO, bytes(36)) for one in split_filters(section, 10))


def test_segments_without_filters(data: bytes) -> None:
    """They are read as ever, and every frame may hold every key."""
    old = without_filters(data)
    index, _ = read(old)

    assert Segment.open(old).entries == Segment.open(data).entries
    assert index.filters is None
    assert index.may_hold(UTXO, bytes(36)) == list(index.entries)


def test_the_section_is_optional(data: bytes) -> None:
    """A reader that does not know it passes it by: its flag says so, and those of the others do not."""
    flags = {int.from_bytes(data[at : at + 2], "little"): data[at + 2] for at in range(16, 16 + 4 * 24, 24)}

    assert flags == {1: 1, 2: 1, 3: 1, 4: 0}


@pytest.mark.parametrize(
    "harm", [lambda section: section[:-1], lambda section: section[:100], lambda section: section + b"\0"]
)
def test_damaged_filters(data: bytes, harm: object) -> None:
    """Lengths that do not add up."""
    places = LAYOUT.split(data)
    sections = {kind: data[slice(*place)] for kind, place in places.items()}
    sections[Section.FILTERS] = harm(sections[Section.FILTERS])  # type: ignore[operator]

    with pytest.raises(SegmentCorrupt, match="filters"):
        read(LAYOUT.join(sections))


def test_the_same_frames_make_the_same_segment(data: bytes) -> None:
    """Filters follow from the frames."""
    segment = Segment.open(data)

    assert build_segment(list(segment.frames()), segment.resume) == data
