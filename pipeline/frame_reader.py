"""What one record of the diffs topic is, to whoever stands at a position.

The rule, in the order in which it is asked, the same on every reader:

    damaged, another generation or shard, a writer not in force      -> Void: counted, passed by
    an EPOCH with the number in force + 1                            -> Reign; it may take frames of a shard back
    a GENERATION with the number in force + 1                        -> Ended: this history is over
    in force, of a version or feature unknown here                   -> Unsupported: stop
    in force, undecodable                                            -> FrameCorrupt: quarantine
    the seq and id applied last                                      -> Repeat
    seq + 1, links meet                                              -> Next: `replica` computes it
    a gap                                                            -> SeqGap: bridge or restore
    another id at a seq, links that do not meet                      -> Diverged: quarantine
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline import chunk, frame
from pipeline.frame import Header, Kind
from pipeline.generation import Generation, decode_end
from pipeline.position import Meta
from pipeline.verify import follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """A record that no reader may follow. ``reason`` is one of a fixed few words, counted by it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A chunk of a message that is not complete yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    header: Header


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    successor: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """A frame in force that follows; what it changes is still to be computed."""

    header: Header
    message: bytes


Judgement = Next | Repeat | Void | Partial | Reign | Ended


class FrameReader:
    """Records of one partition, in order: chunks are put together.

    * `passes_by`: what comes up to the next EPOCH that takes frames back is void.
    """

    def __init__(self) -> None:
        self.voids: Counter[str] = Counter()
        self.passes_by = False
        self._assembler = chunk.Assembler()

    @property
    def held_bytes(self) -> int:
        return self._assembler.held_bytes

    def forget_chunks(self) -> None:
        """A message in force came whole: what is incomplete stays so for every reader, restarted or not."""
        self._assembler.discard()

    def feed(self, record: bytes, meta: Meta) -> Judgement:
        """The next record. Raises as the module says."""
        if chunk.is_chunk(record):
            return self._read_chunk(record, meta)
        return self._read_message(record, meta)

    def _read_chunk(self, record: bytes, meta: Meta) -> Judgement:
        origin = chunk.peek_origin(record)
        if origin is None:
            return self._void("damaged")
        if origin.generation != meta.generation:
            return self._void("generation")
        if (origin.epoch, origin.writer) != (meta.epoch, meta.writer):
            return self._void("writer")
        message = self._assembler.feed(chunk.decode_chunk(record))
        return Partial() if message is None else self._read_message(message, meta)

    def _read_message(self, message: bytes, meta: Meta) -> Judgement:
        prefix = frame.peek_prefix(message)
        if prefix is None:
            return self._void("damaged")
        if prefix.generation != meta.generation:
            return self._void("generation")
        if (prefix.shard, prefix.shards) != (meta.shard, meta.shards):
            return self._void("shard")
        if prefix.kind in (Kind.EPOCH, Kind.GENERATION):
            if prefix.epoch != meta.epoch + 1:
                return self._void("epoch")
            self.forget_chunks()
            if prefix.kind == Kind.GENERATION:
                return Ended(successor=decode_end(frame.decode(message).body))
            return Reign(header=frame.peek(message))
        if (prefix.epoch, prefix.writer) != (meta.epoch, meta.writer):
            return self._void("writer")
        self.forget_chunks()
        header = frame.peek(message)
        if self.passes_by:
            return self._void("taken back")
        if not follows(header, meta):
            return Repeat(seq=header.seq)
        return Next(header=header, message=message)

    def _void(self, reason: str) -> Void:
        self.voids[reason] += 1
        return Void(reason=reason)


def is_ahead(record: bytes, meta: Meta) -> bool:
    """Whether a record is of a later epoch than the one in force, by what it says of itself."""
    origin = chunk.peek_origin(record) if chunk.is_chunk(record) else frame.peek_prefix(record)
    return origin is not None and origin.generation == meta.generation and origin.epoch > meta.epoch


def reign(message: bytes, meta: Meta) -> Header | None:
    """The header of a valid EPOCH, by the rule that `FrameReader.feed` follows; None for any other record."""
    prefix = frame.peek_prefix(message)
    if prefix is None or prefix.kind != Kind.EPOCH or prefix.generation != meta.generation:
        return None
    return frame.peek(message) if prefix.epoch == meta.epoch + 1 else None
