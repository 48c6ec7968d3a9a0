"""Several who believe that a chain is theirs: every reader follows one of them, and the others end and say why."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from pipeline.errors import Fenced
from tests.chains import block_files
from tests.topology.commands import Done, Site, finish, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = block_files("regtest_kernel_206")
END = 206


def more(site: Site, blocks: int, seed: int = 1, **kwargs: object) -> None:
    """Blocks above those of the files."""
    words = ("--blocks", blocks, "--changes", 10, "--from-height", END, "--seed", seed)
    site.here("ingest", "synthetic", *words, **kwargs).ok()


def check_one_history(site: Site, height: int, nodes: list[str]) -> None:
    """Every frame in force is there once, and all nodes and a new one hold the same."""
    for node in nodes:
        site.follow("replica", node)
    voids = site.follow("replica", "new")["void_records"]
    same_state(site, ["new", *nodes])
    frame_ids = site.frame_ids()

    assert site.meta("new").tip.height == height
    assert len(set(frame_ids)) == site.meta("new").seq == height + 1
    assert len(frame_ids) - len(set(frame_ids)) <= sum(voids.values())


def test_sleeping_primary(tmp_path: Path) -> None:
    """A primary that slept while another one took over has no effect when it wakes: it says so, and ends."""
    site = Site(tmp_path / "site")
    site.ingest(*BLOCKS)
    with site.running("primary", "p") as sleeper:
        site.wait_for("p", sleeper, state="leading", height=END)
        site.put_to_sleep(sleeper)
        with site.running("primary", "q") as successor:
            found = site.wait_for("q", successor, state="leading", height=END)
            more(site, 20)
            site.wait_for("q", successor, height=END + 20, in_flight=0)
            sleeper.send_signal(signal.SIGCONT)
            assert "is in force since epoch" in finish(sleeper).failed(Fenced)
            assert site.wait_for("q", successor, state="leading")["epoch"] == found["epoch"]
    check_one_history(site, END + 20, ["p", "q"])


def test_promoted_replica(tmp_path: Path) -> None:
    """A replica that is started as the primary takes over from one that lives, in the middle of its work."""
    site = Site(tmp_path / "site")
    site.ingest(*BLOCKS)
    site.here("run", "--role", "primary", "--until-height", 100).ok()
    site.follow("replica", "r")
    old = site.start("run", "--role", "primary")
    site.wait_for("p", old, state="leading")
    with site.running("primary", "r") as promoted:
        site.wait_for("r", promoted, state="leading", height=END, in_flight=0)
        assert "is in force since epoch" in finish(old).failed(Fenced)
        assert site.wait_for("r", promoted, state="leading")["epoch"] == 3
    check_one_history(site, END, ["p", "r"])


def test_copied_directory(tmp_path: Path) -> None:
    """Two workers of one name in the group, from a directory that was copied: the one that came last goes on."""
    site = Site(tmp_path / "site")
    site.ingest(*BLOCKS)
    site.here("run", "--role", "primary", "--until-height", 100).ok()
    shutil.copytree(site.dir("p"), site.dir("q"), ignore=shutil.ignore_patterns("LOCK", "*.sock"))
    node_id = (site.dir("p") / "NODE").read_text()
    first = site.start("run", "--role", "primary")
    site.wait_for("p", first, state="leading", height=END, in_flight=0)
    with site.running("primary", "q") as second:
        said = finish(first).failed(Fenced)
        assert "in force since epoch" in said or f"as instance {node_id}" in said
        site.wait_for("q", second, state="leading", height=END, in_flight=0)
        more(site, 20)
        assert site.wait_for("q", second, height=END + 20, in_flight=0)["epoch"] == 3
    check_one_history(site, END + 20, ["p", "q"])


def test_two_sources(tmp_path: Path) -> None:
    """Two sources publish different blocks at once: the chain is that of the one that came last, from where it found
    the other's."""
    site = Site(tmp_path / "site")
    site.ingest(*BLOCKS)
    words = ("ingest", "synthetic", "--changes", 10, "--from-height", END)
    first = site.start(*words, "--blocks", 100_000, "--seed", 1, "--interval-s", 0.01, node="one")
    with site.running("primary", "p", "--finality", 50_000) as primary:
        while site.wait_for("p", primary)["height"] < END + 40:
            pass
        second: Done = site.command(*words, "--blocks", 100, "--seed", 2, node="two")
        assert second.ok()["height"] == END + 100
        assert "another source is in force" in finish(first).failed(Fenced)
        site.wait_for("p", primary, height=END + 100, in_flight=0)
    site.follow("replica", "r")
    same_state(site, ["p", "r"])

    assert second.ok()["block_hash"] == site.meta("r").tip.block_hash[::-1].hex()
