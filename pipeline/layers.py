"""A store and what is computed on top of it but not yet read back from the log.

Base (the store) · dirty (one layer per frame computed ahead). Reads come from the top of the stack. A frame that the
log confirmed is settled: its layer goes into the next write batch and leaves the stack. A writer that is no longer in
force drops all dirty layers at once; the store never saw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from pipeline.stores.base import Store

_ENTRY_OVERHEAD_BYTES = 160
"""What CPython needs per entry beside the bytes themselves: two bytes objects, a tuple, a dict slot."""


class Layers:
    """A read view over a store, with dirty layers numbered by ascending seq.

    * `dirty_bytes` is what the dirty layers hold, overhead included; whoever pushes keeps it below a bound.
    * A key written by several layers keeps one entry in the merged view, that of the highest.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: dict[int, Mapping[bytes, bytes | None]] = {}
        self._sizes: dict[int, int] = {}
        self._merged: dict[bytes, tuple[int, bytes | None]] = {}
        self.dirty_bytes = 0

    def read(self, storage_keys: list[bytes]) -> list[bytes | None]:
        """One multi-get, through all layers."""
        if not self._merged:
            return self._store.get(storage_keys)
        found = list(map(self._merged.get, storage_keys))
        missing = [key for key, entry in zip(storage_keys, found, strict=True) if entry is None]
        below = iter(self._store.get(missing) if missing else ())
        return [next(below) if entry is None else entry[1] for entry in found]

    def push(self, number: int, writes: Mapping[bytes, bytes | None]) -> None:
        """A new top layer. ``number`` is above every number pushed and not settled."""
        assert number > self.checkpoint(), (number, self.checkpoint())
        size = sum(map(len, writes)) + sum(len(value) for value in writes.values() if value)
        self._sizes[number] = size + _ENTRY_OVERHEAD_BYTES * len(writes)
        self.dirty_bytes += self._sizes[number]
        self._layers[number] = writes
        self._merged.update((key, (number, value)) for key, value in writes.items())

    def settle(self, number: int) -> None:
        """The lowest layer is in the store now: it may go."""
        assert number == next(iter(self._layers)), (number, list(self._layers))
        merged = self._merged
        for key in self._drop(number):
            if merged[key][0] == number:
                del merged[key]

    def checkpoint(self) -> int:
        """The number of the top layer: what `revert` comes back to. 0 without layers."""
        return next(reversed(self._layers), 0)

    def revert(self, checkpoint: int) -> None:
        """Take off every layer above ``checkpoint``: keys written below it show those values again."""
        above = [number for number in self._layers if number > checkpoint]
        touched = set(chain.from_iterable(self._drop(number) for number in above))
        for key in touched:
            del self._merged[key]
        for number, writes in self._layers.items():
            self._merged.update((key, (number, writes[key])) for key in touched & writes.keys())

    def _drop(self, number: int) -> Iterator[bytes]:
        self.dirty_bytes -= self._sizes.pop(number)
        return iter(self._layers.pop(number))
