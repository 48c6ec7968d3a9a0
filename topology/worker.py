"""A worker in the foreground: from settings to nodes that follow, and back to an exit code.

Order of a start: own the directory, find the generation, find (or write) the opening of the diffs topic, fill an empty
directory from the base manifest, open the stores, answer on the control socket, let Faust flow. A stop goes the other
way, and every step of it is safe to be cut off.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import (
    Diverged,
    GenerationEnded,
    LogChanged,
    NotFound,
    OffsetOutOfRange,
    SettingsConflict,
    UsageError,
)
from pipeline.generation import FINALITY_DEFAULT, Generation, Opening
from pipeline.objects import open_objects
from pipeline.position import encode_meta
from pipeline.state import schema_named
from topology import (
    answers,
    base_state,
    building,
    logs,
    reads,
    renewal,
    squashing,
    topic_check,
    topics,
    views,
)
from topology.app import Application
from topology.control import ControlServer
from topology.data_dir import DataDir
from topology.ending import Ending, ending_at_once, on_signals
from topology.node import Node
from topology.rejoining import rejoin
from topology.settings import Settings
from topology.shard_set import ShardSet
from topology.shard_store import Role
from topology.signing import required_signer
from topology.snapshotter import SCRATCH_FOLDER
from topology.snapshotting import Snapshotting
from topology.transports.base import Broker
from topology.transports.factory import open_broker
from topology.transports.kafka_security import security_of
from topology.trimming import Trimming

log = logs.get()

IDLE_S = 2.0
"""Nothing new for this long is idle, once what was there at the start is consumed."""
_POLL_S = 0.2

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """When a worker ends by itself."""

    height: int | None = None
    idle: bool = False


async def run(
    settings: Settings, role: Role, until: Until, *, on_open: Callable[[ShardSet], Awaitable[None]] | None = None
) -> dict[str, Any] | None:
    """Run until `until`, a signal, or a failure, which is raised: where the worker stands then. None if there was
    nothing to follow.

    ``on_open`` runs beside the worker, once its stores are open: progress bars.
    """
    data_dir = DataDir(settings.data_dir)
    stopping = asyncio.Event()
    asked = asyncio.Event()  # to stop, by a signal

    def stop() -> None:
        asked.set()
        stopping.set()

    on_signals(stop)
    with data_dir:
        data_dir.check_quarantine()
        shutil.rmtree(data_dir.copies_path, ignore_errors=True)
        shutil.rmtree(data_dir.path / SCRATCH_FOLDER, ignore_errors=True)
        renewal.settle(data_dir)
        broker = open_broker(settings.broker_url, settings.topic_prefix, security_of(settings))
        try:
            tried: set[bytes] = set()
            while True:
                generation = await _find_generation(settings, until, broker, stopping)
                if generation is None:
                    return None
                with ending_at_once(stop):
                    await rejoin(settings, role, broker, data_dir, generation, until_height=until.height)
                openings = await _find_openings(settings, role, until, broker, data_dir, generation, stopping)
                if openings is None:
                    return None
                with ending_at_once(stop):
                    await _fill_from_base(settings, data_dir, generation)
                shard_set = ShardSet(
                    settings=settings,
                    role=role,
                    broker=broker,
                    data_dir=data_dir,
                    openings=openings,
                    ending=Ending(stopping),
                    until_height=until.height,
                )
                try:
                    await _run(shard_set, until, on_open)
                    return await answers.standing(shard_set)
                except GenerationEnded as error:
                    if role is not Role.REPLICA or asked.is_set():
                        raise
                    stopping.clear()
                    objects, history = open_objects(settings.objects_url), await topics.history(broker)
                    signer = required_signer(settings)
                    with ending_at_once(stop):
                        await asyncio.to_thread(renewal.renew, objects, data_dir, history, error, signer)
                except (LogChanged, OffsetOutOfRange) as error:
                    if asked.is_set() or not _stands_elsewhere(data_dir, tried):
                        raise
                    log.warning("log_changed", error=error.name, message=str(error))
                    stopping.clear()
        finally:
            await broker.close()


def _stands_elsewhere(data_dir: DataDir, tried: set[bytes]) -> bool:
    """Whether a store here stands where no try has ended yet, so that to begin again may take back, or restore, what a
    log lost. ``tried``: those positions."""
    metas = [building.held_meta(found.store_path) for found in data_dir.shard_dirs]
    positions = {encode_meta(meta) for meta in metas if meta is not None}
    is_elsewhere = not positions <= tried
    tried |= positions
    return is_elsewhere


async def _find_generation(
    settings: Settings, until: Until, broker: Broker, stopping: asyncio.Event
) -> Generation | None:
    """Wait for it, and check it and its topics; None if told to stop before, or if idle."""
    generation = await _wait(lambda: topics.current_generation(broker), until, stopping)
    if generation is None:
        return None
    topics.check_chain(settings.chain, generation.chain_id, settings.broker_url)
    await topics.ensure_topics(broker, generation)
    await topic_check.check(broker, generation, settings.topic_prefix)
    return generation


async def _find_openings(
    settings: Settings,
    role: Role,
    until: Until,
    broker: Broker,
    data_dir: DataDir,
    generation: Generation,
    stopping: asyncio.Event,
) -> list[tuple[Opening, bytes]] | None:
    """Wait for the openings of its diffs; None if told to stop before, or if idle."""
    found: list[tuple[Opening, bytes]] | None
    try:
        if role is Role.PRIMARY:
            asked = FINALITY_DEFAULT if settings.finality is None else settings.finality
            found = await topics.ensure_openings(broker, generation, asked)
        else:
            found = await _wait(lambda: topics.openings(broker, generation), until, stopping)
    except NotFound:
        # Records were deleted: what the openings said is in every store, of an earlier generation too.
        metas = (building.held_meta(one.store_path) for one in data_dir.shard_dirs)
        meta = next(filter(None, metas), None)
        if meta is None:
            raise
        found = [
            (Opening(generation=generation, finality=meta.finality, shard=shard), b"")
            for shard in range(generation.shards)
        ]
    if found is not None and settings.finality not in (None, found[0][0].finality):
        raise SettingsConflict(
            f"finality {settings.finality} was asked for, the generation has {found[0][0].finality}",
            way_out="leave --finality out, or start a new generation",
        )
    return found


async def _wait(look: Callable[[], Awaitable[Found | None]], until: Until, stopping: asyncio.Event) -> Found | None:
    deadline_s = time.monotonic() + IDLE_S
    while (found := await look()) is None and not stopping.is_set():
        if until.idle and time.monotonic() > deadline_s:
            return None
        await asyncio.sleep(_POLL_S)
    return found


async def _fill_from_base(settings: Settings, data_dir: DataDir, generation: Generation) -> None:
    if not data_dir.has_store and generation.base_manifest:
        objects = open_objects(settings.objects_url)
        await asyncio.to_thread(base_state.fill, objects, data_dir.path, generation, required_signer(settings))


async def _run(shard_set: ShardSet, until: Until, on_open: Callable[[ShardSet], Awaitable[None]] | None) -> None:
    data_dir = shard_set.data_dir
    application = Application(shard_set)
    tasks: list[asyncio.Task[None]] = []
    snapshotting = Snapshotting(shard_set)
    trimming = Trimming(shard_set)
    control = ControlServer(data_dir.socket_path, lambda request: _answer(shard_set, snapshotting, trimming, request))
    try:
        shard_set.open(application.produce, application.split)
        await control.start()
        shard_set.prove_with(lambda node: _guard(shard_set, _prove(node)))
        jobs: list[Awaitable[None]] = [_watch(shard_set, until), snapshotting.run()]
        if shard_set.role is Role.PRIMARY:
            jobs += (archiving.run() for archiving in shard_set.archiving)
            jobs.append(squashing.run(shard_set.nodes, shard_set.settings.objects_url, shard_set.stopping))
            jobs.append(trimming.run())
        if shard_set.anchoring is not None:
            jobs.append(shard_set.anchoring.run())
        if on_open is not None:
            jobs.append(on_open(shard_set))
        tasks = [asyncio.create_task(_guard(shard_set, job)) for job in jobs]
        await application.run()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await shard_set.stop()
        await control.close()
        shard_set.close()
    if shard_set.ending.failure is not None:
        raise shard_set.ending.failure
    if shard_set.anchoring is not None:
        await shard_set.anchoring.flush()


async def _guard(shard_set: ShardSet, job: Awaitable[None]) -> None:
    try:
        await job
    except Exception as error:
        shard_set.fail(error)


async def _watch(shard_set: ShardSet, until: Until) -> None:
    """End the worker when it got where it was to go."""
    while not shard_set.stopping.is_set():
        await asyncio.sleep(0.05)
        if until != Until() and (refused := await shard_set.refused()) is not None:
            shard_set.fail(refused)  # without an end to reach it waits for a source that mends
        if shard_set.has_arrived or (until.idle and await shard_set.is_idle(IDLE_S, time.monotonic())):
            shard_set.stopping.set()


async def _prove(node: Node) -> None:
    """Hash every key in the background, if this node has not yet."""
    if node.stored.proof.proven:
        return
    started_s = time.monotonic()
    proof, audited = await answers.prove(node.stored.store, node.data_dir)
    node.proven(proof)
    seconds = round(time.monotonic() - started_s, 3)
    log.warning("state_proven", height=proof.at.height if proof.at else -1, keys=audited.keys, seconds=seconds)


async def _answer(shard_set: ShardSet, snapshotting: Snapshotting, trimming: Trimming, request: dict[str, Any]) -> Any:
    """One request on the control socket."""
    what = request["what"]
    match what:
        case "alive":
            return {"role": shard_set.role.value}
        case "status":
            return await answers.status(shard_set) | {
                "snapshotting": snapshotting.status,
                "trimming": trimming.status,
            }
        case "get":
            return _get(shard_set, request)
        case "copy":
            paths = []
            for node in shard_set.nodes:
                path = node.data_dir.copies_path / secrets.token_hex(4)
                path.parent.mkdir(exist_ok=True)
                node.stored.store.checkpoint(path)
                paths.append(str(path))
            return {"paths": paths, "role": shard_set.role.value}
        case "snapshot":
            for archiving in shard_set.archiving:
                await archiving.flush()
            return await snapshotting.take(request["height"])
        case "cancel-snapshot":
            return {"cancelled": snapshotting.cancel()}
        case "verify":
            try:
                return await answers.verify([(node.stored.store, node.data_dir) for node in shard_set.nodes])
            except Diverged as error:
                shard_set.fail(error)
                raise
        case _:
            raise UsageError(f"a worker does not answer {what!r}")


def _get(shard_set: ShardSet, request: dict[str, Any]) -> Any:
    """Point reads at one position; None if the stores do not stand at one: a copy is asked for then."""
    reads.check_serving(shard_set.proof, request.get("serve") or shard_set.settings.serve)
    if not shard_set.stands_together:
        return None
    store = views.union([node.stored.store for node in shard_set.nodes])
    found = reads.get(store, schema_named(request["table"]), request["keys"])
    return {"position": reads.position(shard_set.meta, shard_set.proof), "found": found}
