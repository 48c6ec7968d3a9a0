"""A process beside a primary's, which seals its blocks: hashing and encoding would hold the worker's interpreter.

It needs no state and keeps none: diffs in, seals out, in order. It ends with the worker, however that ends.

The portions of a block's gains are shared out as they are begun: the process takes them from the front, and a worker
that has nothing better to do than to wait takes them from the back. So both are busy, also with a single block.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing.synchronize import Lock
from typing import ClassVar

import msgpack

from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.delta import TableDiff
from pipeline.diff import Diff, Portion
from pipeline.errors import StateferryError
from pipeline.seal import Pending, Seal, Shared, seal, seal_at_once
from pipeline.state import SCHEMAS

_CHANGES_MIN = 200
"""A smaller block is sealed here: it takes no longer than asking."""
_PORTION_CHANGES = 200
"""About a millisecond of hashing."""
_SLOTS = 16
"""Blocks that are with the process at a time. Any more are sealed here."""
_LOCK_TIMEOUT_S = 1.0
"""The lock is held for microseconds: if it is not had after this, the process was killed or stopped with it."""
_COLUMNS = [field.name for field in fields(TableDiff) if field.name != "schema"]


class _Shares:
    """In memory that both processes see: for each slot the portions that nobody has begun, a range."""

    def __init__(self, ends: ctypes.Array[ctypes.c_uint32], lock: Lock) -> None:
        self._ends = ends
        self._lock = lock

    def offer(self, slot: int, count: int) -> None:
        """All portions of a block. Whoever had this slot before it has none left."""
        self._ends[2 * slot], self._ends[2 * slot + 1] = 0, count

    def take_first(self, slot: int) -> int | None:
        with self._lock:
            start, stop = self._ends[2 * slot : 2 * slot + 2]
            if start == stop:
                return None
            self._ends[2 * slot] = start + 1
            return start

    def take_last(self, slot: int) -> int | None:
        if not self._lock.acquire(timeout=_LOCK_TIMEOUT_S):
            return None
        try:
            start, stop = self._ends[2 * slot : 2 * slot + 2]
            if start == stop:
                return None
            self._ends[2 * slot + 1] = stop - 1
            return stop - 1
        finally:
            self._lock.release()


class _Beside:
    """A block that the process seals, and what of it was made here: a `Pending`."""

    def __init__(self, sealing: Sealing, diff: Diff, future: Future[Seal], slot: int, count: int) -> None:
        self.future = future
        self.slot = slot
        self._sealing = sealing
        self._diff = diff
        self._count = count
        self._gains: dict[int, bytes] = dict.fromkeys(diff.tables, lthash.ZERO)

    def make(self, portion: int) -> None:
        self._gains = lthash.combine(self._gains, self._diff.gains([Portion(portion, self._count)]))

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Seal:
        while not self.done() and self._sealing.help():
            pass
        return self.future.result().plus(self._gains)


class Sealing:
    """Seals blocks in a process of its own, which starts with the first block that is worth it; or here, if it is not
    ``beside``.

    * `submit` is a `pipeline.seal.Sealer`; the result raises BrokenProcessPool if the process was killed.
    """

    def __init__(self, *, beside: bool = True) -> None:
        self._beside = beside
        self._pool: ProcessPoolExecutor | None = None
        self._shares: _Shares | None = None
        self._pending: deque[_Beside] = deque()

    def submit(self, diff: Diff, shared: Shared, codec: Codec) -> Pending:
        if not self._beside or diff.op_count < _CHANGES_MIN:
            return seal_at_once(diff, shared, codec)
        self._forget_done()
        slots = {*range(_SLOTS)} - {pending.slot for pending in self._pending}
        if not slots:
            return seal_at_once(diff, shared, codec)
        if self._pool is None or self._shares is None:
            self._pool, self._shares = _start()
        slot, count = slots.pop(), max(1, diff.op_count // _PORTION_CHANGES)
        self._shares.offer(slot, count)
        future = self._pool.submit(_Process.seal, _flat(diff), shared, codec, slot, count)
        pending = _Beside(self, diff, future, slot, count)
        self._pending.append(pending)
        return pending

    def help(self) -> bool:
        """Make a portion of the oldest block that has one left. False if there is none: all that is left is to wait."""
        self._forget_done()
        for pending in self._pending:
            assert self._shares is not None
            portion = self._shares.take_last(pending.slot)
            if portion is not None:
                pending.make(portion)
                return True
        return False

    async def advance(self, pending: Pending) -> None:
        """Help, or wait until a block is sealed. The loop has its turn in both cases."""
        await asyncio.sleep(0)
        if isinstance(pending, _Beside) and not pending.done() and not self.help():
            await asyncio.wait([asyncio.wrap_future(pending.future)])

    def close(self) -> None:
        """What was submitted and not sealed is dropped. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._pending.clear()

    def _forget_done(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft()


def sealing_lost() -> StateferryError:
    """What a BrokenProcessPool says to whoever runs the worker."""
    return StateferryError(
        "the process that seals blocks was ended by somebody else",
        way_out="start again; if it happens again, see whether memory runs out",
    )


def _start() -> tuple[ProcessPoolExecutor, _Shares]:
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and the store's
    shares = _Shares(context.RawArray(ctypes.c_uint32, 2 * _SLOTS), context.Lock())
    return ProcessPoolExecutor(1, mp_context=context, initializer=_Process.begin, initargs=(shares,)), shares


def _flat(diff: Diff) -> bytes:
    """A diff for the way to the process: pickle, which looks for the same object twice, takes four times as long."""
    columns = [[table_id, *(getattr(table, name) for name in _COLUMNS)] for table_id, table in diff.tables.items()]
    packed: bytes = msgpack.packb(columns)
    return packed


def _unflat(flat: bytes) -> Diff:
    tables = msgpack.unpackb(flat)
    return Diff(
        tables={
            table_id: TableDiff(schema=SCHEMAS[table_id], **dict(zip(_COLUMNS, columns, strict=True)))
            for table_id, *columns in tables
        }
    )


class _Process:
    """What runs in it."""

    shares: ClassVar[_Shares]

    @classmethod
    def begin(cls, shares: _Shares) -> None:
        cls.shares = shares
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's business
        parent = multiprocessing.parent_process()
        assert parent is not None

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

    @classmethod
    def seal(cls, flat: bytes, shared: Shared, codec: Codec, slot: int, count: int) -> Seal:
        def portions() -> Iterator[Portion]:
            while (number := cls.shares.take_first(slot)) is not None:
                yield Portion(number, count)

        return seal(_unflat(flat), shared, codec, portions())
