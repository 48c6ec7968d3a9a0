"""Stores to read from: one, or those of all shards at one position.

Stores of shards that were cut off in the middle, or copied while each went its own way, may stand some frames apart.
Those ahead are taken back in a copy, by their own journals, until all stand where the last one does.
"""

from __future__ import annotations

import itertools
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import LogLost, StoreCorrupt
from pipeline.position import Meta, decode_meta
from pipeline.replica import Replica
from pipeline.shards import join_metas, shard_of, stand_together
from pipeline.stores.base import META_KEY, PROOF_KEY, ROLE_KEY
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, decode_proof
from topology.data_dir import DataDir
from topology.reads import Readable, View


class Union:
    """Stores of all shards, in their order, read as one."""

    def __init__(self, stores: Sequence[Readable]) -> None:
        self._stores = stores

    def get(self, storage_keys: list[bytes]) -> list[bytes | None]:
        """As `Store.get`."""
        wanted: dict[int, list[bytes]] = {}
        for key in storage_keys:
            wanted.setdefault(shard_of(key, len(self._stores)), []).append(key)
        found = {
            key: stored
            for shard, keys in wanted.items()
            for key, stored in zip(keys, self._stores[shard].get(keys), strict=True)
        }
        return [found[key] for key in storage_keys]

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """As `Store.scan`: shards are runs of storage keys, one behind the other."""
        first = shard_of(start, len(self._stores)) if len(start) > 1 else 0
        return itertools.chain.from_iterable([store.scan(start, stop) for store in self._stores[first:]])


def union(stores: Sequence[Readable]) -> Readable:
    """The only store, or all of them as one."""
    return stores[0] if len(stores) == 1 else Union(stores)


def view_of(store: RocksStore) -> View:
    """A store and where it stands. Raises StoreCorrupt without a position."""
    data = store.get_meta(META_KEY)
    if data is None:
        raise StoreCorrupt("the store has no position", where=str(store.path), way_out="restore it from a snapshot")
    return View(
        store=store,
        meta=decode_meta(data),
        proof=decode_proof(store.get_meta(PROOF_KEY)),
        role=(store.get_meta(ROLE_KEY) or b"").decode(),
    )


def join(views: Sequence[View]) -> View:
    """All shards as one view. Raises NotFound unless they are all there is, at one position."""
    if len(views) == 1 and views[0].meta.shards == 1:
        return views[0]
    return View(
        store=union([view.store for view in views]),
        meta=join_metas([view.meta for view in views]),
        proof=Proof(proven=all(view.proof.proven for view in views)),
        role=views[0].role,
    )


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[View]]:
    """Views of stores that nobody writes to."""
    with ExitStack() as stack:
        views = []
        for path in paths:
            store = RocksStore(path, read_only=True)
            stack.callback(store.close)
            views.append(view_of(store))
        yield views


def metas_of(paths: Sequence[Path]) -> list[Meta]:
    with opened(paths) as views:
        return [view.meta for view in views]


def bring_together(paths: Sequence[Path]) -> None:
    """Take back what some of these copies have and others lack, as far as their journals reach."""
    metas = metas_of(paths)
    if not metas or stand_together(metas):
        return
    lowest = min(meta.seq for meta in metas)
    for path, meta in zip(paths, metas, strict=True):
        if meta.seq == lowest:
            continue
        store = RocksStore(path)
        try:
            replica = Replica(store, meta)
            while replica.meta.seq > lowest:
                replica.take_back()
        except LogLost:
            return  # further apart than a journal reaches: whoever joins the views says so
        finally:
            store.close()


def copy_closed(data_dir: DataDir) -> list[Path]:
    """Copies of the stores of a directory that no worker has; the caller holds its lock, and removes them."""
    paths = []
    for found in data_dir.shard_dirs:
        path = data_dir.copies_path / secrets.token_hex(4)
        path.parent.mkdir(exist_ok=True)
        store = RocksStore(found.store_path)
        try:
            store.checkpoint(path)
        finally:
            store.close()
        paths.append(path)
    return paths


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
