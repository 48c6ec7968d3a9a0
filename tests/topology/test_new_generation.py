"""A reorg deeper than finality: it stops with its fork named, and a new generation leads on from a snapshot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import GenerationEnded, NotFound, RewindTooDeep, UsageError
from pipeline.position import decode_meta
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
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
    begun = site.here("generation", "new", "--height", FORK).ok()
    assert (begun["number"], begun["previous"], begun["ended"]) == (2, ended["generation"], ended["generation"])
    assert begun["base"].startswith(f"{FORK}:")

    said = site.ingest(write_hex_lines(site.folder / "b.hex", load_blocks(NAME, "B")))
    assert (said["connected"], said["rewinds"], said["height"]) == (11, 0, B_END)
    assert site.diffs == begun["diffs_topic"]
    for role, node in (("primary", "p2"), ("replica", "r2")):
        found = site.follow(role, node)
        assert (found["height"], found["generation"], found["finality"]) == (B_END, begun["generation"], FINALITY)
        site.here("verify", node=node).ok()
    same_state(site, ["p2", "r2"])
    assert site.muhash("r2")["muhash"] == at_b["muhash"]

    for node in ("p", "r"):
        said = site.here("run", "--role", "primary", "--until-idle", node=node).failed(GenerationEnded)
        assert begun["generation"] in said and "stateferry restore" in said
        assert site.here("status", node=node).ok()["generation"] == ended["generation"]
    assert site.muhash("p")["muhash"] == at_a["muhash"]

    site.here("snapshot", node="p2").ok()
    restored = site.here("restore", node="r3").ok()
    assert (restored["height"], restored["generation"]) == (B_END - FINALITY, begun["generation"])
    site.follow("replica", "r3")
    same_state(site, ["p2", "r3"])


@pytest.fixture(scope="module")
def begun(stopped: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The new generation at the end of B, in the hands of a primary of its own; r holds A, of the old one."""
    site = stopped.copy(tmp_path_factory.mktemp("begun") / "site")
    site.follow("primary", "p", "--until-height", A_END)
    site.here("snapshot").ok()
    site.here("restore", "--height", FORK, node="fork").ok()
    site.here("snapshot", node="fork").ok()
    site.here("generation", "new", "--height", FORK).ok()
    site.ingest(write_hex_lines(site.folder / "b.hex", load_blocks(NAME, "B")))
    site.follow("primary", "p2")
    return site


def is_renewed(site: Site, node: str) -> None:
    """A replica stands where the new generation's primary does, and its old store is kept."""
    same_state(site, ["p2", node])
    assert site.meta(node).generation == site.meta("p2").generation
    site.here("verify", node=node).ok()
    (kept,) = (site.dir(node) / "left-generations").iterdir()
    store = RocksStore(kept)
    data = store.get_meta(META_KEY)
    store.close()
    assert data is not None and decode_meta(data).tip.height in (A_END, FORK)
    assert not (site.dir(node) / "renewing").exists()


def test_a_replica_of_an_old_generation_renews_itself(begun: Site, tmp_path: Path) -> None:
    """At its start: from the object store's newest manifest of the new generation, beside the store that it has."""
    site = begun.copy(tmp_path / "site")
    objects, site.objects = site.objects, tmp_path / "none"
    assert "--objects" in site.here("run", "--role", "replica", "--until-idle", node="r").failed(GenerationEnded)
    assert site.meta("r").tip.height == A_END
    site.objects = objects
    for node in ("r", "fork"):
        site.follow("replica", node)

        is_renewed(site, node)


def test_a_running_replica_renews_itself(site: Site) -> None:
    """It follows the old generation to its end, and goes on with the new one, in the same process."""
    site.follow("primary", "p", "--until-height", A_END)
    site.here("snapshot").ok()
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=A_END)
        begun = site.here("generation", "new").ok()
        site.wait_for("r", worker, generation=begun["generation"])
        site.ingest(write_hex_lines(site.folder / "a.hex", load_blocks(NAME, "A")))
        site.follow("primary", "p2")
        site.wait_for("r", worker, height=A_END)

    is_renewed(site, "r")


def test_a_broker_that_lost_everything(site: Site, tmp_path: Path) -> None:
    """From the object store alone: the newest state, a snapshot of it, a generation, and the replica that was there."""
    site.follow("primary", "p", "--until-height", A_END)
    site.here("snapshot").ok()
    lost = Site(tmp_path / "lost")
    for path in (site.objects, site.dir("r")):
        shutil.copytree(path, lost.folder / path.name)
    lost.here("generation", "new").failed(NotFound)
    lost.here("generation", "new", "--broker-lost", "--height", FORK).failed(NotFound)

    newest = lost.here("restore", node="n").ok()["height"]
    assert lost.here("snapshot", node="n").ok()["height"] == newest
    begun = lost.here("generation", "new", "--broker-lost").ok()
    assert (begun["number"], begun["previous"]) == (2, site.meta("r").generation.hex())
    lost.here("generation", "new", "--broker-lost").failed(UsageError)

    said = lost.ingest(*block_files(NAME, "genesis"), write_hex_lines(lost.folder / "a.hex", load_blocks(NAME, "A")))
    assert (said["connected"], said["height"]) == (A_END - newest, A_END)
    lost.follow("primary", "p2")
    lost.follow("replica", "r")
    is_renewed(lost, "r")
    assert lost.muhash("r")["muhash"] == expected(NAME)[1]["muhash"]


class Cut(BaseException):
    """A crash."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_renewal_that_is_cut_off(at: int, begun: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its renames, before or behind: the next start goes on, and ends the same."""
    site, renames, rename = begun.copy(tmp_path / "site"), 0, Path.rename

    def cut(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += path.name == "store"
        if renames == at and path.name == "store":
            raise Cut
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Path, "rename", cut)
        site.follow("replica", "r")
    site.follow("replica", "r")

    is_renewed(site, "r")


def test_finality_is_the_generation_s(site: Site) -> None:
    """It was fixed by the first primary; a directory made later takes it from the topic."""
    assert site.follow("replica", "late")["finality"] == FINALITY
