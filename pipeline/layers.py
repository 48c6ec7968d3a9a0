"""A store and what is computed on top of it but not yet read back from the log.

Base (the store) · dirty (one layer per frame computed ahead). Reads come from the top of the stack. A frame that the
log confirmed is settled: its layer goes into the next write batch and leaves the stack. A writer that is no longer in
force drops all dirty layers at once; the store never saw them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress, islice, repeat
from operator import is_
from typing import Any, Final

from pipeline.stores.base import Store

_ENTRY_OVERHEAD_BYTES = 160
"""What CPython needs per entry beside the bytes themselves: two bytes objects, slots in three dicts."""

_NOT_HERE: Final[Any] = object()
"""For a key that no layer wrote."""


class Layers:
    """A read view over a store, with dirty layers numbered by ascending seq.

    * `dirty_bytes` is what the dirty layers hold, overhead and what their owner keeps with them included; whoever
      pushes keeps it below a bound.
    * A key written by several layers shows what the highest wrote.
    * What a settled layer wrote stays readable until all layers that stood with it are settled: as many bytes again, at
      most, which `dirty_bytes` does not count. Until then it is what the store holds as well, or older than what stands
      above it; to take it out key by key cost more than to write it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: dict[int, Mapping[bytes, bytes | None]] = {}
        self._sizes: dict[int, int] = {}
        self._recent: dict[bytes, bytes | None] = {}  # what the layers above `_older_top` wrote
        self._older: dict[bytes, bytes | None] = {}  # what those up to it wrote, settled ones among them
        self._older_top = 0
        self.dirty_bytes = 0

    def read(self, storage_keys: list[bytes]) -> list[bytes | None]:
        """One multi-get, through all layers."""
        shown = list(map(self._recent.get, storage_keys, map(self._older.get, storage_keys, repeat(_NOT_HERE))))
        missing = shown.count(_NOT_HERE)
        if missing == len(shown):
            return self._store.get(storage_keys)
        below = iter(self._store.get(list(compress(storage_keys, map(is_, shown, repeat(_NOT_HERE))))))
        return [next(below) if value is _NOT_HERE else value for value in shown]

    def push(self, number: int, writes: Mapping[bytes, bytes | None]) -> None:
        """A new top layer. ``number`` is above every number pushed and not settled."""
        assert number > self.checkpoint(), (number, self.checkpoint())
        size = sum(map(len, writes)) + sum(map(len, filter(None, writes.values())))
        self._sizes[number] = size + _ENTRY_OVERHEAD_BYTES * len(writes)
        self.dirty_bytes += self._sizes[number]
        self._layers[number] = writes
        self._recent.update(writes)

    def hold(self, number: int, held_bytes: int) -> None:
        """Count in what else a layer's owner keeps as long as it stands."""
        self._sizes[number] += held_bytes
        self.dirty_bytes += held_bytes

    def settle(self, number: int) -> None:
        """The lowest layer is in the store now: it may go. Costs no more with many layers above it."""
        assert number == next(iter(self._layers)), (number, list(self._layers))
        self._drop(number)
        if number >= self._older_top:
            self._older, self._recent = (self._recent, {}) if self._layers else ({}, {})
            self._older_top = self.checkpoint()

    def lowest_bytes(self, layers: int) -> int:
        """What so many of the lowest layers hold of `dirty_bytes`."""
        return sum(islice(self._sizes.values(), layers))

    def checkpoint(self) -> int:
        """The number of the top layer: what `revert` comes back to. 0 without layers."""
        return next(reversed(self._layers), 0)

    def revert(self, checkpoint: int) -> None:
        """Take off every layer above ``checkpoint``: keys written below it show those values again."""
        for number in [number for number in self._layers if number > checkpoint]:
            self._drop(number)
        self._recent, self._older, self._older_top = {}, {}, 0
        for writes in self._layers.values():
            self._recent.update(writes)

    def _drop(self, number: int) -> None:
        self.dirty_bytes -= self._sizes.pop(number)
        del self._layers[number]
