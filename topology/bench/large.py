"""`bench apply --keys N`: a primary's work on a block where N keys live already, their files warm and cold.

Blocks of 5,000 changes; half of the spends are of the last ten blocks, half of any age, all of them in the files.
`keys-N` has the files in the system's cache, as after reading them once. Before every 60 blocks of `keys-N-cold` they
are dropped from there; `keys-N-cold-prefetch` as well, and processes read ahead (`topology.prefetching`), up to 32
blocks, as a worker's do. The baseline of the warm rows is the first N, that of the row with processes the one without.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.state import UTXO
from pipeline.stores.rocksdb import RocksStore
from pipeline.stores.sst import SortedFile
from topology.app import STREAM_BUFFER_RECORDS
from topology.bench import loads
from topology.bench.apply import Applier, Taken
from topology.bench.report import Row
from topology.bench.workers import Worker
from topology.prefetching import FOLDER, Prefetcher

CHANGES = 5_000
TURNS = 2
TURN_BLOCKS = 60
_CREATES = round(CHANGES / 1.8)
_RECENT_BLOCKS = 10
_TXID_BYTES = 32
_FILE_KEYS = 500_000
_VALUE = b"a coin of sixty bytes, of which nobody looks at a single one"
assert len(_VALUE) == 60

KEYS_MIN = (TURNS + 1) * TURN_BLOCKS * CHANGES // 4
"""Enough old coins for all blocks."""

Txids = npt.NDArray[np.uint8]
"""One a row."""


class LargeApplier(Applier):
    """An `Applier` on a store that holds keys already."""

    def __init__(self, path: Path, *, prefetches: bool) -> None:
        super().__init__(path, None)
        self._coming: Iterator[bytes] = iter(())
        self._prefetcher = Prefetcher(self._store.checkpoint, path / FOLDER) if prefetches else None

    def answer(self, events: list[bytes] | None) -> Any:
        self._coming = iter(events or [])
        self._submit(STREAM_BUFFER_RECORDS)
        return super().answer(events)

    def _begin(self, event: bytes) -> None:
        self._submit(1)
        super()._begin(event)

    def _submit(self, count: int) -> None:
        if self._prefetcher is not None:
            for event in islice(self._coming, count):
                self._prefetcher.submit(event)

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        super().close()


def run(sizes: Sequence[int], *, turns: int = TURNS, turn_blocks: int = TURN_BLOCKS) -> list[Row]:
    """All rows, N by N."""
    rows: list[Row] = []
    for keys in sizes:
        with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
            folder = Path(name)
            random = np.random.default_rng(1)
            txids = np.frombuffer(random.bytes(_TXID_BYTES * keys), np.uint8).reshape(-1, _TXID_BYTES)
            store = RocksStore(folder / "base")
            _fill(store, txids, folder)
            for kind in ("", "-cold", "-cold-prefetch"):
                place = folder / f"keys{kind}"
                place.mkdir()
                store.checkpoint(place / "store")
                rows.append(_row(f"keys-{keys}{kind}", place, txids, turns, turn_blocks))
                shutil.rmtree(place)
            store.close()
    rates = {row.name: row.measures["changes_per_s"] for row in rows}

    def beside(row: Row) -> Row:
        baseline = row.name.removesuffix("-prefetch") if row.name.endswith("-prefetch") else rows[0].name
        if row.name == baseline or row.name.endswith("-cold"):
            return row
        return replace(row, baseline=baseline, ratio=rates[row.name] / rates[baseline])

    return list(map(beside, rows))


def _row(name: str, place: Path, txids: Txids, turns: int, turn_blocks: int) -> Row:
    taken = Taken()
    events = _events(txids)
    with Worker(partial(LargeApplier, place, prefetches=name.endswith("-prefetch"))) as worker:
        for turn in range(turns + 1):
            asked = list(islice(events, turn_blocks))
            ready = _drop if "cold" in name else Path.read_bytes
            for file in (place / "store").glob("*.sst"):
                ready(file)
            answered = worker.ask(asked)
            if turn:  # the first one has the new processes in it
                taken = taken.plus(answered)
        _, rss_mb = worker.ask(None)
    changes = turns * turn_blocks * CHANGES
    return Row(
        name=name,
        measures={"changes_per_s": changes / taken.wall_s, "cpu_us_per_change": 1e6 * taken.cpu_s / changes},
        peak_rss_mb=rss_mb,
    )


def _drop(file: Path) -> None:
    """Out of the system's cache, where it lets us say so."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(store: RocksStore, txids: Txids, folder: Path) -> None:
    """Output 0 of every transaction, by files."""
    order = np.argsort(np.ascontiguousarray(txids[:, :8]).view(">u8").ravel())
    for start in range(0, len(order), _FILE_KEYS):
        keys = _keys(txids[order[start : start + _FILE_KEYS]])
        file = SortedFile(folder / f"{start}.sst")
        for at, head in zip(UTXO.storage_keys(keys), UTXO.stored_heads(keys), strict=True):
            file.put(at, head + _VALUE)
        file.finish()
        store.ingest([file.path])


def _keys(txids: Txids) -> list[bytes]:
    blob = np.ascontiguousarray(txids).tobytes()
    return [blob[at : at + _TXID_BYTES] + bytes(4) for at in range(0, len(blob), _TXID_BYTES)]


def _events(txids: Txids) -> Iterator[bytes]:
    """Blocks without end: as many as there are old coins for."""
    random = np.random.default_rng(2)
    old = iter(random.permutation(len(txids)))
    recent: deque[list[bytes]] = deque(maxlen=_RECENT_BLOCKS)
    parent = bytes(32)
    for height in itertools.count():
        created = _keys(np.frombuffer(random.bytes(_TXID_BYTES * _CREATES), np.uint8).reshape(-1, _TXID_BYTES))
        spends = CHANGES - _CREATES
        young = [coins.pop() for coins in recent for _ in range(spends // 2 // _RECENT_BLOCKS)]
        spent = young + _keys(txids[list(islice(old, spends - len(young)))])
        block_hash = blake3(parent + b"".join(created)).digest()
        ops = Ops(
            codes=bytes([Op.DELETE]) * len(spent) + bytes([Op.CREATE]) * len(created),
            keys=spent + created,
            values=[_VALUE] * len(created),
        )
        block = Block(
            ref=BlockRef(height, block_hash), parent_hash=parent, time_s=1_600_000_000, tables={UTXO.name: ops}
        )
        yield loads.event_of(block, height + 1)
        recent.append(created)
        parent = block_hash
