"""`bench backlog`: memory while there is far more to read than fits.

A source publishes many small blocks before anybody reads them; a primary applies all of them, then a replica follows
all of its frames, both as the processes that users run. The rows say how fast, and what the worker had resident in each
quarter of the blocks, at most, its helper processes included: a buffer that grew with the backlog would show as
quarters that grow. `level` is the last quarter over the second; the first one fills the caches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from topology.bench.processes import Commit, Node, ingest, new_place, running
from topology.bench.report import Row

BLOCKS = 100_000
CHANGES = 10
_QUARTERS = 4


def run(*, blocks: int = BLOCKS, changes: int = CHANGES, broker: str = "") -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        place = new_place(broker, folder)
        published = ingest(folder / "source", place, blocks, changes)
        rows = [Row(name=f"ingest-{blocks}", measures={"blocks_per_s": blocks / published["seconds"]})]
        for role in ("primary", "replica"):
            with running(role, folder / role, place, "--until-idle") as node:
                node.finish()
            assert sum(commit.blocks for commit in node.commits) == blocks, node.commits[-1:]
            rows.append(_row(node, blocks))
    return rows


def _row(node: Node, blocks: int) -> Row:
    first, *later = node.commits
    quarters = [max((commit.rss_mb for commit in part), default=0.0) for part in _quarters(node.commits, blocks)]
    return Row(
        name=f"{node.role}-{blocks}",
        measures={
            "blocks_per_s": sum(commit.blocks for commit in later) / (later[-1].at_s - first.at_s),
            **{f"rss_mb_q{number}": rss_mb for number, rss_mb in enumerate(quarters, 1)},
            "level": quarters[-1] / quarters[1] if quarters[1] else 0.0,
        },
        peak_rss_mb=node.peak_rss_mb or None,
    )


def _quarters(commits: Sequence[Commit], blocks: int) -> list[list[Commit]]:
    """The commits in which each quarter of the blocks was reached."""
    bounds = [blocks * quarter // _QUARTERS for quarter in range(_QUARTERS + 1)]
    return [[commit for commit in commits if low <= commit.height < high] for low, high in pairwise(bounds)]
