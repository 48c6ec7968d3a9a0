"""A worker in the foreground: from settings to a node that follows, and back to an exit code.

Order of a start: own the directory, find the generation, find (or write) the opening of the diffs topic, fill an empty
directory from the base manifest, open the store, answer on the control socket, let Faust flow. A stop goes the other
way, and every step of it is safe to be cut off.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import Diverged, GenerationEnded, NotFound, SettingsConflict, UsageError
from pipeline.generation import FINALITY_DEFAULT, Opening
from pipeline.objects import open_objects
from pipeline.state import schema_named
from topology import answers, base_state, logs, reads, renewal, topic_check, topics
from topology.app import Application
from topology.archiver import Archiver
from topology.control import ControlServer
from topology.data_dir import DataDir
from topology.node import Node, Role, check_serving
from topology.settings import Settings
from topology.transports.base import Broker
from topology.transports.factory import open_broker
from topology.transports.kafka_security import security_of

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
    settings: Settings, role: Role, until: Until, *, on_node: Callable[[Node], Awaitable[None]] | None = None
) -> Node | None:
    """Run until `until`, a signal, or a failure, which is raised. None if there was nothing to follow.

    ``on_node`` runs beside the worker, once the node is open: progress bars.
    """
    data_dir = DataDir(settings.data_dir)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()  # to stop, by a signal

    def stop() -> None:
        asked.set()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    with data_dir:
        data_dir.check_quarantine()
        shutil.rmtree(data_dir.copies_path, ignore_errors=True)
        renewal.settle(data_dir)
        broker = open_broker(settings.broker_url, settings.topic_prefix, security_of(settings))
        try:
            while True:
                opened = await _find_opening(settings, role, until, broker, data_dir, stopping)
                if opened is None:
                    return None
                try:
                    return await _run_node(settings, role, until, broker, data_dir, opened, stopping, on_node)
                except GenerationEnded as error:
                    if role is not Role.REPLICA or asked.is_set():
                        raise
                    stopping.clear()
                    objects, history = open_objects(settings.objects_url), await topics.history(broker)
                    await asyncio.to_thread(renewal.renew, objects, data_dir, history, error)
        finally:
            await broker.close()


async def _find_opening(
    settings: Settings, role: Role, until: Until, broker: Broker, data_dir: DataDir, stopping: asyncio.Event
) -> tuple[Opening, bytes] | None:
    """Wait for the generation and the opening of its diffs topic; None if told to stop before, or if idle."""
    generation = await _wait(lambda: topics.current_generation(broker), until, stopping)
    if generation is None:
        return None
    topics.check_chain(settings.chain, generation.chain_id, settings.broker_url)
    await topics.ensure_topics(broker, generation)
    await topic_check.check(broker, generation, settings.topic_prefix)
    found: tuple[Opening, bytes] | None
    try:
        if role is Role.PRIMARY:
            asked = FINALITY_DEFAULT if settings.finality is None else settings.finality
            found = await topics.ensure_opening(broker, generation, asked)
        else:
            found = await _wait(lambda: topics.opening(broker, generation), until, stopping)
    except NotFound:
        meta = renewal.held_meta(data_dir.store_path)
        if meta is None:
            raise
        # Records were deleted: what the opening said is in the store, and in `generations`.
        found = Opening(generation=generation, finality=meta.finality), b""
    if found is not None and settings.finality not in (None, found[0].finality):
        raise SettingsConflict(
            f"finality {settings.finality} was asked for, the generation has {found[0].finality}",
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


async def _run_node(
    settings: Settings,
    role: Role,
    until: Until,
    broker: Broker,
    data_dir: DataDir,
    opened: tuple[Opening, bytes],
    stopping: asyncio.Event,
    on_node: Callable[[Node], Awaitable[None]] | None,
) -> Node:
    opening, record = opened
    if not data_dir.has_store and opening.generation.base_manifest:
        objects = open_objects(settings.objects_url)
        await asyncio.to_thread(base_state.fill, objects, data_dir.path, opening.generation)
    node = Node(
        settings=settings,
        role=role,
        broker=broker,
        data_dir=data_dir,
        opening=opening,
        opening_record=record,
        until_height=until.height,
    )
    node.adopt_stop(stopping)
    application = Application(node)
    tasks: list[asyncio.Task[None]] = []
    control = ControlServer(data_dir.socket_path, lambda request: _answer(node, request))
    try:
        node.open(application.produce)
        await control.start()
        jobs = [_watch(node, until), _prove(node)]
        if role is Role.PRIMARY:
            jobs.append(_archive(node))
        if on_node is not None:
            jobs.append(on_node(node))  # type: ignore[arg-type]
        tasks = [asyncio.create_task(_guard(node, job)) for job in jobs]
        await application.run()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await control.close()
        node.close()
    if node.failure is not None:
        raise node.failure
    return node


async def _guard(node: Node, job: Awaitable[None]) -> None:
    try:
        await job
    except Exception as error:
        node.fail(error)


async def _watch(node: Node, until: Until) -> None:
    """End the worker when it got where it was to go."""
    while not node.stopping.is_set():
        await asyncio.sleep(0.05)
        if node.has_arrived:
            node.stop()
        refused = None if node.lead is None else node.lead.refused
        if refused is not None and until != Until() and node.has_consumed_all:
            node.fail(refused)  # without an end to reach it waits for a source that mends
        quiet_s = time.monotonic() - node.last_progress_s
        if until.idle and node.has_consumed_all and quiet_s >= IDLE_S and not node.archive_is_due:
            node.stop()


async def _prove(node: Node) -> None:
    """Hash every key in the background, if this node has not yet."""
    if node.proof.proven:
        return
    started_s = time.monotonic()
    proof, audited = await answers.prove(node.store, node.data_dir)
    node.proven(proof)
    seconds = round(time.monotonic() - started_s, 3)
    log.warning("state_proven", height=proof.at.height if proof.at else -1, keys=audited.keys, seconds=seconds)


async def _archive(node: Node) -> None:
    """Move final blocks of a proven state into the object store, one segment at a time."""
    archiver = Archiver(open_objects(node.settings.objects_url))
    node.archiver = archiver
    while not node.stopping.is_set():
        if not node.archive_is_due:
            await node.wait_for_progress()
            continue
        node.archive_once()
        await asyncio.sleep(0)  # frames and reads go in between


async def _answer(node: Node, request: dict[str, Any]) -> Any:
    """One request on the control socket."""
    match request["what"]:
        case "alive":
            return {"role": node.role.value}
        case "status":
            return await answers.status(node)
        case "get":
            check_serving(node.proof, request.get("serve") or node.settings.serve)
            found = reads.get(node.store, schema_named(request["table"]), request["keys"])
            return {"position": reads.position(node.committed_meta, node.proof), "found": found}
        case "copy":
            path = node.data_dir.copies_path / secrets.token_hex(4)
            path.parent.mkdir(exist_ok=True)
            node.store.checkpoint(path)
            return {"path": str(path), "role": node.role.value}
        case "snapshot":
            while node.archive_once(flush=True):
                await asyncio.sleep(0)
            return await answers.snapshot(node.store, node.data_dir, node.settings.objects_url, request["height"])
        case "verify":
            try:
                return await answers.verify(node.store, node.data_dir)
            except Diverged as error:
                node.fail(error)
                raise
        case what:
            raise UsageError(f"a worker does not answer {what!r}")
