"""A state goes on with another number of shards: the same coins and root, and replicas that follow by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PartCorrupt, UsageError
from tests.chains import expected, load_blocks, write_hex_lines
from tests.topology.commands import check
from tests.topology.sharded import ROOT_199, Sharded, same

pytestmark = pytest.mark.usefixtures("each_broker")

STEPS = expected("mainnet_0_599")
FINALITY = 3
FIRST = 119


def publish(site: Sharded, last: int) -> None:
    blocks = load_blocks("mainnet_0_599")[: last + 1]
    assert site.ingest(write_hex_lines(site.folder / "blocks.hex", blocks))["height"] == last


@pytest.fixture(scope="module")
def snapped(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """One shard at height 119, with a snapshot; a replica follows it."""
    site = Sharded(tmp_path_factory.mktemp("snapped") / "site").begin(1)
    publish(site, FIRST)
    site.follow_both("--finality", FINALITY)
    assert site.here("snapshot").ok()["height"] == FIRST - FINALITY
    return site


@pytest.fixture
def site(snapped: Sharded, tmp_path: Path) -> Sharded:
    copy = Sharded(snapped.copy(tmp_path / "site").folder)
    copy.shards = 1
    return copy


def test_from_one_number_to_the_other(site: Sharded) -> None:
    """1, 4 and 1 again, some blocks of Bitcoin in each. The replica renews itself every time."""
    last, node = FIRST, "p"
    for shards, height in ((4, 159), (1, 199)):
        begun = site.here("generation", "new", "--shards", shards, node=node).ok()
        assert (begun["shards"], begun["base"].split(":")[0]) == (shards, str(last - FINALITY))
        assert not (site.dir(node) / "rescaling").exists()
        site.shards, last, node = shards, height, f"p{shards}-{height}"
        publish(site, height)

        for role, one in (("primary", node), ("replica", "r")):
            site.follow(role, one)
            site.here("verify", node=one).ok()
        root = check(site, node, STEPS[height])
        same(site, [node, "r"])
        assert site.here("snapshot", node=node).ok()["height"] == height - FINALITY

    assert root == ROOT_199
    restored = site.here("restore", node="x").ok()
    check(site, "x", STEPS[restored["height"]])


def test_numbers_that_cannot_be(site: Sharded) -> None:
    for shards in (0, 3, 128, -2):
        assert "power of two" in site.here("generation", "new", "--shards", shards).failed(UsageError)
    assert site.here("generation", "show").ok()["number"] == 1


def test_a_part_that_is_damaged(site: Sharded) -> None:
    """Nothing is begun, and nothing is published."""
    (part,) = (site.objects / "bitcoin").rglob("*.sst")
    whole = part.read_bytes()
    part.write_bytes(whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:])
    assert part.name in site.here("generation", "new", "--shards", 4).failed(PartCorrupt)
    assert site.here("generation", "show").ok()["number"] == 1
    assert len(list((site.objects / "bitcoin").rglob("manifest.json"))) == 1

    part.write_bytes(whole)
    assert site.here("generation", "new", "--shards", 4).ok()["number"] == 2
