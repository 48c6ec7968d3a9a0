"""A made-up chain without end: whoever is stopped in it goes on above the tip that the topic stands at."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sqlite3
from functools import partial
from pathlib import Path

import pytest

from pipeline.block import Op
from pipeline.errors import NotFound, UsageError
from pipeline.sources.branch import Branch
from pipeline.state import UTXO
from tests.topology.commands import Site, finish, same_state, wait_until
from topology.commands import ingest

pytestmark = pytest.mark.usefixtures("each_broker")

ENDLESS = ("ingest", "synthetic", "--endless", "--changes", 9, "--interval-s", 0.01, "--reorg-every", 30)


def published(site: Site) -> int:
    with contextlib.suppress(NotFound, sqlite3.OperationalError, ValueError):  # not there yet
        return len(site.records("blocks"))
    return 0


def test_goes_on(tmp_path: Path) -> None:
    """kill -9, then SIGTERM: each start opens an epoch and goes on above what is there."""
    site = Site(tmp_path)
    heights = []
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        process = site.start(*ENDLESS, node="s")
        start = published(site)
        wait_until(lambda start=start: published(site) > start + 50, process)
        process.send_signal(number)
        assert finish(process).code == code
        primary, replica = site.follow_both()
        assert (replica["height"], replica["root"]) == (primary["height"], primary["root"])
        heights.append(primary["height"])

    assert heights[1] >= heights[0] + 40
    assert primary["coins"] > 40
    same_state(site, ["p", "r"])
    assert site.kinds()["UNDO"] >= 3


def test_takes_no_count(tmp_path: Path) -> None:
    said = Site(tmp_path).here(*ENDLESS, "--blocks", 5).failed(UsageError)

    assert "--blocks" in said


def test_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more coins are known than fit: those from before a seam are never spent. The blocks make one chain."""
    monkeypatch.setattr(ingest, "LIVE_COINS_MAX", 40)
    make = partial(ingest._synthetic, changes=9, seed=1, reorg_every=None, reorg_depth=3)
    made = list(itertools.islice(ingest._endless(None, 9, make), 120))
    branch = Branch()
    for block in made:
        branch.connect(block.ref, block.parent_hash)
    assert branch.tip == made[-1].ref

    created: set[bytes] = set()
    live: set[bytes] = set()
    for number, block in enumerate(made):
        if number % 40 == 0:
            live.clear()
        ops = block.tables[UTXO.name]
        spends = {key for code, key in zip(ops.codes, ops.keys, strict=True) if code == Op.DELETE}
        creates = set(ops.keys) - spends

        assert spends <= live
        assert created.isdisjoint(creates)
        live, created = live - spends | creates, created | creates
    assert len(live) <= 40 + 9
