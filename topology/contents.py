"""Whole contents of states that are compared: stores where they stand, and snapshots, of which parts are fetched when
they are read.

Two states are read by as little as will do. Where parts of two snapshots are cut at the same keys, their partials are
compared and what differs is read of both. Where they are not (other shards, other sizes), one side is read, the smaller
one, and hashed between the cuts of the other, of which only those parts are fetched that hold something else.
"""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from pipeline.audits import check_digest
from pipeline.comparison import Difference, Entries, differing_entries, differing_runs
from pipeline.errors import PartCorrupt, StoreCorrupt
from pipeline.objects import ObjectStore
from pipeline.parts import Part, digest_file
from pipeline.snapshot import Manifest
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import audit
from topology.reads import Readable

_OPENED_MAX = 4
"""Parts of a side that are on disk at a time, 32 MiB of entries each: what lies between two cuts of the other side is
in three of them as a rule, and is read twice if it differs."""


class StoreState:
    """What stores hold where they stand."""

    def __init__(self, store: Readable, root: bytes) -> None:
        self.root = root
        self._store = store

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Entries:
        return self._store.scan(start, stop)


class PartReader:
    """Parts of snapshots in an object store, those read last kept in a folder.

    * ``read``: parts and bytes fetched so far.
    """

    def __init__(self, objects: ObjectStore, scratch: Path, read: Counter[str]) -> None:
        self.read = read
        self._objects = objects
        self._scratch = scratch
        self._opened: OrderedDict[str, RocksStore] = OrderedDict()

    def scan(self, manifest: Manifest, part: Part, start: bytes = b"", stop: bytes | None = None) -> Entries:
        """Raises PartCorrupt, NotFound."""
        name = manifest.part_name(part)
        store = self._opened.get(name)
        if store is None:
            while len(self._opened) >= _OPENED_MAX:
                self._drop(next(iter(self._opened)))
            store = self._opened[name] = self._fetched(manifest, part)
        self._opened.move_to_end(name)
        try:
            yield from store.scan(start, stop)
        except StoreCorrupt as error:
            raise PartCorrupt(f"a part cannot be read: {error.what}", where=name) from error

    def close(self) -> None:
        for name in list(self._opened):
            self._drop(name)

    def _drop(self, name: str) -> None:
        store = self._opened.pop(name)
        store.close()
        shutil.rmtree(store.path, ignore_errors=True)

    def _fetched(self, manifest: Manifest, part: Part) -> RocksStore:
        name, path = manifest.part_name(part), self._scratch / part.name
        self.read.update(parts=1, bytes=part.size_bytes)
        store = RocksStore(self._scratch / f"{part.name}.store")
        try:
            self._objects.fetch_to(name, path)
            check_digest(part, name, path.stat().st_size, digest_file(path))
            store.ingest([path])
        except StoreCorrupt as error:
            store.close()
            raise PartCorrupt(f"a part cannot be read: {error.what}", where=name) from error
        except BaseException:
            store.close()
            raise
        finally:
            path.unlink(missing_ok=True)
        return store


class SnapshotState:
    """A snapshot's parts."""

    def __init__(self, manifest: Manifest, reader: PartReader) -> None:
        self.parts = manifest.parts
        self.root = manifest.root
        self._manifest = manifest
        self._reader = reader

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Entries:
        return self.scan_parts(self.parts, start, stop)

    def scan_parts(self, parts: Sequence[Part], start: bytes = b"", stop: bytes | None = None) -> Entries:
        for part in parts:
            if start <= part.last_key and (stop is None or part.first_key < stop):
                yield from self._reader.scan(self._manifest, part, start, stop)


State = StoreState | SnapshotState


def differing_keys(a: State, b: State) -> Iterator[Difference]:
    """Keys that differ between two states. Raises PartCorrupt."""
    if isinstance(a, SnapshotState) and isinstance(b, SnapshotState):
        for one, two in differing_runs(a.parts, b.parts):
            if len(one) <= 1 and len(two) <= 1:
                yield from differing_entries(a.scan_parts(one), b.scan_parts(two))
            elif sum(part.size_bytes for part in one) < sum(part.size_bytes for part in two):
                yield from _turned(_between_cuts(b, two, partial(a.scan_parts, one)))
            else:
                yield from _between_cuts(a, one, partial(b.scan_parts, two))
    elif isinstance(a, SnapshotState):
        yield from _between_cuts(a, a.parts, b.scan)
    elif isinstance(b, SnapshotState):
        yield from _turned(_between_cuts(b, b.parts, a.scan))
    else:
        yield from differing_entries(a.scan(), b.scan())


def _between_cuts(
    a: SnapshotState, parts: Sequence[Part], scan: Callable[[bytes, bytes | None], Entries]
) -> Iterator[Difference]:
    """What the other side has up to the end of each part is hashed; a part of other partials is read."""
    starts = [b"", *(part.last_key + b"\0" for part in parts)]
    for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
        found = audit(scan(start, stop))
        vectors = {table_id: vector for table_id, vector in found.vectors.items() if any(vector)}
        if (vectors, found.keys) != (part.partials, part.keys):
            yield from differing_entries(a.scan_parts([part]), scan(start, stop))
    yield from differing_entries(iter(()), scan(starts[-1], None))


def _turned(found: Iterator[Difference]) -> Iterator[Difference]:
    return (one._replace(a=one.b, b=one.a) for one in found)
