"""A log that lost its end, as a broker without fsync does in a power cut: stores take back what the log no longer
holds, and all goes on to what a run without the loss gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import LogLost, WalkInvalid
from pipeline.sources.bitcoin import parse_header
from tests.chains import block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

NAME = "regtest_core_getblockstats"
END = 103
FINALITY = 20


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Primary and replica at the end of a chain: 104 frames, the EPOCHs of three reigns between them."""
    folder = tmp_path_factory.mktemp("base")
    site = Site(folder / "site")
    site.ingest(write_hex_lines(folder / "blocks.hex", load_blocks(NAME)))
    for height in (50, 98):
        site.here("run", "--role", "primary", "--finality", FINALITY, "--until-height", height).ok()
    site.follow_both()
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def ends_equal(site: Site, base: Site) -> None:
    """Content, position and frame ids are those of the run without a loss."""
    same_state(site, ["p", "r"])
    assert site.content("p") == base.content("p")
    assert site.meta("p").tip == base.meta("p").tip
    assert site.meta("p").seq == base.meta("p").seq
    assert site.frame_ids() == base.frame_ids()
    assert site.muhash("r")["muhash"] == expected(NAME)[0]["muhash"]


@pytest.mark.parametrize("lost", [1, 3, 5, 6, 7, 20])
@pytest.mark.parametrize("first", ["primary", "replica"])
def test_lost_frames(lost: int, first: str, site: Site, base: Site) -> None:
    """``lost`` records, with or without an EPOCH among them: whoever starts first takes back what is gone. The primary
    proposes the same frames again."""
    frames = site.frame_ids()
    site.cut("diffs", lost)
    kept = len(site.frame_ids())
    assert kept == len(frames) - lost + (lost > 5)
    if first == "replica":
        found = site.follow("replica", "r")
        assert (found["seq"], found["height"]) == (kept, kept - 1)
        assert found["proof"] == "proven"
    site.follow_both()

    ends_equal(site, base)


def test_another_log_in_its_place(site: Site, base: Site) -> None:
    """Records are not missing but different: the digest of the last one tells."""
    lost = site.cut("diffs", 4)
    site.append("diffs", b"what another", b"writer left", b"in the same", b"places")
    found = site.follow("replica", "r")
    assert (found["height"], found["void_records"]) == (END - 4, {"damaged": 4})
    site.follow_both()

    ends_equal(site, base)
    assert len(lost) == 4


def test_more_than_the_journal_takes_back(site: Site) -> None:
    """A loss deeper than finality is not guessed at: the store stays as it is, and the way out is named."""
    before, content = site.meta("r"), site.content("r")
    site.cut("diffs", 60)

    assert "restore" in site.here("run", "--role", "replica", "--until-idle", node="r").failed(LogLost)
    after = site.meta("r")
    assert after.seq >= before.journal_first_seq - 1 and after.final_height == before.final_height
    assert site.content("p") == content
    assert site.here("status", node="r").code == 0


def test_lost_events(site: Site, base: Site) -> None:
    """Events are gone whose frames are not: published again, they are known by their walk numbers."""
    lost = site.cut("blocks", 7)
    site.follow_both()
    assert site.meta("p").tip == base.meta("p").tip

    said = site.ingest(write_hex_lines(site.folder / "blocks.hex", load_blocks(NAME)))
    assert (said["connected"], said["walk"]) == (len(lost), END + 1)
    site.follow_both()

    ends_equal(site, base)


def test_lost_events_and_frames(site: Site, base: Site) -> None:
    """Both topics lost their ends, by different lengths."""
    site.cut("blocks", 3)
    site.cut("diffs", 9)
    site.follow_both()
    assert site.meta("r").tip.height == END - 3
    site.ingest(write_hex_lines(site.folder / "blocks.hex", load_blocks(NAME)))
    site.follow_both()

    ends_equal(site, base)


def test_another_branch_in_the_place_of_lost_events(tmp_path: Path) -> None:
    """What was published instead is not what both nodes hold under these numbers: the primary says so, also before
    anything is published on top, and goes on once the source has gone back to what was applied."""
    site = Site(tmp_path / "site")
    genesis = block_files("reorg_floresta", "genesis")
    a, b = (write_hex_lines(tmp_path / part, load_blocks("reorg_floresta", part)) for part in "AB")
    site.ingest(*genesis, a)
    site.follow_both()
    walk = site.meta("p").walk
    site.cut("blocks", 2)
    site.ingest(write_hex_lines(tmp_path / "short", load_blocks("reorg_floresta", "B")[:1]))
    before, content = site.meta("p"), site.content("p")
    said = site.here("run", "--role", "primary", "--until-idle").failed(WalkInvalid)
    assert f"event {walk - 1} is" in said and "topic blocks, partition 0, offset" in said
    site.follow("replica", "r")
    assert (site.meta("p").tip, site.content("p")) == (before.tip, content)
    same_state(site, ["p", "r"])

    site.ingest(b)
    site.here("run", "--role", "primary", "--until-idle").failed(WalkInvalid)
    site.here("ingest", "bitcoin", a, "--again", "--resume-from", walk + 1).ok()
    site.here("ingest", "bitcoin", b, "--again").ok()
    site.follow_both()
    same_state(site, ["p", "r"])
    assert site.meta("p").tip.block_hash == parse_header(load_blocks("reorg_floresta", "B")[-1]).block_hash


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_nothing_but_the_opening_is_left(kept: int, tmp_path: Path) -> None:
    """A short history, lost down to its first records, is taken back to its beginning and made again."""
    site = Site(tmp_path / "site")
    site.ingest(write_hex_lines(tmp_path / "blocks.hex", load_blocks(NAME)[:12]))
    site.follow_both()
    before = site.copy(tmp_path / "before")
    site.cut("diffs", len(site.records("diffs")) - kept)
    site.follow_both()

    same_state(site, ["p", "r"])
    assert site.content("r") == before.content("r")
    assert site.frame_ids() == before.frame_ids()


def test_replica_that_waits_while_the_log_is_cut(site: Site, base: Site) -> None:
    """A replica that was down during loss and repair sees only that the log is another one from some offset on."""
    site.cut("diffs", 12)
    site.follow("primary", "p")
    site.follow("primary", "p")
    site.follow("replica", "r")

    ends_equal(site, base)
