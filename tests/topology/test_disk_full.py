"""No room left, by a limit on the size of files: a named error, nothing torn, and a start with room goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DiskFull
from tests.topology.commands import Site, same_state

BLOCKS, CHANGES = 60, 1000
SYNTHETIC = ("ingest", "synthetic", "--blocks", BLOCKS, "--changes", CHANGES, "--seed", 5)
LIMIT_BYTES = 1 << 20
"""Of one file. The log of this chain, and the write-ahead log of its store, are several times as long."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The run with room enough."""
    site = Site(tmp_path_factory.mktemp("whole") / "site")
    site.here(*SYNTHETIC).ok()
    published = site.copy(site.folder.parent / "published")
    site.follow_both("--finality", 10)
    assert site.log.stat().st_size > 4 * LIMIT_BYTES
    site.here("snapshot").ok()
    assert published.log.exists()
    return site


def test_ingest(tmp_path: Path, whole: Site) -> None:
    """What was acknowledged stays; the same command publishes the rest."""
    site = Site(tmp_path / "site")
    site.command(*SYNTHETIC, file_bytes_max=LIMIT_BYTES).failed(DiskFull)
    said = site.here(*SYNTHETIC).ok()
    assert (said["connected"] + said["skipped"], said["walk"]) == (BLOCKS, BLOCKS)
    site.follow_both("--finality", 10)

    assert site.content("r") == whole.content("r")
    same_state(site, ["p", "r"])


@pytest.mark.parametrize("limit_bytes", [LIMIT_BYTES, 2 * LIMIT_BYTES])
def test_primary(limit_bytes: int, whole: Site, tmp_path: Path) -> None:
    """Where the log, or the store, cannot grow, the primary stops; it ends in the state of the run with room."""
    site = Site(whole.folder.parent / "published").copy(tmp_path / "site")
    run = ("run", "--role", "primary", "--finality", 10, "--until-idle")
    site.command(*run, file_bytes_max=limit_bytes).failed(DiskFull)
    site.follow_both()

    assert site.content("r") == whole.content("r") and site.frame_ids() == whole.frame_ids()
    same_state(site, ["p", "r"])


def test_replica(whole: Site, tmp_path: Path) -> None:
    """A replica's store cannot grow: what it committed is whole."""
    site = whole.copy(tmp_path / "site")
    site.command("run", "--role", "replica", "--until-idle", node="late", file_bytes_max=LIMIT_BYTES).failed(DiskFull)
    meta = site.meta("late")
    assert 0 <= meta.tip.height < BLOCKS - 1
    assert site.here("verify", node="late").ok()["verified_height"] == meta.tip.height
    site.follow("replica", "late")

    same_state(site, ["p", "late"])


def test_snapshot(whole: Site, tmp_path: Path) -> None:
    """Nothing is published; the store goes on, and the next attempt makes a snapshot."""
    site = whole.copy(tmp_path / "site")
    for manifest in site.objects.rglob("manifest.json"):
        manifest.unlink()
    site.command("snapshot", file_bytes_max=256 << 10).failed(DiskFull)
    assert site.here("status").ok()["snapshots"] == []
    assert not (site.dir("p") / "snapshotting").exists()
    taken = site.here("snapshot").ok()

    assert [one["height"] for one in site.here("status").ok()["snapshots"]] == [taken["height"]]
    same_state(site, ["p", "r"])


def test_restore(whole: Site, tmp_path: Path) -> None:
    """There is no store until all of it is there; the same command goes on."""
    site = whole.copy(tmp_path / "site")
    site.command("restore", node="restored", file_bytes_max=256 << 10).failed(DiskFull)
    assert not (site.dir("restored") / "store").exists()
    assert site.here("restore", node="restored").ok()["proof"] == "proven"
    site.follow("replica", "restored")

    same_state(site, ["p", "restored"])
