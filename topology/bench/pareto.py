"""`bench pareto`: bytes kept, what snapshots cost, and how long restores take, over codec, level and interval.

A synthetic chain on top of a state of ``keys`` is applied once. Each codec and level then writes the same two things:
the whole state as a sorted file with RocksDB's options for parts, which is ingested and read through as a proof reads
it; and the whole form of every block's frame, which is decompressed again. For an interval of I blocks between full
snapshots that makes, a block:

    bytes_per_block        a frame, and 1/I of a snapshot
    snapshot_ms_per_block  compressing a frame, and 1/I of writing a snapshot
    restore_s              reading a snapshot in, and decompressing and applying I/2 frames: a height in the middle

Applying a frame takes the same time whatever its codec; it is measured once. Hashing every key for a proof comes on top
and is the same for all rows. Range diffs, which shorten the way over the frames by some 5 x, are left out on purpose:
they are as many bytes and seconds for every row.

With ``--out`` a folder gets `pareto.csv`, and `pareto.png` where matplotlib is installed (`pip install
'stateferry[plot]'`). A row is on the front (`is_best`) if none is better in all three.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cramjam
import zstandard
from rocksdict import DBCompressionType, SstFileWriter

from pipeline.frame import decode
from pipeline.restore import Replay
from pipeline.stores.rocksdb import RocksStore, state_options
from topology.bench import loads
from topology.bench.archive import FINALITY, chain
from topology.bench.report import Row
from topology.bench.workers import Worker, peak_rss_mb

BLOCKS = 256
CHANGES = 2_000
KEYS = 500_000
INTERVALS = (64, 256, 1_024, 4_096)
"""Blocks between full snapshots."""

Transform = Callable[[bytes], bytes]


class Choice(NamedTuple):
    """A codec at a level; 0 where it has none."""

    name: str
    level: int
    type: DBCompressionType
    compress: Transform
    decompress: Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``full_``: of the whole state. ``frame_``: of one block, on average."""

    full_bytes: int
    full_write_s: float
    full_read_s: float
    frame_bytes: float
    frame_write_s: float
    frame_read_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    codec: str
    level: int
    interval_blocks: int
    bytes_per_block: float
    snapshot_ms_per_block: float
    restore_s: float

    @property
    def costs(self) -> tuple[float, float, float]:
        return self.bytes_per_block, self.snapshot_ms_per_block, self.restore_s


def choices() -> list[Choice]:
    zstd = [
        Choice(
            "zstd",
            level,
            DBCompressionType.zstd(),
            zstandard.ZstdCompressor(level=level).compress,
            zstandard.ZstdDecompressor().decompress,
        )
        for level in (1, 3, 9, 19)
    ]
    snappy = Choice(
        "snappy",
        0,
        DBCompressionType.snappy(),
        lambda raw: bytes(cramjam.snappy.compress_raw(raw)),
        lambda packed: bytes(cramjam.snappy.decompress_raw(packed)),
    )
    return [Choice("none", 0, DBCompressionType.none(), bytes, bytes), snappy, *zstd]


class Weigher:
    """Asked for (blocks, changes, keys), it answers with what each choice measures, the seconds that a frame takes to
    be applied, and its peak memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = RocksStore(folder / "built")

    def answer(self, asked: tuple[int, int, int]) -> tuple[list[Measured], float, float]:
        bodies, apply_s = self._apply(*asked)
        return [self._weigh(choice, bodies) for choice in choices()], apply_s, peak_rss_mb()

    def _apply(self, blocks: int, changes: int, keys: int) -> tuple[list[bytes], float]:
        """The whole form of each block, uncompressed, and what a restore takes for one."""
        replica = loads.open_replica(self._store, finality=FINALITY)
        primary = loads.ReadBack(replica)
        bodies, frames = list[bytes](), list[bytes]()
        start = replica.meta
        for walk, block in enumerate(chain(changes, keys, blocks + 1), 1):
            proposal = primary.commit(loads.event_of(block, walk))
            if walk == 1:
                start = replica.meta
                self._store.checkpoint(self._folder / "before")
            else:
                frames.append(proposal.step.whole)
                bodies.append(decode(proposal.step.whole).body)
        store = RocksStore(self._folder / "before")
        replay = Replay(store, start)
        begin_s = time.perf_counter()
        for frame in frames:
            replay.apply(frame)
        replay.commit()
        apply_s = (time.perf_counter() - begin_s) / len(frames)
        store.close()
        return bodies, apply_s

    def _weigh(self, choice: Choice, bodies: Sequence[bytes]) -> Measured:
        options = state_options()
        options.set_compression_type(choice.type)
        if choice.level:
            options.set_compression_options(-14, choice.level, 0, 0)
        path = self._folder / f"{choice.name}-{choice.level}.sst"
        full_write_s, full_bytes = self._write(path, options)
        start = time.perf_counter()
        store = RocksStore(self._folder / f"{path.stem}.store")
        store.ingest([path])
        for _ in store.scan():
            pass
        full_read_s = time.perf_counter() - start
        store.close()
        start = time.perf_counter()
        packed = list(map(choice.compress, bodies))
        frame_write_s = time.perf_counter() - start
        start = time.perf_counter()
        assert sum(1 for one in map(choice.decompress, packed) if one) == len(bodies)
        return Measured(
            full_bytes=full_bytes,
            full_write_s=full_write_s,
            full_read_s=full_read_s,
            frame_bytes=sum(map(len, packed)) / len(bodies),
            frame_write_s=frame_write_s / len(bodies),
            frame_read_s=(time.perf_counter() - start) / len(bodies),
        )

    def _write(self, path: Path, options: object) -> tuple[float, int]:
        start = time.perf_counter()
        writer = SstFileWriter(options)
        writer.open(str(path))
        for key, value in self._store.scan():
            writer[key] = value
        writer.finish()
        return time.perf_counter() - start, path.stat().st_size

    def close(self) -> None:
        self._store.close()


def run(*, blocks: int = BLOCKS, changes: int = CHANGES, keys: int = KEYS, out: Path | None = None) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as folder, Worker(Weigher, Path(folder)) as weigher:
        measured, apply_s, rss_mb = weigher.ask((blocks, changes, keys))
    points = [
        Point(
            codec=choice.name,
            level=choice.level,
            interval_blocks=interval,
            bytes_per_block=one.frame_bytes + one.full_bytes / interval,
            snapshot_ms_per_block=1000 * (one.frame_write_s + one.full_write_s / interval),
            restore_s=one.full_read_s + interval / 2 * (one.frame_read_s + apply_s),
        )
        for choice, one in zip(choices(), measured, strict=True)
        for interval in INTERVALS
    ]
    best = front(points)
    if out is not None:
        write_csv(out / "pareto.csv", points, best)
        plot(out / "pareto.png", points, best)
    return [
        Row(
            name=f"{point.codec}{point.level or ''}-every-{point.interval_blocks}",
            measures={
                "bytes_per_block": point.bytes_per_block,
                "snapshot_ms_per_block": point.snapshot_ms_per_block,
                "restore_s": point.restore_s,
                "is_best": float(point in best),
            },
            peak_rss_mb=rss_mb,
        )
        for point in points
    ]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one is better than, or as good, in all costs."""
    return [
        point
        for point in points
        if not any(
            other.costs != point.costs and all(a <= b for a, b in zip(other.costs, point.costs, strict=True))
            for other in points
        )
    ]


def write_csv(path: Path, points: Sequence[Point], best: Sequence[Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("bytes_per_block", "snapshot_ms_per_block", "restore_s")
        writer.writerow(("codec", "level", "interval_blocks", *names, "is_best"))
        for point in points:
            costs = (f"{cost:.6g}" for cost in point.costs)
            writer.writerow((point.codec, point.level, point.interval_blocks, *costs, int(point in best)))


def plot(path: Path, points: Sequence[Point], best: Sequence[Point]) -> bool:
    """Bytes against seconds, a line for each codec and level, the front ringed. False without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (nobody else needs it)
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for codec, level in dict.fromkeys((point.codec, point.level) for point in points):
        line = [point for point in points if (point.codec, point.level) == (codec, level)]
        label = f"{codec} {level}" if level else codec
        xs, ys = [point.restore_s for point in line], [point.bytes_per_block / 1000 for point in line]
        axes.plot(xs, ys, marker="o", markersize=4, label=label)
    for point in best:
        axes.plot(point.restore_s, point.bytes_per_block / 1000, marker="o", markersize=10, mfc="none", color="black")
    for point in (one for one in points if (one.codec, one.level) == (points[0].codec, points[0].level)):
        axes.annotate(f"every {point.interval_blocks}", (point.restore_s, point.bytes_per_block / 1000))
    axes.set(xscale="log", yscale="log", xlabel="seconds to restore a height", ylabel="kB kept for a block")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
