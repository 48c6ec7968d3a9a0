"""`bench pipeline --shards N`: primaries of N shards, a process each, against one primary of one shard on one core.

A primary of one shard seals its blocks in a second process: the row `shards-1-all-cores` is one that may use all cores.

All workers run and lead before anything is measured. They are stopped while a source publishes the blocks, and then let
go on: what counts is from there to the last commit of the last of them. The workers share this machine's cores, among
themselves and with a broker, if it runs here.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import StateferryError
from topology import control
from topology.bench.processes import Node, ingest, make_topics, new_place, running
from topology.bench.report import Row
from topology.data_dir import DataDir

_FIRST_BLOCKS = 2
_PATIENCE_S = 300.0
_SESSION_TIMEOUT = {"STATEFERRY_SESSION_TIMEOUT_S": "300"}
"""Nobody takes a worker for dead while it is stopped."""


def run(shards: int, *, blocks: int, changes: int, broker: str = "") -> list[Row]:
    """A row for one shard on one core, one for the same on all cores, and one for so many shards."""
    alone = _measure(1, blocks, changes, broker, on_one_core=True)
    baseline = f"shards-1-{changes}"
    rows = [Row(name=baseline, measures={"changes_per_s": alone[0]}, peak_rss_mb=alone[1])]
    for name, count in ((f"shards-1-all-cores-{changes}", 1), (f"shards-{shards}-{changes}", shards)):
        changes_per_s, peak_rss_mb = _measure(count, blocks, changes, broker)
        rows.append(
            Row(
                name=name,
                measures={"changes_per_s": changes_per_s},
                baseline=baseline,
                ratio=changes_per_s / alone[0],
                peak_rss_mb=peak_rss_mb,
            )
        )
    return rows


def _measure(shards: int, blocks: int, changes: int, broker: str, *, on_one_core: bool = False) -> tuple[float, float]:
    """Changes a second of all primaries together, and the memory of the largest."""
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        place = new_place(broker, folder)
        make_topics(folder / "source", place, shards)
        ingest(folder / "source", place, _FIRST_BLOCKS, changes)
        nodes, dirs = [], []
        for number in range(shards):
            dirs.append(folder / f"primary-{number}")
            nodes.append(stack.enter_context(running("primary", dirs[-1], place, env=_SESSION_TIMEOUT)))
        _wait_until_shared(nodes, dirs, shards)
        if on_one_core:
            _pin(nodes[0].process_id)
        before = sum(commit.changes for node in nodes for commit in node.commits)
        for node in nodes:
            os.kill(node.process_id, signal.SIGSTOP)
        ingest(folder / "source", place, blocks, changes, "--from-height", str(_FIRST_BLOCKS - 1))
        began_s = time.time()
        for node in nodes:
            os.kill(node.process_id, signal.SIGCONT)
        deadline_s = time.monotonic() + _PATIENCE_S
        while sum(commit.changes for node in nodes for commit in node.commits) < before + blocks * changes:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{shards} primaries did not apply {blocks} blocks")
            time.sleep(0.02)
        ended_s = max(node.commits[-1].at_s for node in nodes)
    return blocks * changes / (ended_s - began_s), max(node.peak_rss_mb for node in nodes)


def _pin(process_id: int) -> None:
    """All threads of a process, and of what it started and starts from now on, to one core. Linux only."""
    for thread in Path(f"/proc/{process_id}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {min(os.sched_getaffinity(0))})
        for child in (thread / "children").read_text().split():
            _pin(int(child))


def _wait_until_shared(nodes: list[Node], dirs: list[Path], shards: int) -> None:
    """Until every worker leads one shard, and has committed what is there."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        found = [_status(path) for path in dirs]
        led = [[one["height"] for one in status["shards"] if one["in_force"]] if status else [] for status in found]
        if all(heights == [_FIRST_BLOCKS - 1] for heights in led):
            return
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{len(nodes)} primaries did not share {shards} shards: {led}")
        time.sleep(0.1)


def _status(path: Path) -> Any:
    """What a worker says of itself; None while it does not."""
    with suppress(StateferryError):
        return control.ask(DataDir(path).socket_path, {"what": "status"})
    return None
