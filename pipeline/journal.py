"""The journal: one entry per frame of the last `finality` blocks, enough to take the frame back.

An entry holds the `Meta` from before the frame and the frame itself in whole form: every change with its before- and
after-value. UNDO frames have entries too, so that a store can be taken back over them when a log lost its end. The
same bytes become the archive's once the block is final; they are encoded and compressed once.

Keys of the column family `undo`: ``j`` || seq (8 B, big-endian) -> entry; ``h`` || height (8 B, big-endian) -> seq of
the frame that connected the block of the current branch at that height.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import frame
from pipeline.diff import Diff, decode_whole_body
from pipeline.errors import StoreCorrupt
from pipeline.frame import Header, Kind
from pipeline.position import Meta, decode_meta, encode_meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What taking one frame back needs. ``before``: the meta that the frame was applied to."""

    before: Meta
    frame_bytes: bytes  # self-contained

    @property
    def header(self) -> Header:
        return frame.peek(self.frame_bytes)

    def diff(self) -> Diff:
        """What the frame did: of an UNDO frame, the inverse of its block's changes. Raises FrameCorrupt."""
        decoded = frame.decode(self.frame_bytes)
        diff = decode_whole_body(decoded.body)
        return diff.inverted() if decoded.header.kind is Kind.UNDO else diff


def entry_key(seq: int) -> bytes:
    return b"j" + seq.to_bytes(8, "big")


def height_key(height: int) -> bytes:
    return b"h" + height.to_bytes(8, "big")


def encode_entry(entry: Entry) -> bytes:
    meta = encode_meta(entry.before)
    return len(meta).to_bytes(4, "little") + meta + entry.frame_bytes


def decode_entry(data: bytes) -> Entry:
    """The inverse of `encode_entry`; the frame is looked at when it is used. Raises StoreCorrupt."""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 + size + frame.SMALLEST_FRAME_BYTES:
        raise StoreCorrupt("a journal entry is cut off", way_out="restore this data directory from a snapshot")
    return Entry(before=decode_meta(data[4 : 4 + size]), frame_bytes=data[4 + size :])
