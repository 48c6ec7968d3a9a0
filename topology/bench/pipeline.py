"""`bench pipeline`: the whole of it, in the processes that users run, against `bench apply` of the same blocks.

A source publishes synthetic blocks; a primary (`run --role primary`) applies them through Faust's agents, produces
frames, reads them back and commits; then a replica (`run --role replica`) follows the frames. Broker: Kafka, or the
embedded log on this machine's disk. The rows `primary-N` and `replica-N` count changes from the first commit to the
last, as the node's own log has them; `startup_s` is from the start of the process to the first commit. The baseline
`apply-N` is the same work without a broker, once before them and once after.

The row `tip-N` is what a reader sees at the tip of a chain: one block every 100 ms, and the time from the moment at
which its event was handed to the log to the moment at which the replica had committed it, with source, primary and
replica running side by side.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pipeline.block import Connect, decode_event
from pipeline.chunk import is_chunk
from topology import topics
from topology.bench import loads
from topology.bench.apply import Applier
from topology.bench.report import Row
from topology.bench.workers import Worker, peak_rss_mb
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
_PATIENCE_S = 300.0


class Place(NamedTuple):
    """Where the topics of one row are."""

    url: str
    prefix: str

    @property
    def options(self) -> list[str]:
        return ["--broker", self.url, "--topic-prefix", self.prefix]


def _place(broker: str, folder: Path) -> Place:
    """Topics that nobody used before, on a broker; without one, on an embedded log in a folder."""
    if broker:
        return Place(broker, f"bench-{secrets.token_hex(4)}.")
    return Place(f"embedded://{folder}/log.sqlite", "")


class Commit(NamedTuple):
    """A line of a node's log."""

    at_s: float  # Unix time
    height: int
    changes: int


class Node:
    """A worker process and what it says it commits."""

    def __init__(self, role: str, data_dir: Path, place: Place, *until: str) -> None:
        self.role = role
        self.commits: list[Commit] = []
        self.peak_rss_mb = 0.0
        self.started_s = time.time()
        command = [
            sys.executable,
            "-m",
            "topology",
            "run",
            "--role",
            role,
            "--verbose",
            *until,
            *_places(data_dir, place),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._other_lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                fields = json.loads(line)
            except ValueError:
                self._other_lines.append(line)
                continue
            if fields.get("event") == "group_committed":
                at_s = datetime.fromisoformat(fields["timestamp"]).timestamp()
                self.commits.append(Commit(at_s, fields["height"], fields["changes"]))
                with suppress(OSError):
                    self.peak_rss_mb = max(self.peak_rss_mb, peak_rss_mb(self._process.pid))

    def wait_for(self, height: int) -> None:
        """Return once the node has committed a height. Raises RuntimeError if it ends before, or takes minutes."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self.commits or self.commits[-1].height < height:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the {self.role} did not get to height {height}: {''.join(self._other_lines)}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Wait until the process ends by itself. Raises RuntimeError unless it ends well."""
        code = self._process.wait(_PATIENCE_S)
        self._reader.join()
        if code:
            raise RuntimeError(f"the {self.role} ended with exit code {code}: {''.join(self._other_lines)}")

    def end(self) -> None:
        """Whatever happened: no process is left behind."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def changes_per_s(self) -> float:
        """Between the first commit and the last: what the first one had to wait for is start-up."""
        first, *later = self.commits
        return sum(commit.changes for commit in later) / (later[-1].at_s - first.at_s)


@contextmanager
def running(role: str, data_dir: Path, place: Place, *until: str) -> Iterator[Node]:
    node = Node(role, data_dir, place, *until)
    try:
        yield node
    finally:
        node.end()


def _places(data_dir: Path, place: Place) -> list[str]:
    return ["--data-dir", str(data_dir), *place.options, "--json"]


def _ingest(data_dir: Path, place: Place, blocks: int, changes: int, *more: str) -> None:
    sizes = ["--blocks", str(blocks), "--changes", str(changes), *more]
    command = [sys.executable, "-m", "topology", "ingest", "synthetic", *sizes, *_places(data_dir, place)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(
    *,
    blocks: int = BLOCKS,
    sizes: Sequence[int] = SIZES,
    tip_blocks: int = TIP_BLOCKS,
    tip_changes: int = TIP_CHANGES,
    broker: str = "",
) -> list[Row]:
    rows: list[Row] = []
    for changes in sizes:
        rows += _throughput(blocks, changes, broker)
    return [*rows, _tip(tip_blocks, tip_changes, broker)]


def _throughput(blocks: int, changes: int, broker: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        place = _place(broker, folder)
        _ingest(folder / "source", place, blocks, changes)
        apply_s, apply_mb = _apply_alone(blocks, changes)
        nodes = []
        for role in ("primary", "replica"):
            with running(role, folder / role, place, "--until-idle") as node:
                node.finish()
            assert sum(commit.changes for commit in node.commits) == blocks * changes, node.commits[-1:]
            nodes.append(node)
        again_s, again_mb = _apply_alone(blocks, changes)
    baseline = f"apply-{changes}"
    alone_per_s = 2 * blocks * changes / (apply_s + again_s)
    return [
        Row(name=baseline, measures={"changes_per_s": alone_per_s}, peak_rss_mb=max(apply_mb, again_mb)),
        *(
            Row(
                name=f"{node.role}-{changes}",
                measures={
                    "changes_per_s": node.changes_per_s,
                    "startup_s": node.commits[0].at_s - node.started_s,
                },
                baseline=baseline,
                ratio=node.changes_per_s / alone_per_s,
                peak_rss_mb=node.peak_rss_mb,
            )
            for node in nodes
        ),
    ]


def _apply_alone(blocks: int, changes: int) -> tuple[float, float]:
    """Seconds of `bench apply` for the same blocks, and its memory."""
    made = enumerate(loads.synthetic_blocks(blocks, changes), 1)
    total_s = 0.0
    with (
        tempfile.TemporaryDirectory(prefix="stateferry-bench-") as folder,
        Worker(Applier, Path(folder), None) as worker,
    ):
        events: list[bytes] = []
        for walk, block in made:
            events.append(loads.event_of(block, walk))
            if len(events) == _TURN_BLOCKS or walk == blocks:
                total_s += worker.ask(events).wall_s
                events = []
        _, rss_mb = worker.ask(None)
    return total_s, rss_mb


def _tip(blocks: int, changes: int, broker: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as name:
        folder = Path(name)
        place, source = _place(broker, folder), folder / "source"
        _ingest(source, place, _TIP_FIRST_BLOCKS, changes)
        first, last = _TIP_FIRST_BLOCKS, _TIP_FIRST_BLOCKS + blocks - 1
        with (
            running("primary", folder / "primary", place) as primary,
            running("replica", folder / "replica", place) as replica,
        ):
            primary.wait_for(first - 1)
            replica.wait_for(first - 1)
            parent = str(first - 1)
            _ingest(source, place, blocks, changes, "--from-height", parent, "--interval-s", str(_TIP_INTERVAL_S))
            replica.wait_for(last)
            primary.wait_for(last)
        published = asyncio.run(_published(place))
    seen_ms = {"primary": _lags_ms(primary, published, first), "replica": _lags_ms(replica, published, first)}
    return Row(
        name=f"tip-{changes}",
        measures={
            f"{role}_{label}_ms": value
            for role, lags in seen_ms.items()
            for label, value in (("p50", statistics.median(lags)), ("p99", lags[max(0, -(-99 * len(lags) // 100) - 1)]))
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
