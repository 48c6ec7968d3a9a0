"""A sweep, publishers and restores at once, request by request in an order that a seed chooses.

`STATEFERRY_RACE_SEEDS=200 pytest tests/test_sweep_races.py` (`make races`) runs more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import ObjectMissing
from pipeline.objects import LocalObjects, MemoryObjects, ObjectStore
from pipeline.parts import WrittenPart
from pipeline.position import Meta
from pipeline.retention import Rules
from pipeline.snapshot import Manifest, decode_manifest, parse_manifest_name
from pipeline.stores.rocksdb import RocksStore
from tests.ferries import Ferry, Killed, held, make_ferry
from tests.turns import Turns, copy_objects
from topology import fetching, snapshotter
from topology.children import no_report
from topology.collector import Swept, look, sweep
from topology.holding import Clock
from topology.restore_plans import Request
from topology.restorer import Restored, restore

SEEDS = int(os.environ.get("STATEFERRY_RACE_SEEDS", "2"))
RULES = Rules(last=1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A snapshot that is written and not published, as two nodes write it: with parts of their own."""

    resumes: list[Meta]
    by_node: list[list[WrittenPart]]


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"), events=300, snapshots=2)


@pytest.fixture(scope="module")
def prepared(ferry: Ferry, tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    """Of the heights of the snapshots that the ferry took, and of the last final one."""
    folder, found = tmp_path_factory.mktemp("prepared"), []
    newest = ferry.snapshot()
    for manifest in (*ferry.manifests, newest):
        restore(ferry.objects, folder / f"{manifest.height}", Request(height=manifest.height), claimed=True)
        store = RocksStore(folder / f"{manifest.height}" / "store")
        by_node = []
        for node, raw_bytes_max in enumerate((900, 2500)):
            parts = folder / f"{manifest.height}-{node}"
            parts.mkdir()
            by_node.append(snapshotter.write_all([store.scan()], parts, 0, raw_bytes_max, no_report))
        store.close()
        found.append(Prepared(list(manifest.resumes), by_node))
    ferry.objects.delete(newest.name)
    for part in newest.parts:
        ferry.objects.delete(newest.part_name(part))
    return found


def manifests(objects: ObjectStore) -> list[Manifest]:
    names = [info.name for info in objects.list() if parse_manifest_name(info.name)]
    return [decode_manifest(objects.get(name)) for name in names]


def race(
    seed: int, folder: Path, ferry: Ferry, prepared: list[Prepared], objects: ObjectStore, *, restorers_count: int
) -> None:
    turns = Turns(seed, objects)
    random = turns.random

    def publisher(node: int) -> Callable[[ObjectStore, Clock], list[Manifest]]:
        wanted = random.sample(prepared, len(prepared))

        def publish(objects: ObjectStore, clock: Clock) -> list[Manifest]:
            return [
                snapshotter.publish(objects, one.by_node[node], one.resumes, no_report, clock=clock) for one in wanted
            ]

        return publish

    def collect(objects: ObjectStore, clock: Clock) -> list[Swept]:
        swept = []
        for _ in range(3):
            seen = look(objects, "walk", RULES, clock=clock)
            swept.append(sweep(objects, seen, RULES, clock=clock))
        return swept

    def restorer(number: int) -> Callable[[ObjectStore, Clock], Restored]:
        request = Request(height=random.choice([None, None, ferry.manifests[-1].height]))
        return lambda objects, clock: restore(objects, folder / f"restored-{number}", request, claimed=True)

    def off_s() -> float:
        return random.choice([0.0, 0.0, 3600.0, -3600.0])

    dies_at = [0, 0, 0]
    if seed % 3 == 0:
        dies_at = [random.choice([0, random.randint(1, 30)]) for _ in range(3)]
    publishers = [turns.add(f"publisher {node}", publisher(node), dies_at=dies_at[node]) for node in (0, 1)]
    collectors = [
        turns.add("collector", collect, clock_off_s=off_s()),
        turns.add("other collector", collect, clock_off_s=off_s(), dies_at=dies_at[2]),
    ]
    restorers = [turns.add(f"restorer {number}", restorer(number)) for number in range(restorers_count)]
    turns.run()

    for actor in (*publishers, *collectors):
        assert actor.error is None or isinstance(actor.error, Killed), (actor.name, actor.error)
    # Nobody renews a lease here. So parts of a publisher that stood still may be swept, and if it dies before it looks
    # again, its manifest names what is gone.
    may_lack = any(isinstance(actor.error, Killed) for actor in publishers)
    for number, actor in enumerate(restorers):
        if actor.error is None:
            meta, state = held(folder / f"restored-{number}")
            assert state == ferry.content_at(meta.tip.height)
        else:
            assert may_lack and isinstance(actor.error, ObjectMissing), (actor.name, actor.error)
    there = {info.name for info in objects.list()}
    for manifest in manifests(objects):
        assert may_lack or all(manifest.part_name(part) in there for part in manifest.parts), manifest.name
    returned = [manifest for actor in publishers for manifest in actor.result or ()]

    # Whoever is gone holds nothing up for ever: what stays in the end is what the rules keep.
    clock = turns.clock(collectors[0])
    lasting = Clock(now_s=clock.now_s, steady_s=clock.steady_s, sleep=lambda _: None)
    for _ in range(2):
        turns.now_s += 100_000
        sweep(objects, look(objects, "walk", RULES, clock=lasting), RULES, clock=lasting)
    (newest,) = manifests(objects)
    assert newest.height >= max(manifest.height for manifest in (*returned, *ferry.manifests))
    left = {info.name for info in objects.list() if "/archive/" not in info.name}
    assert left == {newest.name, *map(newest.part_name, newest.parts)}


@pytest.mark.parametrize("kind", ["memory", "local"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_race(
    seed: int, kind: str, tmp_path: Path, ferry: Ferry, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every restore ends with the state of its height, every manifest has its parts, and in the end nothing is left but
    what the rules keep."""
    monkeypatch.setattr(fetching, "_THREADS", 1)
    monkeypatch.setattr(snapshotter, "_PUTTING_THREADS", 1)
    objects = MemoryObjects() if kind == "memory" else LocalObjects(tmp_path / "objects")
    copy_objects(ferry.objects, objects, tmp_path)

    race(seed, tmp_path, ferry, prepared, objects, restorers_count=4)


@pytest.mark.parametrize("seed", range(SEEDS * 20))
def test_publishers_race(
    seed: int, tmp_path: Path, ferry: Ferry, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without restores, more often: what a publisher puts beside a sweep is there when it returns."""
    monkeypatch.setattr(snapshotter, "_PUTTING_THREADS", 1)
    objects = MemoryObjects()
    copy_objects(ferry.objects, objects, tmp_path)

    race(seed, tmp_path, ferry, prepared, objects, restorers_count=0)
