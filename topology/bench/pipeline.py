"""`bench pipeline`: the whole of it, in the processes that users run, against `bench apply` of the same blocks.

A source publishes synthetic blocks; a primary (`run --role primary`) applies them through Faust's agents, produces
frames, reads them back and commits; then a replica (`run --role replica`) follows the frames. All of it runs on an
embedded log on this machine's disk, and with `--broker` a second time there (rows `kafka-...`).

`ingest-N` is events in: from the first block made to the last event acknowledged. `primary-N` and `replica-N` count
changes from the first commit to the last, as the node's own log has them: a commit is the state with its offsets, in
the store. `startup_s` is from the start of the process to the first commit. The baseline `apply-N` is the same work
without a broker, once before and once after. `topic_bytes_per_change` is what the broker's disk holds more of
afterwards: records, batches and what else it keeps.

The row `tip-N` is what a reader sees at the tip of a chain: one block every 100 ms, and the time from the moment at
which its event was handed to the log to the moment at which the node had committed it, with source, primary and
replica running side by side.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from statistics import harmonic_mean, median

from pipeline.block import Connect, decode_event
from pipeline.chunk import is_chunk
from topology import topics
from topology.bench import loads
from topology.bench.apply import Applier
from topology.bench.processes import Node, Place, ingest, new_place, running
from topology.bench.report import Row
from topology.bench.topic_bytes import stored_bytes
from topology.bench.workers import Worker
from topology.transports.factory import open_broker

BLOCKS = 200
SIZES = (5_000,)
TIP_BLOCKS = 100
"""Ten seconds at the tip."""
TIP_CHANGES = 2_000
_TIP_INTERVAL_S = 0.1
_TIP_FIRST_BLOCKS = 12
"""Published before the clock runs: a node at the tip has started long ago."""
_TURN_BLOCKS = 10


def run(
    *,
    blocks: int = BLOCKS,
    sizes: Sequence[int] = SIZES,
    tip_blocks: int = TIP_BLOCKS,
    tip_changes: int = TIP_CHANGES,
    broker: str = "",
) -> list[Row]:
    """All rows, on the embedded log and then on ``broker`` if there is one."""
    wheres = {"": "", "kafka-": broker} if broker else {"": ""}
    rows: list[Row] = []
    for changes in sizes:
        before_per_s, before_mb = _apply_alone(blocks, changes)
        found = [_throughput(label, blocks, changes, where) for label, where in wheres.items()]
        after_per_s, after_mb = _apply_alone(blocks, changes)
        alone_per_s = harmonic_mean((before_per_s, after_per_s))
        baseline = Row(
            name=f"apply-{changes}",
            measures={"changes_per_s": alone_per_s},
            peak_rss_mb=max(before_mb, after_mb),
        )
        rows += [
            baseline,
            *(
                replace(row, baseline=baseline.name, ratio=row.measures["changes_per_s"] / alone_per_s)
                for row in chain(*found)
            ),
        ]
    return [*rows, *(_tip(label, tip_blocks, tip_changes, where) for label, where in wheres.items())]


def _throughput(label: str, blocks: int, changes: int, broker: str) -> list[Row]:
    """Source, primary and replica on one broker, one after the other."""
    total = blocks * changes
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        place = new_place(broker, folder)
        published = ingest(folder / "source", place, blocks, changes)
        event_bytes = stored_bytes(place)
        primary = _run_node("primary", folder, place, total)
        frame_bytes = stored_bytes(place) - event_bytes
        replica = _run_node("replica", folder, place, total)
    ingest_row = Row(
        name=f"{label}ingest-{changes}",
        measures={"changes_per_s": total / published["seconds"], "topic_bytes_per_change": event_bytes / total},
    )
    return [
        ingest_row,
        _node_row(label, primary, changes, {"topic_bytes_per_change": frame_bytes / total}),
        _node_row(label, replica, changes, {}),
    ]


def _run_node(role: str, folder: Path, place: Place, changes: int) -> Node:
    """Until there is nothing left to do."""
    with running(role, folder / role, place, "--until-idle") as node:
        node.finish()
    assert sum(commit.changes for commit in node.commits) == changes, node.commits[-1:]
    return node


def _node_row(label: str, node: Node, changes: int, more: dict[str, float]) -> Row:
    startup_s = node.commits[0].at_s - node.started_s
    return Row(
        name=f"{label}{node.role}-{changes}",
        measures={"changes_per_s": node.changes_per_s, "startup_s": startup_s} | more,
        peak_rss_mb=node.peak_rss_mb,
    )


def _apply_alone(blocks: int, changes: int) -> tuple[float, float]:
    """Changes a second of `bench apply` for the same blocks, and its memory. The first turn, in which its processes
    start, does not count, as it does not for a worker."""
    made = islice(enumerate(loads.synthetic_blocks(blocks, changes), 1), blocks)
    done, total_s = 0, 0.0
    with (
        tempfile.TemporaryDirectory(prefix="stateferry-bench-") as folder,
        Worker(Applier, Path(folder), None) as worker,
    ):
        worker.ask([loads.event_of(block, walk) for walk, block in islice(made, min(_TURN_BLOCKS, blocks // 2))])
        while events := [loads.event_of(block, walk) for walk, block in islice(made, _TURN_BLOCKS)]:
            total_s += worker.ask(events).wall_s
            done += len(events) * changes
        _, rss_mb = worker.ask(None)
    return done / total_s, rss_mb


def _tip(label: str, blocks: int, changes: int, broker: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        place, source = new_place(broker, folder), folder / "source"
        ingest(source, place, _TIP_FIRST_BLOCKS, changes)
        first, last = _TIP_FIRST_BLOCKS, _TIP_FIRST_BLOCKS + blocks - 1
        with (
            running("primary", folder / "primary", place) as primary,
            running("replica", folder / "replica", place) as replica,
        ):
            primary.wait_for(first - 1)
            replica.wait_for(first - 1)
            parent = str(first - 1)
            ingest(source, place, blocks, changes, "--from-height", parent, "--interval-s", str(_TIP_INTERVAL_S))
            replica.wait_for(last)
            primary.wait_for(last)
        published = asyncio.run(_published(place))
    seen_ms = {"primary": _lags_ms(primary, published, first), "replica": _lags_ms(replica, published, first)}
    return Row(
        name=f"{label}tip-{changes}",
        measures={
            f"{role}_{label}_ms": value
            for role, lags in seen_ms.items()
            for label, value in (("p50", median(lags)), ("p99", lags[max(0, -(-99 * len(lags) // 100) - 1)]))
        },
        peak_rss_mb=max(primary.peak_rss_mb, replica.peak_rss_mb),
    )


async def _published(place: Place) -> dict[int, float]:
    """When each height's event was handed to the log, Unix time."""
    broker = open_broker(place.url, place.prefix)
    try:
        generation = await topics.current_generation(broker)
        assert generation is not None
        times: dict[int, float] = {}
        async for record in topics.records(broker, generation.blocks_topic):
            if not is_chunk(record.value):
                event = decode_event(record.value, with_ops=False)
                if isinstance(event, Connect):
                    times[event.block.ref.height] = record.timestamp_ms / 1000
        return times
    finally:
        await broker.close()


def _lags_ms(node: Node, published: dict[int, float], first: int) -> list[float]:
    """Of every block from ``first`` on, ascending."""
    lags: list[float] = []
    height = first
    for commit in node.commits:
        while height <= commit.height:
            lags.append(1000 * (commit.at_s - published[height]))
            height += 1
    return sorted(lags)
