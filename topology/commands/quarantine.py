"""`stateferry quarantine`: the evidence of a divergence, and the ways out of it. None of them accepts anything."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import ExitStack

import click

from pipeline.errors import NotFound, UsageError
from pipeline.objects import open_objects
from pipeline.stores.rocksdb import RocksStore
from topology import answers, restorer
from topology.commands.common import common_options, emit, rows
from topology.data_dir import DataDir
from topology.restore_plans import Request
from topology.settings import Settings
from topology.signing import required_signer

_LEFT = "left-quarantine"


@click.command()
@click.option("--restore", is_flag=True, help="Set the store aside and restore from the object store.")
@click.option("--recheck", is_flag=True, help="Hash every key; leave quarantine if the store holds what it says.")
@common_options
def quarantine(settings: Settings, restore: bool, recheck: bool, as_json: bool) -> None:
    """Show why this data directory is in quarantine; then restore it, or check it again.

    A recheck finds that the store is sound and the record was not: the node then stops at the same record again, until
    the topic holds another one. Evidence is never deleted, only moved aside.
    """
    if restore and recheck:
        raise UsageError("--restore and --recheck exclude each other")
    data_dir = DataDir(settings.data_dir)
    evidence = data_dir.evidence()
    document = {"quarantined": bool(evidence), "evidence": evidence}
    if restore or recheck:
        if not evidence:
            raise NotFound("this data directory is not in quarantine", where=str(data_dir.path))
        with data_dir:
            document |= _restore(settings, data_dir) if restore else _recheck(data_dir)
            aside = data_dir.path / _LEFT
            aside.mkdir(exist_ok=True)
            for folder in data_dir.quarantine_path.iterdir():
                shutil.move(folder, aside / folder.name)
        document |= {"quarantined": False, "evidence_kept_in": str(aside)}
    emit(document, as_json=as_json, text=lambda: "\n\n".join(map(rows, evidence)) or "not in quarantine")


def _restore(settings: Settings, data_dir: DataDir) -> dict[str, object]:
    """The new state first; the old store is set aside, and kept, before it takes its place."""
    aside = data_dir.path / _LEFT / f"store-{len(list((data_dir.path / _LEFT).glob('store-*')))}"
    aside.parent.mkdir(exist_ok=True)
    if data_dir.has_store:
        shutil.move(data_dir.stores_path, aside)
    request = Request(chain=settings.chain or None, signer=required_signer(settings))
    restored = restorer.restore(open_objects(settings.objects_url), data_dir.path, request)
    return {"restored": True, "height": restored.ref.height, "old_store": str(aside)}


def _recheck(data_dir: DataDir) -> dict[str, object]:
    with ExitStack() as stack:
        stores = []
        for found in data_dir.shard_dirs:
            store = RocksStore(found.store_path)
            stack.callback(store.close)
            stores.append((store, found))
        return {"recheck": asyncio.run(answers.verify(stores))}
