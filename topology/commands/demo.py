"""`stateferry demo`: the whole walk on one machine, in front of one's eyes."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import signal
import sys
from pathlib import Path

import click

from pipeline.errors import BrokerUrlError, Diverged
from topology import logs
from topology.commands.common import emit
from topology.demo import walk
from topology.demo.facts import NODES, Facts
from topology.demo.screen import Screen, table
from topology.demo.walk import Plan
from topology.transports.kafka_address import is_kafka


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-data"),
    show_default=True,
    help="Emptied first, if it was made by an earlier demo.",
)
@click.option(
    "--mainnet",
    type=click.Path(path_type=Path, file_okay=False),
    default=walk.MAINNET,
    show_default="of the checkout",
    help="Folder of mainnet blocks 0 to 599 and what their coins must be.",
)
@click.option(
    "--blocks", type=click.IntRange(walk.BLOCKS_MIN), default=200, show_default=True, help="Synthetic ones on top."
)
@click.option("--changes", type=click.IntRange(2), default=2000, show_default=True, help="Of each synthetic block.")
@click.option("--broker", metavar="URL", default="", help="A Kafka broker. [default: an embedded log in the directory]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def demo(data_dir: Path, mainnet: Path, blocks: int, changes: int, broker: str, as_json: bool) -> None:
    """Ferry real blocks from a primary to two replicas, and compare what they hold.

    Three workers on this machine, and an embedded log or Kafka between them: mainnet blocks 0 to 599, a heavier
    synthetic chain on top with a reorg in it, a snapshot, a replica restored from it. Ends with 3 if anything does not
    agree.
    """
    logs.configure(verbose=False)
    if broker and not is_kafka(broker):
        raise BrokerUrlError("the demo has an embedded log of its own", where=broker, way_out="name kafka://host:port")
    plan = Plan(
        folder=data_dir.absolute(),
        mainnet=mainnet,
        blocks=blocks,
        changes=changes,
        kafka_url=broker,
        topic_prefix=f"demo-{secrets.token_hex(3)}." if broker else "",
    )
    screen = Screen()
    try:
        facts = asyncio.run(_run(plan, screen))
    except asyncio.CancelledError:
        raise click.Abort from None
    emit(facts.document(), as_json=True) if as_json else _show(facts, plan, screen)
    mismatches = list(facts.mismatches())
    for mismatch in mismatches:
        click.echo(mismatch, err=True)
    if mismatches:
        raise click.exceptions.Exit(Diverged.exit_code)


async def _run(plan: Plan, screen: Screen) -> Facts:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await walk.run(plan, screen)


def _show(facts: Facts, plan: Plan, screen: Screen) -> None:
    out = screen.result
    out.print()
    out.print(table(NODES, facts.rows()))
    out.print()
    for name, text in _figures(facts):
        out.print(f"{name:<14}{text}")
    out.print()
    if not list(facts.mismatches()):
        out.print("All three hold the same state, each by its own computation.")
    out.print(f"\nThe data lies in {plan.folder}. Try next:\n")
    for line in _next(plan, facts):
        out.print(f"  {line}", soft_wrap=True)


def _figures(facts: Facts) -> list[tuple[str, str]]:
    real, made = facts.wire_mainnet, facts.wire_synthetic
    as_json = facts.json_zstd_bytes_per_change
    restored_s = facts.restore_s + facts.restore_to_tip_s
    return [
        (
            "on the wire",
            f"{made.size_bytes / made.changes:.1f} bytes a change in synthetic blocks"
            + (f" (JSON + zstd: {as_json:.1f})" if as_json else ""),
        ),
        ("", f"{real.size_bytes / real.frames:.0f} bytes a frame in the small blocks of mainnet"),
        (
            "restore",
            f"{restored_s:.1f} s: {facts.restore_s:.1f} s to {facts.restore_height}, proven; "
            f"{facts.restore_to_tip_s:.1f} s of frames to {facts.tip_height}",
        ),
        ("replay", f"{facts.replay_s:.1f} s: all frames from the first one to {facts.tip_height}"),
        ("speed", f"{facts.changes_per_s:,.0f} changes/s from the source to both stores"),
        ("whole demo", f"{facts.total_s:.0f} s"),
    ]


def _next(plan: Plan, facts: Facts) -> list[str]:
    """Commands that work as they stand."""
    beside = Path(sys.executable).with_name("stateferry")
    program = "stateferry" if shutil.which("stateferry") or not beside.exists() else _short(beside)
    replica, restored = _short(plan.data_dir("replica")), _short(plan.data_dir("restored"))
    segment = min(plan.folder.glob("objects/*/*/archive/0/*.seg"), default=None)
    lines = [
        f"export STATEFERRY_CONFIG={_short(plan.config)}",
        f"{program} status --data-dir {replica}",
        f"{program} scan --limit 3 --data-dir {replica}",
        f"{program} verify --level full --data-dir {restored}",
    ]
    if segment is not None:
        lines.append(
            f"{program} frame dump --height 170 {_short(plan.folder / 'objects')}/*/*/archive/0/000000000128-*"
        )
    lines.append(f"{program} run --role replica -v --data-dir {replica}   # goes on; Ctrl-C ends it")
    return lines


def _short(path: Path) -> str:
    """As one would type it from here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
