"""Rejoining: a node that the topics have left behind restores by itself, and follows on from there.

Records that are archived may be deleted (`trimmer`). Whoever was away for longer than they are kept, or begins in an
empty directory, finds them gone. What they said is in the object store; so the newest state there is restored beside
what is here, into `renewing/`, and takes its place if the topics go on from it (`renewal`). If they do not, the error
says so, and what is here stays as it was. No offset is ever reset: a store is read on from where it stands, or not.

Shards of a primary come and go, and each is restored on its own, beside the others (`restoring`): all that is done here
is to fill a directory that has none of them.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping

from pipeline.errors import NotFound, OffsetOutOfRange
from pipeline.generation import Generation
from pipeline.objects import ObjectStore, open_objects
from pipeline.position import Meta
from topology import building, floors, logs, renewal, restorer
from topology.data_dir import DataDir
from topology.restore_plans import Request
from topology.settings import Settings
from topology.shard_store import Role
from topology.signing import required_signer
from topology.transports.base import Broker

log = logs.get()

_TRIES = 2
"""A restore that goes on from an earlier day may be too old, and records may be deleted while one is under way."""


async def rejoin(
    settings: Settings,
    role: Role,
    broker: Broker,
    data_dir: DataDir,
    generation: Generation,
    *,
    until_height: int | None = None,
) -> None:
    """Bring a data directory to where the topics can be followed on, if it is not there.

    Raises OffsetOutOfRange if the object store does not lead there, or only beyond ``until_height``; what a restore
    raises.
    """
    metas = _held(data_dir)
    if any(meta.generation != generation.generation for meta in metas.values()):
        return  # that is for who opens it to say
    if role is Role.PRIMARY and generation.shards > 1 and metas:
        return
    behind = await _behind(broker, role, generation, metas)
    if not behind:
        return
    objects, signer = open_objects(settings.objects_url), required_signer(settings)
    request = Request(chain=generation.chain_id, generation=generation.generation, signer=signer)
    renewed = DataDir(data_dir.path / renewal.WORK_FOLDER)
    for _ in range(_TRIES):
        found = await asyncio.to_thread(_restore, objects, renewed, request, behind)
        left = await _behind(broker, role, generation, found)
        height = found[0].tip.height
        if not left and (until_height is None or height <= until_height):
            break
        shutil.rmtree(renewed.path)
        if not left:
            raise OffsetOutOfRange(
                f"{behind}, and a restore leads to height {height}, above {until_height}",
                where=str(data_dir.path),
                way_out=f"`stateferry restore --height {until_height}` into an empty data directory",
            )
    else:
        raise OffsetOutOfRange(
            f"{left}, also after a restore, which leads to height {height}",
            where=generation.diffs_topic,
            way_out="archive more of it: `stateferry snapshot` on a node that has it, then `stateferry restore` or a "
            "start again; or `stateferry generation new`",
        )
    renewal.replace_stores(data_dir)
    held_height = min((meta.tip.height for meta in metas.values()), default=-1)
    log.warning("store_rejoined", height=height, left_height=held_height, why=behind)


def _held(data_dir: DataDir) -> dict[int, Meta]:
    """Of the stores that are here, by shard."""
    metas = [building.held_meta(one.store_path) for one in data_dir.shard_dirs]
    return {meta.shard: meta for meta in metas if meta is not None}


def _restore(objects: ObjectStore, renewed: DataDir, request: Request, why: str) -> dict[int, Meta]:
    """The newest state, claimed, beside what is here."""
    if renewed.has_store:
        shutil.rmtree(renewed.path)  # whole, and of who knows when: it never took its place
    renewed.create()
    try:
        metas = restorer.restore(objects, renewed.path, request, claimed=True).metas
    except NotFound as error:
        raise OffsetOutOfRange(
            f"{why}, and the object store has no state that leads there: {error.what}",
            way_out="name the object store that has it, --objects; or `stateferry restore` into an empty directory",
        ) from error
    return {meta.shard: meta for meta in metas}


async def _behind(broker: Broker, role: Role, generation: Generation, metas: Mapping[int, Meta]) -> str:
    """What the first of the stores lacks that lacks anything; empty if none does."""
    for shard in range(generation.shards):
        meta, events = metas.get(shard), role is Role.PRIMARY
        if why := await floors.lacking(broker, generation, shard, meta, events=events):
            return why
    return ""
