"""Sweeps, publishers, squashers and restores at once, request by request in an order that a seed chooses.

`STATEFERRY_RACE_SEEDS=200 pytest tests/test_sweep_races.py` (`make races`) runs more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import ranges
from pipeline import squash as squashing
from pipeline.archive_names import parse_piece_name, whole_ranges
from pipeline.errors import ObjectMissing
from pipeline.leases import LEASE_S
from pipeline.objects import LocalObjects, MemoryObjects, ObjectStore
from pipeline.parts import WrittenPart
from pipeline.position import Meta
from pipeline.retention import Rules
from pipeline.snapshot import Manifest, decode_manifest, parse_manifest_name
from pipeline.stores.rocksdb import RocksStore
from tests.ferries import Ferry, Killed, held, make_ferry
from tests.turns import Actor, Turns, copy_objects
from tests.walks import GENERATION
from topology import fetching, holding, snapshotter, squasher
from topology.children import no_report
from topology.collector import Swept, look, sweep
from topology.holding import Clock
from topology.restore_plans import Request
from topology.restorer import Restored, restore
from topology.squasher import Archive, Squashed, squash

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
    sweep_the_rest(turns, collectors[0], objects)
    (newest,) = manifests(objects)
    assert newest.height >= max(manifest.height for manifest in (*returned, *ferry.manifests))
    left = {info.name for info in objects.list() if "/archive/" not in info.name}
    assert left == {newest.name, *map(newest.part_name, newest.parts)}


def sweep_the_rest(turns: Turns, actor: Actor, objects: ObjectStore) -> None:
    """Once all who held leases are gone."""
    clock = turns.clock(actor)
    lasting = Clock(now_s=clock.now_s, steady_s=clock.steady_s, sleep=lambda _: None)
    for _ in range(2):
        turns.now_s += 100_000
        sweep(objects, look(objects, "walk", RULES, clock=lasting), RULES, clock=lasting)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_race(
    seed: int, tmp_path: Path, ferry: Ferry, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every restore ends with the state of its height, every manifest has its parts, and in the end nothing is left but
    what the rules keep. In memory and in a directory by turns."""
    monkeypatch.setattr(fetching, "_THREADS", 1)
    monkeypatch.setattr(snapshotter, "_PUTTING_THREADS", 1)
    objects = LocalObjects(tmp_path / "objects") if seed % 2 else MemoryObjects()
    copy_objects(ferry.objects, objects, tmp_path)

    race(seed, tmp_path, ferry, prepared, objects, restorers_count=4)


@pytest.mark.parametrize("seed", range(SEEDS * 10))
def test_publishers_race(
    seed: int, tmp_path: Path, ferry: Ferry, prepared: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without restores, more often: what a publisher puts beside a sweep is there when it returns."""
    monkeypatch.setattr(snapshotter, "_PUTTING_THREADS", 1)
    objects = MemoryObjects()
    copy_objects(ferry.objects, objects, tmp_path)

    race(seed, tmp_path, ferry, prepared, objects, restorers_count=0)


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    """Two segments, and a snapshot above them."""
    ferry = make_ferry(tmp_path_factory.mktemp("archived"), events=450, snapshots=0)
    assert ferry.snapshot().height >= 127
    return ferry


def race_squashers(seed: int, folder: Path, ferry: Ferry) -> None:
    """Two who make the same three range diffs, the last of the others, and two sweeps that may take pieces of one that
    lacks some, and all that they are made of: the rules promise no height below the newest snapshot."""
    objects = MemoryObjects()
    copy_objects(ferry.objects, objects, folder)
    turns = Turns(seed, objects)
    archive = Archive("walk", GENERATION.generation, 0)

    def squashes(number: int) -> Callable[[ObjectStore, Clock], list[Squashed]]:
        def run(objects: ObjectStore, clock: Clock) -> list[Squashed]:
            made = []
            for one in squash(objects, archive, folder / f"squashing-{number}", clock=clock):
                there = {info.name for info in objects.list()}  # its maker's lease is held still
                assert {str(piece) for piece in one.name.pieces(len(one.sizes))} <= there
                made.append(one)
            return made

        return run

    def collect(objects: ObjectStore, clock: Clock) -> list[Swept]:
        seen = look(objects, "walk", RULES, archive=True, clock=clock)
        return [sweep(objects, seen, RULES, archive=True, clock=clock)]

    dies_at = turns.random.choice([0, turns.random.randint(1, 40)])
    squashers = [turns.add(f"squasher {one}", squashes(one), dies_at=dies_at if one else 0) for one in (0, 1)]
    collectors = [turns.add(f"collector {one}", collect) for one in (0, 1)]
    turns.run()

    for actor in (*squashers, *collectors):
        assert actor.error is None or isinstance(actor.error, Killed), (actor.name, actor.error)
    turns.now_s += NEVER_S
    sweep_the_rest(turns, collectors[0], objects)
    pieces = [piece for info in objects.list() if (piece := parse_piece_name(info.name)) is not None]
    assert sum(len(one.sizes) for one in whole_ranges((piece, 1) for piece in pieces)) == len(pieces)


NEVER_S = 1e7


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Range diffs of some pieces each, under leases that nobody needs to renew."""
    monkeypatch.setattr(squashing, "LEVELS", (64, 128))
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 9)
    monkeypatch.setattr(ranges, "PIECE_RAW_BYTES", 2000)
    monkeypatch.setattr(squasher, "_THREADS", 1)
    monkeypatch.setattr(holding, "LEASE_S", NEVER_S)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(SEEDS * 3))
def test_squashers_race(seed: int, tmp_path: Path, archived: Ferry) -> None:
    """What a range diff is made of, and its pieces, stay while its maker lives; of one that was killed, and is made by
    nobody else, nothing is left in the end."""
    race_squashers(seed, tmp_path, archived)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("mutant", "first"), [("publishers do not wait", 220), ("squashers hold no lease", 50)])
def test_races_see_what_is_wrong(
    mutant: str,
    first: int,
    tmp_path: Path,
    ferry: Ferry,
    prepared: list[Prepared],
    archived: Ferry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A publisher that does not wait for a sweep's end, a squasher without a lease: each fails at some seed, the first
    of them soon after ``first``."""
    monkeypatch.setattr(holding, "LEASE_S", NEVER_S if mutant == "squashers hold no lease" else LEASE_S)
    monkeypatch.setattr(snapshotter, "_PUTTING_THREADS", 1)
    if mutant == "publishers do not wait":
        monkeypatch.setattr(snapshotter, "wait_for_sweeps", lambda *_: None)
    else:
        monkeypatch.setattr(squasher, "held", lambda *_, **__: nullcontext())
    for seed in range(first, first + 600):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        try:
            if mutant == "squashers hold no lease":
                race_squashers(seed, folder, archived)
            else:
                objects = MemoryObjects()
                copy_objects(ferry.objects, objects, folder)
                race(seed, folder, ferry, prepared, objects, restorers_count=0)
        except AssertionError:
            return
    pytest.fail("no seed has found it")
