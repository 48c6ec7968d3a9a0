"""Records that no writer of ours would make: events of any content, and frames changed under a right checksum."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any

import xxhash

from pipeline import frame
from pipeline.block import (
    Block,
    BlockRef,
    Connect,
    Op,
    Ops,
    Rewind,
    SourceEpoch,
    SourceStamp,
    decode_event,
    encode_event,
)
from pipeline.errors import EventCorrupt
from pipeline.generation import decode_generation
from pipeline.sources import coins
from tests.topology.commands import Site

_CHECKSUM_BYTES = 16
VERSION_AT, REQUIRED_AT = 4, 8


def coin_key(number: int) -> bytes:
    return number.to_bytes(32, "little") + bytes(4)


def coin_name(key: bytes) -> str:
    """As people write it."""
    return f"{key[:32][::-1].hex()}:{int.from_bytes(key[32:], 'big')}"


def ops(*said: tuple[Op, bytes]) -> dict[str, Ops]:
    """Ops of the coin table, in order."""
    value = coins.encode(coins.Coin(1, False, 5_000, b"\x51"))
    return {
        "utxo": Ops(
            codes=bytes(op for op, _ in said),
            keys=[key for _, key in said],
            values=[value for op, _ in said if op is not Op.DELETE],
        )
    }


class Source:
    """A source writer on a site's blocks topic, in force from its first word on. It says what it is told to."""

    def __init__(self, site: Site, *, resume: int | None = None) -> None:
        """``resume``: the walk number from which it claims to go on; None: behind the last one."""
        self.site = site
        self.generation = decode_generation(site.records("generations")[-1])
        events = []
        for record in site.records("blocks"):
            with suppress(EventCorrupt):
                events.append(decode_event(record))
        self.walk = max((event.walk for event in events if not isinstance(event, SourceEpoch)), default=0)
        if resume is not None:
            self.walk = resume - 1
        epoch = max((event.stamp.epoch for event in events), default=0) + 1
        self.stamp = SourceStamp(
            chain_id=self.generation.chain_id,
            generation=self.generation.generation,
            epoch=epoch,
            writer=secrets.token_bytes(16),
        )
        site.append("blocks", encode_event(SourceEpoch(stamp=self.stamp, resume_walk=self.walk + 1)))

    def connect(self, parent: BlockRef, tables: dict[str, Ops], *, walk: int | None = None, **stamp: Any) -> BlockRef:
        """A block on top of another. ``walk``: None for the next number."""
        ref = BlockRef(parent.height + 1, secrets.token_bytes(32))
        block = Block(ref=ref, parent_hash=parent.block_hash, time_s=0, tables=tables)
        self._say(Connect(stamp=replace(self.stamp, **stamp), walk=self._next(walk), block=block))
        return ref

    def rewind(self, to: BlockRef, *, walk: int | None = None) -> None:
        self._say(Rewind(stamp=self.stamp, walk=self._next(walk), to=to))

    def repeat(self) -> None:
        """The last record once more."""
        self.site.append("blocks", self.site.records("blocks")[-1])

    def _next(self, walk: int | None) -> int:
        if walk is None:
            self.walk += 1
            return self.walk
        return walk

    def _say(self, event: Connect | Rewind) -> None:
        self.site.append("blocks", encode_event(event))


def changed(record: bytes, **fields: Any) -> bytes:
    """A frame with other header fields and the same body."""
    decoded = frame.decode(record)
    return frame.encode(replace(decoded.header, **fields), decoded.body)


def with_body(record: bytes, at: int, flip: int) -> bytes:
    """A frame with bits of one byte of its body flipped."""
    decoded = frame.decode(record)
    body = bytearray(decoded.body)
    body[at] ^= flip
    return frame.encode(decoded.header, bytes(body))


def patched(record: bytes, at: int, data: bytes) -> bytes:
    """A frame with other bytes somewhere, and the checksum of those."""
    start = record[:at] + data + record[at + len(data) : -_CHECKSUM_BYTES]
    return start + xxhash.xxh3_128_digest(start)
