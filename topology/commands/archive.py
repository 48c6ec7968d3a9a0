"""`stateferry archive`: what can be done with an archive from its object store alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from pipeline.errors import NotFound
from pipeline.objects import open_objects
from topology import squasher
from topology.commands.common import common_options, emit, rows
from topology.settings import Settings


@click.group("archive")
def archive_group() -> None:
    """Archived blocks, without a worker and without a store."""


@archive_group.command()
@common_options
def squash(settings: Settings, as_json: bool) -> None:
    """Make the range diffs that an archive lacks: of 64, 4,096 and 65,536 blocks, in pieces.

    A primary does this by itself. Needs room for the largest twice, where TMPDIR says.
    """
    objects = open_objects(settings.objects_url)
    found = squasher.archives(objects, f"{settings.chain}/" if settings.chain else "")
    if not found:
        raise NotFound("nothing is archived here", where=settings.objects_url, way_out="check --objects and --chain")
    made = []
    with tempfile.TemporaryDirectory(prefix="stateferry-squash-") as folder:
        for archive in found:
            for one in squasher.squash(objects, archive, Path(folder) / "work"):
                made.append(_row(one))
                if not as_json:
                    click.echo("  ".join(f"{name} {value}" for name, value in made[-1].items()))
    document = {"archives": len(found), "made": len(made)}
    emit(document | {"ranges": made} if as_json else document, as_json=as_json, text=lambda: rows(document))


def _row(one: squasher.Squashed) -> dict[str, Any]:
    return {
        "range": str(one.name),
        "pieces": len(one.sizes),
        "changes": one.changes,
        "bytes": sum(one.sizes),
    }
