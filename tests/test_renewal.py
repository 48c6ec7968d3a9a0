"""A store that was restored beside another takes its place, whatever cuts that off."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stores.base import Batch
from pipeline.stores.rocksdb import RocksStore
from topology import renewal
from topology.data_dir import DataDir


def fill(path: Path, value: bytes) -> None:
    path.parent.mkdir(parents=True)
    store = RocksStore(path)
    store.write(Batch(state={b"k": value}))
    store.close()


def held(path: Path) -> bytes | None:
    store = RocksStore(path)
    try:
        return store.get([b"k"])[0]
    finally:
        store.close()


class Cut(BaseException):
    """A crash."""


@pytest.mark.parametrize(("at", "found"), [(1, b"old"), (2, b"new"), (3, b"new")])
def test_a_shard_s_store_is_replaced(at: int, found: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off before either of the two renames, or not at all: after a start there is one store, the old or the new."""
    node = DataDir(tmp_path)
    shard = node.shard(1, 2)
    fill(shard.store_path, b"old")
    fill(shard.path / renewal.WORK_FOLDER / "store", b"new")
    renames, rename = 0, Path.rename

    def cut(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == at:
            raise Cut
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        if at <= 2:
            with pytest.raises(Cut):
                renewal.replace_stores(shard)
        else:
            renewal.replace_stores(shard)
    renewal.settle(node)

    assert held(shard.store_path) == found
    assert {path.name for path in shard.path.iterdir()} == ({"store", "renewing"} if found == b"old" else {"store"})
