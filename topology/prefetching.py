"""Processes beside a primary that read what the next blocks will spend, so that the disk has it ready.

A state that memory does not hold is read from the disk key by key, one after another: some 50 to 150 us each, against
some 10 us for all else that a change takes. These processes get every event as it comes in, up to 32 before it is
applied, and look up the keys that it deletes or puts, each process another event, on a copy of the store by hard links.
What they find they forget: the pages are in the system's cache then, which is all that matters. They decide nothing:
an event that they miss, or a process that is gone, makes the primary slower and no more. What is missed is counted, by
its cause.
"""

from __future__ import annotations

import ctypes
import enum
import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import chunk
from pipeline.block import Connect, Op, decode_event
from pipeline.errors import StateferryError
from pipeline.state import SCHEMAS_BY_NAME
from pipeline.stores.rocksdb import RocksStore
from topology import logs

log = logs.get()

PROCESSES = 8
"""Reads that a disk works on at a time. Each process needs some 50 MB and 2 bytes for every key of the state."""
WAITING_BYTES_MAX = 32 << 20
"""Events that no process has taken yet; any more are not read ahead."""
_REFRESH_EVENTS = 2_000
"""By then the store has other files, and a new copy is made."""
_LOOK_EVENTS = 100
"""So often it is seen whether the store has outgrown memory."""
FOLDER = "prefetching"


def memory_share_bytes() -> int:
    """Half of this machine's memory: a store below it is in the system's cache before long, and stays there."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class _Count(enum.IntEnum):
    """What each process counts, in memory that it shares."""

    KEYS_READ = 0
    BAD_EVENTS = 1  # that it could not read
    BAD_READS = 2  # copies that it could not open, or keys that it could not look up


class _Reader(NamedTuple):
    process: BaseProcess
    events: Connection


class Prefetcher:
    """Processes that read ahead on copies of one store, which ``copy`` makes at a path.

    * `submit` never waits. A thread hands events over, and drops what is too much.
    """

    def __init__(self, copy: Callable[[Path], None], folder: Path, processes: int = PROCESSES) -> None:
        self._copy = copy
        self._folder = folder
        self._copies = 0
        self._submitted = 0
        self._waiting: queue.SimpleQueue[bytes | Path | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._counting = threading.Lock()  # of those bytes, by both threads
        self._no_room = 0
        self._no_process = 0
        shutil.rmtree(folder, ignore_errors=True)
        context = multiprocessing.get_context("spawn")
        self._counts = context.RawArray(ctypes.c_uint64, processes * len(_Count))
        self._readers: list[_Reader] = []
        for number in range(processes):
            its_events, events = context.Pipe(duplex=False)
            process = context.Process(target=_read_ahead, args=(its_events, self._counts, number), daemon=True)
            process.start()
            its_events.close()
            self._readers.append(_Reader(process, events))
        self._thread = threading.Thread(target=self._hand_over, name="prefetching", daemon=True)
        self._refresh()
        self._thread.start()

    @property
    def keys_read(self) -> int:
        """By all processes."""
        return self._counted(_Count.KEYS_READ)

    @property
    def missed(self) -> dict[str, int]:
        """What was not read ahead, by its cause."""
        found = {
            "no room": self._no_room,
            "process gone": self._no_process,
            "bad event": self._counted(_Count.BAD_EVENTS),
            "bad read": self._counted(_Count.BAD_READS),
        }
        return {cause: count for cause, count in found.items() if count}

    def _counted(self, what: _Count) -> int:
        return sum(self._counts[what :: len(_Count)])

    def submit(self, record: bytes) -> None:
        """One record of the events that come next."""
        if self._waiting_bytes + len(record) > WAITING_BYTES_MAX:
            self._no_room += 1
            return
        self._submitted += 1
        if self._submitted % _REFRESH_EVENTS == 0:
            self._refresh()
        with self._counting:
            self._waiting_bytes += len(record)
        self._waiting.put(record)

    def _refresh(self) -> None:
        path = self._folder / f"{self._copies:06d}"
        self._copies += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        self._copy(path)
        self._waiting.put(path)

    def _hand_over(self) -> None:
        """The chunks of a message go to one process; each message, or chunk 0, to the next."""
        turn, previous = 0, None
        while (item := self._waiting.get()) is not None:
            if isinstance(item, Path):
                self._tell(self._readers, str(item))
                if previous is not None:
                    shutil.rmtree(previous, ignore_errors=True)  # whoever has its files open goes on with them
                previous = item
                continue
            with self._counting:
                self._waiting_bytes -= len(item)
            if not _continues(item):
                turn = (turn + 1) % len(self._readers)
            self._tell([self._readers[turn]], item)

    def _tell(self, readers: list[_Reader], what: bytes | str) -> None:
        for reader in readers:
            try:
                reader.events.send(what)
            except OSError:  # its events are not read ahead
                self._no_process += 1

    def close(self) -> None:
        """Idempotent."""
        for reader in self._readers:
            reader.process.kill()
            reader.process.join()
        self._waiting.put(None)
        self._thread.join()
        for reader in self._readers:
            reader.events.close()
        self._readers = []
        shutil.rmtree(self._folder, ignore_errors=True)


def _continues(record: bytes) -> bool:
    if not chunk.is_chunk(record):
        return False
    try:
        return chunk.decode_chunk(record).index > 0
    except StateferryError:
        return False


class Prefetching:
    """Reads ahead for a store once its files have ``above_bytes``. ``store``: the one in use."""

    def __init__(self, store: Callable[[], RocksStore], folder: Path, above_bytes: int) -> None:
        self._store = store
        self._folder = folder
        self._above_bytes = above_bytes
        self._seen = 0
        self._prefetcher: Prefetcher | None = None

    def comes(self, record: bytes) -> None:
        """A record of events is on its way to the applier."""
        if self._prefetcher is None and self._seen % _LOOK_EVENTS == 0:
            size_bytes = self._store().file_bytes()
            if size_bytes >= self._above_bytes:
                self._prefetcher = Prefetcher(lambda path: self._store().checkpoint(path), self._folder)
                log.info("prefetch_started", bytes=size_bytes, processes=PROCESSES)
        self._seen += 1
        if self._prefetcher is not None:
            self._prefetcher.submit(record)

    @property
    def status(self) -> dict[str, Any] | None:
        """None while memory holds the store."""
        one = self._prefetcher
        return None if one is None else {"keys_read": one.keys_read, "missed": one.missed}

    def close(self) -> None:
        if self._prefetcher is not None:
            log.info("prefetch_ended", keys_read=self._prefetcher.keys_read, missed=self._prefetcher.missed)
            self._prefetcher.close()
            self._prefetcher = None


# What runs in a process


def _read_ahead(events: Connection, counts: ctypes.Array[ctypes.c_uint64], number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's business
    store: RocksStore | None = None
    assembler = chunk.Assembler()
    first = number * len(_Count)
    while True:
        try:
            item: bytes | str = events.recv()
        except (EOFError, OSError):
            return  # the worker is gone
        wanted: list[bytes] = []
        if isinstance(item, bytes):
            try:
                message = assembler.feed(chunk.decode_chunk(item)) if chunk.is_chunk(item) else item
                wanted = [] if message is None else _looked_up(message)
            except Exception:
                counts[first + _Count.BAD_EVENTS] += 1
        try:
            if isinstance(item, str):
                if store is not None:
                    store.close()
                store = None
                store = RocksStore(Path(item), read_only=True)
            elif store is None:
                counts[first + _Count.BAD_READS] += 1
            else:
                store.get(wanted)
                counts[first + _Count.KEYS_READ] += len(wanted)
        except Exception:
            counts[first + _Count.BAD_READS] += 1


def _looked_up(message: bytes) -> list[bytes]:
    """The storage keys whose values an event wants. Raises EventCorrupt, Unsupported."""
    event = decode_event(message)
    if not isinstance(event, Connect):
        return []
    storage_keys: list[bytes] = []
    for name, ops in event.block.tables.items():
        # What is created is not there, which the filters in memory know.
        keys = [key for key, code in zip(ops.keys, ops.codes, strict=True) if code != Op.CREATE]
        storage_keys += SCHEMAS_BY_NAME[name].storage_keys(sorted(keys))
    return storage_keys
