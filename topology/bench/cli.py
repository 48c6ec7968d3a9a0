"""The commands of `stateferry bench`: sizes in, rows out."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.shards import SHARDS_MAX
from topology.bench import apply as apply_bench
from topology.bench import archive as archive_bench
from topology.bench import backlog as backlog_bench
from topology.bench import large as large_bench
from topology.bench import loads, report
from topology.bench import pareto as pareto_bench
from topology.bench import pipeline as pipeline_bench
from topology.bench import reads as reads_bench
from topology.bench import restore as restore_bench
from topology.bench import shards as shards_bench
from topology.bench import snapshot as snapshot_bench
from topology.bench import wire as wire_bench


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--json", "as_json", is_flag=True, help="Rows as JSON on standard output."),
        click.option("--quick", is_flag=True, help="Small sizes: seconds, and figures that say less."),
    )
    for option in options:
        command = option(command)
    return command


_data = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=loads.DATA,
    show_default="of the checkout",
    help="Folder of the real blocks and their base coins.",
)


def _broker(words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--broker", metavar="URL", default="", help=words)


def _notes(data: Path) -> list[str]:
    return [] if loads.real_block(367_891, data) else [loads.WITHOUT_DATA]


@click.group()
def bench() -> None:
    """Measure this machine: every row beside what would be the most it can do."""
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: object) -> None:
    """Unlike other commands this one has processes and folders of its own to end and remove."""
    raise SystemExit(128 + signal.SIGTERM)


@bench.command()
@click.option("--blocks", type=click.IntRange(1), help="Blocks of each synthetic row.", show_default="200")
@click.option(
    "--changes",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    help="Changes a block of a synthetic row; may be repeated.",
    show_default="2000, 5000, 14000",
)
@click.option(
    "--keys",
    type=click.IntRange(large_bench.KEYS_MIN),
    multiple=True,
    help="Instead: blocks of 5,000 changes where so many keys live, files warm and cold; may be repeated.",
)
@_data
@_common
def apply(
    blocks: int | None, sizes: tuple[int, ...], keys: tuple[int, ...], data: Path, quick: bool, as_json: bool
) -> None:
    """A primary's work on a block, against a bare write of the same changes."""
    if keys:
        rows = large_bench.run(keys, turns=1, turn_blocks=3) if quick else large_bench.run(keys)
        report.show("bench apply --keys", rows, as_json=as_json, notes=[])
        return
    rows = apply_bench.run(
        blocks=blocks or (10 if quick else apply_bench.BLOCKS),
        sizes=sizes or ((2_000,) if quick else apply_bench.SIZES),
        repeats=4 if quick else apply_bench.REPEATS,
        data=data,
    )
    report.show("bench apply", rows, as_json=as_json, notes=_notes(data))


@bench.command()
@click.option("--blocks", type=click.IntRange(3), help="Blocks of each synthetic load.", show_default="30")
@_broker("Also what a Kafka broker stores. [default: the embedded log alone]")
@_data
@_common
def wire(blocks: int | None, broker: str, data: Path, quick: bool, as_json: bool) -> None:
    """Bytes a change on the wire, in several encodings, and on a broker's disk."""
    rows = wire_bench.run(
        blocks=blocks or (6 if quick else wire_bench.BLOCKS),
        sizes=(2_000,) if quick else wire_bench.SIZES,
        repeats=4 if quick else wire_bench.REPEATS,
        data=data,
        broker=broker,
    )
    report.show("bench wire", rows, as_json=as_json, notes=_notes(data))


@bench.command()
@click.option("--keys", type=click.IntRange(1), help="Keys in the store.", show_default="1000000")
@click.option("--lookups", type=click.IntRange(1), help="Lookups of each row.", show_default="200000")
@_common
def reads(keys: int | None, lookups: int | None, quick: bool, as_json: bool) -> None:
    """Random lookups, single and batched, hits and misses."""
    rows = reads_bench.run(
        keys=keys or (50_000 if quick else reads_bench.KEYS),
        lookups=lookups or (20_000 if quick else reads_bench.LOOKUPS),
    )
    report.show("bench reads", rows, as_json=as_json)


@bench.command()
@click.option("--blocks", type=click.IntRange(10), help="Blocks of each row.", show_default="200")
@click.option("--changes", "sizes", type=click.IntRange(2), multiple=True, help="Changes a block.", show_default="5000")
@click.option("--tip-blocks", type=click.IntRange(5), help="Blocks at the tip, 100 ms apart.", show_default="100")
@click.option(
    "--shards", type=click.IntRange(2, SHARDS_MAX), help="Only this: primaries of so many shards, against one of one."
)
@_broker("A Kafka broker to run on as well. [default: the embedded log alone]")
@_common
def pipeline(
    blocks: int | None,
    sizes: tuple[int, ...],
    tip_blocks: int | None,
    shards: int | None,
    broker: str,
    quick: bool,
    as_json: bool,
) -> None:
    """Source, primary and replica as real processes, on the embedded log and on Kafka."""
    blocks = blocks or (20 if quick else pipeline_bench.BLOCKS)
    sizes = sizes or ((1_000,) if quick else pipeline_bench.SIZES)
    if shards is not None:
        found = [shards_bench.run(shards, blocks=blocks, changes=size, broker=broker) for size in sizes]
        report.show("bench pipeline", [row for rows in found for row in rows], as_json=as_json)
        return
    rows = pipeline_bench.run(
        blocks=blocks,
        sizes=sizes,
        tip_blocks=tip_blocks or (10 if quick else pipeline_bench.TIP_BLOCKS),
        tip_changes=500 if quick else pipeline_bench.TIP_CHANGES,
        broker=broker,
    )
    report.show("bench pipeline", rows, as_json=as_json)


@bench.command()
@click.option("--blocks", type=click.IntRange(300), help="Blocks that wait.", show_default="100000")
@click.option("--changes", type=click.IntRange(2), help="Changes a block.", show_default="10")
@_broker("A Kafka broker. [default: an embedded log of its own]")
@_common
def backlog(blocks: int | None, changes: int | None, broker: str, quick: bool, as_json: bool) -> None:
    """Memory of a primary and a replica that have a long way to go."""
    rows = backlog_bench.run(
        blocks=blocks or (3_000 if quick else backlog_bench.BLOCKS),
        changes=changes or backlog_bench.CHANGES,
        broker=broker,
    )
    report.show("bench backlog", rows, as_json=as_json)


@bench.command()
@click.option(
    "--keys",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    help="Keys to restore; may be repeated.",
    show_default="100000, 2000000",
)
@click.option("--blocks", type=click.IntRange(1), help="Instead: the state that so many synthetic blocks leave.")
@click.option(
    "--changes", type=click.IntRange(2), default=200, help="Changes a block, with --blocks.", show_default=True
)
@_common
def restore(sizes: tuple[int, ...], blocks: int | None, changes: int, quick: bool, as_json: bool) -> None:
    """A restore from a snapshot, against replaying all frames and against copying files."""
    keys = sizes or ((20_000,) if quick else restore_bench.SIZES)
    histories = [restore_bench.History.of_keys(size) for size in keys]
    if blocks is not None:
        histories = [restore_bench.History.of_blocks(blocks, changes)]
    rows = restore_bench.run(histories)
    report.show("bench restore", rows, as_json=as_json)


@bench.command()
@click.option(
    "--keys",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    help="Keys in the state; may be repeated.",
    show_default="2000000",
)
@_common
def snapshot(sizes: tuple[int, ...], quick: bool, as_json: bool) -> None:
    """A full snapshot, and what a primary beside it feels."""
    rows = snapshot_bench.run(
        sizes=sizes or ((20_000,) if quick else snapshot_bench.SIZES), blocks=5 if quick else snapshot_bench.BLOCKS
    )
    report.show("bench snapshot", rows, as_json=as_json)


@bench.command()
@click.option("--keys", type=click.IntRange(1), help="Keys in the state.", show_default="500000")
@click.option("--blocks", type=click.IntRange(8), help="Blocks on top.", show_default="256")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for pareto.csv and pareto.png.")
@_common
def pareto(keys: int | None, blocks: int | None, out: Path | None, quick: bool, as_json: bool) -> None:
    """Bytes kept, snapshot cost and restore time over codec, level and interval."""
    rows = pareto_bench.run(
        keys=keys or (5_000 if quick else pareto_bench.KEYS),
        blocks=blocks or (8 if quick else pareto_bench.BLOCKS),
        changes=200 if quick else pareto_bench.CHANGES,
        out=out,
    )
    report.show("bench pareto", rows, as_json=as_json)


@bench.command()
@click.option("--blocks", type=click.IntRange(128), help="Blocks of the synthetic chain.", show_default="10000")
@click.option("--changes", "sizes", type=click.IntRange(2), multiple=True, help="Changes a block.", show_default="500")
@click.option("--keys", type=click.IntRange(0), default=0, show_default=True, help="Keys that are there before.")
@_common
def archive(blocks: int | None, sizes: tuple[int, ...], keys: int, quick: bool, as_json: bool) -> None:
    """Bytes that keep every height, against a full snapshot each 64 blocks; restores by range diffs against replays."""
    rows = archive_bench.run(
        blocks=blocks or (200 if quick else archive_bench.BLOCKS),
        sizes=sizes or ((100,) if quick else (archive_bench.CHANGES,)),
        keys=keys,
    )
    report.show("bench archive", rows, as_json=as_json)
