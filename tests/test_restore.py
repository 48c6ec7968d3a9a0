import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from pipeline.archive_names import RangeName, RangeObject, SegmentName, parse_segment_name
from pipeline.errors import (
    ArchiveConflict,
    AuditFailed,
    ManifestCorrupt,
    NotEmpty,
    NotFound,
    PartCorrupt,
    SegmentCorrupt,
    StateferryError,
    UsageError,
)
from pipeline.objects import LocalObjects, MemoryObjects
from pipeline.parts import write_parts
from pipeline.plans import RATES, Rates, SegmentObject, SnapshotObject, newest_names
from pipeline.position import Meta
from pipeline.restore import SUCCESSORS, Stage
from pipeline.routes import History, Route, find_route
from pipeline.snapshot import ManifestName, encode_manifest
from pipeline.stores.base import PROOF_KEY
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import decode_proof
from tests.ferries import Ferry, Killed, held, kill_at, make_ferry, opened
from tests.walks import GENERATION, Node, content
from topology.restore_plans import Request, plan_restore
from topology.restorer import Progress, restore

__all__ = ["kill_at"]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"))


@pytest.fixture
def objects(ferry: Ferry, tmp_path: Path) -> LocalObjects:
    """A copy that a test may damage."""
    return ferry.damageable(tmp_path / "objects")


def edit(objects: LocalObjects, name: str, change: Callable[[bytes], bytes]) -> None:
    data = objects.get(name)
    objects.delete(name)
    objects.put_new(name, change(data))


def flip(at: int) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        place = at % len(data)
        return data[:place] + bytes([data[place] ^ 1 << at % 8]) + data[place + 1 :]

    return flipped


def follow_on(ferry: Ferry, data_dir: Path) -> tuple[Meta, object]:
    """A restored node follows the rest of the log."""
    with opened(data_dir) as store:
        node = Node(ferry.driven.wire, store)
        node.follow_and_commit()
        return node.meta, content(store)


def comparable(meta: Meta) -> Meta:
    """Without how far back one node could go."""
    return replace(meta, base_height=0, journal_first_seq=0, journal_first_height=0, archived_to=0)


def test_every_height(ferry: Ferry, tmp_path: Path) -> None:
    """Any archived height can be restored; the state and root are the source's, and the node can follow the rest of
    the log to where the source is."""
    source = ferry.node.meta
    heights = range(source.final_height + 1)
    for height in (
        heights if os.environ.get("STATEFERRY_ALL_HEIGHTS") else {*heights[::62], *heights[63:66], heights[-1]}
    ):
        data_dir = tmp_path / str(height)
        restored = restore(ferry.objects, data_dir, Request(height=height), claimed=True)
        meta, state = held(data_dir)
        header = ferry.headers[height]

        assert restored.meta == meta
        assert (meta.tip.ref, meta.tip.root) == (header.ref, header.post_root)
        assert (meta.base_height, meta.final_height, meta.archived_to) == (height, height, height + 1)
        assert state == ferry.content_at(height)
        meta, state = follow_on(ferry, data_dir)
        assert comparable(meta) == comparable(source)
        assert state == content(ferry.store)


def test_newest_and_proven(ferry: Ferry, tmp_path: Path) -> None:
    """Without a height it goes as far as the archive leads, and proves what it has."""
    seen: list[Progress] = []
    restored = restore(ferry.objects, tmp_path, Request(), progress=seen.append)

    assert restored.ref.height == ferry.node.meta.final_height
    assert restored.proof.proven
    assert restored.manifest_name == ferry.manifests[-1].name
    assert restored.keys == len(ferry.content_at(restored.ref.height))
    assert not (tmp_path / "restoring").exists()
    assert [progress.stage for progress in seen] == sorted((p.stage for p in seen), key=list(Stage).index)
    with opened(tmp_path) as store:
        assert decode_proof(store.get_meta(PROOF_KEY)) == restored.proof


def test_claimed_stays_claimed(ferry: Ferry, tmp_path: Path) -> None:
    """Only hashing every key makes a state proven."""
    restore(ferry.objects, tmp_path, Request(), claimed=True)

    with opened(tmp_path) as store:
        assert not decode_proof(store.get_meta(PROOF_KEY)).proven


def test_from_the_archive_alone(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Without any snapshot, segments from the first block on are enough; with a hole, they are not."""
    for manifest in ferry.manifests:
        objects.delete(manifest.name)
    restored = restore(objects, tmp_path / "restored", Request())

    assert restored.proof.proven
    assert restored.ref.height == ferry.node.meta.final_height
    assert comparable(follow_on(ferry, tmp_path / "restored")[0]) == comparable(ferry.node.meta)
    first = next(info.name for info in objects.list() if parse_segment_name(info.name))
    objects.delete(first)
    with pytest.raises(NotFound, match="first block"):
        restore(objects, tmp_path / "other", Request())
    assert not (tmp_path / "other" / "store").exists()


@pytest.mark.parametrize("at", [0, 3, 17, 100, 999, 12345])
def test_flipped_bits(ferry: Ferry, objects: LocalObjects, tmp_path: Path, at: int) -> None:
    """Each damaged object is refused with its own error, and there is no store."""
    manifest = ferry.manifests[1]
    segment = next(
        info.name for info in objects.list() if (name := parse_segment_name(info.name)) and name.first > manifest.height
    )
    for name, error in (
        (manifest.part_name(manifest.parts[-1]), PartCorrupt),
        (segment, SegmentCorrupt),
        (manifest.name, ManifestCorrupt),
    ):
        found = parse_segment_name(name)
        height = manifest.height if found is None else found.last
        edit(objects, name, flip(at))
        objects_seen = [] if found is None else [one for one in ferry.manifests if one.height > manifest.height]
        for one in objects_seen:
            objects.delete(one.name)
        with pytest.raises(error) as caught:
            restore(objects, tmp_path / "restored", Request(height=height))
        assert name in caught.value.where
        assert not (tmp_path / "restored" / "store").exists()
        edit(objects, name, flip(at))
    restored = restore(objects, tmp_path / "restored", Request(height=manifest.height))
    assert restored.proof.proven


def test_foreign_objects(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Another snapshot's part, segment or manifest under a name is refused, however sound it is by itself."""
    one, other = ferry.manifests[:2]
    part = one.part_name(one.parts[0])
    foreign = objects.get(other.part_name(other.parts[-1]))
    own = objects.get(part)
    edit(objects, part, lambda _: foreign)
    with pytest.raises(PartCorrupt):
        restore(objects, tmp_path / "restored", Request(height=one.height))
    edit(objects, part, lambda _: own)
    edit(objects, one.name, lambda _: ferry.objects.get(other.name))
    with pytest.raises(ManifestCorrupt, match="another name"):
        restore(objects, tmp_path / "restored", Request(height=one.height))
    for manifest in ferry.manifests:
        objects.delete(manifest.name)
    names = [info.name for info in objects.list() if parse_segment_name(info.name)]
    edit(objects, names[0], lambda _: ferry.objects.get(names[1]))
    with pytest.raises(SegmentCorrupt, match="another's name"):
        restore(objects, tmp_path / "restored", Request(height=10))


def test_a_part_of_another_state(ferry: Ferry, tmp_path: Path) -> None:
    """A publisher who lies consistently is found when the keys are hashed: there is no store then."""
    manifest, objects = ferry.manifests[1], MemoryObjects()
    files = {part.name: ferry.objects.get(manifest.part_name(part)) for part in manifest.parts}
    other = _with_first_value_changed(files[manifest.parts[0].name], tmp_path)
    first = replace(
        manifest.parts[0],
        name=f"part-00000-{other[1][:8].hex()}.sst",
        digest=other[1],
        size_bytes=len(other[0]),
    )
    lie = replace(manifest, parts=(first, *manifest.parts[1:]))
    objects.put_new(lie.name, encode_manifest(lie))
    objects.put_new(lie.part_name(first), other[0])
    for part in lie.parts[1:]:
        objects.put_new(lie.part_name(part), files[part.name])

    with pytest.raises((AuditFailed, StateferryError)) as caught:
        restore(objects, tmp_path / "restored", Request())
    assert caught.value.name in ("AuditFailed", "StoreCorrupt")
    assert not (tmp_path / "restored" / "store").exists()
    assert not restore(objects, tmp_path / "restored", Request(), claimed=True).proof.proven


def test_a_part_that_is_no_sorted_file(ferry: Ferry, tmp_path: Path) -> None:
    """Bytes with the digest that the manifest says, which a store cannot take in."""
    manifest, objects = ferry.manifests[1], MemoryObjects()
    garbage = b"no table at all " * 100
    digest = blake3(garbage).digest()
    parts = [
        replace(part, name=f"part-{number:05d}-{digest[:8].hex()}.sst", digest=digest, size_bytes=len(garbage))
        for number, part in enumerate(manifest.parts)
    ]
    lie = replace(manifest, parts=tuple(parts))
    objects.put_new(lie.name, encode_manifest(lie))
    for part in parts:
        objects.put_new(lie.part_name(part), garbage)

    with pytest.raises(PartCorrupt, match="cannot be taken in"):
        restore(objects, tmp_path, Request())
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "restoring").exists()


def _with_first_value_changed(data: bytes, folder: Path) -> tuple[bytes, bytes]:
    folder = folder / "forging"
    folder.mkdir()
    (folder / "part.sst").write_bytes(data)
    store = RocksStore(folder / "store")
    store.ingest([folder / "part.sst"])
    entries = list(store.scan())
    store.close()
    key, value = entries[0]
    forged = [(key, value[:-1] + bytes([value[-1] ^ 1])), *entries[1:]]
    (one,) = write_parts(forged, folder, raw_bytes_max=1 << 20)
    return one.path.read_bytes(), one.part.digest


def test_not_empty(ferry: Ferry, tmp_path: Path) -> None:
    """What is there is not overwritten."""
    restore(ferry.objects, tmp_path, Request(height=5), claimed=True)
    before = held(tmp_path)

    for height in (5, 6, None):
        with pytest.raises(NotEmpty):
            restore(ferry.objects, tmp_path, Request(height=height))
    assert held(tmp_path) == before


def test_an_unborn_store_is_none(ferry: Ferry, tmp_path: Path) -> None:
    """What a crash left of a store that was never written is no store."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "LOG").touch()

    assert restore(ferry.objects, tmp_path, Request(height=5), claimed=True).ref.height == 5


PLACES = [
    ("restore.planned", 1),
    ("restore.part_fetched", 2),
    ("restore.before_ingest", 1),
    ("restore.after_ingest", 1),
    ("restore.frame_applied", 3),
    ("prove.hashed", 1),
]


@pytest.mark.parametrize(("place", "hit"), PLACES)
def test_killed_for_real(ferry: Ferry, tmp_path: Path, place: str, hit: int) -> None:
    """A process killed at any stage is taken up where it was, and nothing that was checked is fetched again."""
    height = ferry.manifests[1].height + 5
    code = (
        "import sys; from pathlib import Path; from pipeline.objects import open_objects;"
        "from topology.restorer import Request, restore; from topology.settings import arm_failpoint;"
        "arm_failpoint(sys.argv[1]);"
        "restore(open_objects(sys.argv[2]), Path(sys.argv[3]), Request(height=int(sys.argv[4])))"
    )
    url, data_dir = f"file://{ferry.objects_path}", tmp_path / "restored"
    arguments = [f"{place}:{hit}", url, str(data_dir), str(height)]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -9
    here = {path.name for path in data_dir.glob("restoring/parts/*.sst")}
    restored = restore(ferry.objects, data_dir, Request(height=height))

    assert restored.proof.proven
    assert held(data_dir)[1] == ferry.content_at(height)
    manifest = ferry.manifests[1]
    needed = plan_restore(ferry.objects, Request(height=height)).size_bytes
    if place in ("restore.planned", "restore.part_fetched"):
        kept = sum(part.size_bytes for part in manifest.parts if part.name in here)
        assert restored.fetched_bytes <= needed - kept
        assert bool(here) is (place != "restore.planned")
    else:
        assert restored.fetched_bytes == 0


def test_another_request_starts_over(ferry: Ferry, tmp_path: Path, kill_at: Callable[[str, int], None]) -> None:
    """What an interrupted restore left is of no use to another request."""
    kill_at("restore.frame_applied", 1)
    with pytest.raises(Killed):
        restore(ferry.objects, tmp_path, Request(height=ferry.manifests[1].height + 3))
    restored = restore(ferry.objects, tmp_path, Request(height=7), claimed=True)

    assert restored.ref.height == 7
    assert held(tmp_path)[1] == ferry.content_at(7)


def test_what_is_missing_is_named(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Heights above the archive, other chains, and lost parts."""
    top = ferry.node.meta.final_height
    with pytest.raises(NotFound, match=f"block {top + 1} is missing"):
        restore(objects, tmp_path / "restored", Request(height=top + 1))
    with pytest.raises(NotFound, match="no snapshot"):
        restore(objects, tmp_path / "restored", Request(chain="other"))
    manifest = ferry.manifests[0]
    objects.delete(manifest.part_name(manifest.parts[0]))
    with pytest.raises(NotFound, match=manifest.parts[0].name):
        restore(objects, tmp_path / "restored", Request(height=manifest.height))
    assert not (tmp_path / "restored" / "restoring").exists()


def test_several_chains(objects: LocalObjects, tmp_path: Path) -> None:
    """Which chain must be said, if there are several."""
    objects.put_new(str(SegmentName("zoo", b"z" * 16, 0, 0, 1)), b"")

    with pytest.raises(UsageError, match="walk, zoo"):
        restore(objects, tmp_path / "restored", Request())
    assert restore(objects, tmp_path / "restored", Request(chain="walk", height=3), claimed=True).ref.height == 3


def test_plan(ferry: Ferry) -> None:
    """The newest snapshot below the height, then the fewest segments that lead there; sizes are summed up."""
    manifest = ferry.manifests[1]
    height = manifest.height + 70
    height = min(height, ferry.node.meta.final_height)
    planned = plan_restore(ferry.objects, Request(height=height))
    newest = max((one for one in ferry.manifests if one.height <= height), key=lambda one: one.height)

    assert planned.manifest == newest
    assert (planned.height, planned.frames) == (height, height - newest.height)
    assert planned.requests == len(newest.parts) + len(planned.segments) == sum(step.requests for step in planned.steps)
    assert planned.size_bytes == newest.size_bytes + sum(
        ferry.objects.size(str(segment.name)) for segment in planned.segments
    )


def snapshot(generation: int, height: int, size_bytes: int = 1) -> SnapshotObject:
    return SnapshotObject(ManifestName("walk", bytes([generation]) * 16, height, b"r" * 8), size_bytes, 1)


def segments(generation: int, *spans: tuple[int, int], shard: int = 0, size_bytes: int = 1) -> list[SegmentObject]:
    names = [SegmentName("walk", bytes([generation]) * 16, shard, *span) for span in spans]
    return [SegmentObject(name, size_bytes) for name in names]


def ranges(*spans: tuple[int, int], shard: int = 0, size_bytes: int = 1) -> list[RangeObject]:
    names = [RangeName("walk", bytes([1]) * 16, shard, *span) for span in spans]
    return [RangeObject(name, (size_bytes,)) for name in names]


HISTORIES = {bytes([number]) * 16: History(number, 1) for number in (1, 2)}


def shown(route: Route) -> tuple[int, list[tuple[int, int]]]:
    """The start, -1 without a snapshot; the hops in order, those that are range diffs with their end negative."""
    spans = [(one.name.last, one.name.first, 1) for one in route.segments]
    spans += [(one.name.last, one.name.first, -1) for one in route.ranges]
    start = -1 if route.snapshot is None else route.snapshot.height
    return start, [(first, last * sign) for last, first, sign in sorted(spans)]


def test_routes_over_generations() -> None:
    """A newer generation is preferred, where it leads to the height; else an older one."""
    snapshots = [snapshot(1, 100), snapshot(2, 400)]
    archive = [
        *segments(1, (0, 63), (64, 127), (128, 191), (100, 191)),
        *segments(2, (401, 447), (401, 500), (501, 511)),
    ]

    def found(height: int | None) -> tuple[int, int, int, list[tuple[int, int]]]:
        known = [one for one in snapshots if height is None or one.name.height <= height]
        route = find_route(known, archive, [], height, histories=HISTORIES)
        return route.generation[0], *shown(route)[:1], route.height, shown(route)[1]

    assert found(None) == (2, 400, 511, [(401, 500), (501, 511)])
    assert found(400) == (2, 400, 400, [])
    assert found(450)[:3] == (2, 400, 450)
    assert found(191) == (1, 100, 191, [(100, 191)])
    assert found(99) == (1, -1, 99, [(0, 63), (64, 127)])
    for missing in (192, 399, 512):
        with pytest.raises(NotFound):
            found(missing)
    with pytest.raises(NotFound):
        find_route([], [], [], None, histories={})


def test_routes_by_cost() -> None:
    """Range diffs of any level where they are cheaper than what they stand for, an older snapshot where it is; inside a
    range diff lower levels, then frames."""
    windows = [(at, at + 63) for at in range(0, 8192, 64)]
    archive = segments(1, *windows, size_bytes=100_000)
    levels = ranges(*windows, size_bytes=60_000) + ranges((0, 4095), (4096, 8191), size_bytes=1_000_000)

    def found(height: int | None, snapshots: list[SnapshotObject], **given: list[RangeObject]) -> object:
        known = [one for one in snapshots if height is None or one.name.height <= height]
        return shown(find_route(known, archive, given.get("levels", levels), height, histories=HISTORIES))

    small, large = snapshot(1, 4095, 1_000_000), snapshot(1, 8191, 2_000_000_000)
    assert found(None, [snapshot(1, 4095)]) == (4095, [(4096, -8191)])
    assert found(8191, [small, large]) == (4095, [(4096, -8191)])
    assert found(8191, [large], levels=[]) == (8191, [])
    assert found(4300, [small]) == (4095, [(4096, -4159), (4160, -4223), (4224, -4287), (4288, 4351)])
    assert found(4200, [snapshot(1, 4110)]) == (4110, [(4096, 4159), (4160, 4223)])
    assert found(4300, [snapshot(1, 4110)]) == (4110, [(4096, 4159), (4160, -4223), (4224, -4287), (4288, 4351)])
    assert found(4095, []) == (-1, [(0, -4095)])
    signed = find_route([large], archive, levels, 8191, histories=HISTORIES, needs_snapshot=True)
    assert shown(signed) == (8191, [])
    assert found(8191, [large]) == (-1, [(0, -4095), (4096, -8191)])
    slow = Rates(request=2.0)  # a bucket far away: many parts cost more than a large range diff
    many = snapshot(1, 4095, 1_000_000)._replace(parts=10)
    for rates, route in ((RATES, (4095, [(4096, -4159)])), (slow, (-1, [(0, -4095), (4096, -4159)]))):
        assert shown(find_route([many], archive, levels, 4159, histories=HISTORIES, rates=rates)) == route
    dear = ranges(*windows, size_bytes=900_000)
    assert found(200, [], levels=dear) == (-1, [(0, 63), (64, 127), (128, 191), (192, 255)])


def test_routes_of_several_shards() -> None:
    """All shards end at one height that each can come to: not inside a range diff whose segments are gone."""
    histories = {bytes([1]) * 16: History(1, 2)}
    archive = segments(1, (0, 63), (64, 99)) + segments(1, (0, 63), (64, 127), shard=1)
    levels = ranges((64, 127))

    def found(archive: list[SegmentObject], levels: list[RangeObject], height: int | None = None) -> int:
        return find_route([], archive, levels, height, histories=histories).height

    assert found(archive, []) == 99
    assert found(archive, levels) == 127
    assert found(archive[:1] + archive[2:], levels) == 127
    assert found(archive[:1] + segments(1, (0, 63), (64, 99), shard=1), levels) == 63
    with pytest.raises(NotFound, match="block 100 of shard 0 is missing"):
        found(archive, [], 100)


def test_two_snapshots_of_one_height() -> None:
    """Two roots at one height are a divergence, and nobody chooses."""
    names = [
        ManifestName("walk", GENERATION.generation, height, root) for height, root in ((1, b"a" * 8), (2, b"a" * 8))
    ]

    assert newest_names(names, None) == names[1:]
    assert newest_names(names, 1) == names[:1]
    with pytest.raises(ArchiveConflict):
        newest_names([*names, names[1]._replace(root_start=b"b" * 8)], None)


def test_stages() -> None:
    """Stages follow each other in their order, to the end."""
    stages = list(Stage)

    for one, following in zip(stages, stages[1:], strict=False):  # noqa: RUF007
        assert one.may_lead_to(following)
    assert set(SUCCESSORS) == set(stages)
    assert not Stage.PROVEN.may_lead_to(Stage.PLAN)
