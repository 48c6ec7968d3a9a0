"""The process beside a primary that seals its blocks: there when blocks are worth it, and gone with its worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.errors import StateferryError
from tests.topology.commands import Site, finish, same_state, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")


def sealing_processes(worker_id: int) -> list[int]:
    """The spawned processes below a worker, but for the tracker of their semaphores."""
    children = Path(f"/proc/{worker_id}/task/{worker_id}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sealing_process_is_killed(tmp_path: Path) -> None:
    """The worker ends with an error that names it; the next one goes on, and nothing is lost or twice there."""
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 400).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        (sealing,) = sealing_processes(primary.pid)
        os.kill(sealing, signal.SIGKILL)
        site.here("ingest", "synthetic", "--from-height", 4, "--blocks", 5, "--changes", 400, node="source").ok()
        assert "seals blocks" in finish(primary).failed(StateferryError)

    site.follow_both()
    assert site.meta("p").tip.height == 9
    same_state(site, ("p", "r"))


def test_sealing_process_ends_with_its_worker(tmp_path: Path) -> None:
    """Also if the worker had no time to say good-bye."""
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 400).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        (sealing,) = sealing_processes(primary.pid)
        primary.kill()
        primary.wait()
        wait_until(lambda: not is_running(sealing))


def test_small_blocks_need_no_process(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 40).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        assert not sealing_processes(primary.pid)
