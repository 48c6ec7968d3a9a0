"""Restores by range diffs: every height as before, in fewer steps; what is wrong with one costs frames instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from blake3 import blake3

from pipeline import ranges
from pipeline import restore as restoring
from pipeline import squash as squashing
from pipeline.archive_names import PieceName, RangeName, parse_piece_name, parse_segment_name
from pipeline.errors import NotFound, RangeCorrupt, Unsupported
from pipeline.objects import LocalObjects
from pipeline.range_pieces import Piece
from pipeline.ranges import RangeWriter
from pipeline.restore import Stage
from pipeline.state import UTXO, Change
from pipeline.table_diff import table_diff
from tests.ferries import Ferry, Killed, held, kill_at, make_ferry, opened
from tests.walks import GENERATION, Node, content
from topology.restore_plans import Request, plan_restore
from topology.restorer import restore
from topology.squasher import Archive, squash

__all__ = ["kill_at"]

ROOT = Path(__file__).parent.parent
ARCHIVE = Archive("walk", GENERATION.generation, 0)


def small(patch: pytest.MonkeyPatch) -> None:
    """Levels of 64 and 128 blocks, chunks of some changes, several pieces."""
    patch.setattr(squashing, "LEVELS", (64, 128))
    patch.setattr(squashing, "CHUNK_CHANGES_MAX", 9)
    patch.setattr(ranges, "PIECE_RAW_BYTES", 1500)


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    """Some 140 blocks, archived and squashed, without a snapshot."""
    ferry = make_ferry(tmp_path_factory.mktemp("ferry"), seed=13, events=400, snapshots=0)
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        made = [one.name[3:] for one in squash(ferry.objects, ARCHIVE, ferry.folder / "squashing")]
    assert made == [(0, 63), (64, 127), (0, 127)]
    return ferry


@pytest.fixture
def objects(ferry: Ferry, tmp_path: Path) -> LocalObjects:
    """A copy that a test may damage."""
    return ferry.damageable(tmp_path / "objects")


def pieces(objects: LocalObjects, first: int, last: int) -> list[PieceName]:
    names = [parse_piece_name(info.name) for info in objects.list()]
    return [name for name in names if name is not None and (name.of.first, name.of.last) == (first, last)]


def edit(objects: LocalObjects, name: object, data: bytes) -> None:
    objects.delete(str(name))
    objects.put_new(str(name), data)


def test_random_heights(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Below, at, between and above the ends of range diffs; the node goes on from there with the log."""
    top = ferry.node.meta.final_height
    assert top >= 130
    heights = {62, 63, 64, 127, top, *Random(1).sample(range(top), 4)}
    for height in sorted(heights):
        data_dir = tmp_path / str(height)
        restored = restore(objects, data_dir, Request(height=height), claimed=True)
        meta, state = held(data_dir)

        assert (meta.tip.ref, meta.tip.root) == (ferry.headers[height].ref, ferry.headers[height].post_root)
        assert state == ferry.content_at(height)
        assert restored.range_diffs == (height >= 63)
        assert restored.frames == (height - 127 if height >= 127 else height - 63 if height >= 63 else height + 1)
        assert not restored.refused
        if height > 64:
            continue
        with opened(data_dir) as store:
            Node(ferry.driven.wire, store).follow_and_commit()
            assert content(store) == content(ferry.store)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 4]) + data[61:]


def later(data: bytes) -> bytes:
    """Of a later version, whole."""
    body = data[:4] + b"\2" + data[5:-32]
    return body + blake3(body).digest()


@pytest.mark.parametrize("damage", [truncated, flipped, later])
def test_damaged(ferry: Ferry, objects: LocalObjects, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """A range diff that cannot be read is left out, and the restore says so; what else was fetched is not fetched
    again. Without frames in its place it is refused by its name."""
    bad = pieces(objects, 0, 127)[1]
    edit(objects, bad, damage(objects.get(str(bad))))
    restored = restore(objects, tmp_path / "restored", Request(height=130), claimed=True)

    assert held(tmp_path / "restored")[1] == ferry.content_at(130)
    assert restored.range_diffs == 2
    (said,) = restored.refused
    assert str(bad) in said
    plans = [plan_restore(objects, Request(height=130), refused=refused) for refused in ((), {bad.of})]
    assert restored.fetched_bytes <= sum(objects.size(name) for name in {*plans[0].names, *plans[1].names} - {str(bad)})

    for name in [info.name for info in objects.list()]:
        piece = parse_piece_name(name)
        segment = parse_segment_name(name)
        if (piece is not None and piece.of != bad.of) or (segment is not None and segment.first < 128):
            objects.delete(name)
    with pytest.raises(Unsupported if damage is later else RangeCorrupt) as caught:
        restore(objects, tmp_path / "other", Request(height=130))
    assert str(bad) in str(caught.value)
    assert not (tmp_path / "other" / "store").exists()
    assert not (tmp_path / "other" / "restoring").exists()


def test_swapped_and_foreign(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """A sound piece under another's name, of this range diff or of another one, is not taken for it."""
    one, two = pieces(objects, 0, 127)[:2]
    edit(objects, one, objects.get(str(two)))
    assert restore(objects, tmp_path / "a", Request(height=127), claimed=True).refused
    assert held(tmp_path / "a")[1] == ferry.content_at(127)
    for name, foreign in zip(pieces(objects, 64, 127), pieces(objects, 0, 63), strict=False):
        edit(objects, name, objects.get(str(foreign)))
    restored = restore(objects, tmp_path / "b", Request(height=127), claimed=True)
    assert len(restored.refused) == 2
    assert (restored.range_diffs, restored.frames) == (1, 64)
    assert held(tmp_path / "b")[1] == ferry.content_at(127)


def test_missing_piece(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """A range diff that lacks a piece is none."""
    objects.delete(str(pieces(objects, 0, 127)[0]))
    restored = restore(objects, tmp_path / "a", Request(height=127), claimed=True)

    assert (restored.range_diffs, restored.frames, restored.refused) == (2, 0, [])
    assert held(tmp_path / "a")[1] == ferry.content_at(127)


@pytest.mark.parametrize("lie", ["value", "left out", "before"])
def test_a_range_diff_that_lies(
    ferry: Ferry, objects: LocalObjects, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound bytes that lead elsewhere are found by the vectors, or by the state that they do not meet; nothing of them
    is in what was restored."""
    monkeypatch.setattr(restoring, "PENDING_BYTES_MAX", 500)
    forge(objects, RangeName(*ARCHIVE, 64, 127), lie, tmp_path)
    for name in pieces(objects, 0, 127):
        objects.delete(str(name))
    restored = restore(objects, tmp_path / "restored", Request(height=127))

    assert restored.proof.proven
    assert held(tmp_path / "restored")[1] == ferry.content_at(127)
    (said,) = restored.refused
    assert "range diff" in said and "000000000064-000000000127" in said
    assert (restored.range_diffs, restored.frames) == (2, 64)  # the one below it twice


def forge(objects: LocalObjects, name: RangeName, lie: str, folder: Path) -> None:
    """Put a range diff that says something else, whole in itself, in the place of one."""
    names = pieces(objects, name.first, name.last)
    found = [Piece.of_bytes(objects.get(str(one))) for one in names]
    changes = [change for piece in found for chunk in piece.chunks() for change in chunk.changes()]
    at = next(at for at, change in enumerate(changes) if change.before and change.after)
    key, before, after = changes[at]
    wrong = {
        "value": [Change(key, before, b"another" * 3)],
        "left out": [],
        "before": [Change(key, b"another" * 3, after)],
    }[lie]
    changes[at : at + 1] = wrong
    head = found[0].head
    writer = RangeWriter(folder, first=head.first, parent=head.parent, prev_root=head.prev_root, resume=found[0].resume)
    for start in range(0, len(changes), 9):
        writer.add(table_diff(UTXO, changes[start : start + 9]))
    writer._close(is_last=True)  # `finish` would find out
    for one in names:
        objects.delete(str(one))
    for one, path in zip(name.pieces(len(writer._paths)), writer._paths, strict=True):
        objects.put_file_new(str(one), path)


def test_another_generation(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """Range diffs of a generation that has nothing else are passed by."""
    foreign = replace_generation(pieces(objects, 0, 127)[0])
    objects.put_new(str(foreign), b"whatever")

    assert restore(objects, tmp_path / "a", Request(height=127), claimed=True).range_diffs == 1
    with pytest.raises(NotFound):
        restore(objects, tmp_path / "b", Request(generation=foreign.of.generation, height=127))


def replace_generation(name: PieceName) -> PieceName:
    return PieceName(name.of._replace(generation=b"o" * 16), 1, 1)


@pytest.mark.parametrize(("place", "hit"), [("restore.piece_fetched", 2), ("restore.chunk_applied", 7)])
def test_killed_for_real(ferry: Ferry, objects: LocalObjects, tmp_path: Path, place: str, hit: int) -> None:
    """A process killed between pieces, or in the middle of a range diff, is taken up there; what was checked is not
    fetched again."""
    code = (
        "import sys; from pathlib import Path; from pipeline import restore as restoring;"
        "from pipeline.objects import open_objects; from topology.settings import arm_failpoint;"
        "from topology.restorer import Request, restore; restoring.PENDING_BYTES_MAX = 500;"
        "arm_failpoint(sys.argv[1]); restore(open_objects(sys.argv[2]), Path(sys.argv[3]), Request(height=129))"
    )
    arguments = [f"{place}:{hit}", f"file://{tmp_path / 'objects'}", str(tmp_path / "restored")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -9
    here = [path.stat().st_size for path in tmp_path.glob("restored/restoring/ranges/*.rng")]
    restored = restore(objects, tmp_path / "restored", Request(height=129))

    assert restored.proof.proven
    assert held(tmp_path / "restored")[1] == ferry.content_at(129)
    planned = plan_restore(objects, Request(height=129))
    if place == "restore.piece_fetched":
        assert len(here) >= 2
        assert restored.fetched_bytes <= planned.size_bytes - sum(here)
    else:
        assert restored.fetched_bytes == 0
    assert restored.estimate is None


def test_goes_on_inside(
    ferry: Ferry,
    objects: LocalObjects,
    tmp_path: Path,
    kill_at: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that are in the store are not applied again."""
    monkeypatch.setattr(restoring, "PENDING_BYTES_MAX", 0)
    kill_at("restore.chunk_applied", 5)
    with pytest.raises(Killed):
        restore(objects, tmp_path / "restored", Request(height=127), claimed=True)
    seen: list[int] = []
    restore(
        objects,
        tmp_path / "restored",
        Request(height=127),
        claimed=True,
        progress=lambda at: seen.append(at.done) if at.stage is Stage.RANGES else None,
    )

    assert seen[0] == 6 * 9
    assert held(tmp_path / "restored")[1] == ferry.content_at(127)


def test_steps_and_estimate(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """The plan says each step with its bytes; the estimate is the sum of what it takes."""
    planned = plan_restore(objects, Request(height=130))

    assert [(step.kind, step.from_height, step.to_height) for step in planned.steps] == [
        ("range", -1, 127),
        ("frames", 127, 130),
    ]
    assert sum(step.size_bytes for step in planned.steps) == planned.size_bytes
    assert sum(step.requests for step in planned.steps) == planned.requests
    one, claimed = planned.estimate(cores=2), planned.estimate(cores=0)
    assert one.seconds > claimed.seconds > 0 == claimed.prove_s
    assert replace(one, prove_s=0.0) == claimed
    restored = restore(objects, tmp_path / "a", Request(height=130), claimed=True)
    assert restored.estimate == claimed
    assert restored.fetched_bytes == planned.size_bytes
