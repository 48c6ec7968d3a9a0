"""Anchors: what each shard says of its state after every frame, so that anyone can sum up the global root.

Topic `anchors`, compacted. A record's key is the shard and the seq modulo `SLOTS`, so that the topic never holds more
than `SLOTS` anchors a shard for long. FORMAT.md, "Anchors". An anchor is a claim of the primary that wrote it: whoever
wants proof follows the frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Any

import msgpack
import xxhash

from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.position import Meta, Tip
from pipeline.shards import join_tips

ANCHORS_TOPIC = "anchors"
SLOTS = 256
"""Positions that stay readable a shard: 1.7 days of Bitcoin, half a megabyte."""

_MAGIC = b"SFan"
_VERSION = 1
_HEAD_BYTES = len(_MAGIC) + 1 + 8
_KEY = Struct(">HH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One shard's position after a frame. ``tip.seq`` is the frame's, also where it took a block off."""

    generation: bytes
    shard: int
    shards: int
    walk: int
    tip: Tip

    @classmethod
    def of(cls, meta: Meta) -> Anchor:
        """Of where a store stands."""
        tip = Tip(ref=meta.tip.ref, vectors=meta.tip.vectors, seq=meta.seq, counts=meta.tip.counts)
        return cls(generation=meta.generation, shard=meta.shard, shards=meta.shards, walk=meta.walk, tip=tip)

    @property
    def key(self) -> bytes:
        return _KEY.pack(self.shard, self.tip.seq % SLOTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """All shards at one position. ``tip``: with the vectors, and so the root, of the whole state."""

    walk: int
    tip: Tip


def encode_anchor(anchor: Anchor) -> bytes:
    ref = anchor.tip.ref
    payload: bytes = msgpack.packb(
        {
            "generation": anchor.generation,
            "shard": anchor.shard,
            "shards": anchor.shards,
            "walk": anchor.walk,
            "seq": anchor.tip.seq,
            "height": anchor.tip.height,
            "hash": b"" if ref is None else ref.block_hash,
            "vectors": sorted((table_id, vector) for table_id, vector in anchor.tip.vectors.items()),
            "counts": sorted(anchor.tip.counts.items()),
        },
        use_bin_type=True,
    )
    return _MAGIC + bytes([_VERSION]) + xxhash.xxh3_64_digest(payload) + payload


def decode_anchor(data: bytes) -> Anchor:
    """The inverse of `encode_anchor`. Raises FrameCorrupt, Unsupported."""
    if data[: len(_MAGIC)] != _MAGIC or len(data) <= _HEAD_BYTES:
        raise FrameCorrupt("a record does not begin as an anchor does")
    if data[len(_MAGIC)] != _VERSION:
        raise Unsupported(f"an anchor of version {data[len(_MAGIC)]}", way_out="upgrade")
    payload = data[_HEAD_BYTES:]
    if xxhash.xxh3_64_digest(payload) != data[len(_MAGIC) + 1 : _HEAD_BYTES]:
        raise FrameCorrupt("an anchor's checksum does not match its bytes")
    try:
        fields: dict[str, Any] = msgpack.unpackb(payload, raw=False, strict_map_key=True)
        vectors = {int(table_id): bytes(vector) for table_id, vector in fields["vectors"]}
        if any(len(vector) != lthash.VECTOR_BYTES for vector in vectors.values()):
            raise ValueError("a vector of the wrong size")
        return Anchor(
            generation=bytes(fields["generation"]),
            shard=int(fields["shard"]),
            shards=int(fields["shards"]),
            walk=int(fields["walk"]),
            tip=Tip(
                ref=BlockRef(fields["height"], bytes(fields["hash"])) if fields["hash"] else None,
                vectors=vectors,
                seq=int(fields["seq"]),
                counts={int(table_id): int(count) for table_id, count in fields["counts"]},
            ),
        )
    except (KeyError, TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameCorrupt(f"an anchor is malformed: {error!r}") from error


class AnchorBook:
    """Collects anchors of one generation, in any order, and joins those that stand together.

    * Holds the newest anchor of every key: at most `SLOTS` a shard.
    """

    def __init__(self, generation: bytes, shards: int) -> None:
        self._generation = generation
        self._shards = shards
        self._slots: dict[int, dict[int, Anchor]] = {}  # by seq modulo SLOTS, then by shard

    def feed(self, record: bytes) -> Joined | None:
        """One record of the topic; the position that it completes, if it does. What is no anchor is passed by."""
        try:
            anchor = decode_anchor(record)
        except FrameCorrupt:
            return None
        if (anchor.generation, anchor.shards) != (self._generation, self._shards) or anchor.shard >= self._shards:
            return None
        slot = self._slots.setdefault(anchor.tip.seq % SLOTS, {})
        slot[anchor.shard] = anchor
        return self._joined(slot)

    def newest(self) -> Joined | None:
        """The highest position that all shards have said something of; None without one."""
        joined = [one for slot in self._slots.values() if (one := self._joined(slot)) is not None]
        return max(joined, key=lambda one: one.tip.seq, default=None)

    def _joined(self, slot: dict[int, Anchor]) -> Joined | None:
        anchors = list(slot.values())
        first = anchors[0]
        stand = (first.tip.seq, first.tip.ref, first.walk)
        if len(anchors) != self._shards or any((one.tip.seq, one.tip.ref, one.walk) != stand for one in anchors):
            return None
        return Joined(walk=first.walk, tip=join_tips([anchor.tip for anchor in anchors]))
