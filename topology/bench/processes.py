"""Workers of a benchmark: the processes that users run, and what they say of themselves while they do."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

_PATIENCE_S = 300.0
"""Without a sign of life."""


class Place(NamedTuple):
    """Where the topics of one row are."""

    url: str
    prefix: str = ""

    @property
    def options(self) -> list[str]:
        return ["--broker", self.url, *(["--topic-prefix", self.prefix] if self.prefix else [])]


def new_place(broker: str, folder: Path) -> Place:
    """Topics that nobody used before, on a broker; without one, on an embedded log in a folder."""
    if broker:
        return Place(broker, f"bench-{secrets.token_hex(4)}.")
    return Place(f"embedded://{folder}/log.sqlite")


class Commit(NamedTuple):
    """A line of a node's log, and what the worker's processes held when it was read."""

    at_s: float  # Unix time
    height: int
    blocks: int
    changes: int
    rss_mb: float  # 0 where the operating system does not say


class Node:
    """A worker process and what it says it commits."""

    def __init__(
        self, role: str, data_dir: Path, place: Place, *until: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.role = role
        self.commits: list[Commit] = []
        self.peak_rss_mb = 0.0
        self.started_s = time.time()
        command = _command("run", "--role", role, "--verbose", *until, *_places(data_dir, place))
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | dict(env or {})
        )
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
                rss_mb, peak_rss_mb = memory_mb(self._process.pid)
                self.commits.append(Commit(at_s, fields["height"], fields["blocks"], fields["changes"], rss_mb))
                self.peak_rss_mb = max(self.peak_rss_mb, peak_rss_mb)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def wait_for(self, height: int) -> None:
        """Return once the node has committed a height. Raises RuntimeError if it ends before, or stands still."""
        seen, since_s = 0, time.monotonic()
        while not self.commits or self.commits[-1].height < height:
            if len(self.commits) > seen:
                seen, since_s = len(self.commits), time.monotonic()
            if self._process.poll() is not None or time.monotonic() > since_s + _PATIENCE_S:
                raise RuntimeError(f"the {self.role} did not get to height {height}: {''.join(self._other_lines)}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Wait until the process ends by itself. Raises RuntimeError unless it ends well."""
        seen = -1
        while (code := self._process.poll()) is None and len(self.commits) > seen:
            seen = len(self.commits)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)
        self._reader.join(0 if code is None else None)
        if code != 0:
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
def running(
    role: str, data_dir: Path, place: Place, *until: str, env: Mapping[str, str] | None = None
) -> Iterator[Node]:
    node = Node(role, data_dir, place, *until, env=env)
    try:
        yield node
    finally:
        node.end()


def make_topics(data_dir: Path, place: Place, shards: int) -> None:
    command = _command("topics", "create", "--shards", str(shards), *_places(data_dir, place))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ingest(data_dir: Path, place: Place, blocks: int, changes: int, *more: str) -> Any:
    """Publish made-up blocks; what the command says of it."""
    sizes = ["--blocks", str(blocks), "--changes", str(changes), *more]
    command = _command("ingest", "synthetic", *sizes, *_places(data_dir, place))
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "topology", *arguments]


def _places(data_dir: Path, place: Place) -> list[str]:
    return ["--data-dir", str(data_dir), *place.options, "--json"]


def memory_mb(process_id: int) -> tuple[float, float]:
    """What a process and those that it started have resident, now and at most. (0, 0) but on Linux."""
    now_kib = peak_kib = 0
    waiting = [process_id]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        with suppress(OSError):  # it ended meanwhile
            fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            if "VmRSS" in fields:
                now_kib += int(fields["VmRSS"].split()[0])
                peak_kib += int(fields["VmHWM"].split()[0])
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return now_kib / 1024, peak_kib / 1024
