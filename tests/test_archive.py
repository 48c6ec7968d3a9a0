from dataclasses import replace
from random import Random

import pytest
from blake3 import blake3

from pipeline import failpoints
from pipeline.archive import Committed, Segment, build_segment, covered_to, plan_segments, resume_record, same_history
from pipeline.archive_names import SegmentName, parse_segment_name
from pipeline.errors import ArchiveConflict, SegmentCorrupt, StateferryError, Unsupported
from pipeline.objects import MemoryObjects
from pipeline.position import Meta
from tests.walks import GENERATION, Driven, Node, drive, make_walk
from topology.archiver import Archiver


@pytest.fixture(scope="module")
def driven() -> Driven:
    return drive(make_walk(5, 800), seed=5)


@pytest.fixture(scope="module")
def node(driven: Driven) -> Node:
    """A node that has followed everything and archived nothing yet."""
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    return node


def archive_all(node: Node, objects: MemoryObjects, *, flush: bool = False) -> Archiver:
    archiver = Archiver(objects)
    while archiver.advance(node.replica, proven=True, flush=flush):
        pass
    return archiver


def segments_of(objects: MemoryObjects) -> list[Segment]:
    return [Segment.open(objects.get(info.name)) for info in objects.list()]


@pytest.mark.parametrize(
    ("archived_to", "final_height", "flush", "due"),
    [
        (0, -1, False, []),
        (0, 62, False, []),
        (0, 63, False, [(0, 63)]),
        (0, 130, False, [(0, 63), (64, 127)]),
        (0, 130, True, [(0, 63), (64, 127), (128, 130)]),
        (100, 126, False, []),
        (100, 128, False, [(100, 127)]),
        (131, 130, True, []),
        (64, 64, True, [(64, 64)]),
    ],
)
def test_plan(archived_to: int, final_height: int, flush: bool, due: list[tuple[int, int]]) -> None:
    """Segments end at the alignment; a flush closes the last one early."""

    assert plan_segments(archived_to, final_height, flush=flush) == due


def test_names() -> None:
    """A name says what a segment covers; no other name is taken for one."""
    name = SegmentName("bitcoin", b"g" * 16, 0, 64, 127)

    assert str(name) == f"bitcoin/{'67' * 16}/archive/0/000000000064-000000000127.seg"
    assert parse_segment_name(str(name)) == name
    for other in ("", str(name)[:-1], str(name).replace("127", "063"), str(name).replace("0000", "000", 1)):
        assert parse_segment_name(other) is None


def test_covered_to() -> None:
    """Coverage ends at the first height that no segment has."""
    names = [SegmentName("c", b"g" * 16, 0, *span) for span in ((64, 127), (0, 63), (100, 140), (200, 255))]

    assert covered_to(names, 0) == 141
    assert covered_to(names, 150) == 150


def test_segments_hold_the_final_branch(driven: Driven, node: Node) -> None:
    """Every final height is archived once, linked, with a resume record that names the last block."""
    objects = MemoryObjects()
    archive_all(Node(driven.wire, archives=True), objects)  # nothing was followed: nothing is due
    assert not list(objects.list())
    fresh = Node(driven.wire, archives=True)
    fresh.follow_and_commit()
    archive_all(fresh, objects, flush=True)
    segments = segments_of(objects)

    assert [segment.first for segment in segments] == [0] + [segment.last + 1 for segment in segments[:-1]]
    assert [segment.last % 64 for segment in segments[:-1]] == [63] * (len(segments) - 1)
    assert segments[-1].last == fresh.meta.final_height == fresh.meta.archived_to - 1
    for segment in segments:
        assert segment.resume.tip.ref == segment.entries[-1].ref
        for entry in segment.entries:
            header = node.replica.recent.header_at(entry.ref.height)
            assert (entry.ref, entry.frame_id, entry.post_root) == (header.ref, header.frame_id, header.post_root)
        assert list(segment.frames(segment.last)) == [segment.frame_at(segment.last)]


def test_resume_goes_on_with_the_next_block(driven: Driven, node: Node) -> None:
    """The resume record is the position right before the next block of the final branch: the next record to read is
    its frame, whatever was undone before it."""
    segment = Segment.open(node.segment(0, 63))
    header = node.replica.recent.header_at(64)
    follower = Node(driven.wire)
    while follower.meta.seq < segment.resume.seq:
        follower.follow(1)

    assert (header.seq - 1, header.prev_frame_id) == (segment.resume.seq, segment.resume.frame_id)
    assert resume_record(follower.meta) == segment.resume


def test_nothing_is_archived_unproven_or_early(driven: Driven) -> None:
    """A claimed state is not archived, nor a block that is accepted and not committed."""
    node = Node(driven.wire, archives=True)
    archiver = Archiver(MemoryObjects())
    node.follow()
    assert node.meta.final_height > 64

    assert archiver.advance(node.replica, proven=True) == 0
    node.replica.commit()
    assert archiver.advance(node.replica, proven=False) == 0
    assert archiver.advance(node.replica, proven=True) == 64


def test_the_journal_keeps_what_the_archive_wants(driven: Driven) -> None:
    """A node that archives as it goes archives the same as one that does it in the end, and prunes behind."""
    objects, late_objects = MemoryObjects(), MemoryObjects()
    node, archiver, random = Node(driven.wire, archives=True), Archiver(objects), Random(3)
    while node.next < len(driven.wire.records):
        node.follow(random.randrange(1, 30))
        if random.random() < 0.5:
            node.replica.commit()
        if (due := archiver.plan(node.replica, proven=True)) is not None:
            assert archiver.put(due) is None
            archiver.done(node.replica, due)
    node.replica.commit()
    archive_all(node, objects)
    node.replica.commit()
    late = Node(driven.wire, archives=True)
    late.follow_and_commit()
    archive_all(late, late_objects)

    assert [info.name for info in objects.list()] == [info.name for info in late_objects.list()]
    assert all(map(same_history, segments_of(objects), segments_of(late_objects)))
    assert node.meta.journal_first_height == node.meta.archived_to > 64


@pytest.mark.parametrize("place", ["archive.before_put", "archive.after_put"])
def test_crash_around_the_put(driven: Driven, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the segment was put before the crash, the next attempt ends with the same archive."""
    monkeypatch.setattr(failpoints, "_armed", {})
    monkeypatch.setattr(failpoints, "_hits", failpoints._hits.__class__())

    class Killed(BaseException):
        pass

    def kill(_: str) -> None:
        raise Killed

    objects, node = MemoryObjects(), Node(driven.wire, archives=True)
    node.follow_and_commit()
    failpoints.arm(place, 1, kill)
    with pytest.raises(Killed):
        Archiver(objects).advance(node.replica, proven=True)
    node.reopen()
    archive_all(node, objects)

    assert [segment.first for segment in segments_of(objects)][:2] == [0, 64]


def test_another_history_in_the_archive(driven: Driven) -> None:
    """A differing segment under the same name is a divergence; a damaged one is named as such."""
    other = drive(make_walk(6, 500), seed=6)
    objects = MemoryObjects()
    for walk in (driven, other):
        node = Node(walk.wire, archives=True)
        node.follow_and_commit()
        if walk is driven:
            archive_all(node, objects)

    with pytest.raises(ArchiveConflict):
        Archiver(objects).advance(node.replica, proven=True)
    name = str(SegmentName("walk", GENERATION.generation, 0, 0, 63))
    objects.delete(name)
    objects.put_new(name, b"SFsg but cut off")
    with pytest.raises(SegmentCorrupt):
        Archiver(objects).advance(node.replica, proven=True)


def test_a_gap_is_named(driven: Driven) -> None:
    """A node whose journal begins above what the archive has goes on where it can, and says what is missing."""
    node = Node(driven.wire)
    node.follow_and_commit()
    node.archives = True
    node.reopen()
    archiver = Archiver(MemoryObjects())
    due = archiver.plan(node.replica, proven=True, flush=True)

    assert due is not None and due.wanted == 0 < due.first
    assert archiver.put(due) == (0, due.first - 1)
    archiver.done(node.replica, due)
    while (due := archiver.plan(node.replica, proven=True, flush=True)) is not None:
        assert archiver.put(due) is None
        archiver.done(node.replica, due)
    node.replica.commit()
    assert node.meta.archived_to == node.meta.final_height + 1


def test_every_flipped_bit_is_found(node: Node) -> None:
    """No bit of a segment can change unnoticed."""
    data = node.segment(0, 9)
    Segment.open(data)
    step = max(1, len(data) // 1500)
    for at in [*range(300), *range(300, len(data), step), *range(len(data) - 40, len(data))]:
        for bit in (at % 8, (at + 3) % 8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(SegmentCorrupt):
                Segment.open(bytes(flipped))
    for size in (0, 3, 16, 47, 48, 200, len(data) - 1):
        with pytest.raises(SegmentCorrupt):
            Segment.open(data[:size])


def test_what_does_not_link_is_refused(node: Node) -> None:
    """Frames must be consecutive, and the resume record that of the last."""
    committed = Committed(node.store)
    entries = [committed.entry(height) for height in range(6)]
    frames = [entry.frame_bytes for entry in entries if entry is not None]
    assert entries[5] is not None
    resume = entries[5].before
    build_segment(frames[:5], resume)

    def refused(frames: list[bytes], resume: Meta) -> None:
        with pytest.raises(SegmentCorrupt):
            build_segment(frames, resume)

    refused([], resume)
    refused(frames[:4], resume)
    refused([*frames[:2], *frames[3:5]], resume)
    refused([frames[1], frames[0], *frames[2:5]], resume)
    refused(frames[:5], replace(resume, generation=b"o" * 16))
    refused(frames[:5], replace(resume, tip=replace(resume.tip, vectors={1: bytes(2047) + b"\1"})))


def test_later_versions(node: Node) -> None:
    """A later version, or a section that must be known and is not, is unsupported; an optional one is passed by."""
    data = node.segment(0, 3)

    def edited(data: bytes) -> bytes:
        return data[:-32] + blake3(data[:-32]).digest()

    with pytest.raises(Unsupported):
        Segment.open(edited(data[:4] + b"\2" + data[5:]))
    sections = int.from_bytes(data[6:8], "little")
    table_stop = 16 + 24 * sections
    head, table, body = data[:16], data[16:table_stop], data[table_stop:-32]
    shifted = b"".join(
        table[at : at + 8]
        + (int.from_bytes(table[at + 8 : at + 16], "little") + 24).to_bytes(8, "little")
        + table[at + 16 : at + 24]
        for at in range(0, 24 * sections, 24)
    )
    for flags, known in ((0, True), (1, False)):
        extra = (9).to_bytes(2, "little") + bytes([flags, 0]) + bytes(4)
        extra += (len(data) - 32 + 24).to_bytes(8, "little") + (5).to_bytes(8, "little")
        size = (len(data) + 24 + 5).to_bytes(8, "little")
        grown = edited(head[:6] + bytes([sections + 1, 0]) + size + shifted + extra + body + b"extra" + bytes(32))
        if known:
            assert same_history(Segment.open(grown), Segment.open(data))
        else:
            with pytest.raises(Unsupported):
                Segment.open(grown)


def test_same_history_differs_by_one_block(node: Node) -> None:
    """Segments are compared by heights, hashes, ids and roots."""
    short, long = Segment.open(node.segment(0, 3)), Segment.open(node.segment(0, 4))

    assert same_history(short, replace(short, data=b""))
    assert not same_history(short, long)


def test_missing_blocks_are_an_error(node: Node) -> None:
    """A segment of blocks that the journal does not have cannot be made."""
    tip = node.meta.tip.height

    with pytest.raises(StateferryError):
        node.segment(tip - 1, tip + 1)
