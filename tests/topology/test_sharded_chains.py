"""Chains in several shards, on every broker: what Bitcoin Core would hold, and the root of a run with one shard."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.chains import block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, check, wait_until
from tests.topology.sharded import ROOT_199, ROOT_599, Sharded, leading, more, same

pytestmark = pytest.mark.usefixtures("each_broker")


def test_mainnet(tmp_path: Path) -> None:
    """At a height on the way and at the end, by every command that reads. The first 200 blocks have the first
    spends."""
    site = Sharded(tmp_path / "site").begin(2)
    steps = expected("mainnet_0_599")
    site.ingest(write_hex_lines(tmp_path / "blocks.hex", load_blocks("mainnet_0_599")[:200]))
    for role, node in (("primary", "p"), ("replica", "r")):
        assert site.here("run", "--role", role, "--until-height", 170, node=node).ok()["height"] == 170
    assert check(site, "p", steps[170]) == check(site, "r", steps[170])
    done = site.follow_both()
    assert [one["root"] for one in done] == [ROOT_199] * 2 == [check(site, node, steps[199]) for node in "pr"]
    same(site, ["p", "r"])

    status = site.here("status", node="r").ok()
    assert (status["root"], status["coins"], status["height"]) == (ROOT_199, 203, 199)
    assert [(one["shard"], one["height"], one["lag"]["blocks"]) for one in status["shards"]] == [
        (shard, 199, 0) for shard in range(2)
    ]
    scanned = site.here("scan", "--limit", 1000, node="r").ok()
    assert (len(scanned["found"]), scanned["position"]["root"]) == (203, ROOT_199)
    asked = [scanned["found"][at]["key"] for at in (202, 0, 100)]
    assert [one["key"] for one in site.here("get", *asked, node="p").ok()["found"]] == asked
    verified = site.here("verify", node="r").ok()
    assert (verified["verified_root"], verified["keys"]) == (ROOT_199, 203)
    assert site.anchored()[199] == ROOT_199


@pytest.mark.parity
@pytest.mark.parametrize("shards", [2, 4])
def test_all_of_mainnet(shards: int, tmp_path: Path) -> None:
    """Root, coins and MuHash of 600 blocks, on a primary and on a replica."""
    site = Sharded(tmp_path / "site").begin(shards)
    site.ingest(*block_files("mainnet_0_599"))
    roots = [done["root"] for done in site.follow_both()]

    assert roots == [ROOT_599] * 2 == [check(site, node, expected("mainnet_0_599")[599]) for node in "pr"]
    same(site, ["p", "r"])
    assert site.anchored()[599] == ROOT_599


@pytest.mark.parametrize(("name", "shards", "blocks"), [("signet_0_120", 4, 81), ("regtest_kernel_206", 8, 121)])
def test_chain(name: str, shards: int, blocks: int, tmp_path: Path) -> None:
    alone = Site(tmp_path / "alone")
    site = Sharded(tmp_path / "site").begin(shards)
    file = write_hex_lines(tmp_path / "blocks.hex", load_blocks(name)[:blocks])
    roots = []
    for each in (alone, site):
        each.ingest(file)
        roots.append(each.follow("primary", "p")["root"])
    site.follow("replica", "r")

    assert roots == [check(site, node, expected(name)[blocks - 1]) for node in "pr"]
    same(site, ["p", "r"])


def test_reorgs(tmp_path: Path) -> None:
    """A, then B from a fork, then A again."""
    site = Sharded(tmp_path).begin(4)
    steps = expected("reorg_floresta")
    parts = {name: load_blocks("reorg_floresta", name) for name in "AB"}
    files = {name: write_hex_lines(tmp_path / f"{name}.hex", raws) for name, raws in parts.items()}
    site.ingest(*block_files("reorg_floresta", "genesis"), files["A"])
    site.follow_both()
    assert check(site, "p", steps[1]) == check(site, "r", steps[1])
    for step, name in zip(steps[2:], "BA", strict=True):
        site.here("ingest", "bitcoin", files[name], "--again").ok()
        site.follow_both()

        assert check(site, "p", step) == check(site, "r", step)
        same(site, ["p", "r"])


def test_workers_share_the_shards(tmp_path: Path) -> None:
    """A second primary takes half of the shards, restores them while the other half goes on, and lays them down
    again when it ends; kill -9 of one gives all shards to the other."""
    quick = {"STATEFERRY_SESSION_TIMEOUT_S": "6"}  # no broker allows less
    site = Sharded(tmp_path).begin(4)
    site.here("ingest", "synthetic", "--blocks", 60, "--changes", 60).ok()
    with site.running("primary", "p", env=quick) as first, site.running("replica", "r") as replica:
        site.wait_for("p", first, height=59, state="leading", in_flight=0)
        with site.running("primary", "q", env=quick) as second:
            wait_until(lambda: len(leading(site, "p")) == len(leading(site, "q")) == 2, second)
            assert not set(leading(site, "p")) & set(leading(site, "q"))
            more(site, 59, 20)
            found = site.wait_for("r", replica, height=79)
            wait_until(lambda: site.here("root", node="r").ok()["root"] == found["root"])
            # Neither has all shards: what they say of the whole is what all shards say of themselves.
            wait_until(lambda: site.here("status", node="p").ok()["root"] == found["root"])
            assert site.here("status", node="p").ok()["position_of"] == "anchors"
            first.send_signal(signal.SIGKILL)
            first.wait()
            wait_until(lambda: len(leading(site, "q")) == 4, second)
            more(site, 79, 20)
            site.wait_for("q", second, height=99, in_flight=0)
        site.wait_for("r", replica, height=99)
    same(site, ["q", "r"])

    assert all(len(ids) == len(set(ids)) == 100 for ids in site.valid_ids())
    site.follow("replica", "late")
    same(site, ["late", "r"])
