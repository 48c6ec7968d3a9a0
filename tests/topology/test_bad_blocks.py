"""Block files that are not what they say: the error names file and place, what stands before it is published, and the
same command with good files goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import BlockCorrupt, BlockOrphan, NotFound, SettingsConflict, WrongChain
from tests.chains import base_coins_path, block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site

pytestmark = pytest.mark.usefixtures("each_broker")

RAWS = load_blocks("mainnet_0_599")[:60]
MUHASH = [entry["muhash"] for entry in expected("mainnet_0_599")]
FRAME_BYTES = 8


def offset_of(number: int) -> int:
    """Where the frame of a block begins in the good file, whose blocks stand there in order."""
    return sum(FRAME_BYTES + len(raw) for raw in RAWS[:number])


GOOD = block_files("mainnet_0_599")[0].read_bytes()[: offset_of(len(RAWS))]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all of RAWS."""
    file = tmp_path_factory.mktemp("good") / "blk.dat"
    file.write_bytes(GOOD)
    return file


def goes_on(site: Site, good: Path, height: int) -> None:
    """Everything below a bad block got to both nodes; the good file brings them on."""
    for role, node in (("primary", "p"), ("replica", "r")):
        assert site.follow(role, node)["height"] == height
    assert site.muhash("r")["muhash"] == MUHASH[height]
    walk = site.meta("r").walk
    assert site.ingest(good)["skipped"] == walk == height + 1
    site.follow_both()

    found = site.muhash("r")
    assert found["height"] > height and found["muhash"] == MUHASH[found["height"]]


@pytest.mark.parametrize("kept", [1, 4, FRAME_BYTES, FRAME_BYTES + 40, FRAME_BYTES + 214])
def test_truncated_file(kept: int, good: Path, tmp_path: Path) -> None:
    """A file that ends within block 20, or within the eight bytes before it."""
    site, file = Site(tmp_path), tmp_path / "blk.dat"
    file.write_bytes(GOOD[: offset_of(20) + kept])
    said = site.here("ingest", "bitcoin", file).failed(BlockCorrupt)

    assert str(file) in said and str(offset_of(20)) in said
    goes_on(site, good, 19)


@pytest.mark.parametrize(
    ("at", "garbage"),
    [
        pytest.param(0, b"\xde\xad\xbe\xef", id="magic"),
        pytest.param(4, b"\xff\xff\xff\xff", id="length"),
        pytest.param(FRAME_BYTES + 40, b"\xde\xad\xbe\xef", id="merkle root"),
        pytest.param(FRAME_BYTES + 120, b"\xde\xad\xbe\xef", id="transaction"),
    ],
)
def test_garbage_in_a_file(at: int, garbage: bytes, good: Path, tmp_path: Path) -> None:
    """Garbage within block 20: the bytes before it are blocks, those after it are not looked at."""
    site, file = Site(tmp_path), tmp_path / "blk.dat"
    data = bytearray(GOOD)
    data[offset_of(20) + at :][: len(garbage)] = b""
    data[offset_of(20) + at : offset_of(20) + at + len(garbage)] = garbage
    file.write_bytes(data)
    said = site.here("ingest", "bitcoin", file).failed(BlockCorrupt)

    assert str(file) in said
    assert any(str(offset_of(20) + skipped) in said for skipped in (0, FRAME_BYTES))
    goes_on(site, good, 19)


def test_file_of_something_else(good: Path, tmp_path: Path) -> None:
    """Nothing is published, and no generation is opened, for a file without a block."""
    site = Site(tmp_path)
    for name, content in (("empty", b""), ("text", b"no blocks here\n" * 20), ("zero.gz", b"\x1f\x8b\x08\x00")):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in site.here("ingest", "bitcoin", tmp_path / name).failed(BlockCorrupt)

    site.here("generation", "show").failed(NotFound)
    site.ingest(good)
    events = site.records("blocks")
    site.here("ingest", "bitcoin", good, tmp_path / "text").failed(BlockCorrupt)
    assert site.records("blocks") == events


def test_unknown_parent(good: Path, tmp_path: Path) -> None:
    """A block that fits nowhere is named with its parent; what stood before it is published."""
    site = Site(tmp_path)
    file = write_hex_lines(tmp_path / "gap.hex", [*RAWS[:20], *RAWS[21:30]])
    said = site.here("ingest", "bitcoin", file).failed(BlockOrphan)

    assert RAWS[21][4:36][::-1].hex() in said and str(file) in said
    goes_on(site, good, 19)


def test_first_block_with_a_parent(good: Path, tmp_path: Path) -> None:
    """An empty topic begins with a chain's first block, or with a base."""
    site = Site(tmp_path)
    file = write_hex_lines(tmp_path / "late.hex", RAWS[1:3])
    assert "--base-coins" in site.here("ingest", "bitcoin", file).failed(BlockOrphan)
    site.here("generation", "show").failed(NotFound)

    assert site.ingest(good)["height"] > 0


def test_other_chain(good: Path, tmp_path: Path) -> None:
    """Another chain's first block, name or base is refused, and changes nothing."""
    site = Site(tmp_path)
    site.here("ingest", "bitcoin", good, "--chain", "mainnet").ok()
    events = site.records("blocks")
    for name, part in (("regtest_kernel_206", ""), ("reorg_floresta", "genesis")):
        site.here("ingest", "bitcoin", *block_files(name, part)[:1]).failed(WrongChain)
    site.here("ingest", "bitcoin", good, "--chain", "signet").failed(WrongChain)
    base = ("--base-coins", base_coins_path("block300025_undo"))
    site.here("ingest", "bitcoin", *block_files("block300025_undo"), *base).failed(SettingsConflict)

    assert site.records("blocks") == events
    for role, node in (("primary", "p"), ("replica", "r")):
        site.here("run", "--role", role, "--until-idle", "--chain", "signet", node=node).failed(WrongChain)
        site.follow(role, node, "--chain", "mainnet")
        for words in (("status",), ("root",), ("scan",)):
            assert site.here(*words, "--chain", "mainnet", node=node).code == 0
        site.here("root", "--chain", "signet", node=node).failed(WrongChain)
