"""Messages larger than a record: cut on the way out, put together on the way in.

Both topics share this. A message that fits goes out as it is; a larger one as chunks, each a record of its own. A chunk
names the whole by its digest, so parts of two messages can never be mixed, and names its writer, so that a reader can
tell a chunk in force from one that is not. A stored offset never points inside a chunked message: whoever stops in the
middle reads it again from its first chunk.

Layout of a chunk record (little-endian): magic "SFck" · version u8 · generation 16 B · epoch u64 · writer 16 B ·
number u64 (a frame's seq, an event's walk number) · digest 32 B (BLAKE3 of the whole) · index u32 · count u32 ·
total u64 · payload · checksum u64 (XXH3-64 of all before).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import xxhash
from blake3 import blake3

from pipeline.errors import FrameCorrupt, Unsupported

RECORD_BYTES_MAX = 900 << 10
"""A record's payload: below Kafka's default of 1 MiB for a request, headers and batch included."""

MESSAGE_BYTES_MAX = 256 << 20
"""Bound of one message, and so of what a reader collects: one incomplete message at a time."""

CHUNK_MAGIC = b"SFck"
CHUNK_VERSION = 1
_HEAD = Struct("<4sB16sQ16sQ32sIIQ")
assert _HEAD.size == 101
_ORIGIN = Struct("<4sB16sQ16s")  # version-independent: magic, version, generation, epoch, writer
assert _ORIGIN.size == 45
_CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    generation: bytes
    epoch: int
    writer: bytes
    number: int
    digest: bytes
    index: int
    count: int
    total_bytes: int
    payload: bytes


class Origin(NamedTuple):
    """Whose chunk it is: at the same bytes in every version."""

    generation: bytes
    epoch: int
    writer: bytes


def is_chunk(record: bytes) -> bool:
    return record[:4] == CHUNK_MAGIC


def cut(
    message: bytes,
    *,
    generation: bytes,
    epoch: int,
    writer: bytes,
    number: int,
    record_bytes_max: int = RECORD_BYTES_MAX,
) -> list[bytes]:
    """The records that carry a message, in order: the message itself if it fits."""
    if len(message) <= record_bytes_max:
        return [message]
    assert len(message) <= MESSAGE_BYTES_MAX, (len(message), MESSAGE_BYTES_MAX)
    step = record_bytes_max - _HEAD.size - _CHECKSUM_BYTES
    digest = blake3(message).digest()
    count = -(-len(message) // step)
    records = []
    for index in range(count):
        head = _HEAD.pack(
            CHUNK_MAGIC, CHUNK_VERSION, generation, epoch, writer, number, digest, index, count, len(message)
        )
        body = head + message[index * step : (index + 1) * step]
        records.append(body + xxhash.xxh3_64_digest(body))
    return records


def peek_origin(record: bytes) -> Origin | None:
    """Whose chunk this is, whatever its version; None for anything that is no undamaged chunk: void."""
    if len(record) <= _ORIGIN.size + _CHECKSUM_BYTES or not is_chunk(record):
        return None
    if xxhash.xxh3_64_digest(memoryview(record)[:-_CHECKSUM_BYTES]) != record[-_CHECKSUM_BYTES:]:
        return None
    return Origin(*_ORIGIN.unpack_from(record)[2:])


def decode_chunk(record: bytes) -> Chunk:
    """Raises FrameCorrupt (damaged, or numbers that cannot be) and Unsupported (another version)."""
    if peek_origin(record) is None:
        raise FrameCorrupt("not an undamaged chunk: magic, size or checksum is wrong")
    if record[4] != CHUNK_VERSION:
        raise Unsupported(
            f"a chunk of version {record[4]}", way_out=f"this build reads version {CHUNK_VERSION}: upgrade"
        )
    if len(record) <= _HEAD.size + _CHECKSUM_BYTES:
        raise FrameCorrupt("a chunk is truncated")
    _, _, generation, epoch, writer, number, digest, index, count, total = _HEAD.unpack_from(record)
    if not (0 <= index < count and 1 < count <= total <= MESSAGE_BYTES_MAX):
        raise FrameCorrupt(f"chunk {index} of {count} with {total} bytes in all cannot be")
    return Chunk(
        generation=generation,
        epoch=epoch,
        writer=writer,
        number=number,
        digest=digest,
        index=index,
        count=count,
        total_bytes=total,
        payload=record[_HEAD.size : -_CHECKSUM_BYTES],
    )


class Assembler:
    """Collects the chunks of one message at a time.

    * Holds at most `MESSAGE_BYTES_MAX`, and never more than the message announced.
    * A chunk 0 discards anything incomplete; a chunk that does not continue what is held discards it too.
    """

    def __init__(self) -> None:
        self._first: Chunk | None = None
        self._parts: list[bytes] = []
        self.held_bytes = 0

    def feed(self, chunk: Chunk) -> bytes | None:
        """One chunk that is in force, in log order. The whole message once its last chunk came, else None."""
        if chunk.index == 0:
            self.discard()
            self._first = chunk
        elif not self._continues(chunk):
            self.discard()
            return None
        self._parts.append(chunk.payload)
        self.held_bytes += len(chunk.payload)
        if self.held_bytes > chunk.total_bytes:
            self.discard()
            return None
        if chunk.index + 1 < chunk.count:
            return None
        message = b"".join(self._parts)
        self.discard()
        whole = len(message) == chunk.total_bytes and blake3(message).digest() == chunk.digest
        return message if whole else None

    def _continues(self, chunk: Chunk) -> bool:
        first = self._first
        return (
            first is not None
            and chunk.index == len(self._parts)
            and (chunk.digest, chunk.count, chunk.total_bytes, chunk.epoch, chunk.writer, chunk.number)
            == (first.digest, first.count, first.total_bytes, first.epoch, first.writer, first.number)
        )

    def discard(self) -> None:
        """Forget what is incomplete: also called when a valid EPOCH comes."""
        self._first, self._parts, self.held_bytes = None, [], 0
