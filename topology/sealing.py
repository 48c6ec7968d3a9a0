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
import pickle
import signal
import struct
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Lock
from typing import Any, NamedTuple

import msgpack

from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.diff import Diff, Portion
from pipeline.errors import StateferryError
from pipeline.seal import Pending, Seal, Shared, seal, seal_at_once
from pipeline.state import SCHEMAS
from pipeline.table_diff import TableDiff

_CHANGES_MIN = 200
"""A smaller block is sealed here: it takes no longer than asking."""
_PORTION_CHANGES = 200
"""About a millisecond of hashing."""
_SLOTS = 16
"""Blocks that are with the process at a time. Any more are sealed here."""
_LOCK_TIMEOUT_S = 1.0
"""The lock is held for microseconds: if it is not had after this, the process was killed or stopped with it."""
_BOARD_BYTES_KEPT = 64 << 20
"""Of memory for what is on its way: what larger blocks took is given back once none is with the process."""
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


class _Board:
    """Where diffs lie for the process, and seals for the worker: a file in memory, with a place for each slot, as long
    as need be.

    A pipe would not do: it holds less than a block, so that each side would wait until the other reads on.
    """

    _PLACE_BYTES = 1 << 32  # apart; only what is written takes memory

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._longest = 0

    @classmethod
    def new(cls) -> _Board:
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("stateferry-sealing"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def write(self, slot: int, data: bytes) -> None:
        left, at = memoryview(data), slot * self._PLACE_BYTES
        while left:
            done = os.pwrite(self._fd, left, at)
            left, at = left[done:], at + done
        self._longest = max(self._longest, len(data))

    def read(self, slot: int, size: int) -> bytes:
        parts: list[bytes] = []
        at, stop = slot * self._PLACE_BYTES, slot * self._PLACE_BYTES + size
        while at < stop:
            parts.append(os.pread(self._fd, stop - at, at))
            assert parts[-1], (slot, size)
            at += len(parts[-1])
        self._longest = max(self._longest, size)
        return b"".join(parts)

    def clear(self) -> None:
        """Nothing on it is needed any more."""
        if self._longest * _SLOTS > _BOARD_BYTES_KEPT:
            os.ftruncate(self._fd, 0)
            self._longest = 0

    def close(self) -> None:
        os.close(self._fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Board._inherited, (DupFd(self._fd),)

    @staticmethod
    def _inherited(duplicate: Any) -> _Board:
        return _Board(duplicate.detach())


class _Task(NamedTuple):
    """A block that lies on the board, on its way to the process."""

    slot: int
    size: int
    portions: int


_TASK = struct.Struct("<BII")
_SIZE = struct.Struct("<I")
"""Of a seal that lies where the diff lay. Pipes take one of these for each slot without waiting."""


class _Beside:
    """A block that the process seals, and what of it was made here: a `Pending`."""

    def __init__(self, sealing: Sealing, diff: Diff, slot: int, count: int) -> None:
        self.slot = slot
        self.made: Seal | Exception | None = None  # by the process
        self._sealing = sealing
        self._diff = diff
        self._count = count
        self._gains: dict[int, bytes] = dict.fromkeys(diff.tables, lthash.ZERO)

    def make(self, portion: int) -> None:
        self._gains = lthash.combine(self._gains, self._diff.gains([Portion(portion, self._count)]))

    def done(self) -> bool:
        if self.made is None:
            self._sealing.receive(wait=False)
        return self.made is not None

    def result(self) -> Seal:
        while not self.done() and self._sealing.help():
            pass
        while self.made is None:
            self._sealing.receive(wait=True)
        if isinstance(self.made, Exception):
            raise self.made
        return self.made.plus(self._gains)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """The process, and what leads to it and back."""

    process: BaseProcess
    tasks: Connection
    seals: Connection
    board: _Board
    shares: _Shares

    @classmethod
    def start(cls) -> _Process:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and the store's
        shares = _Shares(context.RawArray(ctypes.c_uint32, 2 * _SLOTS), context.Lock())
        (its_tasks, tasks), (seals, its_seals) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        board = _Board.new()
        process = context.Process(target=_serve, args=(its_tasks, its_seals, board, shares), daemon=True)
        process.start()
        its_tasks.close()
        its_seals.close()
        return cls(process=process, tasks=tasks, seals=seals, board=board, shares=shares)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.tasks.close()
        self.seals.close()
        self.board.close()


class Sealing:
    """Seals blocks in a process of its own, which starts with the first block that is worth it; or here, if it is not
    ``beside``.

    * `submit` is a `pipeline.seal.Sealer`. It, and whoever waits, raises `sealing_lost` if the process was killed.
    """

    def __init__(self, *, beside: bool = True) -> None:
        self._beside = beside
        self._process: _Process | None = None
        self._pending: deque[_Beside] = deque()  # not made yet, in the order in which the process makes them
        self._arrival: asyncio.Future[None] | None = None

    def submit(self, diff: Diff, shared: Shared, codec: Codec) -> Pending:
        if not self._beside or diff.op_count < _CHANGES_MIN:
            return seal_at_once(diff, shared, codec)
        self.receive(wait=False)
        slots = {*range(_SLOTS)} - {pending.slot for pending in self._pending}
        if not slots:
            return seal_at_once(diff, shared, codec)
        if self._process is None:
            self._process = _Process.start()
        with_it = self._process
        slot, count = min(slots), max(1, diff.op_count // _PORTION_CHANGES)
        flat = _flat(diff, shared, codec)
        if not self._pending:
            with_it.board.clear()
        with_it.board.write(slot, flat)
        with_it.shares.offer(slot, count)
        try:
            with_it.tasks.send_bytes(_TASK.pack(slot, len(flat), count))
        except OSError as error:
            raise sealing_lost() from error
        pending = _Beside(self, diff, slot, count)
        self._pending.append(pending)
        return pending

    def receive(self, *, wait: bool) -> None:
        """Take in what the process has made; ``wait`` for one seal at least."""
        if self._process is None:
            return
        seals = self._process.seals
        try:
            while self._pending and (wait or seals.poll()):
                (size,) = _SIZE.unpack(seals.recv_bytes())
                pending = self._pending.popleft()
                pending.made = pickle.loads(self._process.board.read(pending.slot, size))
                wait = False
        except (EOFError, OSError) as error:
            raise sealing_lost() from error

    def help(self) -> bool:
        """Make a portion of the oldest block that has one left. False if there is none: all that is left is to wait."""
        for pending in self._pending:
            assert self._process is not None
            portion = self._process.shares.take_last(pending.slot)
            if portion is not None:
                pending.make(portion)
                return True
        return False

    async def advance(self, pending: Pending) -> None:
        """Help, or wait until a block is sealed. The loop has its turn in both cases."""
        await asyncio.sleep(0)
        if isinstance(pending, _Beside) and not pending.done() and not self.help():
            await asyncio.wait([self._next_arrival()])

    def _next_arrival(self) -> asyncio.Future[None]:
        """Done once something, or its end, comes from the process: one for all who wait."""
        if self._arrival is not None:
            return self._arrival
        assert self._process is not None
        loop, seals = asyncio.get_running_loop(), self._process.seals.fileno()
        self._arrival = loop.create_future()
        loop.add_reader(seals, self._arrived)
        return self._arrival

    def _arrived(self) -> None:
        """Whoever waits looks for what came."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None and self._process is not None:
            arrival.get_loop().remove_reader(self._process.seals.fileno())
            arrival.set_result(None)

    def close(self) -> None:
        """What was submitted and not sealed is dropped. Idempotent."""
        self._arrived()
        if self._process is not None:
            self._process.end()
            self._process = None
        self._pending.clear()


def sealing_lost() -> StateferryError:
    """The process is gone, and the worker did not end it."""
    return StateferryError(
        "the process that seals blocks was ended by somebody else",
        way_out="start again; if it happens again, see whether memory runs out",
    )


def _flat(diff: Diff, shared: Shared, codec: Codec) -> bytes:
    """A diff for the way to the process: pickle, which looks for the same object twice, takes four times as long."""
    columns = [
        [table_id, list(shared[table_id]), *(getattr(table, name) for name in _COLUMNS)]
        for table_id, table in diff.tables.items()
    ]
    packed: bytes = msgpack.packb([codec.value, columns])
    return packed


def _unflat(flat: bytes) -> tuple[Diff, Shared, Codec]:
    codec, tables = msgpack.unpackb(flat)
    shared = {table_id: frozenset(keys) for table_id, keys, *_ in tables}
    diff = Diff(
        tables={
            table_id: TableDiff(schema=SCHEMAS[table_id], **dict(zip(_COLUMNS, columns, strict=True)))
            for table_id, _, *columns in tables
        }
    )
    return diff, shared, Codec(codec)


# What runs in the process


def _serve(tasks: Connection, seals: Connection, board: _Board, shares: _Shares) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's business
    while True:
        try:
            task = _Task(*_TASK.unpack(tasks.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # the worker is gone
        try:
            made: Seal | Exception = _seal(task, board, shares)
        except Exception as error:
            made = error
        made_flat = pickle.dumps(made, pickle.HIGHEST_PROTOCOL)
        board.write(task.slot, made_flat)
        try:
            seals.send_bytes(_SIZE.pack(len(made_flat)))
        except OSError:
            os._exit(0)


def _seal(task: _Task, board: _Board, shares: _Shares) -> Seal:
    def portions() -> Iterator[Portion]:
        while (number := shares.take_first(task.slot)) is not None:
            yield Portion(number, task.portions)

    diff, shared, codec = _unflat(board.read(task.slot, task.size))
    return seal(diff, shared, codec, portions())
