"""The Faust producer of the embedded log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from aiokafka.partitioner import DefaultPartitioner
from faust.transport import producer
from faust.types import TP
from faust.types.tuples import RecordMetadata

from pipeline.errors import NotFound, Unsupported
from topology.transports.base import TopicSpec
from topology.transports.sqlite_log import SqliteLog

_CREATE_TIME = 0  # Kafka's number for a timestamp set by the producer

Partitioner = Callable[[bytes | None, list[int], list[int]], int]


def partition_of(key: bytes | None, count: int, partitioner: Partitioner | None = None) -> int:
    """Return the partition for a key among ``count``: Kafka's own hash, unless the app has a partitioner."""
    every = list(range(count))
    chosen: int = (partitioner or DefaultPartitioner())(key, every, every)
    return chosen


class Producer(producer.Producer):  # type: ignore[misc]
    """Appends what agents send. Everything sent at the same time shares one commit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._log: SqliteLog | None = None
        self._counts: dict[str, int] = {}  # partitions per topic; topics never change
        self._sending: set[asyncio.Future[RecordMetadata]] = set()

    async def on_start(self) -> None:
        """Open the log."""
        await super().on_start()
        self._log = await asyncio.to_thread(SqliteLog.shared, self.transport.path)

    async def on_stop(self) -> None:
        """Wait for what was sent and close the log."""
        await super().on_stop()
        log, self._log = self._log, None
        if log is not None:
            await asyncio.to_thread(log.close)
        await self._all_sent()

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None,
        timestamp: float | None,
        headers: Any,
        *,
        transactional_id: str | None = None,
    ) -> asyncio.Future[RecordMetadata]:
        """Queue a record; the future gives its place in the log once it is durable.

        ``timestamp``: Unix seconds, None for now. The future raises what ``Broker.append`` raises. Raises
        ``Unsupported`` for what this log cannot keep: headers, an absent value, transactions.
        """
        if headers or value is None or transactional_id is not None:
            raise Unsupported(
                f"the embedded log keeps no headers, absent values or transactions ({topic})",
                way_out="send a value, or run on Kafka",
            )
        log = self._open_log()
        self.app.on_produce_message.send(
            key=key, value=value, partition=partition, timestamp=timestamp, headers=headers
        )
        if partition is None:
            partition = partition_of(key, await self._count(topic), self.partitioner)
        timestamp_ms = log.now_ms() if timestamp is None else int(timestamp * 1000)
        sent = asyncio.get_running_loop().create_future()
        self._sending.add(sent)
        sent.add_done_callback(self._sending.discard)
        where = TP(topic, partition)
        submitted = log.submit(topic, partition, [(key, value)], timestamp_ms=timestamp_ms)
        submitted.add_done_callback(lambda done: _resolve_in_loop(done, sent, where, timestamp_ms))
        return sent

    async def send_and_wait(self, *args: Any, **kwargs: Any) -> RecordMetadata:
        """Append a record and return its place once it is durable; see ``send``."""
        return await (await self.send(*args, **kwargs))

    async def flush(self) -> None:
        """Wait until everything sent so far is durable or has failed."""
        await self.buffer.flush()
        await self._all_sent()

    async def _all_sent(self) -> None:
        if self._sending:
            await asyncio.wait(set(self._sending))

    async def create_topic(self, topic: str, partitions: int, replication: int, **kwargs: Any) -> None:
        """Create a topic; retention, replication and the like mean nothing to this log."""
        log = self._open_log()
        await asyncio.to_thread(log.ensure_topics, [TopicSpec(name=topic, partitions=partitions)])

    def key_partition(self, topic: str, key: bytes) -> TP:
        """Return the partition that a key goes to. Raises ``NotFound`` for an unknown topic."""
        return TP(topic, partition_of(key, self._known_count(topic), self.partitioner))

    def supports_headers(self) -> bool:
        """Return False: records of this log have no headers."""
        return False

    async def _count(self, topic: str) -> int:
        return self._counts[topic] if topic in self._counts else await asyncio.to_thread(self._known_count, topic)

    def _known_count(self, topic: str) -> int:
        if topic not in self._counts:
            self._counts = self._open_log().topics()
        if topic not in self._counts:
            raise NotFound(f"there is no topic {topic}", way_out="create the topic first")
        return self._counts[topic]

    def _open_log(self) -> SqliteLog:
        assert self._log is not None, "the producer is not started"
        return self._log


def _resolve_in_loop(
    done: Future[list[int]], sent: asyncio.Future[RecordMetadata], where: TP, timestamp_ms: int
) -> None:
    """Pass a commit's outcome from the writing thread to the loop that waits for it."""

    def resolve() -> None:
        if sent.done():
            return
        error = done.exception()
        if error is not None:
            sent.set_exception(error)
        else:
            (offset,) = done.result()
            sent.set_result(
                RecordMetadata(where.topic, where.partition, where, offset, timestamp_ms / 1000.0, _CREATE_TIME)
            )

    with suppress(RuntimeError):  # the loop ended without waiting for its sends
        sent.get_loop().call_soon_threadsafe(resolve)
