"""`stateferry restore`: an empty data directory from the object store alone."""

from __future__ import annotations

import time

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.objects import open_objects
from topology import reads, restorer
from topology.commands.common import common_options, console, emit, is_terminal, rows
from topology.data_dir import DataDir
from topology.restore_plans import Request
from topology.settings import Settings


@click.command()
@click.option("--height", type=int, help="Any archived height. [default: the newest that can be reached]")
@click.option("--claimed", is_flag=True, help="Return before every key is hashed; a worker proves it later.")
@common_options
def restore(settings: Settings, height: int | None, claimed: bool, as_json: bool) -> None:
    """Fill the data directory: snapshot parts, then archived frames. `stateferry run` goes on from there."""
    started_s = time.monotonic()
    with (
        DataDir(settings.data_dir) as data_dir,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not is_terminal(),
            transient=True,
        ) as progress,
    ):
        task = progress.add_task("plan", total=None)

        def report(at: restorer.Progress) -> None:
            description = f"{at.stage.value} ({at.unit})"
            progress.update(task, description=description, completed=at.done, total=at.total or None)

        restored = restorer.restore(
            open_objects(settings.objects_url),
            data_dir.path,
            Request(chain=settings.chain or None, height=height),
            claimed=claimed,
            progress=report,
        )
        document = reads.standing(restored.metas, restored.proof)
        document |= {"seconds": round(time.monotonic() - started_s, 3)}
    emit(document, as_json=as_json, text=lambda: rows(document))
