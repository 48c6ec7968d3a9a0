"""A store: what a node holds, and its promises.

Three column families: `state` (storage key -> stored bytes), `undo` (the journal), `meta` (the position, the proof,
the format). There is one way to change any of them: `Store.write`, all of a batch or nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

FORMAT_VERSION = 1
"""Of a data directory. A store made by a newer version is refused; an older one is read."""

META_KEY = b"meta"
PROOF_KEY = b"proof"
FORMAT_KEY = b"format"
ROLE_KEY = b"role"  # as which the store was run last: only a primary feeds the archive


@dataclass(slots=True, kw_only=True)
class Batch:
    """One group of frames as one atomic write. None deletes."""

    state: dict[bytes, bytes | None] = field(default_factory=dict)
    undo: dict[bytes, bytes | None] = field(default_factory=dict)
    meta: dict[bytes, bytes | None] = field(default_factory=dict)


class Store(Protocol):
    """What the pipeline needs of a store.

    * `write` is atomic: after a crash all of a batch is there or nothing of it, and a batch is never there without
      those written before it. It need not be durable when it returns: the log is.
    * Reads see every batch that was written before them.
    * `scan` sees the state as it was when it was called, whatever is written meanwhile.
    """

    def get(self, storage_keys: list[bytes]) -> list[bytes | None]:
        """Stored bytes, in the order of the keys: one multi-get."""
        ...

    def get_undo(self, key: bytes) -> bytes | None: ...

    def get_meta(self, key: bytes) -> bytes | None: ...

    def write(self, batch: Batch) -> None:
        """Raises DiskFull if there is no room; nothing of the batch is visible then."""
        ...

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Ascending (storage key, stored bytes) with start <= key < stop."""
        ...

    def checkpoint(self, path: Path) -> None:
        """A second store at ``path`` with the same content, by hard links: cheap, and independent from then on."""
        ...

    def flush(self) -> None:
        """Everything written so far survives a power cut once this returns."""
        ...

    def close(self) -> None: ...
