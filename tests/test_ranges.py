"""Range diffs: what is due, squashing by merge against squashing in memory, pieces and what is wrong with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from test_diff import State, applied, between, states

from pipeline import frame, range_pieces, ranges
from pipeline import squash as squashing
from pipeline.archive import Segment
from pipeline.archive_names import PieceName, RangeName, RangeObject, SegmentName, parse_piece_name, whole_ranges
from pipeline.diff import Diff, decode_whole_body, squash
from pipeline.errors import RangeCorrupt, Unsupported
from pipeline.position import encode_meta
from pipeline.range_pieces import CHUNK_RAW_BYTES_MAX, Entry, Piece, Section, span_of, unpack_chunk
from pipeline.ranges import RangeDiff, RangeWriter
from pipeline.squash import LEVELS, Due, Lowest, due_ranges, merge, net, squash_ranges
from pipeline.state import UTXO, Change
from pipeline.table_diff import TableDiff, table_diff
from tests.walks import GENERATION, Node, drive, make_walk

NAME = RangeName("walk", GENERATION.generation, 0, 0, 63)


@pytest.fixture(scope="module")
def node() -> Node:
    """A node that has followed some 100 blocks, and archived nothing yet."""
    driven = drive(make_walk(7, 400), seed=7, litter=False)
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    assert node.meta.final_height >= 90
    return node


def segment(node: Node, first: int, last: int) -> Segment:
    return Segment.open(node.segment(first, last))


def lowest(node: Node, first: int, last: int, folder: Path, *, cuts: Sequence[int] = ()) -> RangeDiff:
    """The range diff of some blocks, of segments that end at ``cuts`` and at the last."""
    folder.mkdir(parents=True)
    made = Lowest(first, last, folder)
    for start, stop in zip([first, *(cut + 1 for cut in cuts)], [*cuts, last], strict=True):
        made.add(segment(node, start, stop))
    return opened(made.write(folder), first, last)


def opened(paths: list[Path], first: int, last: int) -> RangeDiff:
    return RangeDiff.of(NAME._replace(first=first, last=last), [Piece.of_file(path) for path in paths])


def whole(chunks: Iterator[TableDiff] | list[TableDiff]) -> list[Change]:
    return [change for chunk in chunks for change in chunk.changes()]


def expected(node: Node, first: int, last: int) -> list[Change]:
    """The frames of some blocks, squashed in memory."""
    diffs = [decode_whole_body(frame.decode(data).body) for data in segment(node, first, last).frames()]
    return [change for table in squash(diffs).tables.values() for change in table.changes()]


def cut(diff: Diff, sizes: Iterator[int]) -> list[TableDiff]:
    """A diff as chunks of a few changes."""
    chunks = []
    for table in diff.tables.values():
        changes = table.changes()
        while changes:
            size = next(sizes)
            chunks.append(table_diff(UTXO, changes[:size]))
            changes = changes[size:]
    return chunks


def test_names() -> None:
    """A name says what a piece covers, and of how many it is; no other name is taken for one."""
    piece = PieceName(NAME, 2, 13)

    assert str(piece) == f"walk/{'67' * 16}/ranges/0/000000000000-000000000063.2-13.rng"
    assert parse_piece_name(str(piece)) == piece
    for other in ("", str(piece)[:-1], str(piece).replace("2-13", "14-13"), str(piece).replace("0000", "000", 1)):
        assert parse_piece_name(other) is None


def test_whole_ranges() -> None:
    """A range diff is there once all of its pieces are."""
    other = NAME._replace(first=64, last=127)
    listed = [(PieceName(NAME, 1, 1), 5), (PieceName(other, 3, 3), 9), (PieceName(other, 1, 3), 7)]

    assert whole_ranges(listed) == [RangeObject(NAME, (5,))]
    assert whole_ranges([*listed, (PieceName(other, 2, 3), 8)])[1] == RangeObject(other, (7, 8, 9))


def due(segments: list[tuple[int, int]], have: list[tuple[int, int]]) -> list[tuple[int, int]]:
    names = [SegmentName("walk", GENERATION.generation, 0, *span) for span in segments]
    return [one[:2] for one in due_ranges(names, [NAME._replace(first=first, last=last) for first, last in have])]


def windows(first: int, stop: int, size: int = 64) -> list[tuple[int, int]]:
    return [(at, at + size - 1) for at in range(first, stop, size)]


def test_due() -> None:
    """Each level's aligned runs whose lower level is whole, lower ones first; a hole makes none across it."""
    assert due([], []) == []
    assert due([(0, 62)], []) == []
    assert due([(0, 63), (64, 99), (100, 127), (128, 130)], []) == [(0, 63), (64, 127)]
    assert due([(64, 99), (64, 127)], [(64, 127)]) == []
    assert due([(0, 63), (70, 127), (128, 191)], []) == [(0, 63), (128, 191)]
    assert due([(100, 127), (128, 191)], []) == [(100, 127), (128, 191)]  # an archive that begins there
    assert due([(0, 127)], []) == []  # no resume record at 63
    assert due(windows(0, 4096), windows(0, 4032)) == [(4032, 4095), (0, 4095)]
    assert due([], windows(0, 4096)) == [(0, 4095)]
    assert due([], windows(64, 4096)) == [(64, 4095)]
    assert due([], [one for one in windows(0, 4096) if one[0] != 640]) == []
    # Lower levels may be deleted once the higher one is there.
    assert due(windows(4032, 8192), [(0, 4095), (4032, 4095)])[-2:] == [(8128, 8191), (4096, 8191)]
    assert due([], [*windows(0, 65536, 4096), *windows(61440, 65536)]) == [(0, 65535)]
    assert due_ranges([], [NAME._replace(first=first, last=last) for first, last in windows(0, 4096)]) == [
        Due(0, 4095, tuple(windows(0, 4096)))
    ]
    assert all(above % below == 0 for below, above in itertools.pairwise(LEVELS))


@given(st.lists(states, min_size=2, max_size=6), st.data())
def test_merge_is_squash(history: list[State], data: st.DataObject) -> None:
    """Whatever the chunks, and whatever was squashed before, a merge of consecutive diffs is the diff from the first
    state to the last, as applying one after the other is."""
    sizes = iter(lambda: data.draw(st.integers(1, 3)), 0)
    diffs = [between(one, other) for one, other in itertools.pairwise(history)]
    split = data.draw(st.integers(0, len(diffs)))
    runs = [cut(diff, sizes) for diff in diffs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squashing, "CHUNK_CHANGES_MAX", data.draw(st.integers(1, 4)))
        merged = list(merge(runs))
        twice = list(merge([list(merge(runs[:split])), list(merge(runs[split:]))]))
        at_once = list(net([diff.tables for diff in diffs]))

    spans = [span_of(chunk) for chunk in merged]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))
    assert at_once == merged
    assert whole(merged) == whole(twice) == whole(list(between(history[0], history[-1]).tables.values()))
    state = history[0]
    for chunk in merged:
        state = applied(Diff(tables={1: chunk}), state)
    assert state == history[-1]


def test_what_does_not_follow_is_refused() -> None:
    """A before-value that is not the last after-value."""
    one, other = between({}, {b"k" * 36: b"1"}), between({b"k" * 36: b"2"}, {})

    with pytest.raises(RangeCorrupt, match="do not follow"):
        list(merge([[one.tables[1]], [other.tables[1]]]))


def test_a_merge_holds_a_chunk_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs far longer than a chunk are read as the merge comes to their keys."""
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 10)
    taken = [0, 0, 0]

    def run(number: int) -> Iterator[TableDiff]:
        for at in range(100):
            taken[number] += 1
            keys = [(10 * at + one).to_bytes(8, "big") + bytes([number]) + bytes(27) for one in range(10)]
            yield table_diff(UTXO, [Change(key, None, b"v") for key in keys])

    made = 0
    for _ in merge([run(0), run(1), run(2)]):
        made += 1
        assert max(taken) - made / 3 <= 3, (taken, made)
    assert (made, taken) == (300, [100, 100, 100])


def test_levels_of_a_walk(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Range diffs of segments, and of range diffs, in several pieces and through files in between, hold what all their
    frames net to, and stand where the last one does."""
    first = lowest(node, 0, 40, tmp_path / "a", cuts=[20, 21])
    monkeypatch.setattr(ranges, "PIECE_RAW_BYTES", 1500)
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 7)
    monkeypatch.setattr(squashing, "HELD_RAW_BYTES_MAX", 700)
    second = lowest(node, 41, 63, tmp_path / "b")
    third = lowest(node, 64, 90, tmp_path / "c")
    (tmp_path / "d").mkdir()
    all_of_them = opened(squash_ranges([first, second, third], tmp_path / "d"), 0, 90)

    assert len(first.pieces) == 1 and len(second.pieces) > 1 and len(list(tmp_path.glob("b/run-*"))) > 1
    for one in (first, second, third, all_of_them):
        assert whole(one.chunks()) == expected(node, one.name.first, one.name.last)
        assert one.resume == segment(node, one.name.first, one.name.last).resume
        assert one.changes == len(whole(one.chunks()))
        for start in (1, 5, 8):
            chunks = list(one.chunks())
            assert whole(one.chunks(start)) == whole(chunks[start:])
    assert all_of_them.parent == first.parent == bytes(32)
    assert all_of_them.prev_root == first.prev_root


def test_what_does_not_link(node: Node, tmp_path: Path) -> None:
    """Only consecutive ones of one history make a range diff, and only a whole one is made."""
    first, third = lowest(node, 0, 40, tmp_path / "a"), lowest(node, 64, 90, tmp_path / "c")
    second = lowest(node, 41, 63, tmp_path / "b")
    for wrong in ([first, third], [second, first], [first, replace(second, name=third.name)]):
        with pytest.raises(RangeCorrupt):
            squash_ranges(wrong, tmp_path)
    made = Lowest(0, 63, tmp_path)
    with pytest.raises(RangeCorrupt, match="not the next"):
        made.add(segment(node, 5, 63))
    made.add(segment(node, 0, 40))
    with pytest.raises(RangeCorrupt, match="end at"):
        made.write(tmp_path)
    with pytest.raises(RangeCorrupt, match="not the next"):
        made.add(segment(node, 42, 63))


def test_a_writer_proves_what_it_wrote(node: Node, tmp_path: Path) -> None:
    """Changes that do not lead from one root to the other are no range diff."""
    found = lowest(node, 0, 63, tmp_path / "a")
    (chunk,) = found.chunks()
    changes = chunk.changes()
    key, before, _ = changes[3]
    for wrong in (changes[1:], [*changes[:3], Change(key, before, b"another"), *changes[4:]]):
        writer = RangeWriter(tmp_path, first=0, parent=found.parent, prev_root=found.prev_root, resume=found.resume)
        writer.add(table_diff(UTXO, wrong))
        with pytest.raises(RangeCorrupt, match="starts from root"):
            writer.finish()
        assert not list(tmp_path.glob("*.rng"))


def test_every_flipped_bit_is_found(node: Node, tmp_path: Path) -> None:
    """No bit of a piece can change unnoticed, none can be missing."""
    lowest(node, 0, 9, tmp_path / "a")
    data = (tmp_path / "a" / "piece-00001.rng").read_bytes()
    assert Piece.of_bytes(data).same_as(Piece.of_file(tmp_path / "a" / "piece-00001.rng"))
    for at in [*range(300), *range(300, len(data), max(1, len(data) // 700)), *range(len(data) - 40, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises((RangeCorrupt, Unsupported)):
            Piece.of_bytes(bytes(flipped))
    for size in (0, 3, 16, 47, 48, 200, len(data) - 1):
        with pytest.raises(RangeCorrupt):
            Piece.of_bytes(data[:size])


def edited(piece: Piece, /, **changes: object) -> Piece:
    """A piece that is sound by itself and says something else in its head, index or resume record."""
    head, entries, resume = piece.head, piece.entries, piece.resume
    named = {name: value for name, value in changes.items() if name in piece.head.__slots__}
    chunks = piece.read(piece.chunks_at, piece.chunks_at + sum(entry.packed_bytes for entry in entries))
    given_entries = changes.get("entries", entries)
    assert isinstance(given_entries, tuple)
    sections = {
        Section.CHUNKS: chunks,
        Section.INDEX: b"".join(range_pieces._ENTRY.pack(*entry[:2], 0, *entry[2:]) for entry in given_entries),
        Section.HEAD: replace(head, **named).encode(),  # type: ignore[arg-type]
        Section.RESUME: encode_meta(changes.get("resume", resume)),  # type: ignore[arg-type]
    }
    return Piece.of_bytes(range_pieces.LAYOUT.join(sections))  # type: ignore[arg-type]


def test_heads_that_lie(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign, swapped and mixed pieces are refused by their names; an index that lies when its chunk is read."""
    monkeypatch.setattr(ranges, "PIECE_RAW_BYTES", 1500)
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 9)
    found = lowest(node, 0, 63, tmp_path / "a")
    one, two, *rest = found.pieces
    name = found.name

    def refused(*pieces: Piece) -> None:
        with pytest.raises(RangeCorrupt):
            RangeDiff.of(name, pieces)

    RangeDiff.of(name, [one, two, *rest])
    refused(two, one, *rest)
    refused(one, two)
    refused(one, edited(two, parent=b"p" * 32), *rest)
    refused(one, edited(two, prev_root=b"p" * 32), *rest)
    refused(edited(one, last=62), two, *rest)
    refused(one, edited(two, resume=replace(two.resume, generation=b"o" * 16)), *rest)
    refused(*(edited(piece, last=62) for piece in found.pieces))
    for field, value in (("first", -1), ("piece", "1"), ("is_last", 1), ("parent", b"short")):
        with pytest.raises(RangeCorrupt):
            edited(one, **{field: value})
    first = one.entries[0]
    for wrong in (
        first._replace(changes=first.changes - 1),
        first._replace(raw_bytes=first.raw_bytes + 1),
        first._replace(changes=range_pieces.CHUNK_CHANGES_MAX + 1),
    ):
        with pytest.raises(RangeCorrupt):
            list(edited(one, entries=(wrong, *one.entries[1:])).chunks())
    with pytest.raises(RangeCorrupt):
        edited(one, entries=one.entries[1:])
    with pytest.raises(Unsupported):
        list(edited(one, entries=(first._replace(table_id=9), *one.entries[1:])).chunks())
    twice = RangeDiff.of(name, [one, edited(one, piece=2), *(replace(piece) for piece in rest)])
    with pytest.raises(RangeCorrupt, match="out of order"):
        list(twice.chunks())


def test_bounds_hold_before_anything_is_allocated() -> None:
    """A chunk that announces more than a chunk may have is refused by what it announces."""
    for entry in (Entry(1, 2, 1, CHUNK_RAW_BYTES_MAX + 1, 4), Entry(1, 0, 0, 4, 4)):
        with pytest.raises(RangeCorrupt, match="over the bounds"):
            unpack_chunk(entry, b"junk")
    for codec in (0, 1, 2):
        with pytest.raises(RangeCorrupt, match="cannot be read"):
            unpack_chunk(Entry(1, codec, 1, 100, 4), b"junk")


def test_later_versions(node: Node, tmp_path: Path) -> None:
    """A piece of a later version is unsupported, not damaged."""
    lowest(node, 0, 9, tmp_path / "a")
    data = (tmp_path / "a" / "piece-00001.rng").read_bytes()
    later = data[:4] + b"\2" + data[5:-32]

    with pytest.raises(Unsupported):
        Piece.of_bytes(later + blake3(later).digest())
