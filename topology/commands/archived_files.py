"""Archived files as commands are given them: segments, single frames, pieces of range diffs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pipeline import frame
from pipeline.archive import MAGIC as SEGMENT_MAGIC
from pipeline.archive import Segment
from pipeline.archive_names import RangeName
from pipeline.errors import CorruptInput, UsageError
from pipeline.range_pieces import MAGIC as PIECE_MAGIC
from pipeline.range_pieces import Piece
from pipeline.ranges import RangeDiff


def read_archived(files: tuple[Path, ...], height: int | None = None) -> Iterator[bytes | RangeDiff]:
    """Frames and range diffs in the order of the files; pieces of one range diff stand together, in any order.
    ``height``: only the frame of that block.

    Raises SegmentCorrupt, FrameCorrupt, RangeCorrupt, Unsupported, UsageError (no such height, a piece is missing).
    """
    found = False
    for is_piece, group in groupby(files, _is_piece):
        if is_piece and height is None:
            found = True
            yield from _range_diffs(list(group))
        elif not is_piece:
            for one in _frames(group):
                if height is None or frame.peek(one).ref.height == height:
                    found = True
                    yield one
    if not found:
        raise UsageError(f"no frame of height {height} in these files")


def read_frames(files: tuple[Path, ...], height: int | None = None) -> Iterator[bytes]:
    """The same without range diffs. Raises UsageError if there is one."""
    for one in read_archived(files, height):
        if isinstance(one, RangeDiff):
            raise UsageError(f"{one.name} is a range diff, not frames", way_out="give the segments that it is made of")
        yield one


def _is_piece(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(PIECE_MAGIC)) == PIECE_MAGIC


def _frames(files: Iterator[Path]) -> Iterator[bytes]:
    for file in files:
        data = file.read_bytes()
        try:
            yield from Segment.open(data).frames() if data[: len(SEGMENT_MAGIC)] == SEGMENT_MAGIC else [data]
        except CorruptInput as error:
            error.where = error.where or str(file)
            raise


def _range_diffs(files: list[Path]) -> Iterator[RangeDiff]:
    for name, group in groupby(map(_opened, files), _name):
        pieces = sorted(group, key=lambda piece: piece.head.piece)
        numbers = [piece.head.piece for piece in pieces]
        if numbers != list(range(1, len(pieces) + 1)) or not pieces[-1].head.is_last:
            raise UsageError(
                f"pieces {', '.join(map(str, numbers))} are not the whole range diff of heights {name.first} to "
                f"{name.last}",
                way_out="give all of its pieces, one after another",
            )
        yield RangeDiff.of(name, pieces)


def _opened(file: Path) -> Piece:
    """Its chunks stay in the file until they are asked for."""
    try:
        return Piece.of_file(file)
    except CorruptInput as error:
        error.where = error.where or str(file)
        raise


def _name(piece: Piece) -> RangeName:
    head, resume = piece.head, piece.resume
    return RangeName(resume.chain_id, resume.generation, resume.shard, head.first, head.last)
