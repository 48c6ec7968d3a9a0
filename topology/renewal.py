"""Renewal: a replica of a generation that has ended becomes one of the generation that followed, by itself.

It restores from the object store beside what it has, into `renewing/`, a data directory of its own. Then that one's
store, or the folder of all shards', takes the other's place: two renames, the old one is kept in `left-generations/`.
A crash before the first leaves the old store and a restore to go on with; one between them leaves no store, and
`settle` does the second.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from pipeline.errors import GenerationEnded, NotFound
from pipeline.generation import Generation
from pipeline.objects import ObjectStore
from pipeline.objects.files import sync
from pipeline.position import Meta
from topology import building, logs, restorer
from topology.data_dir import DataDir
from topology.restore_plans import Request

log = logs.get()

WORK_FOLDER = "renewing"
LEFT_FOLDER = "left-generations"
_REPLACED = "replaced"


def settle(data_dir: DataDir) -> None:
    """Finish a swap that was cut off, of the node or of one shard. The caller has locked the directory."""
    for path in (data_dir.path, *sorted(data_dir.stores_path.glob("[0-9][0-9]"))):
        one, renewed = DataDir(path), DataDir(path / WORK_FOLDER)
        if renewed.has_store and not one.has_store:
            _take_place(renewed, one)
        shutil.rmtree(path / _REPLACED, ignore_errors=True)


def replace_stores(data_dir: DataDir) -> None:
    """What was restored in `renewing/` of a directory, the node's or a shard's, takes the place of what is there, which
    goes."""
    aside = data_dir.path / _REPLACED
    shutil.rmtree(aside, ignore_errors=True)
    if data_dir.stores_path.exists():
        data_dir.stores_path.rename(aside)
        sync(data_dir.path)
    _take_place(DataDir(data_dir.path / WORK_FOLDER), data_dir)
    shutil.rmtree(aside, ignore_errors=True)


def renew(
    objects: ObjectStore,
    data_dir: DataDir,
    history: Sequence[Generation],
    why: GenerationEnded,
    signer: bytes | None = None,
) -> None:
    """The newest state of the last generation of ``history``, claimed, in the place of the store that is here.
    ``signer``: as of a `Request`.

    Raises ``why`` if the store is of no earlier generation of this history, or if the object store has nothing of the
    last one; what the restore raises. Then the old store is as it was.
    """
    held, wanted = _first_meta(data_dir), history[-1]
    ended = {history[0].previous, *(one.generation for one in history[:-1])}  # the first's, if a broker was lost
    if held is None or held.generation not in ended:
        raise why
    renewed = DataDir(data_dir.path / WORK_FOLDER)
    found = _first_meta(renewed)
    if found is not None and found.generation != wanted.generation:
        shutil.rmtree(renewed.path)  # another one was in force when that was restored
        found = None
    if found is None:
        renewed.create()
        try:
            request = Request(chain=wanted.chain_id, generation=wanted.generation, signer=signer)
            found = restorer.restore(objects, renewed.path, request, claimed=True).metas[0]
        except NotFound as error:
            why.way_out = f"{error.what}: name the object store that has it, --objects; or {why.way_out}"
            raise why from error
    aside = data_dir.path / LEFT_FOLDER / f"{held.generation.hex()[:12]}-{held.seq}"
    aside.parent.mkdir(exist_ok=True)
    data_dir.stores_path.rename(aside)
    sync(aside.parent)
    sync(data_dir.path)
    _take_place(renewed, data_dir)
    log.warning(
        "generation_renewed",
        left=held.generation.hex(),
        generation=wanted.generation.hex(),
        height=found.tip.height,
        left_height=held.tip.height,
        kept_in=str(aside),
    )


def _first_meta(data_dir: DataDir) -> Meta | None:
    """Of the store here, or of the first shard's."""
    dirs = data_dir.shard_dirs
    return building.held_meta(dirs[0].store_path) if dirs else None


def _take_place(renewed: DataDir, data_dir: DataDir) -> None:
    renewed.stores_path.rename(data_dir.path / renewed.stores_path.name)
    sync(data_dir.path)
    shutil.rmtree(renewed.path)
