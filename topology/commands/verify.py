"""`stateferry verify`: the audits, from a look at records to a replay of everything."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import click

from pipeline.audits import Level, Point, store_points
from pipeline.errors import CorruptInput, Diverged, NotFound, StateferryError
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof
from topology import answers, reads
from topology.auditor import Auditor, audit_records
from topology.commands.common import ask_worker, common_options, console, emit, opened_views, owned_stores, rows
from topology.data_dir import DataDir
from topology.reads import View
from topology.settings import Settings

_FAULTS_KEPT = 20
_POSITION = ("chain", "generation", "height", "block_hash", "root", "proof")


@click.command()
@click.option(
    "--level",
    type=click.Choice([level.value for level in Level]),
    default=Level.FULL.value,
    show_default=True,
    help="quick: records agree. stored: every byte, by checksums. content: and every key of the snapshots, hashed. "
    "full: every key of the store, hashed. replay: the archive, from its beginning.",
)
@common_options
def verify(settings: Settings, level: str, as_json: bool) -> None:
    """Audit the store and the object store. With --level full, a claimed state that verifies is proven from then on.

    Every fault is said, with the object it is in; the exit code is that of the first. `status` says when each level was
    run last, and how it ended.
    """
    started_s = time.time()
    try:
        document, faults = _full(settings) if level == Level.FULL.value else _audit(settings, Level(level))
    except (CorruptInput, Diverged) as error:
        _record(settings, level, started_s, [error])
        raise
    document |= {"level": level, "verified": not faults, "seconds": round(time.time() - started_s, 3)}
    _record(settings, level, started_s, faults)
    if faults:
        document |= faults[0].document | {"faults": [fault.document for fault in faults]}
    shown = {name: value for name, value in document.items() if name != "faults"}
    emit(document, as_json=as_json, text=lambda: rows(shown))
    for fault in faults:
        click.echo(f"{fault.name}: {fault}", err=True)
    if faults:
        raise click.exceptions.Exit(faults[0].exit_code)


def _record(settings: Settings, level: str, started_s: float, faults: Sequence[StateferryError]) -> None:
    """The result of the level, for `status`."""
    DataDir(settings.data_dir).write_audit(
        level,
        {
            "at": datetime.fromtimestamp(started_s, UTC).isoformat(timespec="seconds"),
            "verified": not faults,
            "seconds": round(time.time() - started_s, 3),
            "faults": len(faults),
            "first_faults": [f"{fault.name}: {fault}" for fault in faults[:_FAULTS_KEPT]],
        },
    )


def _full(settings: Settings) -> tuple[dict[str, Any], list[StateferryError]]:
    """Every key of the store, by the worker that has it, or here."""
    document = ask_worker(settings, {"what": "verify"})
    if document is None:
        with owned_stores(settings) as (_, stores):
            document = asyncio.run(answers.verify(stores))
    return document, []


def _audit(settings: Settings, level: Level) -> tuple[dict[str, Any], list[StateferryError]]:
    """The other levels: the store, or a worker's copy of it, and the object store. Raises Locked, NotFound."""
    document: dict[str, Any] = {}
    faults: list[StateferryError] = []
    points: dict[tuple[bytes, int], list[Point]] = {}
    chain = settings.chain or None
    with ExitStack() as stack:
        scratch = stack.enter_context(DataDir(DataDir(settings.data_dir).auditing_path))
        for left in scratch.path.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        progress = stack.enter_context(console.status(level.value))

        def report(what: str, done: int, total: int) -> None:
            progress.update(f"{what}: {done:,}" + (f" of {total:,}" if total else ""))

        views: list[View] = []
        try:
            views = stack.enter_context(opened_views(settings))
            document = reads.standing(
                [view.meta for view in views], Proof(proven=all(view.proof.proven for view in views))
            )
            document = {
                name: document[name] for name in ("chain", "generation", "height", "block_hash", "root", "proof")
            }
            counts = Counter[str]()
            for view in views:
                assert isinstance(view.store, RocksStore)
                counts += audit_records(view.store, level)
                where = f"shard {view.meta.shard} of {settings.data_dir}"
                points[view.meta.generation, view.meta.shard] = list(store_points(view.store, view.meta, where))
            document["store"] = dict(counts)
        except NotFound:
            document["store"] = None
        except (CorruptInput, Diverged) as error:
            error.where = error.where or str(settings.data_dir)
            faults.append(error)
        chain = chain or document.get("chain")
        work = scratch.path / "work"
        work.mkdir()
        auditor = Auditor(settings.objects_url, work, chain=chain, report=report)
        auditor.run(level, points)
        document["objects"] = dict(auditor.found.counts)
        has_objects = auditor.manifests or auditor.segments or auditor.found.faults
        if document.get("store", {}) is None and not has_objects:
            raise NotFound(
                "there is nothing to audit: no store in the data directory, and nothing in the object store",
                where=f"{settings.data_dir}, {settings.objects_url}",
                way_out="name them: --data-dir, --objects",
            )
        shutil.rmtree(work)
    return document, faults + auditor.found.faults
