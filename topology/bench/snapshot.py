"""`bench snapshot`: what a full snapshot takes, and what a primary beside it feels.

`snapshot-N` is the helper process of a snapshot of N keys (`topology.snapshotter`), from a checkpoint of a store to a
folder of objects: its time, its peak memory, and `written_per_byte`: bytes it had written to the disk for each byte of
the snapshot. `apply-beside-N` is a primary in another process that commits a block of 5,500 changes every 150 ms
meanwhile, from the event to its commit, and `apply-alone-N`, its baseline, is the same before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.position import Tip
from pipeline.snapshot import decode_manifest
from pipeline.state import UTXO
from pipeline.stores.rocksdb import RocksStore
from topology.bench import loads
from topology.bench.report import Row
from topology.bench.restore import FINALITY, growing_blocks
from topology.bench.workers import Worker, peak_rss_mb
from topology.sealing import Sealing

SIZES = (2_000_000,)
BLOCKS = 100
"""15 seconds each, alone and beside."""
_INTERVAL_S = 0.15
_STORED = "stored"
_BLOCK_BYTES = 512
"""In which the system counts what a process had written."""


class Growing:
    """A primary of its own. Asked with a number of keys, it grows until it has as many; with a path, it makes a
    checkpoint there; with None, it commits some blocks at their time, and answers with milliseconds of each."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self._blocks = blocks
        self._store = RocksStore(folder / _STORED)
        self._sealing = Sealing()
        self._replica = loads.open_replica(self._store, finality=FINALITY)
        self._primary = loads.ReadBack(self._replica, sealer=self._sealing.submit)
        self._coming = enumerate(growing_blocks(), 1)

    def answer(self, asked: int | Path | None) -> Any:
        match asked:
            case int():
                while self._tip.counts[UTXO.table_id] < asked or self._tip.height <= FINALITY:
                    self._primary.commit(next(self._events(1)))
                return None
            case Path():
                return self._store.checkpoint(asked)
            case None:
                return self._paced(), peak_rss_mb()

    @property
    def _tip(self) -> Tip:
        return self._replica.meta.tip

    def _events(self, count: int) -> Any:
        return (loads.event_of(block, walk) for walk, block in islice(self._coming, count))

    def _paced(self) -> list[float]:
        events, took_ms = list(self._events(self._blocks)), []
        for event in events:
            start = time.perf_counter()
            self._primary.commit(event)
            taken_s = time.perf_counter() - start
            took_ms.append(1000 * taken_s)
            time.sleep(max(0.0, _INTERVAL_S - taken_s))
        return took_ms

    def close(self) -> None:
        self._sealing.close()
        self._store.close()


def run(*, sizes: Sequence[int] = SIZES, blocks: int = BLOCKS) -> list[Row]:
    return [row for size in sizes for row in _rows(size, blocks)]


def _rows(size: int, blocks: int) -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stateferry-bench-")))
        primary = stack.enter_context(Worker(Growing, folder, blocks))
        primary.ask(size)
        alone_ms, alone_mb = primary.ask(None)
        primary.ask(folder / "copy")
        start = time.perf_counter()
        process = subprocess.Popen(_command(folder), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        beside_ms, beside_mb = primary.ask(None)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        taken_s = time.perf_counter() - start
        assert process.returncode == 0, process.returncode
        (path,) = (folder / "objects").rglob("manifest.json")
        manifest = decode_manifest(path.read_bytes())
    rows = [
        Row(name=f"apply-{kind}-{size}", measures=_lags(took_ms), peak_rss_mb=rss_mb)
        for kind, took_ms, rss_mb in (("alone", alone_ms, alone_mb), ("beside", beside_ms, beside_mb))
    ]
    ratio = rows[0].measures["p99_ms"] / rows[1].measures["p99_ms"]
    rows[1] = replace(rows[1], baseline=rows[0].name, ratio=ratio)
    written_bytes = used.ru_oublock * _BLOCK_BYTES
    snapshot = Row(
        name=f"snapshot-{size}",
        measures={
            "seconds": taken_s,
            "keys_per_s": manifest.keys / taken_s,
            "megabytes": manifest.size_bytes / 1e6,
            "written_per_byte": written_bytes / manifest.size_bytes,
        },
        peak_rss_mb=used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10),
    )
    return [*rows, snapshot]


def _command(folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "topology.snapshotter", "--store", str(folder / "copy")),
        *("--scratch", str(folder / "scratch"), "--objects", f"file://{folder}/objects"),
    ]


def _lags(took_ms: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": statistics.median(took_ms), "p99_ms": statistics.quantiles(took_ms, n=100)[98]}
