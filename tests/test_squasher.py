"""The squasher: from an archive alone to range diffs that nobody finds before they are whole."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import ranges
from pipeline import squash as squashing
from pipeline.archive_names import PieceName, RangeName, SegmentName, parse_piece_name
from pipeline.errors import ArchiveConflict, RangeCorrupt, SegmentCorrupt, StateferryError
from pipeline.objects import LocalObjects
from pipeline.range_pieces import Piece
from tests.ferries import Killed, kill_at
from tests.walks import GENERATION, Node, drive, make_walk
from topology import squasher
from topology import squashing as squashing_worker
from topology.archiver import Archiver
from topology.squasher import Archive, archives, squash, squash_in_process
from topology.squashing import BLOCKS_MAX, QUIET_S, Waiting

__all__ = ["kill_at"]

ROOT = Path(__file__).parent.parent
ARCHIVE = Archive("walk", GENERATION.generation, 0)
LEVELS = (64, 128)


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squashing, "LEVELS", LEVELS)


def archived(folder: Path, seed: int) -> LocalObjects:
    """More than 128 blocks, in segments."""
    node = Node(drive(make_walk(seed, 480), seed=seed, litter=False).wire, archives=True)
    node.follow_and_commit()
    objects = LocalObjects(folder)
    while Archiver(objects).advance(node.replica, proven=True):
        pass
    assert node.meta.archived_to >= 128
    return objects


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LocalObjects:
    return archived(tmp_path_factory.mktemp("source"), 8)


@pytest.fixture
def objects(source: LocalObjects, tmp_path: Path) -> LocalObjects:
    return copied(source, tmp_path / "objects")


def copied(source: LocalObjects, folder: Path) -> LocalObjects:
    copy = LocalObjects(folder)
    for info in source.list():
        copy.put_new(info.name, source.get(info.name))
    return copy


def spans(objects: LocalObjects) -> list[tuple[int, int]]:
    names = [parse_piece_name(info.name) for info in objects.list()]
    return sorted({(name.of.first, name.of.last) for name in names if name is not None})


def make(objects: LocalObjects, scratch: Path) -> list[tuple[int, int]]:
    return [(one.name.first, one.name.last) for one in squash(objects, ARCHIVE, scratch / "squashing")]


def test_all_levels(objects: LocalObjects, tmp_path: Path) -> None:
    """Lower ones first, then nothing more; whoever made them leaves no scratch; two makers make the same bytes."""
    other = copied(objects, tmp_path / "other")

    assert archives(objects) == [ARCHIVE]
    assert archives(objects, "zoo/") == []
    assert make(objects, tmp_path) == [(0, 63), (64, 127), (0, 127)]
    assert make(objects, tmp_path) == []
    assert not (tmp_path / "squashing").exists()
    make(other, tmp_path)
    assert [(info, objects.get(info.name)) for info in objects.list()] == [
        (info, other.get(info.name)) for info in other.list()
    ]


@pytest.mark.parametrize("place", ["squash.before_put", "squash.after_put"])
def test_killed_between_pieces(
    objects: LocalObjects,
    tmp_path: Path,
    place: str,
    kill_at: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a crash left half put counts as nothing, and is completed by the next attempt."""
    monkeypatch.setattr(ranges, "PIECE_RAW_BYTES", 1000)
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 9)
    undisturbed = copied(objects, tmp_path / "undisturbed")
    make(undisturbed, tmp_path)
    assert len(list(undisturbed.list("walk/" + "67" * 16 + "/ranges/0/000000000000-000000000063."))) > 2

    kill_at(place, 2)
    with pytest.raises(Killed):
        make(objects, tmp_path)
    assert [one.name for one in squasher._whole(objects, ARCHIVE)] == []
    assert make(objects, tmp_path) == [(0, 63), (64, 127), (0, 127)]
    assert list(map(tuple, objects.list())) == list(map(tuple, undisturbed.list()))


def test_another_history(objects: LocalObjects, tmp_path: Path) -> None:
    """Another range diff where this one goes is a divergence; a damaged one is named, with the way out."""
    other = archived(tmp_path / "foreign", 9)
    make(other, tmp_path)
    name = str(PieceName(RangeName(*ARCHIVE, 0, 63), 1, 1))
    half = name.replace(".1-1.", ".2-2.")
    objects.put_new(half, b"of another build")  # not whole: nobody looks at it
    foreign = other.get(name)
    whole_name = name.replace(".1-1.", ".1-2.")
    objects.put_new(whole_name, foreign)
    with pytest.raises(RangeCorrupt) as caught:
        make(objects, tmp_path)  # now it counts as whole, and its upper level is made of it
    assert caught.value.where.startswith(name.removesuffix(".1-1.rng"))
    for one in (half, whole_name):
        objects.delete(one)

    squasher._put(objects, RangeName(*ARCHIVE, 0, 63), [_write(tmp_path / "own", _own(objects, tmp_path))])
    objects.delete(name)
    objects.put_new(name, foreign)
    with pytest.raises(ArchiveConflict):
        squasher._compare(objects, parse_piece_name(name), Piece.of_file(tmp_path / "own"))  # type: ignore[arg-type]
    objects.delete(name)
    objects.put_new(name, b"SFrd but cut off")
    with pytest.raises(RangeCorrupt, match="wrong"):
        squasher._compare(objects, parse_piece_name(name), Piece.of_file(tmp_path / "own"))  # type: ignore[arg-type]


def _own(objects: LocalObjects, tmp_path: Path) -> bytes:
    copy = copied(objects, tmp_path / "copy")
    next(squash(copy, ARCHIVE, tmp_path / "squashing"))
    return copy.get(str(PieceName(RangeName(*ARCHIVE, 0, 63), 1, 1)))


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_damaged_segment(objects: LocalObjects, tmp_path: Path) -> None:
    """Nothing is made of what cannot be read."""
    name = str(SegmentName(*ARCHIVE, 64, 127))
    data = objects.get(name)
    objects.delete(name)
    objects.put_new(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SegmentCorrupt) as caught:
        make(objects, tmp_path)

    assert caught.value.where == name
    assert spans(objects) == [(0, 63)]
    assert not (tmp_path / "squashing").exists()


def test_in_a_process(objects: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that is killed leaves nothing that counts; the next one makes the rest."""
    url = f"file://{tmp_path / 'objects'}"
    monkeypatch.setenv("STATEFERRY_FAILPOINT", "squash.after_put:1")
    with pytest.raises(StateferryError, match="ended early"):
        asyncio.run(squash_in_process(ARCHIVE, tmp_path / "scratch", url))
    assert spans(objects) == [(0, 63)]
    monkeypatch.delenv("STATEFERRY_FAILPOINT")

    assert asyncio.run(squash_in_process(ARCHIVE, tmp_path / "scratch", url)) == 1
    assert spans(objects) == [(0, 63), (64, 127)]
    assert not (tmp_path / "scratch").exists()


def test_when() -> None:
    """Once nothing was archived for a while, or a range diff of the second level waits; not twice; later after a
    failure."""
    waiting = Waiting()
    assert not waiting.is_due(70, 1000.0)
    assert not waiting.is_due(134, 1000.0 + QUIET_S)
    assert waiting.is_due(134, 1000.0 + 2 * QUIET_S)
    waiting.failed(1100.0)
    assert not waiting.is_due(134, 1100.0)
    assert waiting.is_due(134, 1100.0 + QUIET_S)
    waiting.squashed_to = 134
    assert not waiting.is_due(135, 9000.0)
    assert not waiting.is_due(135, 9999.0)
    assert not waiting.is_due(192, 10000.0)
    assert waiting.is_due(134 + BLOCKS_MAX, 10000.0)
    assert not Waiting().is_due(9 * BLOCKS_MAX, 0.0)


def test_a_worker_squashes(objects: LocalObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its archive is quiet; a helper that ends early is tried again; only what it owns."""
    monkeypatch.setattr(squashing_worker, "QUIET_S", 0.5)
    monkeypatch.setattr(squashing_worker, "_LOOK_S", 0.1)
    monkeypatch.setenv("STATEFERRY_FAILPOINT", "squash.before_put:2")
    logged = []
    for level in ("info", "warning"):
        monkeypatch.setattr(squashing_worker.log, level, lambda event, **fields: logged.append(event), raising=False)

    def node(shard: int) -> SimpleNamespace:
        return SimpleNamespace(
            shard=shard,
            is_owned=shard == 0,
            committed_meta=SimpleNamespace(archived_to=150),
            generation=GENERATION,
            data_dir=SimpleNamespace(path=tmp_path / f"node-{shard}"),
        )

    async def work() -> None:
        stopping = asyncio.Event()
        url = f"file://{tmp_path / 'objects'}"
        task = asyncio.create_task(squashing_worker.run([node(0), node(1)], url, stopping))  # type: ignore[list-item]
        while "archive_not_squashed" not in logged:
            await asyncio.sleep(0.05)
        assert spans(objects) == [(0, 63)]
        monkeypatch.delenv("STATEFERRY_FAILPOINT")
        while "archive_squashed" not in logged:
            await asyncio.sleep(0.05)
        stopping.set()
        await task

    asyncio.run(asyncio.wait_for(work(), 120))
    assert spans(objects) == [(0, 63), (64, 127)]
    assert not (tmp_path / "node-1").exists()


def test_the_command(objects: LocalObjects, tmp_path: Path) -> None:
    """`stateferry archive squash`, of all archives there are; then there is nothing to do."""
    call = [sys.executable, "-m", "topology", "archive", "squash", "--objects", f"file://{tmp_path / 'objects'}"]
    first, again = (subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2))

    assert "000000000064-000000000127" in first.stdout
    assert spans(objects) == [(0, 63), (64, 127)]
    assert again.stdout.split() == ["archives", "1", "made", "0"]
