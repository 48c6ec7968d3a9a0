"""Topics whose archived records are deleted: everybody goes on from what is left, or from the object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from tests.chains import load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = load_blocks("mainnet_0_599")
SOME, MORE = 160, 180
FINALITY = 20
CUT = 127
"""Where the last whole segment ends, and everything is deleted by a trim that keeps nothing behind it."""


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Some blocks, at a primary and a replica; those that are final are archived in two segments."""
    folder = tmp_path_factory.mktemp("base")
    site = Site(folder / "site")
    write_hex_lines(site.folder / "all.hex", BLOCKS[:MORE])
    site.ingest(write_hex_lines(folder / "some.hex", BLOCKS[:SOME]))
    site.follow_both("--finality", FINALITY)
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def bounds(site: Site, topic: str) -> tuple[int, int]:
    with site.opened_log() as log:
        first, end = log.bounds(topic)
    return first, end


def trim(site: Site, *args: object) -> Any:
    return site.here("topics", "trim", *args, node="ops").ok()


def go_on(site: Site) -> Any:
    said = site.ingest(site.folder / "all.hex")
    site.follow("primary", "p")
    return said


def test_trim(site: Site) -> None:
    """It deletes what is archived and says why not more; doing it again finds nothing to do."""
    site.here("topics", "trim", node="ops").failed(UsageError)
    would = trim(site, "--keep-blocks", 0, "--dry-run")
    assert (would["height"], would["walk"]) == (CUT, CUT + 1)
    assert would["why"] == [f"archived to {CUT} in every shard, and a restore leads to {CUT}"]
    assert bounds(site, "blocks")[0] == bounds(site, "diffs")[0] == 0

    done = trim(site, "--keep-blocks", 0)
    assert {**done, "dry_run": True} == would
    firsts = {cut["topic"]: cut["before"] for cut in done["trimmed"]}
    for topic in ("blocks", "diffs"):
        assert bounds(site, topic)[0] == firsts[site.place.prefix + topic] > CUT
    again = trim(site, "--keep-blocks", 0)
    assert (again["records"], again["trimmed"]) == (0, [])

    go_on(site)
    site.follow("replica", "r")
    same_state(site, ["p", "r"])
    assert site.meta("r").tip.height == MORE - 1


def test_ingest_goes_on(site: Site) -> None:
    """From the walk number, the source and the branch that are left: the same files again say nothing again."""
    walk = site.meta("p").walk
    trim(site, "--keep-blocks", 0)
    said = go_on(site)
    assert (said["connected"], said["skipped"], said["walk"]) == (MORE - SOME, SOME, walk + MORE - SOME)
    said = site.ingest(site.folder / "all.hex")
    assert (said["connected"], said["rewinds"]) == (0, 0)

    site.follow("replica", "r")
    same_state(site, ["p", "r"])
    low = site.here("ingest", "bitcoin", write_hex_lines(site.folder / "low.hex", BLOCKS[:CUT]), node="source")
    assert low.code == 5 and f"known from {CUT}:" in low.document["way_out"]
