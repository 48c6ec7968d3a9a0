"""A node on disk that archives and takes snapshots as it follows a random walk: what restores start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.frame import Header
from pipeline.objects import LocalObjects
from pipeline.position import Meta, decode_meta
from pipeline.snapshot import Manifest
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from tests.walks import Content, Driven, Node, content, drive, make_walk
from topology.archiver import Archiver
from topology.snapshotter import take_snapshot

SMALL_PART_BYTES = 600
"""Raw: a state of a few dozen keys makes several parts."""


@dataclass(slots=True, kw_only=True)
class Ferry:
    """``headers``: of the final branch's frames and those above, by height."""

    driven: Driven
    node: Node
    objects: LocalObjects
    objects_path: Path
    folder: Path
    headers: dict[int, Header] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)

    @property
    def store(self) -> RocksStore:
        assert isinstance(self.node.store, RocksStore)
        return self.node.store

    def damageable(self, path: Path) -> LocalObjects:
        """A copy of the objects, for a test that spoils them."""
        copy = LocalObjects(path)
        for info in self.objects.list():
            copy.put_new(info.name, self.objects.get(info.name))
        return copy

    def run(self, *, snapshots: int) -> None:
        """Follow the whole walk, archiving; take so many snapshots on the way."""
        archiver = Archiver(self.objects)
        records = len(self.driven.wire.records)
        due = [records * (at + 1) // (snapshots + 1) for at in range(snapshots)]
        while self.node.next < records:
            for outcome in self.node.follow(7):
                step = getattr(outcome, "step", None)
                if step is not None:
                    self.headers[step.header.ref.height] = step.header
            self.node.replica.commit()
            archiver.advance(self.node.replica, proven=True)
            if due and self.node.next >= due[0] and self.node.meta.final_height > 0:
                due.pop(0)
                self.manifests.append(self.snapshot())
        while archiver.advance(self.node.replica, proven=True, flush=True):
            pass
        self.node.replica.commit()

    def copy(self) -> Path:
        path = self.folder / "copy"
        shutil.rmtree(path, ignore_errors=True)
        self.store.checkpoint(path)
        return path

    def snapshot(self, height: int | None = None) -> Manifest:
        return take_snapshot(
            [self.copy()], self.folder / "scratch", self.objects, height=height, part_raw_bytes_max=SMALL_PART_BYTES
        )

    def content_at(self, height: int) -> Content:
        """What the model holds after the final block of a height."""
        return self.driven.expected[self.headers[height].frame_id]


def make_ferry(folder: Path, *, seed: int = 11, events: int = 700, snapshots: int = 3) -> Ferry:
    driven = drive(make_walk(seed, events), seed=seed)
    node = Node(driven.wire, RocksStore(folder / "source" / "store"), archives=True)
    objects_path = folder / "objects"
    ferry = Ferry(
        driven=driven, node=node, objects=LocalObjects(objects_path), objects_path=objects_path, folder=folder
    )
    ferry.run(snapshots=snapshots)
    return ferry


@contextmanager
def opened(data_dir: Path) -> Iterator[RocksStore]:
    store = RocksStore(data_dir / "store")
    try:
        yield store
    finally:
        store.close()


def held(data_dir: Path) -> tuple[Meta, Content]:
    with opened(data_dir) as store:
        data = store.get_meta(META_KEY)
        assert data is not None
        return decode_meta(data), content(store)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Arm a fail point that raises `Killed`."""
    monkeypatch.setattr(failpoints, "_armed", {})
    failpoints._hits.clear()

    def kill(name: str) -> None:
        raise Killed(name)

    return lambda name, hit: failpoints.arm(name, hit, kill)
