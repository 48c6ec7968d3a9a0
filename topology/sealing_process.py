"""The process that seals: how it is started, what lies between it and the worker, and what it does.

Blocks and seals lie on a board that both see; pipes say where. So neither side ever waits for the other to read on.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Lock
from typing import Any, NamedTuple

import msgpack

from pipeline.codec import Codec
from pipeline.diff import Diff, Portion
from pipeline.errors import StateferryError
from pipeline.seal import Seal, Shared, seal
from pipeline.state import SCHEMAS
from pipeline.table_diff import TableDiff

SLOTS = 16
"""Blocks that are with the process at a time."""
_LOCK_TIMEOUT_S = 1.0
"""The lock is held for microseconds: if it is not had after this, the process was killed or stopped with it."""
_BOARD_BYTES_KEPT = 64 << 20
"""Of memory for what is on its way: what larger blocks took is given back once none is with the process."""
_COLUMNS = [field.name for field in fields(TableDiff) if field.name != "schema"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingProcess:
    """The worker's side. Raises `sealing_lost` where the process was killed."""

    process: BaseProcess
    tasks: Connection
    seals: Connection
    board: Board
    shares: Shares

    @classmethod
    def start(cls) -> SealingProcess:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and the store's
        shares = Shares(context.RawArray(ctypes.c_uint32, 2 * SLOTS), context.Lock())
        (its_tasks, tasks), (seals, its_seals) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        board = Board.new()
        process = context.Process(target=_serve, args=(its_tasks, its_seals, board, shares), daemon=True)
        process.start()
        its_tasks.close()
        its_seals.close()
        return cls(process=process, tasks=tasks, seals=seals, board=board, shares=shares)

    def hand_over(self, slot: int, diff: Diff, shared: Shared, codec: Codec, *, portions: int) -> None:
        flat = _flat(diff, shared, codec)
        self.board.write(slot, flat)
        self.shares.offer(slot, portions)
        try:
            self.tasks.send_bytes(_TASK.pack(slot, len(flat), portions))
        except OSError as error:
            raise sealing_lost() from error

    def has_sealed(self) -> bool:
        """Whether `take` would not wait."""
        try:
            return self.seals.poll()
        except OSError as error:
            raise sealing_lost() from error

    def take(self, slot: int) -> Seal | Exception:
        """The seal of the block handed over first, and where it lay."""
        try:
            (size,) = _SIZE.unpack(self.seals.recv_bytes())
        except (EOFError, OSError) as error:
            raise sealing_lost() from error
        made: Seal | Exception = pickle.loads(self.board.read(slot, size))
        return made

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.tasks.close()
        self.seals.close()
        self.board.close()


def sealing_lost() -> StateferryError:
    """The process is gone, and the worker did not end it."""
    return StateferryError(
        "the process that seals blocks was ended by somebody else",
        way_out="start again; if it happens again, see whether memory runs out",
    )


class Shares:
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


class Board:
    """Where diffs lie for the process, and seals for the worker: a file in memory, with a place for each slot, as long
    as need be.

    A pipe would not do: it holds less than a block, so that each side would wait until the other reads on.
    """

    _PLACE_BYTES = 1 << 32  # apart; only what is written takes memory

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._longest = 0

    @classmethod
    def new(cls) -> Board:
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
        if self._longest * SLOTS > _BOARD_BYTES_KEPT:
            os.ftruncate(self._fd, 0)
            self._longest = 0

    def close(self) -> None:
        os.close(self._fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return Board._inherited, (DupFd(self._fd),)

    @staticmethod
    def _inherited(duplicate: Any) -> Board:
        return Board(duplicate.detach())


class _Task(NamedTuple):
    """A block that lies on the board, on its way to the process."""

    slot: int
    size: int
    portions: int


_TASK = struct.Struct("<BII")
_SIZE = struct.Struct("<I")
"""Of a seal that lies where the diff lay. Pipes take one of these for each slot without waiting."""


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


def _serve(tasks: Connection, seals: Connection, board: Board, shares: Shares) -> None:
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


def _seal(task: _Task, board: Board, shares: Shares) -> Seal:
    def portions() -> Iterator[Portion]:
        while (number := shares.take_first(task.slot)) is not None:
            yield Portion(number, task.portions)

    diff, shared, codec = _unflat(board.read(task.slot, task.size))
    return seal(diff, shared, codec, portions())
