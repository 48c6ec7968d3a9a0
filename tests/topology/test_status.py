"""What `stateferry status` says of the stream: how far behind, who owns what, what was void, what is held."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.chains import block_files
from tests.topology.commands import Site, here
from topology import lag
from topology.cli import cli

BLOCKS = block_files("mainnet_0_599")


@pytest.fixture(scope="module")
def site(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """600 blocks published, 600 applied, 101 of them followed."""
    site = Site(tmp_path_factory.mktemp("status"))
    site.ingest(*BLOCKS)
    site.here("run", "--role", "primary", "--until-height", 599).ok()
    site.here("run", "--role", "replica", "--until-height", 100, node="r").ok()
    yield site


def shard_of(site: Site, node: str) -> Any:
    (shard,) = site.here("status", node=node).ok()["shards"]
    return shard


def appended_s(site: Site, topic: str, offset: int) -> float:
    with site.opened_log() as log:
        return log.read(topic)[offset].timestamp_ms / 1000


def test_a_store_without_a_worker_is_behind(site: Site) -> None:
    """Blocks and seconds are counted from the first frame that the store does not hold."""
    before_s = time.time()
    shard = shard_of(site, "r")
    after_s = time.time()
    at_101_s = appended_s(site, "diffs", 103)

    assert (shard["height"], shard["seq"], shard["owner"]) == (100, 101, None)
    assert shard["lag"]["blocks"] == 499
    assert before_s - at_101_s - 0.001 <= shard["lag"]["seconds"] <= after_s - at_101_s + 0.001
    assert (shard["topics"]["diffs"]["next_offset"], shard["topics"]["diffs"]["end_offset"]) == (103, 602)
    assert shard["topics"]["diffs"]["records_behind"] == 499
    assert set(shard["topics"]) == {"diffs"}


def test_a_store_that_holds_all_is_not_behind(site: Site) -> None:
    """A primary is measured against both topics. A block that is there for long makes no seconds."""
    shard = shard_of(site, "p")

    assert shard["lag"] == {"blocks": 0, "seconds": 0.0}
    assert {name: topic["records_behind"] for name, topic in shard["topics"].items()} == {"diffs": 0, "blocks": 0}
    assert (shard["topics"]["diffs"]["epoch"], shard["topics"]["diffs"]["writer"]) == (1, shard["writer"])


def test_void_records_are_no_blocks(site: Site, tmp_path: Path) -> None:
    """Junk at the end of a topic is records to read, and no lag."""
    junk = site.copy(tmp_path / "junk")
    junk.append("diffs", b"", b"junk", b"SFfr" + bytes(500))
    shard = shard_of(junk, "p")

    assert shard["lag"] == {"blocks": 0, "seconds": 0.0}
    assert shard["topics"]["diffs"]["records_behind"] == 3
    assert shard_of(junk, "r")["lag"]["blocks"] == 499


def test_workers_say_who_owns_and_who_is_in_force(site: Site, tmp_path: Path) -> None:
    """Both follow the same epoch and writer; it is the primary's. All that is held is below its bound, and what was
    void is counted by reason."""
    site = site.copy(tmp_path / "running")
    site.append("diffs", b"", b"junk", b"SFfr" + bytes(500))
    with site.running("primary", "p") as primary, site.running("replica", "r") as replica:
        site.wait_for("p", primary, state="leading")
        site.wait_for("r", replica, height=599, epoch=2)
        shards = {node: shard_of(site, node) for node in ("p", "r")}

    for node, shard in shards.items():
        assert (shard["shard"], shard["shards"], shard["height"]) == (0, 1, 599)
        assert shard["lag"] == {"blocks": 0, "seconds": 0.0}
        assert shard["owner"] == (site.dir(node) / "NODE").read_text()
        assert all(held["bytes"] <= held["bytes_max"] for held in shard["buffers"].values())
        assert shard["frames_in_flight"] == 0 and shard["void_records"] == {"damaged": 3}
    assert (shards["p"]["in_force"], shards["p"]["state"]) == (True, "leading")
    assert (shards["r"]["in_force"], shards["r"]["state"]) == (False, "following")
    assert (shards["p"]["epoch"], shards["p"]["writer"]) == (shards["r"]["epoch"], shards["r"]["writer"])
    assert set(shards["p"]["buffers"]) >= {"dirty_layers", "frames_in_flight", "event_chunks", "frame_chunks"}


def test_a_primary_that_is_not_run_falls_behind_the_source(site: Site, tmp_path: Path) -> None:
    """A primary's lag is to the blocks that are published, a rewind among them counts as one event."""
    site = site.copy(tmp_path / "published")
    more = ("--from-height", 599, "--blocks", 30, "--changes", 5, "--reorg-every", 10, "--seed", 2)
    published = site.here("ingest", "synthetic", *more).ok()
    shard = shard_of(site, "p")

    assert shard["lag"]["blocks"] == published["walk"] - 600
    assert shard["lag"]["seconds"] > 0
    assert shard["topics"]["diffs"]["blocks_behind"] == 0


def test_text_says_the_same(site: Site) -> None:
    """For people, a shard is a few lines below the node's."""
    options = [option for option in site.options("r") if option != "--json"]
    shown = CliRunner().invoke(cli, ["status", *options], catch_exceptions=False).stdout

    position, shard = shown.split("\n\n")
    assert "role                  replica" in position
    lines = [line.split(maxsplit=1) for line in shard.splitlines()]
    assert re.split(r" {2,}|(?<=shard) ", shard.splitlines()[0]) == ["shard", "0 of 1", "height 100, seq 101"]
    assert lines[1][0] == "lag" and lines[1][1].startswith("499 blocks, ")
    assert lines[-1] == [f"{site.place.prefix}diffs[0]", "103 of 602 records"]


def test_a_broker_that_does_not_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status says so, and what the store holds; it waits for nobody for long."""
    monkeypatch.setattr(lag, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"kafka://127.0.0.1:{silent.getsockname()[1]}"
        found = here("status", "--broker", url, "--data-dir", site.dir("r"), "--json").ok()

    (shard,) = found["shards"]
    assert (found["height"], shard["height"], shard["lag"]) == (100, 100, None)
    assert shard["lag_unknown"] == "the broker did not answer within 1 s"
