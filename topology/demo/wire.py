"""The diffs topic, read along beside the workers: how many changes are in it, how many bytes, and which reorgs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pipeline import frame
from pipeline.archive import Segment
from pipeline.chunk import is_chunk
from pipeline.codec import Codec, compress
from pipeline.diff import decode_whole_body
from pipeline.frame import Kind
from pipeline.generation import Generation
from topology import topics
from topology.transports.base import Broker


class Reorg(NamedTuple):
    """Blocks taken back, from the highest down to the one above the fork, and the seq of the last UNDO."""

    from_height: int
    fork_height: int
    last_seq: int

    @property
    def depth(self) -> int:
        return self.from_height - self.fork_height


class Size(NamedTuple):
    """Of numbered frames: what they change, and what they take on the topic."""

    frames: int
    changes: int
    size_bytes: int


NOTHING = Size(0, 0, 0)


class WireReader:
    """Reads the topic on from where it was; only headers are looked at."""

    def __init__(self, broker: Broker, generation: Generation) -> None:
        self._broker = broker
        self._topic = generation.diffs_topic
        self._blocks_topic = generation.blocks_topic
        self._next = 0
        self._sizes = [NOTHING]  # running totals, by seq
        self._undone: list[int] = []
        self.reorgs: list[Reorg] = []

    @property
    def seq(self) -> int:
        """Of the last frame seen."""
        return len(self._sizes) - 1

    async def advance(self) -> None:
        """Read what came since."""
        async for record in topics.records(self._broker, self._topic, self._next):
            self._next = record.offset + 1
            if is_chunk(record.value):
                continue  # a block of the demo fits a record many times
            header = frame.peek(record.value)
            if not header.is_numbered:
                continue
            total = self._sizes[-1]
            size_bytes = total.size_bytes + len(record.value)
            self._sizes.append(Size(total.frames + 1, total.changes + header.op_count, size_bytes))
            if header.kind is Kind.UNDO:
                self._undone.append(header.ref.height)
            elif self._undone:
                self.reorgs.append(Reorg(self._undone[0], self._undone[-1] - 1, header.seq - 1))
                self._undone.clear()

    def changes_to(self, seq: int) -> int:
        return self._sizes[min(seq, self.seq)].changes

    def since(self, seq: int) -> Size:
        """What came after a seq."""
        start, end = self._sizes[seq], self._sizes[-1]
        return Size(*(after - before for before, after in zip(start, end, strict=True)))

    async def waiting_blocks(self, next_offset: int) -> int:
        """Events that a node which goes on at this offset of the blocks topic has still before it."""
        _, end = await self._broker.bounds(self._blocks_topic, 0)
        return max(end - next_offset, 0)


def json_bytes_per_change(objects: Path, first_height: int) -> float | None:
    """What archived blocks from a height on would take as JSON with zstd-3: whole keys, and the values of what is
    created. None if nothing of them is archived."""
    changes = size_bytes = 0
    for path in sorted(objects.glob("*/*/archive/0/*.seg")):
        for whole in Segment.open(path.read_bytes()).frames():
            decoded = frame.decode(whole)
            if decoded.header.ref.height < first_height:
                continue
            diff = decode_whole_body(decoded.body)
            rows = [
                {"key": key.hex(), "value": after and after.hex()}
                for table in diff.tables.values()
                for key, _, after in table.changes()
            ]
            changes += len(rows)
            size_bytes += len(compress(json.dumps(rows, separators=(",", ":")).encode(), Codec.ZSTD))
    return size_bytes / changes if changes else None
