"""`bench reads`: random lookups of coins by whole key, one at a time and 100 at once, against a bare RocksDB.

Hits are keys that live, misses keys that never did. A stateferry lookup turns the whole key into a storage key, asks
the store, and finds the key's entry in what stands there; the baseline asks a RocksDB of the same options, loaded with
the same stored bytes under the same storage keys, which it is given. Both stores are loaded in batches and not
compacted, as a running node's are. They take turns, in processes of their own.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blake3 import blake3
from rocksdict import Rdict, WriteBatch

from pipeline.state import UTXO
from pipeline.stores.base import Batch
from pipeline.stores.rocksdb import RocksStore, state_options
from topology.bench.report import Row
from topology.bench.workers import Worker, peak_rss_mb

KEYS = 1_000_000
LOOKUPS = 200_000
"""Of each row."""
BATCH_KEYS = 100
_TURNS = 10
_LOAD_KEYS = 20_000
_VALUE_BYTES = 60

_SEED_LIVE, _SEED_MISSING, _SEED_VALUES = b"live", b"missing", b"values"


def made_up(seed: bytes, start: int, count: int, size: int) -> list[bytes]:
    """Entries ``start`` and on of an endless list of random strings: the same in every process."""
    data = blake3(seed).digest(size * count, seek=size * start)
    return [data[at : at + size] for at in range(0, len(data), size)]


def whole_keys(seed: bytes, start: int, count: int) -> list[bytes]:
    return [txid + bytes(4) for txid in made_up(seed, start, count, 32)]


def load_batches(keys: int) -> Any:
    """(whole keys, values) in the batches that stores are loaded with."""
    for start in range(0, keys, _LOAD_KEYS):
        count = min(_LOAD_KEYS, keys - start)
        yield whole_keys(_SEED_LIVE, start, count), made_up(_SEED_VALUES, start, count, _VALUE_BYTES)


def picked(seed: bytes, keys: int, count: int, turn: int) -> list[bytes]:
    """Random keys of a kind; others in every turn."""
    numbers = made_up(b"picks" + seed, turn * count, count, 8)
    return [whole_keys(seed, int.from_bytes(number, "little") % keys, 1)[0] for number in numbers]


def _writes(keys: list[bytes], values: list[bytes]) -> dict[bytes, bytes | None]:
    stored = (UTXO.with_value(key, None, value) for key, value in zip(keys, values, strict=True))
    return dict(zip(UTXO.storage_keys(keys), stored, strict=True))


class _Reader(ABC):
    """Asked with (whole keys, keys at once), it answers with the seconds and how many were found; with None, with
    its peak memory."""

    def answer(self, question: tuple[list[bytes], int] | None) -> Any:
        if question is None:
            return peak_rss_mb()
        keys, at_once = question
        batches = self.prepare([keys[at : at + at_once] for at in range(0, len(keys), at_once)])
        find, found = self.find, 0
        start = time.perf_counter()
        for batch in batches:
            found += at_once - find(batch).count(None)
        return time.perf_counter() - start, found

    @abstractmethod
    def prepare(self, batches: list[list[bytes]]) -> list[list[bytes]]:
        """What `find` will be given, made before the clock runs."""

    @abstractmethod
    def find(self, keys: list[bytes]) -> list[bytes | None]:
        """One lookup, timed."""


class StoreReader(_Reader):
    """Whole keys to values, as a node answers."""

    def __init__(self, path: Path, keys: int) -> None:
        self._store = RocksStore(path)
        for batch in load_batches(keys):
            self._store.write(Batch(state=_writes(*batch)))

    def prepare(self, batches: list[list[bytes]]) -> list[list[bytes]]:
        return batches

    def find(self, keys: list[bytes]) -> list[bytes | None]:
        return UTXO.find_all(keys, self._store.get(UTXO.storage_keys(keys)))

    def close(self) -> None:
        self._store.close()


class BareReader(_Reader):
    """Storage keys to stored bytes."""

    def __init__(self, path: Path, keys: int) -> None:
        self._db = Rdict(str(path), state_options())
        for batch in load_batches(keys):
            write = WriteBatch(raw_mode=True)
            for key, value in _writes(*batch).items():
                write.put(key, value)
            self._db.write(write)

    def prepare(self, batches: list[list[bytes]]) -> list[list[bytes]]:
        return list(map(UTXO.storage_keys, batches))

    def find(self, keys: list[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = self._db.get(keys) if len(keys) > 1 else [self._db.get(keys[0])]
        return found

    def close(self) -> None:
        self._db.close()


def run(*, keys: int = KEYS, lookups: int = LOOKUPS) -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stateferry-bench-")))
        bare = stack.enter_context(Worker(BareReader, folder / "bare", keys))
        store = stack.enter_context(Worker(StoreReader, folder / "store", keys))
        for kind, seed in (("hit", _SEED_LIVE), ("miss", _SEED_MISSING)):
            for at_once in (1, BATCH_KEYS):
                rows += _rows(f"{kind}-{at_once}", bare, store, at_once, _chooser(seed, keys, lookups), kind == "hit")
    return rows


def _chooser(seed: bytes, keys: int, lookups: int) -> Callable[[int], list[bytes]]:
    count = max(lookups // _TURNS // BATCH_KEYS, 1) * BATCH_KEYS
    return lambda turn: picked(seed, keys, count, turn)


def _rows(
    name: str, bare: Worker, store: Worker, at_once: int, choose: Callable[[int], list[bytes]], exist: bool
) -> list[Row]:
    seconds = dict.fromkeys((bare, store), 0.0)
    done = 0
    for turn in range(_TURNS):
        keys = choose(turn)
        done += len(keys)
        for worker in seconds:
            taken_s, found = worker.ask((keys, at_once))
            assert found == (len(keys) if exist else 0), (name, found, len(keys))
            seconds[worker] += taken_s
    baseline = f"rocksdict-{name}"
    return [
        Row(name=baseline, measures={"keys_per_s": done / seconds[bare]}, peak_rss_mb=bare.ask(None)),
        Row(
            name=name,
            measures={"keys_per_s": done / seconds[store]},
            baseline=baseline,
            ratio=seconds[bare] / seconds[store],
            peak_rss_mb=store.ask(None),
        ),
    ]
