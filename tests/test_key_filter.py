"""Filters never miss a key, seldom name a block for nothing, and cost an old reader nothing."""

from __future__ import annotations

from random import Random

import pytest

from pipeline import frame, segment_index
from pipeline.archive import LAYOUT, Section, Segment, build_segment
from pipeline.archive_names import SegmentName
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
    return node.segment(NAME.first, NAME.last)


def read(data: bytes, *, with_filters: bool = True) -> tuple[SegmentIndex, list[int]]:
    """An index, and the lengths of the ranges that it took."""
    ranges: list[int] = []

    def read_range(start: int, stop: int) -> bytes:
        ranges.append(stop - start)
        return data[start:stop]

    return SegmentIndex.read(NAME, len(data), read_range, with_filters=with_filters), ranges


def joined(data: bytes, *kinds: Section) -> bytes:
    """A segment with these of its sections, in this order."""
    places = LAYOUT.split(data)
    return LAYOUT.join({kind: data[slice(*places[kind])] for kind in kinds})


def without_filters(data: bytes) -> bytes:
    """As segments were before there were filters."""
    return joined(data, Section.FRAMES, Section.INDEX, Section.RESUME)


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
    assert len(ranges) == 1 and ranges[0] <= len(data) / 2


@pytest.mark.parametrize(
    ("order", "requests"), [((2, 3, 4, 1), 1), ((1, 2, 3, 4), 2), ((4, 3, 2, 1), 1), ((2, 3, 1, 4), 2), ((3, 1, 2), 2)]
)
def test_one_request(data: bytes, order: tuple[int, ...], requests: int) -> None:
    """Where frames stand last, as they are written. Whatever the order, the same is read."""
    index, ranges = read(joined(data, *map(Section, order)))
    segment = Segment.open(data)

    assert len(ranges) == requests
    assert (index.entries, index.resume) == (segment.entries, segment.resume)
    assert index.filters == (read(data)[0].filters if 4 in order else None)


def test_more_filters_than_were_guessed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is read, and nothing twice; without filters nothing is missing."""
    places = LAYOUT.split(data)
    monkeypatch.setattr(segment_index, "_RESUME_BYTES", 3000)
    monkeypatch.setattr(segment_index, "_FILTERS_SHARE", 1 << 30)
    index, ranges = read(data)

    assert (len(ranges), sum(ranges)) == (2, places[Section.FILTERS][1])
    assert index.may_hold(UTXO, b"?" * 36) == []
    assert read(data, with_filters=False)[1] == ranges[:1]
    with pytest.raises(SegmentCorrupt, match="ends 3 bytes early"):
        SegmentIndex.read(
            NAME, len(data), lambda start, stop: data[start : stop - (3 if start else 0)], with_filters=True
        )


def test_frames_without_changes() -> None:
    """An empty filter holds nothing, and takes its length alone."""
    driven = drive(make_walk(3, 40, ops_max=1), seed=3)
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    segment = Segment.open(node.segment(0, 9))
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
