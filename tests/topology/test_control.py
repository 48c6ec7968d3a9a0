"""Beside a running worker: commands ask it over its socket, get its position with every answer, and signals end it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import NotFound, UsageError
from tests.chains import block_files, expected
from tests.processes import ROOT
from tests.topology.commands import Site, finish, wait_until

STEPS = expected("mainnet_0_599")
NODES = ("p", "r")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A primary and a replica that run, at height 599."""
    site = Site(tmp_path_factory.mktemp("control"))
    site.ingest(*block_files("mainnet_0_599"))
    with site.running("primary", "p") as primary, site.running("replica", "r") as replica:
        site.wait_for("p", primary, height=599)
        site.wait_for("r", replica, height=599)
        yield site


def position(answer: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(answer[name] for name in ("chain", "height", "block_hash", "proof"))


AT_599 = ("bitcoin", 599, STEPS[599]["tip"] if "tip" in STEPS[599] else STEPS[599]["hash"], "proven")


@pytest.mark.parametrize(("node", "role"), [("p", "primary"), ("r", "replica")])
def test_status(site: Site, node: str, role: str) -> None:
    """Everything that says where a node stands, in one document."""
    found = site.here("status", node=node).ok()

    assert position(found) == AT_599
    assert (found["role"], found["running"], found["proven"]) == (role, True, True)
    assert (found["epoch"], found["seq"], found["walk"]) == (1, 600, 600)
    assert found["offsets"] == {"blocks": 601, "diffs": 602}
    assert (found["coins"], found["keys"]) == (STEPS[599]["coins"],) * 2
    assert len(found["generation"]) == 32 and len(found["root"]) == 64
    assert found["void_records"] == {} and found["in_flight"] == 0
    assert isinstance(found["snapshots"], list)


@pytest.mark.parametrize("node", NODES)
def test_reads(site: Site, node: str) -> None:
    """Pages of a scan hold every coin once; each of them is found by its key."""
    found, after = [], ""
    while True:
        page = site.here("scan", "--limit", 250, *(["--after", after] if after else []), node=node).ok()
        assert position(page["position"]) == AT_599
        found += page["found"]
        after = page["next"]
        if after is None:
            break
    keys = [one["key"] for one in found]
    assert len(keys) == len(set(keys)) == STEPS[599]["coins"]
    assert sum(one["coin"]["amount_sat"] for one in found) == STEPS[599]["amount_sat"]

    answer = site.here("get", *keys[:5], keys[-1], node=node).ok()
    assert position(answer["position"]) == AT_599
    assert answer["found"] == [*found[:5], found[-1]]
    one = site.here("scan", "--txid", keys[7].partition(":")[0], node=node).ok()
    assert one["found"] == [found[7]]
    assert "no utxo" in site.here("get", "00" * 32 + ":0", node=node).failed(NotFound)
    site.here("get", "beef", node=node).failed(UsageError)


def test_roots_agree(site: Site) -> None:
    """The MuHash is Bitcoin Core's, the root the same on both."""
    primary, replica = (site.muhash(node) for node in NODES)

    assert position(primary) == position(replica) == AT_599
    assert (primary["muhash"], primary["root"]) == (STEPS[599]["muhash"], replica["root"])
    assert replica["muhash"] == primary["muhash"]


@pytest.mark.parametrize("node", NODES)
def test_verify(site: Site, node: str) -> None:
    """A worker hashes every key without stopping."""
    found = site.here("verify", "--level", "full", node=node).ok()

    assert position(found) == AT_599
    assert (found["verified"], found["keys"], found["verified_height"]) == (True, STEPS[599]["coins"], 599)


def test_snapshot_and_restore_of_it(site: Site) -> None:
    """A snapshot is taken at the final height, and everybody sees it; from it comes a proven store."""
    taken = site.here("snapshot").ok()
    assert (taken["height"], taken["keys"]) == (499, STEPS[499]["coins"])
    for node in NODES:
        assert [one["height"] for one in site.here("status", node=node).ok()["snapshots"]] == [499]

    restored = site.here("restore", node="restored").ok()
    assert (restored["height"], restored["root"], restored["proof"]) == (499, taken["root"], "proven")
    assert site.muhash("restored")["muhash"] == STEPS[499]["muhash"]


def test_health_check(site: Site) -> None:
    """It passes where a worker answers, and nowhere else: not where there is only a store."""

    def check(node: str) -> int:
        command = [sys.executable, "-m", "topology.control", site.dir(node) / "control.sock"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode

    site.here("run", "--role", "replica", "--until-height", 9, node="ended").ok()

    assert [check(node) for node in (*NODES, "ended", "never")] == [0, 0, 1, 1]


def test_nothing_is_left_behind(site: Site) -> None:
    """Copies made for commands are gone."""
    site.muhash("r")

    assert not [*(site.dir("r") / "copies").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """A worker told to stop, wherever it is, exits with 0 and says where; the next one goes on."""
    site = Site(tmp_path)
    files = block_files("mainnet_0_599")
    site.ingest(*files)
    for role, node in (("primary", "p"), ("replica", "r")):
        with site.running(role, node) as worker:
            worker.send_signal(number)
            stopped = finish(worker).ok()
        assert stopped["role"] == role and not (site.dir(node) / "control.sock").exists()
        assert stopped["height"] == site.here("status", node=node).ok()["height"]
        assert site.follow(role, node)["height"] == 599

    assert site.muhash("r")["muhash"] == STEPS[599]["muhash"]


def test_a_worker_without_anything_to_follow_waits(tmp_path: Path) -> None:
    """It is told to stop before there is a generation: that is a clean end too."""
    site = Site(tmp_path)
    worker = site.start("run", "--role", "replica", node="r")
    wait_until(site.log.exists, worker)
    worker.send_signal(signal.SIGTERM)

    assert finish(worker).ok() == {"followed": False, "why": "nothing was published"}
