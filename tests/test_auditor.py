"""What only the deeper audits see: objects whose digests, names and sums agree, and whose content is another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import archive, frame, range_pieces
from pipeline import squash as squashing
from pipeline.archive import Segment, build_segment
from pipeline.audits import Level, Point, check_journal, store_points
from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.diff import Diff, decode_whole_body, join_tables
from pipeline.errors import AuditFailed, Diverged, RangeCorrupt, SegmentCorrupt, SignatureWrong, StoreCorrupt
from pipeline.objects import LocalObjects
from pipeline.range_pieces import Piece
from pipeline.ranges import RangeWriter
from pipeline.sections import Layout
from pipeline.signature import Signature
from pipeline.snapshot import Manifest, encode_manifest
from pipeline.state import UTXO
from pipeline.table_diff import table_diff
from tests.ferries import Ferry, make_ferry
from topology import auditor as auditor_module
from topology.auditor import Auditor
from topology.squasher import archives, squash

SIGNER = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"), events=500, snapshots=2)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's tests have helper processes."""
    monkeypatch.setattr(auditor_module, "_CORES", 1)


@pytest.fixture
def objects(ferry: Ferry, tmp_path: Path) -> LocalObjects:
    """A copy that a test may damage."""
    return ferry.damageable(tmp_path / "objects")


def put(objects: LocalObjects, name: str, data: bytes) -> None:
    objects.delete(name)
    objects.put_new(name, data)


def audit(
    folder: Path,
    level: Level,
    points: Mapping[tuple[bytes, int], Sequence[Point]] | None = None,
    *,
    name: str = "scratch",
) -> tuple[Auditor, list[tuple[str, str]]]:
    scratch = folder / f"{name}-{level.value}"
    scratch.mkdir()
    auditor = Auditor(f"file://{folder}/objects", scratch)
    auditor.run(level, points or {})
    return auditor, [(fault.name, fault.where) for fault in auditor.found.faults]


def final_points(ferry: Ferry) -> dict[tuple[bytes, int], list[Point]]:
    meta = ferry.node.meta
    return {(meta.generation, 0): list(store_points(ferry.store, meta, "the store"))}


def test_replay_meets_snapshots_and_store(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """From the first block on, every frame, both snapshots, the store's final state."""
    auditor, found = audit(tmp_path, Level.REPLAY, final_points(ferry))

    assert found == []
    assert auditor.found.counts["frames"] == ferry.node.meta.final_height + 1
    assert auditor.found.counts["snapshots_met"] == len(ferry.manifests)
    assert auditor.found.counts["points_met"] == 1


def test_replay_goes_on_behind_a_hole(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Without the first segments it begins at the lowest snapshot that the archive leads on from."""
    for info in list(objects.list()):
        if info.name.endswith("000000000063.seg"):
            objects.delete(info.name)
    auditor, found = audit(tmp_path, Level.REPLAY)

    assert found == []
    starts = [manifest.height for manifest in ferry.manifests if manifest.height >= 63]
    assert auditor.found.counts["frames"] == ferry.node.meta.final_height - min(starts)


def other_root(point: Point) -> Point:
    return point._replace(root=bytes(32))


@pytest.mark.parametrize("level", [Level.QUICK, Level.REPLAY])
def test_a_store_of_another_root(ferry: Ferry, objects: LocalObjects, tmp_path: Path, level: Level) -> None:
    """A store whose final state is not the archive's is a divergence."""
    points = {place: list(map(other_root, held)) for place, held in final_points(ferry).items()}
    _, found = audit(tmp_path, level, points)

    assert found
    assert {name for name, _ in found} <= {Diverged.__name__, AuditFailed.__name__}
    assert all("the store" in where for _, where in found)


def moved(manifest: Manifest) -> Manifest:
    """The same sums, and a part of what one part holds said to be in the next."""
    one, other, *others = manifest.parts
    table_id, vector = next(iter(one.partials.items()))
    taken, given = lthash.Accumulator(), lthash.Accumulator()
    taken.combine(vector)
    given.combine(other.partials[table_id])
    element = lthash.elements(table_id, [b"k"], [b"v"])
    taken.add(element)
    given.subtract(element)
    parts = [
        replace(one, partials={table_id: taken.vector()}),
        replace(other, partials={table_id: given.vector()}),
        *others,
    ]
    return replace(manifest, parts=tuple(parts))


def test_parts_that_their_manifest_lies_about(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Digests, sums and names agree: only hashing the keys shows it, in either part."""
    manifest = ferry.manifests[0]
    put(objects, manifest.name, encode_manifest(moved(manifest)))

    assert audit(tmp_path, Level.STORED)[1] == []
    assert sorted(audit(tmp_path, Level.CONTENT)[1]) == [
        (AuditFailed.__name__, manifest.part_name(part)) for part in manifest.parts[:2]
    ]


def test_a_snapshot_of_another_block(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """The archive has another block at a snapshot's height."""
    manifest = ferry.manifests[1]
    resume = manifest.resumes[0]
    tip = replace(resume.tip, ref=BlockRef(manifest.height, b"?" * 32))
    put(objects, manifest.name, encode_manifest(replace(manifest, resumes=(replace(resume, tip=tip),))))
    ((name, where),) = audit(tmp_path, Level.QUICK)[1]

    assert (name, where.split(" and ")[0]) == (AuditFailed.__name__, manifest.name)
    assert (AuditFailed.__name__, manifest.name) in audit(tmp_path, Level.REPLAY)[1]


def forged(data: bytes) -> bytes:
    """A segment with one value of one frame changed, and right digests over it."""
    segment = Segment.open(data)
    frames = list(segment.frames())
    for at, one in enumerate(frames):
        decoded = frame.decode(one)
        diff = decode_whole_body(decoded.body)
        if diff.tables and diff.tables[1].created_values:
            table = diff.tables[1]
            values = [b"forged", *table.created_values[1:]]
            other = replace(diff, tables={1: replace(table, created_values=values)})
            frames[at] = frame.encode(decoded.header, join_tables(other.encode().columns))
            break
    return build_segment(frames, segment.resume)


def test_a_forged_frame(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """A segment that is sound in itself, and whose frames do not make the roots they claim: replay refuses it."""
    name = next(info.name for info in objects.list() if info.name.endswith(".seg"))
    put(objects, name, forged(objects.get(name)))

    assert audit(tmp_path, Level.STORED)[1] == []
    assert audit(tmp_path, Level.REPLAY)[1][0][0] in ("RootMismatch", "FrameIdMismatch")


def test_a_journal_that_does_not_lead_here(ferry: Ferry) -> None:
    """A position with another frame or root than its journal's last, and a journal with a hole."""
    meta = ferry.node.meta
    assert check_journal(ferry.store, meta) == meta.seq - meta.journal_first_seq + 1
    for wrong in (
        replace(meta, frame_id=b"?" * 32),
        replace(meta, seq=meta.seq + 1),
        replace(meta, tip=replace(meta.tip, vectors={1: bytes([1]) * 2048})),
    ):
        with pytest.raises(StoreCorrupt, match="frame"):
            check_journal(ferry.store, wrong)


def rejoined(data: bytes, kind: int, change: Callable[[bytes], bytes], layout: Layout) -> bytes:
    """A file of sections with one of them changed, under a right digest."""
    places = layout.split(data)
    sections = {one: data[slice(*place)] for one, place in places.items()}
    return layout.join(sections | {kind: change(sections[kind])})


def test_filters_that_leave_a_key_out(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """A trace would not find what they do not say: content compares them with the frames."""
    name = next(info.name for info in objects.list() if info.name.endswith(".seg"))

    def emptied(section: bytes) -> bytes:
        return section[: 4 * 64] + bytes(len(section) - 4 * 64)

    put(objects, name, rejoined(objects.get(name), archive.Section.FILTERS, emptied, archive.LAYOUT))

    assert audit(tmp_path, Level.STORED)[1] == []
    assert audit(tmp_path, Level.CONTENT)[1] == [(SegmentCorrupt.__name__, name)]


def test_a_signature_that_is_none(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Whoever requires none, an audit says that it is wrong."""
    manifest = ferry.manifests[0]
    forged = replace(manifest, signature=Signature(SIGNER, bytes(64)))
    put(objects, manifest.name, encode_manifest(forged))

    assert audit(tmp_path, Level.QUICK)[1] == [(SignatureWrong.__name__, manifest.name)]


@pytest.fixture
def ranged(objects: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalObjects:
    """With range diffs of 64 and 128 blocks."""
    monkeypatch.setattr(squashing, "LEVELS", (64, 128))
    for one in archives(objects):
        assert list(squash(objects, one, tmp_path / "squashing"))
    return objects


def test_range_diffs(ranged: LocalObjects, tmp_path: Path) -> None:
    """A flipped bit is seen by their digest; a root that they do not lead from, by what they change."""
    names = [info.name for info in ranged.list() if info.name.endswith(".rng")]
    for level in (Level.STORED, Level.CONTENT):
        auditor, found = audit(tmp_path, level)
        assert (found, auditor.found.counts["range_diffs"]) == ([], len(names))
    data = ranged.get(names[0])
    head = Piece.of_bytes(data).head
    lying = replace(head, prev_root=bytes(32)).encode()
    put(ranged, names[0], rejoined(data, range_pieces.Section.HEAD, lambda _: lying, range_pieces.LAYOUT))
    assert audit(tmp_path, Level.STORED, name="lying")[1] == []
    assert [name for name, _ in audit(tmp_path, Level.CONTENT, name="lying")[1]] == [AuditFailed.__name__]
    assert [name for name, _ in audit(tmp_path, Level.REPLAY, name="lying")[1]] == [RangeCorrupt.__name__]
    put(ranged, names[0], data[:300] + bytes([data[300] ^ 1]) + data[301:])

    for level in (Level.STORED, Level.REPLAY):
        assert [name for name, _ in audit(tmp_path, level, name="flipped")[1]] == [RangeCorrupt.__name__]


def without_a_key(data: bytes, folder: Path) -> bytes:
    """A range diff that leaves out one key that was created, and leads to the state without it, soundly."""
    piece = Piece.of_bytes(data)
    chunks = [chunk.changes() for chunk in piece.chunks()]
    left_out = next(change for chunk in chunks for change in chunk if change.before is None)
    one = Diff(tables={1: table_diff(UTXO, [left_out])}).inverted()
    tip = piece.resume.tip
    tip = replace(tip, vectors=one.advance(tip.vectors), counts=one.count(tip.counts))
    head = piece.head
    writer = RangeWriter(
        folder,
        first=head.first,
        parent=head.parent,
        prev_root=head.prev_root,
        resume=replace(piece.resume, tip=tip),
    )
    for chunk in chunks:
        writer.add(table_diff(UTXO, [change for change in chunk if change != left_out]))
    (path,) = writer.finish()
    return path.read_bytes()


def test_replay_applies_range_diffs(ranged: LocalObjects, tmp_path: Path) -> None:
    """Each to the state at its start; one that is sound in itself and leads elsewhere than the frames is found. Behind
    a hole only those count whose first and last heights are replayed."""
    names = [info.name for info in ranged.list() if info.name.endswith(".rng")]
    assert {name[-14:] for name in names} >= {"000063.1-1.rng", "000127.1-1.rng"}
    auditor, found = audit(tmp_path, Level.REPLAY)
    assert (found, auditor.found.counts["range_diffs_met"]) == ([], len(names))
    assert auditor.found.counts["range_diffs"] == len(names)
    (tmp_path / "forged").mkdir()
    put(ranged, names[0], without_a_key(ranged.get(names[0]), tmp_path / "forged"))
    assert audit(tmp_path, Level.CONTENT)[1] == []
    assert audit(tmp_path, Level.REPLAY, name="forged")[1] == [
        (AuditFailed.__name__, names[0].removesuffix(".1-1.rng"))
    ]
    for info in list(ranged.list()):
        if info.name.endswith("000000000063.seg"):
            ranged.delete(info.name)
    auditor, found = audit(tmp_path, Level.REPLAY, name="behind")

    assert found == []
    assert auditor.found.counts["range_diffs_met"] < len(names) == auditor.found.counts["range_diffs"]
