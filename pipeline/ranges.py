"""Range diffs: the diffs of consecutive final blocks of one shard as one, so that a restore takes few hops.

A **range diff** `(from_height, to_height]` is netted: a key created and deleted inside is not in it, an update's before
is the first before, a delete stays as a delete. It has whole keys with their values before and after, and is therefore
checked as a frame is: the vectors before it, minus all befores, plus all afters, are those of the resume record in it,
from which whoever restored to that height goes on.

Levels are 64, 4,096 and 65,536 blocks, aligned as segments are; the lowest is made of segments, each other one of the
level below. Only at the beginning of an archive may one be shorter. A height inside is reached by lower levels, and
then by frames.

A range diff is cut by keys into **pieces**, each one object, created if absent:

    CHAIN/GENERATION/ranges/SHARD/FIRST-LAST.PIECE-PIECES.rng    heights with 12 digits, both inclusive; 1-1, or 1-3 ..

It is there once all of its pieces are: there is nothing else to publish, and a listing says what is missing. A piece
is a file of sections (`pipeline.sections`), magic "SFrd", version 1:

    kind 1, chunks   packed columns in whole form (`delta`), one chunk after another, each of one table
    kind 2, index    per chunk: table id u8 · codec u8 · zeroes u16 · changes u32 · raw bytes u32 ·
                     packed bytes u32                                                                16 B each
    kind 3, head     a MessagePack map: first, last, parent, prev_root, piece, is_last, digest
    kind 4, resume   the `Meta` of right before the frame of the height after ``last``, as the last segment has it

Chunks ascend strictly by table and key, over all pieces. Why not a frame of another kind: a frame is decoded whole,
and 65,536 blocks are not. **Memory**: whoever reads holds one chunk of each range diff that is merged, at most 4,096
changes or 512 KiB and one change; whoever writes holds one piece, at most 32 MiB before compression and one chunk.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import msgpack
from blake3 import blake3

from pipeline import codec
from pipeline.archive import resume_record
from pipeline.block import BlockRef
from pipeline.codec import Codec, CodecError
from pipeline.commitment import lthash
from pipeline.delta import TableDiff, decode_whole, encode_whole
from pipeline.diff import EMPTY_VECTORS, Diff
from pipeline.errors import FrameCorrupt, RangeCorrupt, StoreCorrupt, Unsupported
from pipeline.frame import NO_HASH
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.range_names import PieceName, RangeName
from pipeline.sections import TABLE_BYTES_MAX, Layout
from pipeline.state import SCHEMAS, VALUE_BYTES_MAX

CHUNK_CHANGES_MAX = 4096
CHUNK_RAW_BYTES = 512 << 10
"""A chunk that has so many bytes takes no further change."""
CHUNK_RAW_BYTES_MAX = CHUNK_RAW_BYTES + 2 * VALUE_BYTES_MAX + (64 << 10)
PIECE_RAW_BYTES = 32 << 20
"""Of its chunks before compression. As of snapshot parts: a fetch that fails costs little."""

MAGIC = b"SFrd"
VERSION = 1
_ENTRY = Struct("<BBHIII")
assert _ENTRY.size == 16

Reader = Callable[[int, int], bytes]
"""Bytes start <= at < stop of a piece."""


class Section(enum.IntEnum):
    CHUNKS = 1
    INDEX = 2
    HEAD = 3
    RESUME = 4


LAYOUT = Layout(what="range diff", magic=MAGIC, version=VERSION, kinds=Section, corrupt=RangeCorrupt)


# Chunks


class Entry(NamedTuple):
    """A chunk in the index."""

    table_id: int
    codec: int
    changes: int
    raw_bytes: int
    packed_bytes: int


def pack_chunk(raw: bytes, table: TableDiff) -> tuple[Entry, bytes]:
    packed, used = codec.compress(raw, Codec.ZSTD), Codec.ZSTD
    if len(packed) >= len(raw):
        packed, used = raw, Codec.NONE
    return Entry(table.schema.table_id, used, len(table), len(raw), len(packed)), packed


def unpack_chunk(entry: Entry, packed: bytes) -> TableDiff:
    """The inverse of `pack_chunk`. Raises RangeCorrupt, Unsupported, before it allocates."""
    if entry.table_id not in SCHEMAS or entry.codec not in set(Codec):
        raise Unsupported(f"a chunk of table {entry.table_id}, codec {entry.codec}", way_out="upgrade")
    if not 0 < entry.changes <= CHUNK_CHANGES_MAX or entry.raw_bytes > CHUNK_RAW_BYTES_MAX:
        raise RangeCorrupt(f"a chunk of {entry.changes} changes and {entry.raw_bytes} bytes is over the bounds")
    try:
        raw = codec.decompress(packed, Codec(entry.codec), raw_bytes_max=CHUNK_RAW_BYTES_MAX, raw_bytes=entry.raw_bytes)
        table = decode_whole(SCHEMAS[entry.table_id], memoryview(raw))
    except (CodecError, FrameCorrupt) as error:
        raise RangeCorrupt(f"a chunk of a range diff cannot be read: {error}") from error
    if len(table) != entry.changes:
        raise RangeCorrupt(f"a chunk has {len(table)} changes, its index says {entry.changes}")
    return table


def span_of(table: TableDiff) -> tuple[bytes, bytes]:
    """A table's lowest and highest changed key; it has changes."""
    columns = [keys for keys in (table.created_keys, table.updated_keys, table.deleted_keys) if keys]
    return min(keys[0] for keys in columns), max(keys[-1] for keys in columns)


# Pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all pieces of one range diff agree on, and which of them this is.

    ``parent`` and ``prev_root``: of the position before. ``digest``: BLAKE3 of what the chunks hold, so that pieces of
    two builds can be compared whatever their compression.
    """

    first: int
    last: int
    parent: bytes
    prev_root: bytes
    piece: int
    is_last: bool
    digest: bytes

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb({name: getattr(self, name) for name in self.__slots__})
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Head:
        """Raises RangeCorrupt."""
        try:
            head = cls(**msgpack.unpackb(data, raw=False, strict_map_key=True))
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise RangeCorrupt(f"the head of a range diff cannot be read: {error}") from error
        numbers, hashes = (head.first, head.last, head.piece), (head.parent, head.prev_root, head.digest)
        if not all(type(number) is int and number >= 0 for number in numbers) or type(head.is_last) is not bool:
            raise RangeCorrupt("the head of a range diff has numbers that cannot be")
        if not all(isinstance(one, bytes) and len(one) == len(NO_HASH) for one in hashes):
            raise RangeCorrupt("the head of a range diff has hashes that cannot be")
        return head


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One piece, its table, index and head checked; its chunks are read when they are asked for."""

    head: Head
    resume: Meta
    entries: tuple[Entry, ...]
    read: Reader
    chunks_at: int

    @classmethod
    def open(cls, read: Reader, size_bytes: int, *, is_checked: bool = False) -> Piece:
        """``is_checked``: the digest was, when it came here. Raises RangeCorrupt, Unsupported."""
        if not is_checked:
            LAYOUT.check_digest(read, size_bytes)
        places = LAYOUT.places(read(0, TABLE_BYTES_MAX), size_bytes)
        index = read(*places[Section.INDEX])
        if len(index) % _ENTRY.size:
            raise RangeCorrupt("the index of a range diff is cut off")
        entries = tuple(Entry(*fields[:2], *fields[3:]) for fields in _ENTRY.iter_unpack(index))
        chunks_at, stop = places[Section.CHUNKS]
        if sum(entry.packed_bytes for entry in entries) != stop - chunks_at:
            raise RangeCorrupt("the index of a range diff does not describe its chunks")
        try:
            resume = decode_meta(read(*places[Section.RESUME]))
        except StoreCorrupt as error:
            raise RangeCorrupt(f"the resume record of a range diff cannot be read: {error.what}") from error
        head = Head.decode(read(*places[Section.HEAD]))
        return cls(head=head, resume=resume, entries=entries, read=read, chunks_at=chunks_at)

    @classmethod
    def of_bytes(cls, data: bytes) -> Piece:
        return cls.open(lambda start, stop: data[start:stop], len(data))

    @classmethod
    def of_file(cls, path: Path, *, is_checked: bool = False) -> Piece:
        """One that stays a file: it is opened for every read."""

        def read(start: int, stop: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)

        return cls.open(read, path.stat().st_size, is_checked=is_checked)

    def chunks(self, start: int = 0) -> Iterator[TableDiff]:
        """From chunk number ``start`` on."""
        at = self.chunks_at + sum(entry.packed_bytes for entry in self.entries[:start])
        for entry in self.entries[start:]:
            yield unpack_chunk(entry, self.read(at, at + entry.packed_bytes))
            at += entry.packed_bytes

    def check_name(self, name: PieceName) -> None:
        """Raises RangeCorrupt unless it is what stands under that name."""
        head, resume = self.head, self.resume
        own = RangeName(resume.chain_id, resume.generation, resume.shard, head.first, head.last)
        if (own, head.piece, head.is_last) != (name.of, name.number, name.number == name.total):
            raise RangeCorrupt("a piece of a range diff stands under another's name", where=str(name))

    def same_as(self, other: Piece) -> bool:
        """Whether two pieces say the same; compression, epochs and offsets may differ."""
        return (self.head, self.resume.tip) == (other.head, other.resume.tip)


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


# Writing


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
        sections: dict[int, bytes] = {
            Section.CHUNKS: b"".join(packed for _, packed in self._held),
            Section.INDEX: b"".join(_ENTRY.pack(*entry[:2], 0, *entry[2:]) for entry, _ in self._held),
            Section.HEAD: head.encode(),
            Section.RESUME: encode_meta(self._resume),
        }
        path = self._folder / f"piece-{number:05d}.rng"
        path.write_bytes(LAYOUT.join(sections))
        self._paths.append(path)
        self._held, self._hasher, self._raw_bytes = [], blake3(), 0
