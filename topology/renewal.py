"""Renewal: a replica of a generation that has ended becomes one of the generation that followed, by itself.

It restores from the object store beside the store that it has, into `renewing/`, a data directory of its own. Then that
store takes the other's place: two renames, the old store is kept in `left-generations/`. A crash before the first
leaves the old store and a restore to go on with; one between them leaves no store, and `settle` does the second.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from pipeline.errors import GenerationEnded, NotFound
from pipeline.generation import Generation
from pipeline.objects import ObjectStore
from topology import logs, restorer
from topology.data_dir import DataDir, sync_folder

log = logs.get()

WORK_FOLDER = "renewing"
LEFT_FOLDER = "left-generations"


def settle(data_dir: DataDir) -> None:
    """Finish a swap that was cut off. The caller has locked the directory."""
    renewed = DataDir(data_dir.path / WORK_FOLDER)
    if renewed.has_store and not data_dir.has_store:
        _take_place(renewed, data_dir)


def renew(objects: ObjectStore, data_dir: DataDir, history: Sequence[Generation], why: GenerationEnded) -> None:
    """The newest state of the last generation of ``history``, claimed, in the place of the store that is here.

    Raises ``why`` if the store is of no earlier generation of this history, or if the object store has nothing of the
    last one; what the restore raises. Then the old store is as it was.
    """
    held, wanted = restorer.held_meta(data_dir.store_path), history[-1]
    if held is None or held.shards != 1 or held.generation not in {one.generation for one in history[:-1]}:
        raise why
    renewed = DataDir(data_dir.path / WORK_FOLDER)
    found = restorer.held_meta(renewed.store_path)
    if found is not None and found.generation != wanted.generation:
        shutil.rmtree(renewed.path)  # another one was in force when that was restored
        found = None
    if found is None:
        renewed.create()
        try:
            restored = restorer.restore(
                objects, renewed.path, chain=wanted.chain_id, generation=wanted.generation, claimed=True
            )
        except NotFound as error:
            why.way_out = f"{error.what}: name the object store that has it, --objects; or {why.way_out}"
            raise why from error
        found = restored.meta
    aside = data_dir.path / LEFT_FOLDER / f"{held.generation.hex()[:12]}-{held.seq}"
    aside.parent.mkdir(exist_ok=True)
    data_dir.store_path.rename(aside)
    sync_folder(aside.parent)
    sync_folder(data_dir.path)
    _take_place(renewed, data_dir)
    log.warning(
        "generation_renewed",
        left=held.generation.hex(),
        generation=wanted.generation.hex(),
        height=found.tip.height,
        left_height=held.tip.height,
        kept_in=str(aside),
    )


def _take_place(renewed: DataDir, data_dir: DataDir) -> None:
    renewed.store_path.rename(data_dir.store_path)
    sync_folder(data_dir.path)
    shutil.rmtree(renewed.path)
