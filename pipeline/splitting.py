"""From the one order of `blocks` to a partition of `shard-blocks` for each shard, and from there back to events.

The **splitter** keeps no state of its own. Every record that it writes says where on `blocks` its event stands, where
the one before it stood, and which source was in force: the last record of a partition is all that a splitter needs to
go on. It starts at the lowest last one of all partitions, so that some partitions get again what they have.

What it writes is a function of `blocks` alone. So two splitters at once, as when one sleeps and is replaced, write the
same: readers pass by what they had, chunks of one event merge by their index whoever wrote them, and nobody has to be
fenced. A repeat that is not the same means that `blocks` was another topic when it was split; that stops the reader.

The splitter judges nothing but whether a record is an event: EPOCHs, writers not in force, gaps and blocks that cannot
be are passed through, and each shard decides by the rule that it has without shards. A record that is no event is
passed through too, as what it is, so that every shard stops there, and goes on at the EPOCH that mends it.

Layout of a record (little-endian), before it is cut into chunks: magic "SFse" · version u8 · checksum 8 B (XXH3-64 of
the rest) · `_HEAD` · payload: an event with the shard's ops, or in UTF-8 why there is none.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from struct import Struct

import xxhash
from blake3 import blake3

from pipeline import chunk
from pipeline.block import Connect, Event, SourceEpoch, decode_event, encode_event
from pipeline.chunk import Chunk
from pipeline.codec import ZSTD_LEVEL_FAST
from pipeline.errors import EventCorrupt, FrameCorrupt, LogLost, Unsupported, WalkGap
from pipeline.frame import NO_HASH, digest_of
from pipeline.inlet import NO_SOURCE, EventReader, Source, source_after
from pipeline.primary import Reading
from pipeline.shards import split_block

_MAGIC = b"SFse"
_VERSION = 1
# shard, shards, generation, kind, first, last and previous offset on blocks, digest, source epoch and writer, walk
_HEAD = Struct("<HH16sBQQQ32sQ16sQ")
assert _HEAD.size == 109
_PREFIX_BYTES = len(_MAGIC) + 1 + 8
_REPEATS_KNOWN = 4096
"""Events whose digests a reader remembers, to tell a repeat from another event: 400 KiB."""


class Kind(enum.IntEnum):
    EVENT = 0
    BAD = 1  # a record of blocks that is no event


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One event's part for one shard. Offsets are those of `blocks`."""

    generation: bytes
    shard: int
    shards: int
    kind: Kind
    first: int  # of the event's records
    last: int
    previous: int  # offset after the last record of the event before; 0: there was none
    digest: bytes  # of the event's last record
    source: Source  # in force after this event, as far as the splitter knows
    walk: int  # the last one of a source in force
    payload: bytes


def encode_cut(cut: Cut) -> bytes:
    head = _HEAD.pack(
        *(cut.shard, cut.shards, cut.generation, cut.kind, cut.first, cut.last, cut.previous, cut.digest),
        *(*cut.source, cut.walk),
    )
    body = head + cut.payload
    return _MAGIC + bytes([_VERSION]) + xxhash.xxh3_64_digest(body) + body


def decode_cut(data: bytes) -> Cut | None:
    """The inverse of `encode_cut`; None for what is no undamaged record of this kind. Raises Unsupported."""
    if len(data) < _PREFIX_BYTES + _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
        return None
    body = memoryview(data)[_PREFIX_BYTES:]
    if xxhash.xxh3_64_digest(body) != data[len(_MAGIC) + 1 : _PREFIX_BYTES]:
        return None
    if data[len(_MAGIC)] != _VERSION:
        raise Unsupported(f"a shard event of version {data[len(_MAGIC)]}", way_out="upgrade")
    shard, shards, generation, kind, first, last, previous, digest, epoch, writer, walk = _HEAD.unpack_from(body)
    if kind not in iter(Kind):
        raise Unsupported(f"a shard event of kind {kind}", way_out="upgrade")
    return Cut(
        generation=generation,
        shard=shard,
        shards=shards,
        kind=Kind(kind),
        first=first,
        last=last,
        previous=previous,
        digest=digest,
        source=(epoch, writer),
        walk=walk,
        payload=bytes(body[_HEAD.size :]),
    )


# Splitting


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPoint:
    """Where on `blocks` a splitter goes on, and what it must know there."""

    next_offset: int = 0
    last_digest: bytes = NO_HASH  # of the record before
    source: Source = NO_SOURCE
    walk: int = 0

    @classmethod
    def after(cls, cut: Cut) -> SplitPoint:
        return cls(next_offset=cut.last + 1, last_digest=cut.digest, source=cut.source, walk=cut.walk)


def lowest(points: Iterable[SplitPoint]) -> SplitPoint:
    """Where a splitter starts, from where each partition ends."""
    return min(points, key=lambda point: point.next_offset)


class Splitter:
    """Events of `blocks`, in offset order, to the records of every shard.

    * What it gives for an event depends on `blocks` up to that event, and on nothing else.
    * Holds at most one incomplete event.
    """

    def __init__(self, generation: bytes, shards: int, at: SplitPoint) -> None:
        self.at = at
        self._generation = generation
        self._shards = shards
        self._reader = EventReader(generation, previous_digest=at.last_digest)

    @property
    def held_bytes(self) -> int:
        return self._reader.held_bytes

    def feed(self, record: bytes, offset: int) -> list[list[bytes]]:
        """One record; for each shard the records to append, none while an event is incomplete. Raises Unsupported."""
        try:
            found = self._reader.feed(record, offset, self.at.source)
        except EventCorrupt as error:
            reading = Reading(first=offset, last=offset, digest=digest_of(record), previous_digest=b"")
            return self._cut(reading, Kind.BAD, [str(error).encode()] * self._shards)
        if found is None:
            return [[] for _ in range(self._shards)]
        event, reading = found
        self._follow(event)
        parts = split_event(event, self._shards)
        return self._cut(reading, Kind.EVENT, [encode_event(part, zstd_level=ZSTD_LEVEL_FAST) for part in parts])

    def _follow(self, event: Event) -> None:
        """Which chunks count from here on. Whether an event is valid is for its readers to say."""
        stamp, at = event.stamp, self.at
        if isinstance(event, SourceEpoch):
            self.at = replace(at, source=source_after(event, self._generation, at.source))
        elif stamp.generation == self._generation and (stamp.epoch, stamp.writer) == at.source:
            self.at = replace(at, walk=max(at.walk, event.walk))

    def _cut(self, reading: Reading, kind: Kind, payloads: list[bytes]) -> list[list[bytes]]:
        previous = self.at.next_offset
        self.at = replace(self.at, next_offset=reading.last + 1, last_digest=reading.digest)
        epoch, writer = self.at.source
        cuts = []
        for shard, payload in enumerate(payloads):
            cut = Cut(
                generation=self._generation,
                shard=shard,
                shards=self._shards,
                kind=kind,
                first=reading.first,
                last=reading.last,
                previous=previous,
                digest=reading.digest,
                source=self.at.source,
                walk=self.at.walk,
                payload=payload,
            )
            message = encode_cut(cut)
            cuts.append(
                chunk.cut(message, generation=self._generation, epoch=epoch, writer=writer, number=reading.last)
            )
        return cuts


def split_event(event: Event, shards: int) -> list[Event]:
    """What each shard gets of an event: the same event, with that shard's ops."""
    if isinstance(event, Connect):
        return [replace(event, block=block) for block in split_block(event.block, shards)]
    return [event] * shards


# Reading


def stood_at(record: bytes) -> int:
    """The offset on `blocks` behind the event that ends with this record of `shard-blocks`; 0: it is none of an event.

    What `CutReader` wants to know as ``after`` who goes on behind that record."""
    if not chunk.is_chunk(record):
        cut = decode_cut(record)
        return 0 if cut is None else cut.last + 1
    try:
        return chunk.decode_chunk(record).number + 1
    except FrameCorrupt:
        return 0


class CutReader:
    """Records of one partition of `shard-blocks`, in offset order, to cuts: each event once, in order.

    * Holds at most one incomplete event, and the digests of the last `_REPEATS_KNOWN` events.
    * What is damaged, or of another generation or shard, is void: `previous` exposes a loss.
    """

    def __init__(self, generation: bytes, shard: int, shards: int, *, after: int = 0, links: bool = True) -> None:
        """``after``: an offset on blocks below which events are repeats. ``links`` False: do not ask whether an event
        follows the one before, for who begins to read somewhere; the first event is taken as it is in any case."""
        self._generation = generation
        self._shard = (shard, shards)
        self._next = after  # the offset on blocks that the next event's `previous` must be
        self._links = links
        self._has_begun = False
        self._known: OrderedDict[int, bytes] = OrderedDict()
        self._chunks: list[Chunk] = []
        self.first = 0  # offset of the first record of the event that is being read
        self.held_bytes = 0

    def feed(self, record: bytes, offset: int) -> Cut | None:
        """One record; None if no event is whole with it. Raises LogLost, WalkGap, Unsupported."""
        message: bytes | None = record
        if chunk.is_chunk(record):
            message = self._merge(record, offset)
        elif not self._chunks:
            self.first = offset
        cut = None if message is None else decode_cut(message)
        if cut is None or (cut.generation, (cut.shard, cut.shards)) != (self._generation, self._shard):
            return None
        if message is record and not self._is_repeat(cut):
            self._forget_chunks()
            self.first = offset
        return cut if self._is_next(cut) else None

    def _merge(self, record: bytes, offset: int) -> bytes | None:
        """Chunks of one event, whoever wrote them, by their index."""
        try:
            part = chunk.decode_chunk(record)
        except FrameCorrupt:
            return None
        if part.generation != self._generation or part.number < self._next:
            return None
        held = self._chunks
        if held and (part.number, part.digest) == (held[0].number, held[0].digest):
            if part.index != len(held):
                return None
        elif part.index == 0:
            self._forget_chunks()
            self.first = offset
        else:
            return None
        self._chunks.append(part)
        self.held_bytes += len(part.payload)
        if part.index + 1 < part.count:
            return None
        message = b"".join(one.payload for one in self._chunks)
        self._forget_chunks()
        return message if blake3(message).digest() == part.digest else None

    def _forget_chunks(self) -> None:
        self._chunks, self.held_bytes = [], 0

    def _is_repeat(self, cut: Cut) -> bool:
        return cut.last < self._next

    def _is_next(self, cut: Cut) -> bool:
        if self._is_repeat(cut):
            if self._known.get(cut.last, cut.digest) != cut.digest:
                raise LogLost(
                    f"the event at offset {cut.last} of blocks was split twice, and was another one each time",
                    way_out="the blocks topic lost records that were split already: begin again from a source, under "
                    "another --topic-prefix",
                )
            return False
        if self._links and self._has_begun and cut.previous != self._next:
            raise WalkGap(
                f"the event at offset {cut.last} of blocks follows offset {cut.previous}, but the last one read ends "
                f"before {self._next}",
                way_out="records of shard-blocks were lost: begin again from a source, under another --topic-prefix",
            )
        self._next, self._has_begun = cut.last + 1, True
        self._known[cut.last] = cut.digest
        if len(self._known) > _REPEATS_KNOWN:
            self._known.popitem(last=False)
        return True


class ShardEventReader:
    """An `EventReader` of one partition of `shard-blocks`: what a primary of that shard reads."""

    def __init__(
        self,
        generation: bytes,
        shard: int,
        shards: int,
        *,
        after: int = 0,
        links: bool = True,
        previous_digest: bytes = NO_HASH,
        with_ops: bool = True,
    ) -> None:
        """``after`` and ``links``: as of `CutReader`. ``previous_digest`` and ``with_ops``: as of `EventReader`."""
        self._cuts = CutReader(generation, shard, shards, after=after, links=links)
        self._with_ops = with_ops
        self._previous = previous_digest
        self._before_first = previous_digest

    @property
    def held_bytes(self) -> int:
        return self._cuts.held_bytes

    def feed(self, record: bytes, offset: int, source: Source) -> tuple[Event, Reading] | None:
        """As `EventReader.feed`; whether a writer is in force the caller decides. Raises EventCorrupt for a record of
        blocks that was none, and what `CutReader.feed` raises."""
        previous, self._previous = self._previous, digest_of(record)
        cut = self._cuts.feed(record, offset)
        if self._cuts.first == offset:
            self._before_first = previous
        if cut is None:
            return None
        if cut.kind is Kind.BAD:
            raise EventCorrupt(
                f"the record at offset {cut.last} of blocks is no event: {cut.payload.decode(errors='replace')}"
            )
        reading = Reading(
            first=self._cuts.first, last=offset, digest=self._previous, previous_digest=self._before_first
        )
        return decode_event(cut.payload, with_ops=self._with_ops), reading
