"""`stateferry frame` on archived segments: no broker, no store, only the files that stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import frame, ranges
from pipeline import squash as squashing
from pipeline.archive import Segment
from pipeline.diff import decode_whole_body
from pipeline.errors import FrameCorrupt, FrameIdMismatch, RangeCorrupt, SegmentCorrupt, UsageError
from pipeline.state import UTXO
from tests.chains import block_files, expected
from tests.topology.commands import Done, Site, here
from tests.topology.forge import changed, with_body

FINAL = 499
STEPS = expected("mainnet_0_599")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A primary's archive of heights 0 to 499, and a store restored to that height."""
    site = Site(tmp_path_factory.mktemp("archive") / "site")
    site.ingest(*block_files("mainnet_0_599"))
    site.follow("primary", "p")
    site.here("snapshot").ok()
    site.here("restore", "--height", FINAL, node="final").ok()
    return site


@pytest.fixture(scope="module")
def segments(site: Site) -> list[Path]:
    found = sorted(site.objects.rglob("*.seg"))
    assert len(found) == 8
    return found


def call(*words: object) -> Done:
    return here("frame", *words, "--json")


def whole_content(site: Site, node: str) -> dict[bytes, bytes]:
    """A store's content by whole keys."""
    return {key: value for at, stored in site.content(node).items() for key, value in UTXO.items(at, stored)}


def test_verify(segments: list[Path]) -> None:
    """All frames have the ids that their content gives, and follow each other."""
    found = call("verify", *segments).ok()

    assert (found["frames"], found["first_height"], found["last_height"]) == (500, 0, FINAL)
    assert call("verify", segments[3]).ok()["frames"] == 64


def test_dump(segments: list[Path], site: Site) -> None:
    """The block in which coins were first spent by somebody else, readable: 170."""
    (found,) = call("dump", *segments, "--height", 170).ok()

    assert found["header"]["block_hash"] == (STEPS[170].get("tip") or STEPS[170]["hash"])
    spent = [change["key"] for change in found["changes"] if change["after"] is None]
    made = [change["key"] for change in found["changes"] if change["before"] is None]
    assert spent == ["0437cd7f8525ceed2324359c2d0ba26006d92d856a9c20fa0241106ee5a597c9:0"]
    assert len(made) == found["header"]["op_count"] - 1 == 3
    assert len(call("dump", *segments[:2]).ok()) == 128
    assert here("frame", "dump", segments[2], "--height", 170).code == 0


def test_squash_is_the_state(segments: list[Path], site: Site, tmp_path: Path) -> None:
    """All diffs in one are the state itself: what came and went is not in it."""
    out = tmp_path / "squashed"
    done = call("squash", *segments, "--out", out).ok()
    assert (done["frames"], done["from_height"], done["to_height"]) == (500, 0, FINAL)
    assert done["op_count_before"] > done["op_count"] == STEPS[FINAL]["coins"]

    diff = decode_whole_body(frame.decode(out.read_bytes()).body)
    (table,) = diff.tables.values()
    assert all(before is None for _, before, _ in table.changes())
    assert {key: after for key, _, after in table.changes()} == whole_content(site, "final")
    header = frame.peek(out.read_bytes())
    assert header.post_root.hex() == site.here("root", node="final").ok()["root"]
    assert call("verify", out).ok()["frames"] == 1


def test_squash_of_parts_is_the_squash_of_all(segments: list[Path], tmp_path: Path) -> None:
    """Netting is associative."""
    low, high, twice, once = (tmp_path / name for name in ("low", "high", "twice", "once"))
    call("squash", *segments[:3], "--out", low).ok()
    call("squash", *segments[3:], "--out", high).ok()
    call("squash", low, high, "--out", twice).ok()
    call("squash", *segments, "--out", once).ok()

    assert frame.decode(twice.read_bytes()).body == frame.decode(once.read_bytes()).body


def test_invert(segments: list[Path], tmp_path: Path) -> None:
    """Twice inverted is the frame itself; a squash inverted takes all of it back."""
    squashed, undone, again = (tmp_path / name for name in ("squashed", "undone", "again"))
    call("squash", *segments, "--out", squashed).ok()
    done = call("invert", squashed, "--out", undone).ok()
    assert (done["kind"], done["op_count"]) == ("UNDO", STEPS[FINAL]["coins"])
    call("invert", undone, "--out", again).ok()
    assert frame.decode(again.read_bytes()).body == frame.decode(squashed.read_bytes()).body
    assert frame.peek(again.read_bytes()).frame_id == frame.peek(squashed.read_bytes()).frame_id

    (table,) = decode_whole_body(frame.decode(undone.read_bytes()).body).tables.values()
    assert all(after is None for _, _, after in table.changes())
    header = frame.peek(undone.read_bytes())
    first = frame.peek(squashed.read_bytes())
    assert (header.prev_root, header.post_root) == (first.post_root, first.prev_root)
    one = call("invert", *segments, "--height", 170, "--out", undone).ok()
    assert (one["height"], one["op_count"]) == (170, 4)


def test_range_diffs(site: Site, segments: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their changes are those of the blocks squashed; in pieces, they are read whole or not at all; they and segments
    follow each other."""
    monkeypatch.setattr(squashing, "CHUNK_CHANGES_MAX", 20)
    monkeypatch.setattr(ranges, "PIECE_RAW_BYTES", 2500)
    copy = site.copy(tmp_path / "site")
    copy.here("archive", "squash").ok()
    first, *_ = pieces = sorted(copy.objects.rglob("*000000000128-000000000191.*.rng"))
    low = sorted(copy.objects.rglob("*000000000064-000000000127.*.rng"))
    assert len(pieces) > 2
    out = tmp_path / "squashed"
    call("squash", segments[2], "--out", out).ok()
    squashed, ranged = (call("dump", *files).ok()[0] for files in ([out], pieces[::-1]))

    assert ranged["changes"] == squashed["changes"] != []
    assert ranged["range_diff"]["op_count"] == len(ranged["changes"])
    assert ranged["range_diff"]["post_root"] == squashed["header"]["post_root"]
    verified = call("verify", segments[0], *low, *pieces, segments[3]).ok()
    assert (verified["frames"], verified["range_diffs"]) == (128, 2)
    assert (verified["first_height"], verified["last_height"]) == (0, 255)
    assert here("frame", "dump", *pieces).code == 0
    call("verify", *pieces, *low).failed(FrameCorrupt)
    call("verify", *pieces[1:]).failed(UsageError)
    call("dump", *pieces[:-1]).failed(UsageError)
    call("dump", *pieces, "--height", 130).failed(UsageError)
    call("squash", *pieces, "--out", out).failed(UsageError)
    data = first.read_bytes()
    first.write_bytes(data[:400] + bytes([data[400] ^ 1]) + data[401:])

    assert first.name in call("verify", *pieces).failed(RangeCorrupt)


def test_wrong_files(segments: list[Path], site: Site, tmp_path: Path) -> None:
    """Each thing that can be wrong with a file has its name."""
    out, file = tmp_path / "out", tmp_path / "file"
    data = segments[0].read_bytes()
    for at in (3, 20, 500, len(data) - 40, len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert call("verify", file).code == SegmentCorrupt.exit_code
    file.write_bytes(data[:-7])
    call("dump", file).failed(SegmentCorrupt)
    file.write_bytes(b"something else")
    call("dump", file).failed(FrameCorrupt)
    file.write_bytes(b"")
    call("verify", file).failed(FrameCorrupt)
    call("squash", segments[0], segments[2], "--out", out).failed(FrameCorrupt)
    call("verify", segments[1], segments[0]).failed(FrameCorrupt)
    call("invert", segments[0], "--out", out).failed(UsageError)
    call("dump", segments[0], "--height", 64).failed(UsageError)
    assert call("verify", tmp_path / "missing").code == UsageError.exit_code
    topic = next(record for record in site.records("diffs")[2:] if frame.peek(record).op_count)
    file.write_bytes(topic)
    call("dump", file).failed(UsageError)
    assert not out.exists()


def test_wrong_frames(segments: list[Path], tmp_path: Path) -> None:
    """Content under another id, or an id over other links."""
    file, out = tmp_path / "file", tmp_path / "out"
    single = list(Segment.open(segments[2].read_bytes()).frames())[170 - 128]
    file.write_bytes(single)
    assert call("verify", file).ok()["first_height"] == 170
    body = frame.decode(single).body
    for forged in (
        changed(single, post_root=bytes(32)),
        changed(single, seq=9),
        changed(single, frame_id=bytes(32)),
        with_body(single, len(body) - 1, 1),
    ):
        file.write_bytes(forged)
        for words in (("verify", file), ("invert", file, "--out", out), ("squash", file, "--out", out)):
            call(*words).failed(FrameIdMismatch)
    assert not out.exists()
