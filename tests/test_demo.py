"""The demo, small: real processes, and every fact of its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.topology.commands import here
from topology.demo import walk
from topology.demo.facts import Facts, Node
from topology.demo.screen import Screen
from topology.demo.wire import Size

ROOT = Path(__file__).parents[1]
MUHASH_599 = "ce93177ecb5987744529c6e484b895dea4e4b1d062aef2230583f3f32acc4f8d"
BLOCKS = 40


def demo(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "topology", "demo", "--data-dir", str(folder), "--json", *arguments]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run says, and the folder it was in."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        demo(folder, "--blocks", str(BLOCKS), "--changes", "50"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"folder": folder}


def test_all_nodes_agree(found: dict[str, Any]) -> None:
    """Three nodes stand at the tip, proven, with the same coins."""
    nodes = found["nodes"]

    assert (found["agreed"], found["mismatches"]) == (True, [])
    assert set(nodes) == {"primary", "replica", "restored"}
    for name in ("height", "block_hash", "root", "proof", "coins", "muhash"):
        assert len({node[name] for node in nodes.values()}) == 1, name
    assert nodes["primary"]["proof"] == "proven"
    assert nodes["primary"]["height"] == 599 + BLOCKS - 6


def test_mainnet_has_the_expected_muhash(found: dict[str, Any]) -> None:
    assert found["muhash_expected"] == MUHASH_599
    assert found["muhash_found"]["primary"] == found["muhash_found"]["replica"] == MUHASH_599


def test_a_reorg_was_followed(found: dict[str, Any]) -> None:
    """Half of the blocks, then six of them taken back."""
    top = 599 + BLOCKS // 2

    assert found["reorgs"] == [{"from_height": top, "to_height": top - 6, "depth": 6}]


def test_figures_are_measured(found: dict[str, Any]) -> None:
    wire = found["wire_synthetic"]

    assert found["wire_mainnet"]["frames"] == 600
    assert wire["frames"] == BLOCKS + 6
    assert 0 < wire["bytes_per_change"] == wire["size_bytes"] / wire["changes"]
    assert found["snapshot_height"] <= found["tip_height"] - 40
    assert min(found[name] for name in ("restore_s", "restore_to_tip_s", "replay_s", "changes_per_s")) > 0
    assert found["nodes"]["replica"]["peak_memory_mb"] < 300


def test_what_it_leaves_is_a_node(found: dict[str, Any]) -> None:
    """Commands work with the settings that it wrote, and no worker is left."""
    folder = found["folder"]
    environment = os.environ | {"STATEFERRY_CONFIG": str(folder / "stateferry.toml")}
    command = [sys.executable, "-m", "topology", "status", "--data-dir", str(folder / "restored"), "--json"]
    status = json.loads(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout)

    assert (status["height"], status["running"]) == (found["tip_height"], False)


def test_it_ends_its_workers_when_interrupted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        demo(tmp_path / "data"),
        cwd=ROOT,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "data/replica/control.sock").exists():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # it says where each of its threads is
        pytest.fail(f"it did not end: {process.communicate(timeout=60)[1]}")

    assert process.returncode == 130
    assert len(children) >= 2
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_it_empties_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    done = subprocess.run(demo(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.returncode, json.loads(done.stdout)["error"]) == (2, "NotEmpty")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_mismatch_is_an_exit_code(found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the same run found other coins than the expected ones, it would end with the code of a divergence."""
    given = {each.name: found[each.name] for each in fields(Facts)}
    given |= {name: Size(**{field: found[name][field] for field in Size._fields}) for name in given if "wire_" in name}
    given["nodes"] = {name: Node(**node) for name, node in found["nodes"].items()}
    facts = replace(Facts(**given), muhash_expected="00" * 32)

    async def run(plan: walk.Plan, screen: Screen) -> Facts:
        return facts

    monkeypatch.setattr(walk, "run", run)
    done = here("demo", "--data-dir", tmp_path / "data", "--json")

    assert (done.code, done.document["agreed"]) == (3, False)
    assert len(done.document["mismatches"]) == 2
    assert all("MuHash at height 599" in mismatch for mismatch in done.document["mismatches"])
    assert all(mismatch in done.stderr for mismatch in done.document["mismatches"])
