"""Snapshots and restores of states in several shards, by commands: the same state at any height, from one manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from tests.chains import base_coins_path, block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import check, wait_until
from tests.topology.sharded import ROOT_199, ROOT_299, Sharded, heights, leading, more, same

STEPS = expected("mainnet_0_599")[:300]
FINAL = 199


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """A primary of two shards at height 299, with a snapshot."""
    return snapped(tmp_path_factory.mktemp("base") / "site", 2)


def snapped(folder: Path, shards: int) -> Sharded:
    site = Sharded(folder).begin(shards)
    site.ingest(write_hex_lines(folder / "blocks.hex", load_blocks("mainnet_0_599")[: len(STEPS)]))
    assert site.follow("primary", "p")["root"] == ROOT_299
    taken = site.here("snapshot").ok()
    assert (taken["height"], taken["keys"], taken["shards"]) == (FINAL, STEPS[FINAL]["coins"], shards)
    assert taken["manifest"].split("/")[-2] == f"000000000199-{ROOT_199[:16]}"  # the same whatever the shards
    return site


@pytest.fixture
def site(base: Sharded, tmp_path: Path) -> Sharded:
    return Sharded(base.copy(tmp_path / "site").folder)


@pytest.mark.parametrize("shards", [1, 4])
def test_newest(shards: int, tmp_path: Path) -> None:
    """The snapshot's height, proven; from there a replica goes on to where the primary is."""
    site = snapped(tmp_path / "site", shards)
    restored = site.here("restore", node="r").ok()
    assert (restored["height"], restored["proof"], restored["keys"]) == (FINAL, "proven", STEPS[FINAL]["coins"])
    check(site, "r", STEPS[FINAL])

    assert site.follow("replica", "r")["root"] == ROOT_299 == check(site, "r", STEPS[-1])
    same(site, ["p", "r"])


@pytest.mark.parametrize("height", [63, 170, 198, 199])
def test_any_archived_height(height: int, site: Sharded) -> None:
    """From the archives of the shards, or the snapshot; the replica goes on from there to the end."""
    assert site.here("restore", "--height", height, node="h").ok()["height"] == height
    check(site, "h", STEPS[height])
    site.follow("replica", "h")

    same(site, ["p", "h"])


def test_promotion(site: Sharded) -> None:
    """A restored directory, claimed, becomes the primary's: it proves what it holds while it follows."""
    assert site.here("restore", "--claimed", node="q").ok()["proof"] == "claimed"
    with site.running("primary", "q") as worker:
        site.wait_for("q", worker, height=299, state="leading", in_flight=0, proven=True)
        more(site, 299, 120)
        taken = site.wait_for("q", worker, height=419, in_flight=0) and site.here("snapshot", node="q").ok()
    site.follow("replica", "p")

    same(site, ["p", "q"])
    assert (taken["height"], taken["root"]) == (319, site.anchored()[319])


def test_of_a_worker_with_half_of_the_shards(tmp_path: Path) -> None:
    """Two primaries: either publishes all shards, those of the other from what that one archived."""
    site = Sharded(tmp_path / "site").begin(4)
    site.here("ingest", "synthetic", "--blocks", 100, "--changes", 20).ok()
    finality = ("--finality", 10)
    quick = {"STATEFERRY_SESSION_TIMEOUT_S": "6"}
    with (
        site.running("primary", "p", *finality, env=quick) as first,
        site.running("primary", "q", *finality, env=quick) as second,
    ):
        wait_until(lambda: len(leading(site, "p")) == len(leading(site, "q")) == 2, second)
        for node, worker in (("p", first), ("q", second)):
            wait_until(lambda node=node: set(heights(site, node).values()) == {99}, worker)  # type: ignore[misc]
        archived = 63  # of whole segments; blocks are final up to 89
        taken = site.here("snapshot").ok()
        assert (taken["height"], taken["root"]) == (archived, site.anchored()[archived])
        lower = site.here("snapshot", "--height", archived - 20, node="q").ok()
        assert (lower["height"], lower["root"]) == (archived - 20, site.anchored()[archived - 20])
        assert "final up to height 89" in site.here("snapshot", "--height", 90).failed(UsageError)
    site.here("restore", node="r").ok()
    assert site.follow("replica", "r")["root"] == site.anchored()[99]


def test_base_coins(tmp_path: Path) -> None:
    """A chain that begins with imported coins, each with its shard; the base is a snapshot like others."""
    site = Sharded(tmp_path / "site").begin(2)
    name = "block300025_undo"
    before, after = expected(name)[0], expected(name)[-1]
    site.here("ingest", "bitcoin", *block_files(name), "--base-coins", base_coins_path(name)).ok()
    site.follow_both()
    assert site.here("verify", node="r").ok()["verified_height"] == after["height"]
    assert site.muhash("r")["muhash"] == after["muhash"]
    same(site, ["p", "r"])

    assert site.here("restore", "--height", after["height"] - 1, node="base").ok()["coins"] == before["coins"]
    assert site.muhash("base")["muhash"] == before["muhash"]


def test_new_generation(tmp_path: Path) -> None:
    """Every partition ends, the next generation has as many shards, and a replica of the old one renews itself."""
    site = Sharded(tmp_path / "site").begin(2)
    blocks = write_hex_lines(tmp_path / "a.hex", load_blocks("reorg_floresta", "A"))
    site.ingest(*block_files("reorg_floresta", "genesis"), blocks)
    site.follow_both("--finality", 3)
    assert site.here("snapshot").ok()["height"] == 7
    begun = site.here("generation", "new").ok()
    assert (begun["shards"], begun["number"], begun["base"].partition(":")[0]) == (2, 2, "7")
    site.ingest(blocks)
    primary = site.follow("primary", "p2")
    site.follow("replica", "r")

    same(site, ["p2", "r"])
    assert primary["generation"] == begun["generation"] == site.meta("r").generation.hex()
    assert site.muhash("r")["muhash"] == expected("reorg_floresta")[1]["muhash"]
    (kept,) = (site.dir("r") / "left-generations").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["00", "01"]
