"""Stops, starts, promotions: whoever goes on, goes on from where the store and the log are, and one primary reigns."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import Fenced, Locked, SettingsConflict
from tests.chains import block_files, expected
from tests.topology.commands import Site, finish, same_state, wait_until

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = block_files("regtest_kernel_206")
END = 206
MUHASH = expected("regtest_kernel_206")[END]["muhash"]


def test_ingest_again_publishes_nothing(tmp_path: Path) -> None:
    """The topic itself says what it holds: the same files twice, in one call or two, leave it as it was."""
    site = Site(tmp_path)
    first = site.ingest(BLOCKS[0])
    events = site.records("blocks")
    assert site.ingest(BLOCKS[0])["skipped"] == first["connected"]
    assert site.records("blocks") == events

    said = site.ingest(*BLOCKS)
    assert (said["connected"] + said["skipped"], said["skipped"], said["height"]) == (END + 1, first["connected"], END)
    events = site.records("blocks")
    said = site.ingest(*BLOCKS, *BLOCKS)

    assert (said["connected"], said["skipped"]) == (0, 2 * (END + 1))
    assert site.records("blocks") == events


def test_stops_change_nothing(tmp_path: Path) -> None:
    """A walk in steps ends in the state, position and frame ids of a walk in one go."""
    whole = Site(tmp_path / "whole")
    whole.ingest(*BLOCKS)
    steps = whole.copy(tmp_path / "steps")
    whole.follow_both()
    for height in (0, 49, 130):
        for role, node in (("primary", "p"), ("replica", "r")):
            found = steps.here("run", "--role", role, "--until-height", height, node=node).ok()
            assert (found["height"], found["proof"]) == (height, "proven")
    steps.follow_both()

    assert steps.frame_ids() == whole.frame_ids()
    assert steps.content("r") == steps.content("p") == whole.content("p")
    same_state(steps, ["p", "r"])
    assert steps.kinds() == {"GENERATION": 1, "EPOCH": 4, "APPLY": END + 1}
    assert steps.meta("p").tip == whole.meta("p").tip
    finality = steps.here("run", "--role", "replica", "--until-idle", "--finality", 7, node="r")
    assert "finality" in finality.failed(SettingsConflict)


def test_promotion(tmp_path: Path) -> None:
    """A replica's directory becomes the primary's; the old primary's follows it; and back."""
    site = Site(tmp_path)
    site.ingest(*BLOCKS)
    site.here("run", "--role", "primary", "--until-height", 80).ok()
    followed = site.follow("replica", "r")
    reached = followed["height"]
    assert reached >= 80

    promoted = site.here("run", "--role", "primary", "--until-height", 140, node="r").ok()
    assert (promoted["height"], promoted["epoch"], promoted["role"]) == (140, followed["epoch"] + 1, "primary")
    old = site.here("run", "--role", "replica", "--until-height", 140, node="p").ok()
    assert (old["height"], old["epoch"], old["role"]) == (140, promoted["epoch"], "replica")
    assert site.here("status", node="p").ok()["role"] == "replica"
    back = site.follow("primary", "p")
    site.follow("replica", "r")

    assert (back["height"], back["epoch"]) == (END, promoted["epoch"] + 1)
    same_state(site, ["p", "r"])
    assert site.muhash("r")["muhash"] == MUHASH
    assert site.kinds() == {"GENERATION": 1, "EPOCH": 3, "APPLY": END + 1}


def test_two_primaries(tmp_path: Path) -> None:
    """Started at the same moment on two directories, one stays in force; the other says that it is fenced, and ends.
    What they wrote is one chain, which a replica follows to the end."""
    site = Site(tmp_path)
    site.ingest(*BLOCKS)
    runs = {node: site.start("run", "--role", "primary", node=node) for node in ("p", "q")}
    try:
        wait_until(lambda: any(run.poll() is not None for run in runs.values()))
        (loser,) = (node for node, run in runs.items() if run.poll() is not None)
        winner = "q" if loser == "p" else "p"
        assert "is in force since epoch" in finish(runs[loser]).failed(Fenced)
        found = site.wait_for(winner, runs[winner], state="leading", height=END, in_flight=0)
        runs[winner].terminate()
        finish(runs[winner]).ok()
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
    site.follow("replica", "r")
    site.follow("replica", loser)

    same_state(site, [winner, "r", loser])
    assert site.meta("r").epoch == found["epoch"] and site.muhash("r")["muhash"] == MUHASH
    assert len(set(site.frame_ids())) == END + 1


def test_two_workers_on_one_directory(tmp_path: Path) -> None:
    """The second says who has the directory, and touches nothing."""
    site = Site(tmp_path)
    site.ingest(*BLOCKS)
    with site.running("primary", "p") as worker:
        site.wait_for("p", worker, height=END)
        for role in ("primary", "replica"):
            assert str(worker.pid) in site.here("run", "--role", role, "--until-idle").failed(Locked)
        assert str(worker.pid) in site.here("restore").failed(Locked)
        assert site.wait_for("p", worker, height=END)["state"] == "leading"
