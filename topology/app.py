"""The Faust application of one worker: its settings, its agents, and the order in which they start and stop.

The settings below are not taste. Each was needed on a running worker: see the comments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import faust
from faust.tables import TableManager
from mode.supervisors import CrashingSupervisor

from topology import applier, logs, replicator
from topology.lead import Produce
from topology.shard_set import ShardSet
from topology.shard_store import Role
from topology.splitter import Splitting
from topology.transports.factory import faust_credentials, faust_urls
from topology.transports.kafka_security import security_of

log = logs.get()

STREAM_BUFFER_RECORDS = 32
"""Records waiting per agent: 28 MiB of full ones."""
POLL_RECORDS_MAX = 6
"""Per fetch, over all topics. One loop delivers for all agents: above a fifth of the buffer, a full blocks queue keeps
frames from being read back, and both wait for ever."""
ACKNOWLEDGEMENTS_MAX = 256
"""Sends not yet acknowledged; the applier waits above it."""
STOP_TIMEOUT_S = 8.0
"""Of leaving the group in order. A broker that is gone is not waited for: the stores need nothing of it."""


class NoTables(TableManager):  # type: ignore[misc]
    """Faust waits a second at every start, for tables that may still be declared: here are none."""

    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()


class Application:
    """A worker's Faust app, built and not started."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set
        generation, settings = shard_set.generation, shard_set.settings
        node_id = shard_set.data_dir.node_id
        self._acknowledgements: asyncio.Queue[Awaitable[Any]] = asyncio.Queue(ACKNOWLEDGEMENTS_MAX)
        # One consumer group per node, which reads all partitions; primaries of several shards share one. And one per
        # generation: a member known by its name may be handed the topics that it read before, and reads nothing then.
        is_shared = generation.shards > 1 and shard_set.role is Role.PRIMARY
        prefix = self._prefix = settings.topic_prefix
        group = f"{prefix}stateferry-{generation.chain_id}-{generation.generation.hex()[:12]}-{shard_set.role.value}"
        if not is_shared:
            group = f"{group}-{node_id}"
        security = security_of(settings)
        self.app = faust.App(
            group,
            broker=faust_urls(settings.broker_url),
            broker_credentials=faust_credentials(security),
            datadir=shard_set.data_dir.path / "faust",
            agent_supervisor=CrashingSupervisor,  # the default goes on behind a failed record
            stream_wait_empty=False,  # else SIGTERM waits for records that nobody acks
            stream_buffer_maxsize=STREAM_BUFFER_RECORDS,
            broker_max_poll_records=POLL_RECORDS_MAX,
            consumer_group_instance_id=node_id,  # a killed worker has its partitions back at once
            broker_session_timeout=settings.session_timeout_s,
            broker_heartbeat_interval=settings.session_timeout_s / 10,
            broker_request_timeout=max(90.0, settings.session_timeout_s),  # Faust wants no session longer than this
            broker_max_poll_interval=86_400.0,  # a paused partition is not a dead worker
            producer_request_timeout=60.0,  # the default would hold a primary for 20 minutes
            topic_disable_leader=True,
            topic_allow_declare=False,  # whoever opens a generation makes its topics, with a retention that keeps all
            topic_partitions=1,
            web_enabled=False,
            web_tables_enabled=False,
            TableManager=NoTables,
            value_serializer="raw",
            key_serializer="raw",
        )
        self.app.kafka_security = security
        # A producer asks for an id, which takes a permission to write.
        self.app.boot_strategy.enable_kafka_producer = shard_set.role is Role.PRIMARY
        self.app.stored_offsets = self._stored_offsets
        self._diffs = self._topic(generation.diffs_topic)
        self._events = self._topic(generation.events_topic)
        self._agent(self._diffs, "replicator", replicator.make_agent(shard_set))
        if shard_set.role is Role.PRIMARY:
            self._agent(self._events, "applier", applier.make_agent(shard_set))
            self._see_events_come()
        if is_shared:
            self._agent(self._topic(generation.blocks_topic), "splitter", make_splitter(shard_set))

    def _agent(self, topic: Any, name: str, agent: Any) -> None:
        # As the decorator `App.agent` does it. That also notes where each agent stands, for who looks for agents in
        # modules: it asks for the file of every module there is, a fifth of a second of every start.
        made = self.app.conf.Agent(
            agent,
            name=name,
            app=self.app,
            channel=topic,
            isolated_partitions=True,
            on_error=self.app._on_agent_error,
        )
        self.app.agents[made.name] = made

    def _topic(self, name: str) -> Any:
        return self.app.topic(self._prefix + name, value_type=bytes, value_serializer="raw", key_serializer="raw")

    def _see_events_come(self) -> None:
        """Records are seen when they are put into the applier's buffer, before it comes to them."""
        deliver, events_topic = self.app.topics.on_message, self._events.get_topic_name()

        async def on_message(message: Any) -> None:
            if message.topic == events_topic:
                try:
                    self.shard_set.event_comes(message.partition, message.value)
                except Exception as error:
                    self.shard_set.fail(error)
            await deliver(message)

        self.app.topics.on_message = on_message

    def produce(self, shard: int) -> Produce:
        """What appends to a shard's frames."""

        async def send(record: bytes) -> Awaitable[Any]:
            sent: Awaitable[Any] = await self._diffs.send(value=record, partition=shard)
            return sent

        return send

    async def split(self, shard: int, record: bytes) -> Awaitable[Any]:
        """Append to a shard's events."""
        sent: Awaitable[Any] = await self._events.send(value=record, partition=shard)
        return sent

    async def _stored_offsets(self, assignment: set[Any]) -> dict[Any, int]:
        """The hook before flow resumes: compare stores and logs, answer with the stores' offsets."""
        shard_set, diffs = self.shard_set, self._prefix + self.shard_set.generation.diffs_topic
        blocks = (shard_set.generation.blocks_topic, 0)
        try:
            offsets = await shard_set.start(tp.partition for tp in assignment if tp.topic == diffs)
            if shard_set.splitting is not None:
                if any((tp.topic, tp.partition) == (self._prefix + blocks[0], 0) for tp in assignment):
                    offsets[blocks] = await shard_set.splitting.start()
                else:
                    shard_set.splitting.rest()
        except Exception as error:
            shard_set.fail(error)
            raise
        asyncio.get_running_loop().call_soon(self._claim)
        stored = {(self._prefix + topic, partition): offset for (topic, partition), offset in offsets.items()}
        return {tp: stored[tp] for tp in assignment if tp in stored}

    def _claim(self) -> None:
        task = asyncio.ensure_future(self.shard_set.claim())
        task.add_done_callback(self._claimed)
        self._claiming = task

    def _claimed(self, task: asyncio.Future[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.shard_set.fail(error)

    async def run(self) -> None:
        """Start, run until the node stops, end in seconds."""
        shard_set, sent = self.shard_set, self._acknowledgements
        beside = [asyncio.create_task(applier.check_acknowledgements(shard_set, sent))]
        crashed = asyncio.create_task(self.app._crashed.wait())
        stopping = asyncio.create_task(shard_set.stopping.wait())
        try:
            await self.app.start()
            for node in shard_set.nodes:
                if node.lead is not None:
                    beside.append(asyncio.create_task(applier.finish_begun(node, sent)))
            if shard_set.splitting is not None:
                beside.append(asyncio.create_task(check_split(shard_set, shard_set.splitting)))
            await asyncio.wait({stopping, crashed}, return_when=asyncio.FIRST_COMPLETED)
            if crashed.done() and not stopping.done():
                shard_set.fail(self.app._crash_reason or RuntimeError("the Faust application crashed"))
        finally:
            for task in (*beside, crashed, stopping):
                task.cancel()
            await asyncio.gather(*beside, crashed, stopping, return_exceptions=True)
            ending = asyncio.create_task(self.app.stop())
            await asyncio.wait({ending}, timeout=STOP_TIMEOUT_S)  # Faust's services take no cancellation meanwhile
            if not ending.done():
                log.warning("stop_cut_short", seconds=STOP_TIMEOUT_S)
            elif (error := ending.exception()) is not None:
                log.warning("stop_failed", error=repr(error))  # the stores are closed behind it all the same


def make_splitter(shard_set: ShardSet) -> Any:
    """The splitter's agent: events of `blocks` in, one for each shard out."""

    async def splitter(stream: Any) -> None:
        async for event in stream.events():
            try:
                assert shard_set.splitting is not None
                await shard_set.splitting.on_blocks(event.message.offset, event.message.value)
            except Exception as error:
                shard_set.fail(error)
            if shard_set.stopping.is_set():
                await asyncio.Event().wait()  # until the worker takes this task down: nothing more is handled

    return splitter


async def check_split(shard_set: ShardSet, splitting: Splitting) -> None:
    """Await what the splitter sent."""
    try:
        await splitting.check_sent()
    except Exception as error:
        shard_set.fail(error)
