"""A reorg deeper than finality: it stops with its fork named, and a new generation leads on from a snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import NotFound, RewindTooDeep, WrongChain
from tests.chains import block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

NAME = "reorg_floresta"
FORK, A_END, B_END = 5, 10, 16
FINALITY = 3


@pytest.fixture(scope="module")
def stopped(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A and then B were published; both nodes hold A, whose final height is above the fork."""
    folder = tmp_path_factory.mktemp("stopped")
    site = Site(folder / "site")
    a, b = (write_hex_lines(folder / f"{part}.hex", load_blocks(NAME, part)) for part in "AB")
    site.ingest(*block_files(NAME, "genesis"), a)
    site.follow_both("--finality", FINALITY)
    said = site.ingest(b)
    assert (said["connected"], said["rewinds"]) == (11, 1)
    return site


@pytest.fixture
def site(stopped: Site, tmp_path: Path) -> Site:
    return stopped.copy(tmp_path / "site")


def test_rewind_too_deep(site: Site) -> None:
    """The fork is named; state, journal and log are as they were, each time it is tried."""
    before, content, frames = site.meta("p"), site.content("p"), site.frame_ids()
    fork = load_blocks(NAME, "B")[0][4:36][::-1].hex()
    for _ in range(2):
        said = site.here("run", "--role", "primary", "--until-idle").failed(RewindTooDeep)
        assert f"{FORK}:{fork}" in said and "generation new" in said and "topic blocks" in said

    assert (site.meta("p").tip, site.content("p"), site.frame_ids()) == (before.tip, content, frames)
    site.follow("replica", "r")
    same_state(site, ["p", "r"])
    assert site.muhash("p")["muhash"] == expected(NAME)[1]["muhash"]


def test_new_generation(site: Site) -> None:
    """From the archive to a snapshot at the fork, from it a generation, into which the source publishes again."""
    _, at_a, at_b, _ = expected(NAME)
    ended = site.here("generation", "show").ok()
    site.here("generation", "new").failed(NotFound)
    assert site.here("snapshot").ok()["height"] == A_END - FINALITY
    site.here("generation", "new", "--height", FORK).failed(NotFound)

    assert site.here("restore", "--height", FORK, node="fork").ok()["height"] == FORK
    assert site.here("snapshot", node="fork").ok()["height"] == FORK
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=A_END)
        begun = site.here("generation", "new", "--height", FORK).ok()
        _, stderr = worker.communicate()
        assert worker.returncode == WrongChain.exit_code and begun["generation"] in stderr
    assert (begun["number"], begun["previous"], begun["ended"]) == (2, ended["generation"], ended["generation"])
    assert begun["base"].startswith(f"{FORK}:")

    said = site.ingest(write_hex_lines(site.folder / "b.hex", load_blocks(NAME, "B")))
    assert (said["connected"], said["rewinds"], said["height"]) == (11, 0, B_END)
    for role, node in (("primary", "p2"), ("replica", "r2")):
        found = site.follow(role, node)
        assert (found["height"], found["generation"], found["finality"]) == (B_END, begun["generation"], FINALITY)
        site.here("verify", node=node).ok()
    same_state(site, ["p2", "r2"])
    assert site.muhash("r2")["muhash"] == at_b["muhash"]

    for role, node in (("primary", "p"), ("replica", "r"), ("primary", "r"), ("replica", "fork")):
        said = site.here("run", "--role", role, "--until-idle", node=node).failed(WrongChain)
        assert begun["generation"] in said and "stateferry restore" in said
        assert site.here("status", node=node).ok()["generation"] == ended["generation"]
    assert site.muhash("p")["muhash"] == at_a["muhash"]

    site.here("snapshot", node="p2").ok()
    restored = site.here("restore", node="r3").ok()
    assert (restored["height"], restored["generation"]) == (B_END - FINALITY, begun["generation"])
    site.follow("replica", "r3")
    same_state(site, ["p2", "r3"])


def test_finality_is_the_generation_s(site: Site) -> None:
    """It was fixed by the first primary; a directory made later takes it from the topic."""
    assert site.follow("replica", "late")["finality"] == FINALITY
