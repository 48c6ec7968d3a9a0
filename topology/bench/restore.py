"""`bench restore`: from a snapshot to a node that stands at its position, against the other ways to get there.

* `restore-claimed-N`: N keys from the object store (a folder), parts checked against their digests and ingested;
* `restore-proven-N`: the same, and every key hashed;
* `replay-N`, the baseline: every frame of the topic from the first on, followed into an empty store;
* `copy-N`: `cp -r` of a store's files, opened. Nothing can be faster, and nothing is checked.

The state grew out of blocks that create 5,000 keys and spend 500: the shortest history that such a state can have. A
chain that spends more has more frames for the same keys, and restores look the better for it: rows `...-of-B-blocks`
are of the state that B blocks of the synthetic chain leave.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.objects.local import LocalObjects
from pipeline.state import UTXO
from pipeline.stores.rocksdb import RocksStore
from topology import restorer, snapshotter
from topology.bench import loads
from topology.bench.report import Row
from topology.bench.workers import Worker, peak_rss_mb
from topology.restore_plans import Request

SIZES = (100_000, 2_000_000)
"""Keys: where the fixed costs of a restore show, and where they do not: 1% of Bitcoin's coins today."""
FINALITY = 10
_CREATES, _SPENDS = 5_000, 500
_VALUE_BYTES = 60
_GROUP_FRAMES = 16
_OBJECTS, _FRAMES, _CHECKPOINT = "objects", "frames", "checkpoint"


def growing_blocks() -> Iterator[Block]:
    """An endless chain of blocks that create much and spend a little of what the block before created."""
    parent, height = bytes(32), 0
    young: list[bytes] = []
    while True:
        block_hash = blake3(parent + height.to_bytes(8, "little")).digest()
        data = blake3(block_hash).digest((32 + _VALUE_BYTES) * _CREATES)
        size = 32 + _VALUE_BYTES
        rows = [data[at : at + size] for at in range(0, len(data), size)]
        keys = [row[:32] + bytes(4) for row in rows]
        ops = Ops(
            codes=bytes([Op.DELETE]) * len(young) + bytes([Op.CREATE]) * len(keys),
            keys=young + keys,
            values=[row[32:] for row in rows],
        )
        yield Block(ref=BlockRef(height, block_hash), parent_hash=parent, time_s=height, tables={UTXO.name: ops})
        young, parent, height = keys[:_SPENDS], block_hash, height + 1


class History(NamedTuple):
    """How a state came to be: ``blocks`` up to the snapshot's height, of ``changes`` each on the synthetic chain, or
    (None) of `growing_blocks`."""

    name: str
    blocks: int
    changes: int | None = None

    @classmethod
    def of_keys(cls, keys: int) -> History:
        return cls(f"{keys}", max(-(-keys // (_CREATES - _SPENDS)), 1))

    @classmethod
    def of_blocks(cls, blocks: int, changes: int) -> History:
        return cls(f"of-{blocks}-blocks", blocks, changes)

    def made(self) -> Iterator[Block]:
        count = self.blocks + FINALITY
        return islice(growing_blocks(), count) if self.changes is None else loads.synthetic_blocks(count, self.changes)


class Builder:
    """Asked for a history, it makes frames, a snapshot and a checkpoint of the state at its end, and answers with the
    keys that this has."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = RocksStore(folder / "built")

    def answer(self, history: History) -> int:
        replica = loads.open_replica(self._store, finality=FINALITY)
        primary = loads.ReadBack(replica)
        with (self._folder / _FRAMES).open("wb") as file:
            for walk, block in enumerate(history.made(), 1):
                for record in primary.commit(loads.event_of(block, walk)).records:
                    file.write(len(record).to_bytes(4, "little") + record)
        copy = self._folder / "copy"
        self._store.checkpoint(copy)
        self._store.checkpoint(self._folder / _CHECKPOINT)
        manifest = snapshotter.take_snapshot([copy], self._folder / "scratch", LocalObjects(self._folder / _OBJECTS))
        shutil.rmtree(copy)
        return manifest.keys

    def close(self) -> None:
        self._store.close()


class Contender:
    """Asked for a way, it goes it into a directory of its own, and answers with (seconds, keys, peak memory)."""

    def __init__(self, folder: Path, frames: int) -> None:
        self._folder = folder
        self._frames = frames
        self._path = folder / "contender"

    def answer(self, way: str) -> Any:
        self._path.mkdir()
        start = time.perf_counter()
        match way:
            case "copy":
                keys = self._copy()
            case "replay":
                keys = self._replay()
            case _:
                keys = self._restore(claimed=way == "restore-claimed")
        return time.perf_counter() - start, keys, peak_rss_mb()

    def _copy(self) -> int:
        store = self._path / "store"
        subprocess.run(["cp", "-r", str(self._folder / _CHECKPOINT), str(store)], check=True)
        RocksStore(store).close()
        return 0

    def _replay(self) -> int:
        store = RocksStore(self._path / "store")
        replica = loads.open_replica(store, finality=FINALITY)
        offset = replica.meta.diffs.next_offset
        with (self._folder / _FRAMES).open("rb") as file:
            while replica.meta.seq < self._frames:
                record = file.read(int.from_bytes(file.read(4), "little"))
                replica.step(record, offset)
                offset += 1
                if replica.group_length == _GROUP_FRAMES:
                    replica.commit()
        replica.commit()
        store.close()
        return replica.meta.tip.counts[UTXO.table_id]

    def _restore(self, *, claimed: bool) -> int:
        objects = LocalObjects(self._folder / _OBJECTS)
        restored = restorer.restore(objects, self._path, Request(chain=loads.CHAIN), claimed=claimed)
        assert restored.proof.proven is not claimed, restored.proof
        return restored.keys

    def close(self) -> None:
        shutil.rmtree(self._path)


_WAYS = ("replay", "copy", "restore-claimed", "restore-proven")


def run(histories: Sequence[History]) -> list[Row]:
    return [row for history in histories for row in _rows(history)]


def _rows(history: History) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        with Worker(Builder, folder) as builder:
            keys = builder.ask(history)
        took: dict[str, tuple[float, float]] = {}
        for way in _WAYS:
            with Worker(Contender, folder, history.blocks) as contender:
                seconds, found, rss_mb = contender.ask(way)
            assert found == keys or way == "copy", (way, found, keys)
            took[way] = (seconds, rss_mb)
    baseline = f"replay-{history.name}"
    return [
        Row(
            name=f"{way}-{history.name}",
            measures={"seconds": seconds, "keys_per_s": keys / seconds},
            baseline="" if way == "replay" else baseline,
            ratio=None if way == "replay" else took["replay"][0] / seconds,
            peak_rss_mb=rss_mb,
        )
        for way, (seconds, rss_mb) in took.items()
    ]
