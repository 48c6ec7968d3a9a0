"""Range diffs: the diffs of consecutive final blocks of one shard as one, so that a restore takes few hops.

A **range diff** `(from_height, to_height]` is netted: a key created and deleted inside is not in it, an update's before
is the first before, a delete stays as a delete. It has whole keys with their values before and after, and is therefore
checked as a frame is: the vectors before it, minus all befores, plus all afters, are those of the resume record in it,
from which whoever restored to that height goes on.

Levels are 64, 4,096 and 65,536 blocks, aligned as segments are; the lowest is made of segments, each other one of the
level below. Only at the beginning of an archive may one be shorter. A height inside is reached by lower levels, and
then by frames.

A range diff is cut by keys into **pieces** (`range_pieces`), each one object, created if absent:

    CHAIN/GENERATION/ranges/SHARD/FIRST-LAST.PIECE-PIECES.rng    heights with 12 digits, both inclusive; 1-1, or 1-3 ..

It is there once all of its pieces are: there is nothing else to publish, and a listing says what is missing.
**Memory**: whoever writes holds one piece, at most 32 MiB before compression and one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pipeline.archive import resume_record
from pipeline.archive_names import RangeName
from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.delta import encode_whole
from pipeline.diff import EMPTY_VECTORS, Diff
from pipeline.errors import RangeCorrupt
from pipeline.position import Meta
from pipeline.range_pieces import Entry, Head, Piece, encode_piece, pack_chunk, span_of
from pipeline.table_diff import TableDiff

PIECE_RAW_BYTES = 32 << 20
"""Of its chunks before compression. As of snapshot parts: a fetch that fails costs little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeDiff:
    """All pieces of one range diff, which agree with each other and with its name."""

    name: RangeName
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, name: RangeName, pieces: Sequence[Piece]) -> RangeDiff:
        """Raises RangeCorrupt."""
        for piece_name, piece in zip(name.pieces(len(pieces)), pieces, strict=True):
            piece.check_name(piece_name)
            one, other = piece, pieces[0]
            if (one.head.parent, one.head.prev_root, one.resume.tip) != (
                other.head.parent,
                other.head.prev_root,
                other.resume.tip,
            ):
                raise RangeCorrupt("the pieces of a range diff are not of one history", where=str(piece_name))
        ref = pieces[0].resume.tip.ref
        if ref is None or ref.height != name.last:
            raise RangeCorrupt(f"a range diff to height {name.last} resumes from block {ref}", where=str(name))
        return cls(name=name, pieces=tuple(pieces))

    @property
    def parent(self) -> bytes:
        return self.pieces[0].head.parent

    @property
    def prev_root(self) -> bytes:
        return self.pieces[0].head.prev_root

    @property
    def resume(self) -> Meta:
        return self.pieces[0].resume

    @property
    def ref(self) -> BlockRef:
        ref = self.resume.tip.ref
        assert ref is not None, self.name
        return ref

    @property
    def changes(self) -> int:
        return sum(entry.changes for piece in self.pieces for entry in piece.entries)

    def chunks(self, start: int = 0) -> Iterator[TableDiff]:
        """In ascending order, from chunk number ``start`` of all pieces on. Raises RangeCorrupt."""
        previous = (0, b"")
        for piece in self.pieces:
            for chunk in piece.chunks(start):
                low, high = span_of(chunk)
                table_id = chunk.schema.table_id
                if (table_id, low) <= previous:
                    raise RangeCorrupt("the chunks of a range diff are out of order", where=str(self.name))
                previous = (table_id, high)
                yield chunk
            start = max(start - len(piece.entries), 0)


class RangeWriter:
    """Writes pieces into a folder as chunks come in, ascending; knows in the end whether they lead where they must."""

    def __init__(
        self,
        folder: Path,
        *,
        first: int,
        parent: bytes,
        prev_root: bytes,
        resume: Meta,
    ) -> None:
        self.changes = 0
        self._folder = folder
        self._first, self._parent, self._prev_root = first, parent, prev_root
        self._resume = resume_record(resume)
        self._losses = dict(EMPTY_VECTORS)
        self._paths: list[Path] = []
        self._held: list[tuple[Entry, bytes]] = []
        self._hasher = blake3()
        self._raw_bytes = 0

    def add(self, table: TableDiff) -> None:
        """The next chunk."""
        raw = encode_whole(table)
        if self._held and self._raw_bytes + len(raw) > PIECE_RAW_BYTES:
            self._close(is_last=False)
        self._losses = lthash.combine(self._losses, Diff(tables={table.schema.table_id: table}).inverted().gains())
        self._hasher.update(bytes([table.schema.table_id]) + len(raw).to_bytes(4, "little") + raw)
        self._held.append(pack_chunk(raw, table))
        self._raw_bytes += len(raw)
        self.changes += len(table)

    def finish(self) -> list[Path]:
        """The pieces, in order. Raises RangeCorrupt if the chunks do not lead from the root before to that after."""
        before = lthash.state_root(lthash.combine(self._resume.tip.vectors, self._losses))
        if before != self._prev_root:
            raise RangeCorrupt(
                f"a range diff to block {self._resume.tip.ref} starts from root {before.hex()}, and not from "
                f"{self._prev_root.hex()}"
            )
        self._close(is_last=True)
        return self._paths

    def _close(self, *, is_last: bool) -> None:
        assert self._resume.tip.ref is not None
        number = len(self._paths) + 1
        head = Head(
            first=self._first,
            last=self._resume.tip.height,
            parent=self._parent,
            prev_root=self._prev_root,
            piece=number,
            is_last=is_last,
            digest=self._hasher.digest(),
        )
        path = self._folder / f"piece-{number:05d}.rng"
        path.write_bytes(encode_piece(head, self._resume, self._held))
        self._paths.append(path)
        self._held, self._hasher, self._raw_bytes = [], blake3(), 0
