"""Snapshots and restores of states in several shards, by commands: the same state at any height, from one manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chains import expected
from tests.topology.sharded import MAINNET, MAINNET_END, ROOT_599, Sharded, check, same

STEPS = expected("mainnet_0_599")
FINAL = 499


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """A primary of two shards at height 599, with a snapshot."""
    return snapped(tmp_path_factory.mktemp("base") / "site", 2)


def snapped(folder: Path, shards: int) -> Sharded:
    site = Sharded(folder).begin(shards)
    site.ingest(*MAINNET)
    site.follow("primary", "p")
    taken = site.here("snapshot").ok()
    assert (taken["height"], taken["keys"], taken["shards"]) == (FINAL, STEPS[FINAL]["coins"], shards)
    assert taken["manifest"].split("/")[-2] == "000000000499-b6e5d13c2876c78a"  # the same whatever the shards
    return site


@pytest.fixture
def site(base: Sharded, tmp_path: Path) -> Sharded:
    return Sharded(base.copy(tmp_path / "site").folder)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_newest(shards: int, tmp_path: Path) -> None:
    """The snapshot's height, proven; from there a replica goes on to where the primary is."""
    site = snapped(tmp_path / "site", shards)
    restored = site.here("restore", node="r").ok()
    assert (restored["height"], restored["proof"], restored["keys"]) == (FINAL, "proven", STEPS[FINAL]["coins"])
    check(site, "r", STEPS[FINAL])

    assert site.follow("replica", "r")["root"] == ROOT_599 == check(site, "r", MAINNET_END)
    same(site, ["p", "r"])


@pytest.mark.parametrize("height", [0, 63, 64, 170, 498])
def test_any_archived_height(height: int, site: Sharded) -> None:
    """From the archives of the shards, or the snapshot; the replica goes on from there to the end."""
    assert site.here("restore", "--height", height, node="h").ok()["height"] == height
    check(site, "h", STEPS[height])
    site.follow("replica", "h")

    same(site, ["p", "h"])
