"""A bad stretch on the blocks topic: the primary takes nothing from there on, keeps the bytes, serves what it has, and
goes on once a source has published again from there. Every reader of the topic then says the same."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.block import BlockRef, Op
from pipeline.errors import (
    BlockInvalid,
    EventCorrupt,
    RewindTooDeep,
    StateferryError,
    UsageError,
    WalkGap,
    WalkInvalid,
)
from pipeline.sources.bitcoin import parse_header
from tests.chains import load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state
from tests.topology.forge import Source, coin_key, ops

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = load_blocks("reorg_btcd", "main")
LAST, END = 3, len(BLOCKS)  # walk numbers: of the last good event, and of the chain's end
FINALITY = 1
SPENT = coin_key(404)
FIRST = BlockRef(0, parse_header(BLOCKS[0]).block_hash)
TIP = BlockRef(LAST - 1, parse_header(BLOCKS[LAST - 1]).block_hash)

Bad = Callable[[Source, BlockRef], object]
BAD: dict[str, tuple[type[StateferryError], Bad]] = {
    "gap": (WalkGap, lambda source, at: source.connect(at, ops(), walk=LAST + 3)),
    "wrong parent": (WalkInvalid, lambda source, at: source.connect(BlockRef(at.height, b"p" * 32), ops())),
    "poisoned": (EventCorrupt, lambda source, at: source.site.append("blocks", b"SFev\1" + secrets.token_bytes(60))),
    "spend of nothing": (BlockInvalid, lambda source, at: source.connect(at, ops((Op.DELETE, SPENT)))),
    "rewind too deep": (RewindTooDeep, lambda source, at: source.rewind(FIRST)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "good": write_hex_lines(folder / "good.hex", BLOCKS[:LAST]),
        "all": write_hex_lines(folder / "all.hex", BLOCKS),
    }


@pytest.fixture(scope="module")
def straight(base: Site, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A run without anything bad."""
    site = base.copy(tmp_path_factory.mktemp("straight") / "site")
    site.ingest(files["all"])
    site.follow_both()
    return site


@pytest.fixture(scope="module")
def base(each_broker: None, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The first blocks, at both nodes."""
    site = Site(tmp_path_factory.mktemp("base") / "site")
    site.ingest(files["good"])
    site.follow_both("--finality", FINALITY)
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


@pytest.mark.parametrize("kind", BAD)
def test_published_again(kind: str, site: Site, straight: Site, files: dict[str, Path]) -> None:
    """Whatever was bad, and whatever was published above it by sources that did not know: `--resume-from` makes it
    void. A promoted replica goes the same way, and a source that is told nothing finds all blocks there."""
    error, do = BAD[kind]
    source = Source(site)
    do(source, TIP)
    (bad,) = site.records("blocks")[-1:]
    offset = len(site.records("blocks")) - 1
    above = BlockRef(TIP.height + 1, b"a" * 32)
    source.connect(above, ops())
    Source(site).connect(above, ops())
    said = site.here("run", "--role", "primary", "--until-idle").failed(error)
    assert f"topic blocks, partition 0, offset {offset}" in said and f"--resume-from {LAST + 1}" in said
    (kept,) = (site.dir("p") / "refused").iterdir()
    assert (kept / "record.bin").read_bytes() == bad
    facts = json.loads((kept / "evidence.json").read_text())
    assert (facts["error"], facts["topic"], facts["partition"], facts["offset"]) == (
        error.__name__,
        "blocks",
        0,
        offset,
    )
    assert site.here("status").ok()["height"] == TIP.height
    site.here("ingest", "bitcoin", files["all"], "--resume-from", LAST).failed(UsageError)
    site.here("ingest", "bitcoin", files["all"], "--resume-from", 99).failed(WalkGap)

    found = site.here("ingest", "bitcoin", files["all"], "--resume-from", LAST + 1).ok()
    assert (found["connected"], found["skipped"], found["walk"]) == (END - LAST, LAST, END)
    site.copy(site.folder / "other").follow("primary", "r")
    site.follow_both()
    same_state(site, ["p", "r"])
    assert site.content("p") == straight.content("p")
    assert site.meta("p").tip == straight.meta("p").tip
    assert site.frame_ids() == straight.frame_ids()

    records = len(site.records("blocks"))
    found = site.here("ingest", "bitcoin", files["all"]).ok()
    assert (found["connected"], found["skipped"], found["walk"]) == (0, END, END)
    assert len(site.records("blocks")) == records


def test_a_running_primary_waits_for_it(site: Site, straight: Site, files: dict[str, Path]) -> None:
    """It answers meanwhile, with what it has; status says what it refused; nothing has to be started again."""
    with site.running("primary", "p") as worker:
        site.wait_for("p", worker, state="leading")
        Source(site).connect(TIP, ops((Op.DELETE, SPENT)))
        (shard,) = site.wait_for_status("p", worker, lambda found: found["shards"][0]["refused"])["shards"]
        assert "does not exist" in shard["refused"]
        assert site.here("root").ok()["height"] == LAST - 1
        site.here("ingest", "bitcoin", files["all"], "--resume-from", LAST + 1).ok()
        site.wait_for("p", worker, height=END - 1)
        site.wait_for_status("p", worker, lambda found: not found["shards"][0]["refused"])
    site.follow("replica", "r")

    same_state(site, ["p", "r"])
    assert site.content("p") == straight.content("p")


def test_resuming_where_nothing_was_bad(site: Site, files: dict[str, Path]) -> None:
    """From the topic's end on it is an EPOCH that changes nothing."""
    found = site.here("ingest", "bitcoin", files["good"], "--resume-from", LAST + 1).ok()
    assert (found["connected"], found["walk"]) == (0, LAST)
    site.ingest(files["all"])
    site.follow_both()

    assert site.meta("p").walk == END
    same_state(site, ["p", "r"])
