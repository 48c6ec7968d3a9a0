"""Pieces of range diffs (`ranges`): the objects that these are cut into, and the chunks that a piece holds.

A piece is a file of sections (`pipeline.sections`), magic "SFrd", version 1:

    kind 1, chunks   packed columns in whole form (`delta`), one chunk after another, each of one table
    kind 2, index    per chunk: table id u8 · codec u8 · zeroes u16 · changes u32 · raw bytes u32 ·
                     packed bytes u32                                                                16 B each
    kind 3, head     a MessagePack map: first, last, parent, prev_root, piece, is_last, digest
    kind 4, resume   the `Meta` of right before the frame of the height after ``last``, as the last segment has it

Chunks ascend strictly by table and key, over all pieces. Why not a frame of another kind: a frame is decoded whole,
and 65,536 blocks are not. **Memory**: whoever reads holds one chunk of each range diff that is merged, at most 4,096
changes or 512 KiB and one change.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import msgpack

from pipeline import codec
from pipeline.archive_names import PieceName, RangeName
from pipeline.codec import Codec, CodecError
from pipeline.delta import decode_whole
from pipeline.errors import FrameCorrupt, RangeCorrupt, StoreCorrupt, Unsupported
from pipeline.frame import NO_HASH
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.sections import TABLE_BYTES_MAX, Layout
from pipeline.state import SCHEMAS, VALUE_BYTES_MAX
from pipeline.table_diff import TableDiff

CHUNK_CHANGES_MAX = 4096
CHUNK_RAW_BYTES = 512 << 10
"""A chunk that has so many bytes takes no further change."""
CHUNK_RAW_BYTES_MAX = CHUNK_RAW_BYTES + 2 * VALUE_BYTES_MAX + (64 << 10)

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


def encode_piece(head: Head, resume: Meta, chunks: Iterable[tuple[Entry, bytes]]) -> bytes:
    """The bytes of a piece, of packed chunks in their order."""
    chunks = list(chunks)
    sections: dict[int, bytes] = {
        Section.CHUNKS: b"".join(packed for _, packed in chunks),
        Section.INDEX: b"".join(_ENTRY.pack(*entry[:2], 0, *entry[2:]) for entry, _ in chunks),
        Section.HEAD: head.encode(),
        Section.RESUME: encode_meta(resume),
    }
    return LAYOUT.join(sections)
