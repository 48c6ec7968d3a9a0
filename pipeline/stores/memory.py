"""The model: a store in dicts, for properties and simulations. Everything that `Store` promises, and no durability."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.stores.base import Batch


class MemoryStore:
    """A `Store` in memory. `checkpoint` is not offered: there is no directory to link."""

    def __init__(self) -> None:
        self.state: dict[bytes, bytes] = {}
        self.undo: dict[bytes, bytes] = {}
        self.meta: dict[bytes, bytes] = {}

    def get(self, storage_keys: list[bytes]) -> list[bytes | None]:
        return list(map(self.state.get, storage_keys))

    def get_undo(self, key: bytes) -> bytes | None:
        return self.undo.get(key)

    def get_meta(self, key: bytes) -> bytes | None:
        return self.meta.get(key)

    def write(self, batch: Batch) -> None:
        for family, changes in ((self.state, batch.state), (self.undo, batch.undo), (self.meta, batch.meta)):
            for key, value in changes.items():
                if value is None:
                    family.pop(key, None)
                else:
                    family[key] = value

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        keys = sorted(key for key in self.state if key >= start and (stop is None or key < stop))
        return iter([(key, self.state[key]) for key in keys])

    def checkpoint(self, path: Path) -> None:
        raise OSError(f"a store in memory has no checkpoint at {path}")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
