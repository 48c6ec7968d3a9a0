"""`bench archive`: what it costs to be able to restore any height, and how fast that is.

The synthetic chain is archived and squashed. In bytes:

* `full-snapshots`, the baseline: the whole state at every 64th block, in chunks as range diffs have them, with the same
  zstd. A few of them are made; the others are those bytes a key, times the keys there;
* `ranges`: range diffs of all levels, which are enough to restore at each of those blocks;
* `segments`: every block, and so every height in between; `segments-and-ranges`: both.

The baseline grows with the square of the chain, what is archived with its length.

And in seconds, to the last archived height, into an empty directory, unproven:

* `replay`, the baseline: every archived frame since the first block;
* `restore-ranges`: as `stateferry restore` plans it.

``keys`` are there before the synthetic chain begins, and are never touched: what a chain that is years old has most of.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from pipeline.archive_names import parse_piece_name, parse_segment_name
from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.delta import encode_whole
from pipeline.frame import NO_HASH
from pipeline.objects.local import LocalObjects
from pipeline.range_pieces import CHUNK_CHANGES_MAX, pack_chunk
from pipeline.sources import synthetic
from pipeline.squash import LEVELS
from pipeline.state import UTXO
from pipeline.stores.rocksdb import RocksStore
from topology import restorer, squasher
from topology.archiver import Archiver
from topology.bench import loads
from topology.bench.report import Row
from topology.bench.workers import Worker, peak_rss_mb
from topology.restore_plans import Request

BLOCKS = 10_000
CHANGES = 500
FINALITY = 10
_MEASURED_POINTS = 8
_VALUE_BYTES = 60
_OBJECTS, _SEGMENTS_ONLY = "objects", "segments-only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """``full_bytes``: of all points together. ``seconds``: to make all of them, and all range diffs."""

    points: int
    full_bytes: int
    full_seconds: float
    segment_bytes: int
    range_bytes: int
    range_seconds: float
    ranges: int
    peak_rss_mb: float


def _first_block(keys: int) -> Block:
    """Creates coins that nobody spends."""
    data = blake3(b"old coins").digest((32 + _VALUE_BYTES) * keys)
    size = 32 + _VALUE_BYTES
    rows = [data[at : at + size] for at in range(0, len(data), size)]
    codes, values = bytes([Op.CREATE]) * keys, [row[32:] for row in rows]
    ops = Ops(codes=codes, keys=[row[:32] + bytes(4) for row in rows], values=values)
    block_hash = blake3(b"the first").digest()
    return Block(ref=BlockRef(0, block_hash), parent_hash=NO_HASH, time_s=1, tables={UTXO.name: ops})


def chain(changes: int, keys: int, count: int) -> Iterator[Block]:
    """Blocks of the synthetic chain; with ``keys``, the first one creates those and no more."""
    if not keys:
        yield from synthetic.blocks(count, changes=changes, seed=1)
        return
    first = _first_block(keys)
    yield first
    yield from synthetic.blocks(count - 1, changes=changes, seed=1, first_height=1, parent_hash=first.ref.block_hash)


class Builder:
    """Asked for (blocks, changes, keys), it archives, squashes, and weighs what there is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._objects = LocalObjects(folder / _OBJECTS)
        self._store = RocksStore(folder / "built")
        self._keys: list[int] = []  # at each point
        self._weighed: list[tuple[int, int, float]] = []  # keys, bytes, seconds

    def answer(self, asked: tuple[int, int, int]) -> Built:
        blocks, changes, keys = asked
        self._archive(blocks, changes, keys)
        shutil.copytree(self._folder / _OBJECTS, self._folder / _SEGMENTS_ONLY)
        start = time.perf_counter()
        (archive,) = squasher.archives(self._objects)
        made = list(squasher.squash(self._objects, archive, self._folder / "squashing"))
        range_seconds = time.perf_counter() - start
        keys_weighed, size, seconds = (sum(column) for column in zip(*self._weighed, strict=True))
        listed = list(self._objects.list())
        return Built(
            points=len(self._keys),
            full_bytes=round(size / keys_weighed * sum(self._keys)),
            full_seconds=seconds / keys_weighed * sum(self._keys),
            segment_bytes=sum(one.size_bytes for one in listed if parse_segment_name(one.name)),
            range_bytes=sum(one.size_bytes for one in listed if parse_piece_name(one.name)),
            range_seconds=range_seconds,
            ranges=len(made),
            peak_rss_mb=peak_rss_mb(),
        )

    def _archive(self, blocks: int, changes: int, keys: int) -> None:
        replica = loads.open_replica(self._store, archives=True, finality=FINALITY)
        primary = loads.ReadBack(replica)
        archiver = Archiver(self._objects)
        points = range(LEVELS[0] - 1, blocks, LEVELS[0])
        weigh_at = set(points[-1 :: -max(1, len(points) // _MEASURED_POINTS)])
        for walk, block in enumerate(chain(changes, keys, blocks), 1):
            primary.commit(loads.event_of(block, walk))
            archiver.advance(replica, proven=True)
            if block.ref.height in points:
                self._keys.append(replica.meta.tip.counts[UTXO.table_id])
            if block.ref.height in weigh_at:
                self._weigh()
        while archiver.advance(replica, proven=True, flush=True):
            replica.commit()

    def _weigh(self) -> None:
        start, size, keys = time.perf_counter(), 0, 0
        entries = (pair for at, stored in self._store.scan() for pair in UTXO.items(at, stored))
        while chunk := list(islice(entries, CHUNK_CHANGES_MAX)):
            chunk.sort()
            table = loads.created([key for key, _ in chunk], [value for _, value in chunk])
            size += len(pack_chunk(encode_whole(table), table)[1])
            keys += len(chunk)
        self._weighed.append((keys, size, time.perf_counter() - start))

    def close(self) -> None:
        self._store.close()


class Contender:
    """Asked for a way, it goes it into a directory of its own, and answers with (seconds, keys, peak memory, seconds as
    estimated, bytes fetched)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "contender"

    def answer(self, way: str) -> Any:
        self._path.mkdir()
        objects = LocalObjects(self._folder / (_OBJECTS if way == "restore-ranges" else _SEGMENTS_ONLY))
        start = time.perf_counter()
        restored = restorer.restore(objects, self._path, Request(chain=loads.CHAIN), claimed=True)
        seconds = time.perf_counter() - start
        assert (restored.range_diffs > 0) is (way == "restore-ranges"), (way, restored.range_diffs)
        assert restored.estimate is not None
        return seconds, restored.keys, peak_rss_mb(), restored.estimate.seconds, restored.fetched_bytes

    def close(self) -> None:
        shutil.rmtree(self._path)


_WAYS = ("replay", "restore-ranges")


def run(*, blocks: int = BLOCKS, sizes: Sequence[int] = (CHANGES,), keys: int = 0) -> list[Row]:
    return [row for changes in sizes for row in _rows(blocks, changes, keys)]


def _rows(blocks: int, changes: int, keys: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        with Worker(Builder, folder) as builder:
            built = builder.ask((blocks, changes, keys))
        took = {}
        for way in _WAYS:
            with Worker(Contender, folder) as contender:
                took[way] = contender.ask(way)
    assert len({found for _, found, *_ in took.values()}) == 1, took
    return [*_disk_rows(built, changes), *_time_rows(took, changes)]


def _disk_rows(built: Built, changes: int) -> list[Row]:
    baseline = f"full-snapshots-{changes}"
    sizes = {
        "segments": (built.segment_bytes, 0.0),
        "ranges": (built.range_bytes, built.range_seconds),
        "segments-and-ranges": (built.segment_bytes + built.range_bytes, built.range_seconds),
    }
    rows = [
        Row(
            name=baseline,
            measures={
                "seconds": built.full_seconds,
                "bytes": float(built.full_bytes),
                "bytes_per_point": built.full_bytes / built.points,
            },
        )
    ]
    rows += [
        Row(
            name=f"{name}-{changes}",
            measures={"seconds": seconds, "bytes": float(size), "bytes_per_point": size / built.points},
            baseline=baseline,
            ratio=built.full_bytes / size,
            peak_rss_mb=built.peak_rss_mb,
        )
        for name, (size, seconds) in sizes.items()
    ]
    return rows


def _time_rows(took: dict[str, Any], changes: int) -> list[Row]:
    rows = []
    for way, (seconds, keys, rss_mb, estimated, fetched) in took.items():
        is_baseline = way == "replay"
        rows.append(
            Row(
                name=f"{way}-{changes}",
                measures={
                    "seconds": seconds,
                    "keys_per_s": keys / seconds,
                    "bytes": float(fetched),
                    "estimated_seconds": estimated,
                },
                baseline="" if is_baseline else f"replay-{changes}",
                ratio=None if is_baseline else took["replay"][0] / seconds,
                peak_rss_mb=rss_mb,
            )
        )
    return rows
