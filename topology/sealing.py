"""A process beside a primary's, which seals its blocks: hashing and encoding would hold the worker's interpreter.

It needs no state and keeps none: diffs in, seals out, in order. It ends with the worker, however that ends.

The portions of a block's gains are shared out as they are begun: the process takes them from the front, and a worker
that has nothing better to do than to wait takes them from the back. So both are busy, also with a single block.
"""

from __future__ import annotations

import asyncio
from collections import deque

from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.diff import Diff, Portion
from pipeline.seal import Pending, Seal, Shared, seal_at_once
from topology.sealing_process import SLOTS, SealingProcess

_CHANGES_MIN = 200
"""A smaller block is sealed here: it takes no longer than asking."""
_PORTION_CHANGES = 500
"""Half a millisecond of hashing."""


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


class Sealing:
    """Seals blocks in a process of its own, which starts with the first block that is worth it; or here, if it is not
    ``beside``.

    * `submit` is a `pipeline.seal.Sealer`. It, and whoever waits, raises `sealing_lost` if the process was killed.
    """

    def __init__(self, *, beside: bool = True) -> None:
        self._beside = beside
        self._process: SealingProcess | None = None
        self._pending: deque[_Beside] = deque()  # not made yet, in the order in which the process makes them
        self._arrival: asyncio.Future[None] | None = None

    def submit(self, diff: Diff, shared: Shared, codec: Codec) -> Pending:
        if not self._beside or diff.op_count < _CHANGES_MIN:
            return seal_at_once(diff, shared, codec)
        self.receive(wait=False)
        slots = {*range(SLOTS)} - {pending.slot for pending in self._pending}
        if not slots:
            return seal_at_once(diff, shared, codec)
        if self._process is None:
            self._process = SealingProcess.start()
        if not self._pending:
            self._process.board.clear()
        slot, count = min(slots), max(1, diff.op_count // _PORTION_CHANGES)
        self._process.hand_over(slot, diff, shared, codec, portions=count)
        pending = _Beside(self, diff, slot, count)
        self._pending.append(pending)
        return pending

    def receive(self, *, wait: bool) -> None:
        """Take in what the process has made; ``wait`` for one seal at least."""
        while self._process is not None and self._pending and (wait or self._process.has_sealed()):
            pending = self._pending.popleft()
            pending.made = self._process.take(pending.slot)
            wait = False

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
