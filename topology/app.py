"""The Faust application of one node: its settings, its agents, and the order in which they start and stop.

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
from topology.node import Node, Role
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
    """A node's Faust app, built and not started."""

    def __init__(self, node: Node) -> None:
        self.node = node
        generation = node.generation
        self._acknowledgements: asyncio.Queue[Awaitable[Any]] = asyncio.Queue(ACKNOWLEDGEMENTS_MAX)
        # One consumer group per node: each reads all of the partition.
        prefix = self._prefix = node.settings.topic_prefix
        group = f"{prefix}stateferry-{generation.chain_id}-{node.role.value}-{node.data_dir.node_id}"
        security = security_of(node.settings)
        self.app = faust.App(
            group,
            broker=faust_urls(node.settings.broker_url),
            broker_credentials=faust_credentials(security),
            datadir=node.data_dir.path / "faust",
            agent_supervisor=CrashingSupervisor,  # the default goes on behind a failed record
            stream_wait_empty=False,  # else SIGTERM waits for records that nobody acks
            stream_buffer_maxsize=STREAM_BUFFER_RECORDS,
            broker_max_poll_records=POLL_RECORDS_MAX,
            consumer_group_instance_id=node.data_dir.node_id,  # a killed worker has its partitions back at once
            broker_session_timeout=node.settings.session_timeout_s,
            broker_heartbeat_interval=node.settings.session_timeout_s / 10,
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
        self.app.boot_strategy.enable_kafka_producer = node.role is Role.PRIMARY
        self.app.stored_offsets = self._stored_offsets
        self._diffs = self._topic(generation.diffs_topic)
        self.app.agent(self._diffs, name="replicator", isolated_partitions=True)(replicator.make_agent(node))
        if node.role is Role.PRIMARY:
            agent = applier.make_agent(node)
            self.app.agent(self._topic(generation.blocks_topic), name="applier", isolated_partitions=True)(agent)

    def _topic(self, name: str) -> Any:
        return self.app.topic(self._prefix + name, value_type=bytes, value_serializer="raw", key_serializer="raw")

    async def produce(self, record: bytes) -> Awaitable[Any]:
        sent: Awaitable[Any] = await self._diffs.send(value=record, partition=0)
        return sent

    async def _stored_offsets(self, assignment: set[Any]) -> dict[Any, int]:
        """The hook before flow resumes: compare store and log, answer with the store's offsets."""
        try:
            offsets = await self.node.start()
        except Exception as error:
            self.node.fail(error)
            raise
        asyncio.get_running_loop().call_soon(self._claim)
        stored = {(self._prefix + topic, 0): offset for topic, offset in offsets.items()}
        return {tp: stored[tp] for tp in assignment if tp in stored}

    def _claim(self) -> None:
        task = asyncio.ensure_future(self.node.claim_if_caught_up())
        task.add_done_callback(self._claimed)
        self._claiming = task

    def _claimed(self, task: asyncio.Future[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.node.fail(error)

    async def run(self) -> None:
        """Start, run until the node stops, end in seconds."""
        beside = [asyncio.create_task(applier.check_acknowledgements(self.node, self._acknowledgements))]
        crashed = asyncio.create_task(self.app._crashed.wait())
        stopping = asyncio.create_task(self.node.stopping.wait())
        try:
            await self.app.start()
            if self.node.lead is not None:
                beside.append(asyncio.create_task(applier.finish_begun(self.node, self._acknowledgements)))
            await asyncio.wait({stopping, crashed}, return_when=asyncio.FIRST_COMPLETED)
            if crashed.done() and not stopping.done():
                self.node.fail(self.app._crash_reason or RuntimeError("the Faust application crashed"))
        finally:
            for task in (*beside, crashed, stopping):
                task.cancel()
            await asyncio.gather(*beside, crashed, stopping, return_exceptions=True)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.app.stop()
            except TimeoutError:
                log.warning("stop_cut_short", seconds=STOP_TIMEOUT_S)
