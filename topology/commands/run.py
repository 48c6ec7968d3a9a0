"""`stateferry run`: a worker in the foreground."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import click
from rich.progress import BarColumn, Progress, TextColumn

from topology import worker
from topology.commands.common import common_options, console, emit, is_terminal, rows, serve_option, signature_option
from topology.settings import Settings
from topology.shard_set import ShardSet
from topology.shard_store import Role
from topology.worker import Until

Found = TypeVar("Found")

_CANCEL_ROUNDS = 5
"""Times that what is left behind a worker is cancelled, 0.2 s each at most."""


@click.command()
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True)
@click.option("--until-height", type=int, help="End once this height is in the store.")
@click.option("--until-idle", is_flag=True, help="End once all that was there is consumed and nothing came for 2 s.")
@click.option("--finality", type=click.IntRange(0, 100_000), help="Blocks that can be undone. [default: 100]")
@serve_option
@signature_option
@common_options
def run(settings: Settings, role: str, until_height: int | None, until_idle: bool, as_json: bool) -> None:
    """Follow a chain: as the primary, which applies blocks and publishes diffs, or as a replica of it."""
    until = Until(height=until_height, idle=until_idle)
    watch = _progress if is_terminal() else None
    found = _run(worker.run(settings, Role(role), until, on_open=watch))
    if found is None:
        emit({"followed": False, "why": "nothing was published"}, as_json=as_json, text=lambda: "nothing to follow")
        return
    document = found | {"role": role}
    emit(document, as_json=as_json, text=lambda: rows(document))


def _run(work: Coroutine[Any, Any, Found]) -> Found:
    """`asyncio.run`, but for an end that takes seconds whatever the broker's client does: a service of Faust whose
    thread died with its connection waits for it in ever new tasks. The stores are closed before that."""
    runner = asyncio.Runner()
    try:
        return runner.run(work)
    finally:
        loop = runner.get_loop()
        for _ in range(_CANCEL_ROUNDS):
            if left := asyncio.all_tasks(loop):
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(left, timeout=0.2))
        if not asyncio.all_tasks(loop):
            runner.close()


async def _progress(shard_set: ShardSet) -> None:
    """Height, rate, lag and ETA, while the worker runs."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("height {task.fields[height]}  {task.fields[rate]:,.0f} changes/s  lag {task.fields[lag]} records"),
        TextColumn("ETA {task.fields[eta]}"),
        console=console,
        transient=True,
    ) as progress:
        meter = Meter(shard_set)
        task = progress.add_task(shard_set.role.value, height=-1, rate=0.0, lag=0, eta="-")
        while True:
            await asyncio.sleep(0.2)
            meter.tick()
            progress.update(
                task,
                total=max(meter.end, 1),
                completed=meter.done,
                height=min(node.committed_meta.tip.height for node in shard_set.nodes),
                rate=meter.changes_per_s,
                lag=max(meter.end - meter.done, 0),
                eta=meter.eta,
            )


class Meter:
    """Counts what a worker commits."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._nodes = shard_set.nodes
        self._changes = 0
        self._since_s = time.monotonic()
        self._first_done: int | None = None
        self.changes_per_s = 0.0
        for node in shard_set.nodes:
            node.committing.on_commit.append(lambda steps: self._count(sum(step.header.op_count for step in steps)))

    def _count(self, changes: int) -> None:
        self._changes += changes

    @property
    def done(self) -> int:
        return sum(node.following.next_offset if node.lead is None else node.lead.next_blocks for node in self._nodes)

    @property
    def end(self) -> int:
        ends = [node.ends.blocks if node.role is Role.PRIMARY else node.ends.diffs for node in self._nodes]
        return max(sum(ends), self.done)

    def tick(self) -> None:
        elapsed_s = time.monotonic() - self._since_s
        self._first_done = self.done if self._first_done is None else self._first_done
        self.changes_per_s = self._changes / elapsed_s if elapsed_s else 0.0

    @property
    def eta(self) -> str:
        elapsed_s = time.monotonic() - self._since_s
        moved = self.done - (self._first_done or 0)
        left = self.end - self.done
        return f"{left * elapsed_s / moved:.0f} s" if moved and left else "-"
