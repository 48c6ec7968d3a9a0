"""Thousands of small events are waiting, and every buffer between them and the store is full."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from tests.topology.commands import Site, finish, same_state, wait_until

pytestmark = pytest.mark.usefixtures("each_broker")

EVENTS = 2_000
BUSY_EVENTS = 1_000
LATER = 450
SMALL = {"STATEFERRY_AHEAD_BYTES_MAX": str(1 << 16), "STATEFERRY_GROUP_BYTES_MAX": str(1 << 16)}
"""Some thirty of these blocks are computed ahead; the events behind them fill the stream's buffer and the fetches."""


def waiting(folder: Path, events: int) -> Site:
    found = Site(folder)
    found.here("ingest", "synthetic", "--blocks", events, "--changes", 2, "--seed", 4).ok()
    return found


def test_frames_are_read_back(tmp_path: Path) -> None:
    """Events that wait never keep frames from being read back: primary and replica come to the end."""
    site = waiting(tmp_path / "site", EVENTS)
    with mock.patch.dict(os.environ, SMALL):
        primary, replica = site.follow_both()

    assert primary["height"] == replica["height"] == EVENTS - 1
    same_state(site, ["p", "r"])
    assert len(site.frame_ids()) == EVENTS


def test_sigterm_ends_a_busy_worker(tmp_path: Path) -> None:
    """A primary and a replica in the middle of it end in order when told to, and go on from there."""
    site = waiting(tmp_path / "site", BUSY_EVENTS)
    busy = [
        site.start("run", "--role", role, node=node, env=SMALL | {"STATEFERRY_FAILPOINT": f"{point}:300:stop"})
        for role, node, point in (("primary", "p", "propose.computed"), ("replica", "r", "follow.read"))
    ]
    for worker in busy:
        wait_until(lambda worker=worker: worker.is_stopped, worker)
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGCONT)
    for worker in busy:
        assert 0 < finish(worker).ok()["height"] < LATER
    for role, node in (("primary", "p"), ("replica", "r")):
        site.here("run", "--role", role, "--until-height", LATER, node=node).ok()

    same_state(site, ["p", "r"])
    assert len(set(site.frame_ids())) == LATER + 1
