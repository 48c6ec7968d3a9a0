"""What is kept and why, what may go, and whether what is promised can be restored."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.archive_names import (
    PieceName,
    RangeName,
    RangeObject,
    SegmentName,
    parse_segment_name,
    ranges_prefix,
)
from pipeline.errors import LeaseCorrupt, NotFound
from pipeline.leases import Kind, Lease, LeaseName, Names, dead, decode_lease, encode_lease, parse_lease_name
from pipeline.objects import LocalObjects, MemoryObjects, ObjectInfo, ObjectStore, open_objects
from pipeline.plans import SegmentObject
from pipeline.restorable import Hole, Span, restorable
from pipeline.retention import Rules, Snapshot, doomed, expired, judge, window_start
from pipeline.routes import History
from pipeline.snapshot import Manifest, ManifestName, encode_manifest
from tests.ferries import Ferry, Killed, make_ferry
from tests.topology.commands import here
from tests.turns import Turns, copy_objects
from tests.walks import GENERATION
from topology import restore_plans
from topology.collector import look, sweep
from topology.holding import Clock, held, listed_leases
from topology.promises import promises
from topology.restore_plans import Request
from topology.restorer import restore

DAY_S = 86_400
NOW_S = 100 * DAY_S


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"), events=700, snapshots=4)


@pytest.fixture
def objects(ferry: Ferry, tmp_path: Path) -> LocalObjects:
    copy = LocalObjects(tmp_path / "objects")
    copy_objects(ferry.objects, copy, tmp_path)
    return copy


def timeless(now_s: float = NOW_S) -> Clock:
    """A clock by which nothing takes time."""
    return Clock(now_s=lambda: now_s, steady_s=lambda: 0.0, sleep=lambda _: None)


def collected(objects: ObjectStore, rules: Rules, *, archive: bool = False, clock: Clock | None = None) -> set[str]:
    """Names of what a sweep deleted."""
    clock = clock or timeless()
    seen = look(objects, "walk", rules, archive=archive, clock=clock)
    swept = sweep(objects, seen, rules, archive=archive, clock=clock)
    return {one.name for one in swept.deleted}


def names(objects: ObjectStore) -> set[str]:
    return {info.name for info in objects.list()}


# Rules


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(), [10, 64, 70, 140, 200]),
        (Rules(last=1), [200]),
        (Rules(last=2), [140, 200]),
        (Rules(last=9), [10, 64, 70, 140, 200]),
        (Rules(days=3.5), [140, 200]),
        (Rules(heights=frozenset({64, 65})), [64, 200]),
        (Rules(every=64), [10, 64, 140, 200]),
        (Rules(every=1000), [10, 200]),
        (Rules(last=2, heights=frozenset({10})), [10, 140, 200]),
    ],
)
def test_rules_add_up(ferry: Ferry, rules: Rules, kept: list[int]) -> None:
    """A snapshot stays if any rule keeps it; the newest always does. Taken one a day, the last today."""
    manifest = ferry.manifests[0]
    snapshots = [
        Snapshot(ManifestName("walk", b"g" * 16, height, b"r" * 8), NOW_S - age * DAY_S, manifest)
        for height, age in zip((10, 64, 70, 140, 200), (9, 6, 5, 3, 0), strict=True)
    ]
    verdicts = judge(snapshots, rules, NOW_S)

    assert [one.snapshot.name.height for one in verdicts if one.keeps] == kept
    later = judge(snapshots, rules, NOW_S - 50 * DAY_S)  # a clock that went back
    assert {one.snapshot.name for one in later if one.keeps} >= {one.snapshot.name for one in verdicts if one.keeps}


def test_what_cannot_be_read_stays(ferry: Ferry) -> None:
    """A manifest that this build cannot read is nobody's to delete; one that lacks a part is no snapshot."""
    name = ManifestName("walk", b"g" * 16, 5, b"r" * 8)
    unread = Snapshot(name, 0, None)
    lacking = Snapshot(name._replace(height=7), 0, ferry.manifests[0], "part-00000-00.sst")
    whole = Snapshot(name._replace(height=6), 0, ferry.manifests[0])
    keeps = {one.snapshot.name.height: bool(one.keeps) for one in judge([unread, lacking, whole], Rules(last=1), 0)}

    assert keeps == {5: True, 6: True, 7: False}
    assert window_start(judge([unread, whole], Rules(last=1), 0), b"g" * 16) == 6


def of_generation(manifest: Manifest, number: int, seq: int) -> Manifest:
    (resume,) = manifest.resumes
    return replace(manifest, resumes=(replace(resume, generation_number=number, seq=seq),))


@pytest.mark.parametrize(
    ("rules", "new_seq", "new_archived", "kept_of_old"),
    [
        (Rules(), 5, True, [10, 50, 90]),  # no rule, and all stays
        (Rules(ended_days=1), 5, True, [10, 50, 90]),  # which is no rule
        (Rules(last=1), 5, True, [10, 90]),  # 20 days are not enough
        (Rules(last=1, ended_days=19), 5, True, []),
        (Rules(last=1, ended_days=19), 0, True, []),
        (Rules(last=1, ended_days=19), 0, False, [10, 90]),  # a base state alone may have been given up
        (Rules(last=1, ended_days=19, heights=frozenset({50})), 5, False, [50]),
        (Rules(last=1, ended_days=19, days=22), 5, False, [90]),
    ],
)
def test_a_generation_that_ended(
    ferry: Ferry, rules: Rules, new_seq: int, new_archived: bool, kept_of_old: list[int]
) -> None:
    """Its newest snapshot and its base state stay for so many days after another one went on; then what is archived of
    it may go as well. The newer one is kept as ever."""
    old, new = (ManifestName("walk", bytes([number]) * 16, 0, b"r" * 8) for number in (1, 2))
    snapshots = [
        Snapshot(old._replace(height=height), NOW_S - age * DAY_S, of_generation(ferry.manifests[0], 1, seq))
        for height, age, seq in ((10, 60, 0), (50, 50, 60), (90, 21, 100))
    ] + [Snapshot(new._replace(height=90), NOW_S - 20 * DAY_S, of_generation(ferry.manifests[0], 2, new_seq))]
    archived = {old.generation: 1} | ({new.generation: 2} if new_archived else {})
    gone = expired(snapshots, archived, rules, NOW_S)
    verdicts = judge(snapshots, rules, NOW_S, gone)
    infos = [ObjectInfo(str(SegmentName("walk", old.generation, 0, first, first + 63)), 10) for first in (0, 64)]
    swept = {one.name for one in doomed(infos, verdicts, Names(), archive=True, gone=gone)} & {
        one.name for one in infos
    }
    history = History(1, 1)
    hops = [SegmentObject(SegmentName("walk", old.generation, 0, 0, 127), 9)]
    promise = restorable(
        old.generation,
        verdicts,
        hops,
        [],
        history,
        everything=not rules.are_set,
        from_empty=True,
        has_expired=old.generation in gone,
    )

    assert [one.snapshot.name.height for one in verdicts if one.keeps] == [*kept_of_old, 90]
    assert (len(swept) == 2) is (kept_of_old in ([], [50]))
    assert (promise.first is None) is (kept_of_old in ([], [50]))
    assert promise.holes == []


def test_generations_told_by_what_is_archived(objects: LocalObjects, ferry: Ferry) -> None:
    """An ended generation without any snapshot is known by its segments; without a newer one it has not ended."""
    for manifest in ferry.manifests:
        objects.delete(manifest.name)
    rules, clock = Rules(last=1), timeless(time.time() + 40 * DAY_S)
    assert look(objects, "walk", rules, archive=True, clock=clock).expired == frozenset()
    (resume,) = ferry.manifests[0].resumes
    newer = replace(resume, generation=b"n" * 16, generation_number=2)
    one = replace(ferry.manifests[0], resumes=(newer,))
    for part in one.parts:
        objects.put_new(one.part_name(part), b"?")
    objects.put_new(one.name, encode_manifest(one))
    seen = look(objects, "walk", rules, archive=True, clock=clock)

    assert seen.expired == {GENERATION.generation}
    gone = {one.name for one in seen.doomed}
    assert gone >= {name for name in names(objects) if name.endswith(".seg")}
    assert gone.isdisjoint({one.name, *map(one.part_name, one.parts)})


def test_pieces_that_nobody_finished(ferry: Ferry) -> None:
    """Go, unless a lease names them; whole ones stay, also beside others of the same heights."""
    first, second = (RangeName("walk", b"g" * 16, 0, first, first + 63) for first in (0, 64))
    whole = [*map(str, first.pieces(2)), *map(str, second.pieces(1))]
    half = [str(first.pieces(3)[0]), str(first.pieces(3)[2]), str(second.pieces(2)[1])]
    infos = [ObjectInfo(name, 10) for name in (*whole, *half)]

    assert {one.name for one in doomed(infos, [], Names())} == set(half)
    assert {one.name for one in doomed(infos, [], Names(half[:1]))} == set(half[1:])
    assert doomed(infos, [], Names([ranges_prefix("walk", b"g" * 16, 0)])) == []


# Leases


def test_lease_round_trip() -> None:
    """A lease is what its name and bytes say."""
    name = LeaseName("bitcoin", Kind.PIN, b"12345678", 1_700_000_000)
    lease = Lease(names=("a/b", "c/"), lasts_s=5)

    assert str(name) == "bitcoin/leases/pin-3132333435363738-001700000000.json"
    assert parse_lease_name(str(name)) == name
    assert parse_lease_name(str(name) + "x") is None
    assert decode_lease(encode_lease(lease), "") == lease
    data = encode_lease(lease)
    for at in range(len(data)):
        with pytest.raises(LeaseCorrupt):
            decode_lease(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "here")


def test_names_and_folders() -> None:
    """A name with a slash at its end is all below it."""
    kept = Names(["a/b", "c/d/"])

    assert [name in kept for name in ("a/b", "a/bc", "a/b/c", "c/d/e", "c/d/e/f", "c/de", "c/d")] == [
        *(True, False, False),
        *(True, True, False, False),
    ]


def test_only_what_was_seen_twice_is_dead() -> None:
    """A lease that came up since the first look is alive, whatever its clock says."""
    old, renewed = (LeaseName("walk", Kind.PIN, b"1" * 8, expires_s) for expires_s in (10, 20))

    assert dead([old, renewed], [old], now_s=99) == [old]
    assert dead([old], [old], now_s=10) == []


# Sweeps


def test_what_no_rule_keeps_goes(objects: LocalObjects, ferry: Ferry, tmp_path: Path) -> None:
    """Manifests and their parts, nothing else; every archived height restores as before."""
    before, (*gone, newest) = names(objects), ferry.manifests
    deleted = collected(objects, Rules(last=1))

    assert deleted == {name for one in gone for name in (one.name, *map(one.part_name, one.parts))}
    assert names(objects) == before - deleted
    assert newest.name in before
    assert collected(objects, Rules(last=1)) == set()
    for height in (gone[0].height, newest.height):
        restored = restore(objects, tmp_path / str(height), Request(height=height), claimed=True)
        assert restored.meta.tip.root == ferry.headers[height].post_root


def test_in_a_bucket(ferry: Ferry, s3_url: str, tmp_path: Path) -> None:
    """The same behind S3: what no rule keeps goes, what a pin names stays until it ends."""
    objects, (gone, *_, newest) = open_objects(s3_url), ferry.manifests
    snapshots = LocalObjects(tmp_path / "snapshots")
    for manifest in (gone, newest):
        for name in (manifest.name, *map(manifest.part_name, manifest.parts)):
            snapshots.put_new(name, ferry.objects.get(name))
    copy_objects(snapshots, objects, tmp_path)
    clock = timeless(time.time())
    with held(objects, "walk", Kind.PIN, [f"{gone.folder}/"]):
        assert collected(objects, Rules(last=1), clock=clock) == set()

    assert collected(objects, Rules(last=1), clock=clock) == {gone.name, *map(gone.part_name, gone.parts)}
    assert names(objects) == {newest.name, *map(newest.part_name, newest.parts)}


def test_orphans_and_leftovers_go(objects: LocalObjects, ferry: Ferry, tmp_path: Path) -> None:
    """Parts without a manifest, leases of the dead, drafts of the killed; what is young or unknown stays."""
    victim = ferry.manifests[0]
    objects.delete(victim.name)
    stale = str(LeaseName("walk", Kind.INTENT, b"1" * 8, 1000))
    objects.put_new(stale, encode_lease(Lease(names=(f"{ferry.manifests[1].folder}/",))))
    objects.put_new("walk/notes.txt", b"of the operator")
    killed, young = (tmp_path / "objects" / "walk" / f".new-{name}" for name in ("killed", "young"))
    killed.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(killed, (NOW_S - 5000, NOW_S - 5000))
    os.utime(young, (NOW_S - 5, NOW_S - 5))
    deleted = collected(objects, Rules())

    assert deleted == set(map(victim.part_name, victim.parts))
    assert stale not in names(objects)
    assert "walk/notes.txt" in names(objects)
    assert (killed.exists(), young.exists()) == (False, True)


def test_a_manifest_that_comes_during_a_sweep(objects: LocalObjects, ferry: Ferry) -> None:
    """Its parts had none when the sweep began, no rule keeps it: it goes with the next one, no part before."""
    late = ferry.manifests[0]
    data = objects.get(late.name)
    objects.delete(late.name)
    came = Clock(now_s=lambda: NOW_S, steady_s=lambda: 0.0, sleep=lambda _: objects.put_new(late.name, data))
    own = {late.name, *map(late.part_name, late.parts)}

    assert not collected(objects, Rules(last=1), clock=came) & own
    assert names(objects) >= own
    assert collected(objects, Rules(last=1)) == own


def test_pins_and_intents_keep(objects: LocalObjects, ferry: Ferry) -> None:
    """What a living lease names stays, until it ends."""
    one, other = ferry.manifests[:2]
    pinned = [one.name, *map(one.part_name, one.parts)]
    objects.delete(other.name)
    with (
        held(objects, "walk", Kind.PIN, pinned, clock=timeless()),
        held(objects, "walk", Kind.INTENT, [f"{other.folder}/"], clock=timeless()),
    ):
        collected(objects, Rules(last=1))
        assert names(objects) >= {*pinned, *map(other.part_name, other.parts)}
    collected(objects, Rules(last=1))

    assert not names(objects) & {*pinned, *map(other.part_name, other.parts)}
    assert listed_leases(objects, "walk") == []


def test_an_unreadable_lease_stops_a_sweep(objects: LocalObjects) -> None:
    """What it keeps is not known, so nothing goes."""
    objects.put_new(str(LeaseName("walk", Kind.PIN, b"1" * 8, NOW_S + 5)), b"{}")
    before = names(objects)

    with pytest.raises(LeaseCorrupt, match="pin-"):
        collected(objects, Rules(last=1))
    assert names(objects) == before


def test_archive_goes_only_below_the_window(objects: LocalObjects, ferry: Ferry, tmp_path: Path) -> None:
    """If told so: segments that end at or below the lowest promised height. All above still restore."""
    start = ferry.manifests[-2].height
    deleted = collected(objects, Rules(last=2), archive=True)
    segments = {name for name in deleted if parse_segment_name(name)}

    assert segments == {
        str(segment)
        for segment in map(parse_segment_name, names(ferry.objects))
        if segment is not None and segment.last <= start
    }
    assert segments
    (promise,) = promises(objects, "walk", Rules(last=2))
    assert (promise.first, promise.last, promise.holes) == (start, ferry.node.meta.final_height, [])
    for height in (start, start + 1, ferry.node.meta.final_height):
        restored = restore(objects, tmp_path / str(height), Request(height=height), claimed=True)
        assert restored.meta.tip.root == ferry.headers[height].post_root


def test_killed_at_every_request(ferry: Ferry, tmp_path: Path) -> None:
    """A sweep that dies anywhere leaves nothing that the next one does not bring to the same end; the newest
    snapshot is whole at any time."""
    rules, after, snapshots = Rules(last=1), None, tmp_path / "snapshots"
    folder = f"walk/{GENERATION.generation.hex()}/snapshots"
    shutil.copytree(ferry.objects_path / folder, snapshots / folder)
    for dies_at in itertools.count(1):
        objects = MemoryObjects()
        copy_objects(LocalObjects(snapshots), objects, tmp_path)
        turns = Turns(dies_at, objects)

        def collect(objects: ObjectStore, clock: Clock) -> None:
            sweep(objects, look(objects, "walk", rules, clock=clock), rules, clock=clock)

        actor = turns.add("collector", collect, dies_at=dies_at)
        turns.run()
        newest = ferry.manifests[-1]
        assert names(objects) >= {newest.name, *map(newest.part_name, newest.parts)}
        collected(objects, rules, clock=timeless(turns.now_s + 10_000))
        after = after or names(objects)
        assert names(objects) == after
        if actor.error is None:
            break
        assert isinstance(actor.error, Killed)
    assert dies_at > 20


def test_a_listing_that_lies_is_not_asked_for_ever(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that is listed and never there ends a plan, and does not hang it."""
    listed = list(objects.list())
    for info in listed:
        if info.name.endswith("manifest.json"):
            objects.delete(info.name)
    monkeypatch.setattr(objects, "list", lambda prefix="": iter(listed), raising=False)

    with pytest.raises(NotFound):
        restore_plans.plan_restore(objects, Request())


def test_range_diffs_go_with_what_they_lead_over(ferry: Ferry) -> None:
    """Those that end at or below the window; one that a pin names stays."""
    snapshot = Snapshot(ManifestName("walk", b"g" * 16, 130, b"r" * 8), 0, ferry.manifests[0])
    pieces = [
        str(PieceName(RangeName("walk", b"g" * 16, 0, first, last), 1, 1))
        for first, last in ((0, 63), (64, 127), (128, 191))
    ]
    infos = [ObjectInfo(name, 10) for name in (*pieces, str(segment(64, 130).name), str(segment(131, 191).name))]
    verdicts = judge([snapshot], Rules(last=1), 0)

    assert [one.name for one in doomed(infos, verdicts, Names(pieces[:1]), archive=True)] == [
        infos[1].name,
        infos[3].name,
    ]
    assert doomed(infos, verdicts, Names(), archive=False) == []


# Promises


def segment(first: int, last: int, shard: int = 0) -> SegmentObject:
    return SegmentObject(SegmentName("walk", b"g" * 16, shard, first, last), 1000)


def range_diff(first: int, last: int) -> RangeObject:
    return RangeObject(RangeName("walk", b"g" * 16, 0, first, last), (500,))


def promised(
    manifest: Manifest, heights: list[int], hops: list[SegmentObject], ranges: list[RangeObject], shards: int, last: int
) -> tuple[list[Span], list[Hole]]:
    snapshots = [Snapshot(ManifestName("walk", b"g" * 16, height, b"r" * 8), 0, manifest) for height in heights]
    rules = Rules(last=last)
    verdicts = judge(snapshots, rules, 0)
    begins, everything = any(hop.name.first == 0 for hop in hops), not rules.are_set
    history = History(1, shards)
    found = restorable(b"g" * 16, verdicts, hops, ranges, history, everything=everything, from_empty=begins)
    return found.spans, [hole._replace(why="") for hole in found.holes]


@pytest.mark.parametrize(
    ("heights", "hops", "ranges", "shards", "last", "spans", "holes"),
    [
        ([], [segment(0, 63), segment(64, 99)], [], 1, 0, [(0, 99, None)], []),
        ([50], [segment(0, 63), segment(64, 99)], [], 1, 0, [(0, 49, None), (50, 99, 50)], []),
        ([50], [segment(0, 63), segment(128, 191)], [], 1, 0, [(0, 49, None), (50, 63, 50)], [(64, 191)]),
        ([50, 130], [segment(128, 191)], [], 1, 1, [(130, 191, 130)], []),
        ([50, 130], [segment(128, 191)], [], 1, 2, [(50, 50, 50), (130, 191, 130)], [(51, 129)]),
        ([63], [segment(128, 191)], [range_diff(64, 127)], 1, 1, [(63, 63, 63), (127, 191, 63)], [(64, 126)]),
        ([50], [segment(0, 63), segment(0, 99, 1)], [], 2, 0, [(0, 49, None), (50, 63, 50)], []),
        ([50], [segment(51, 63), segment(60, 99, 1)], [], 2, 1, [(50, 50, 50)], [(51, 63)]),
    ],
)
def test_every_height_or_its_hole(
    ferry: Ferry,
    heights: list[int],
    hops: list[SegmentObject],
    ranges: list[RangeObject],
    shards: int,
    last: int,
    spans: list[tuple[int, int, int | None]],
    holes: list[tuple[int, int]],
) -> None:
    """Each promised height has a start that leads there, in every shard, or is in a hole."""
    found, missing = promised(ferry.manifests[0], heights, hops, ranges, shards, last)

    assert found == [Span(*span) for span in spans]
    assert [(hole.first, hole.last) for hole in missing] == holes


def test_holes_are_those_of_restores(objects: LocalObjects, ferry: Ferry) -> None:
    """Whatever is missing: a height restores if and only if it is in no hole."""
    final = ferry.node.meta.final_height
    for victim in [str(name) for name in map(parse_segment_name, sorted(names(objects))) if name is not None]:
        data = objects.get(victim)
        objects.delete(victim)
        (promise,) = promises(objects, "walk", Rules())
        holes = {height for hole in promise.holes for height in range(hole.first, hole.last + 1)}
        for height in range(0, final + 1, 7):
            try:
                plan = restore_plans.plan_restore(objects, Request(height=height))
                restores = plan.manifest is not None or plan.segments[0].name.first == 0
            except NotFound:
                restores = False
            assert restores is (height not in holes and promise.first <= height <= promise.last), (victim, height)
        objects.put_new(victim, data)


# Commands


def test_commands(objects: LocalObjects, ferry: Ferry, tmp_path: Path) -> None:
    """`gc --dry-run` says what `gc` does, and changes nothing; `prove-restorable` ends with 4 where there is a hole."""
    options = ["--objects", f"file://{tmp_path}/objects", "--data-dir", tmp_path, "--json"]
    rules = ["--keep-last", "1", "--keep-height", str(ferry.manifests[1].height)]
    before = names(objects)
    said = here("gc", "--dry-run", *rules, *options).ok()
    assert names(objects) == before
    done = here("gc", "--grace", "0", *rules, *options).ok()

    assert said["swept"] == done["swept"]
    assert {one["object"] for one in done["swept"]} == before - names(objects)
    assert [(one["height"], one["why"]) for one in done["kept"]] == [
        (ferry.manifests[1].height, ["its height is to be kept"]),
        (ferry.manifests[-1].height, ["the newest of its generation", "among the last 1"]),
    ]
    assert here("gc", "--grace", "0", *rules, *options).ok()["swept"] == []
    promise = here("prove-restorable", *rules, *options).ok()["generations"][0]
    assert (promise["first_height"], promise["holes"]) == (ferry.manifests[-1].height, [])
    last = max(filter(None, map(parse_segment_name, names(objects))), key=lambda name: name.first)
    objects.delete(str(last._replace(first=last.first - 64, last=last.first - 1)))
    broken = here("prove-restorable", *options)
    assert (broken.code, broken.document["restorable"]) == (4, False)
    assert broken.document["generations"][0]["holes"][0]["to"] <= last.first - 1
    here("gc", *options[:1], f"file://{tmp_path}/nothing", *options[2:]).failed(NotFound)
