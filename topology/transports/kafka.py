"""Kafka as a Faust transport: Faust's aiokafka driver, with the things that it gets wrong for us put right.

* Every assignment starts at the offsets of the stores (``StoredOffsets``), and an offset that the log does not hold is
  an error: nothing is ever reset.
* The producer is idempotent, waits for all replicas in sync, and appends nothing behind an append that failed.
* A member that ends in order leaves its partitions to the others of its group at once, if there are others.
* Of two members with one instance id the later one stays. The other one ends: it would join again and again.
* A fetch that waits for a quiet partition holds up all others of the same broker, so it waits briefly.

Faust finds it by the entry point ``faust.transports``, under the scheme ``factory.KAFKA_SCHEME``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.protocol.admin import DescribeGroupsRequest
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage, RecordMetadata

from pipeline.errors import Fenced, OffsetOutOfRange, StateferryError, Unsupported
from topology.transports import kafka_access
from topology.transports.base import StoredOffsets
from topology.transports.kafka_address import PORT_DEFAULT, Address, shown
from topology.transports.kafka_appends import Appends, producer_settings
from topology.transports.kafka_security import PLAINTEXT, Security
from topology.transports.kafka_topics import Admin

FETCH_WAIT_MS: Final = 50
"""Fifty fetches cost a quiet worker nothing; Faust's 1.5 s would be the lag of a partition that shares its broker."""
GROUP_TIMEOUT_S: Final = 5.0
"""Of looking whether the group may be joined."""
_CREATE_TIME: Final = 0  # Kafka's number for a timestamp set by the producer


class ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """The thread that talks to the cluster."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS  # Faust has no setting for it; it is read when the consumer starts
        consumer._auto_offset_reset = "none"
        return consumer

    _member_id = ""  # in the group, as it was when partitions came last

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """The group gave this member its partitions."""
        self._member_id = self._ensure_consumer()._coordinator.member_id
        await super().on_partitions_assigned(assigned, generation_id)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """The group takes them away, for this member to join again.

        A member that the group forgot joins again too, under the name of its instance. If that is another process's
        by now, each would throw the other out for ever: this one ends instead, and does not join any more.
        """
        coordinator = self._ensure_consumer()._coordinator
        successor = await self._successor(coordinator)
        if not successor:
            await super().on_partitions_revoked(revoked)
            return
        instance = coordinator._group_instance_id
        error = Fenced(
            f"another process joined group {coordinator.group_id} as instance {instance}",
            where=shown(self.transport.brokers),
            way_out="run one worker per data directory; a copied one needs a NODE file of its own",
        )
        asyncio.run_coroutine_threadsafe(self.consumer.crash(error), self.parent_loop)
        await asyncio.wait([coordinator._closing])
        coordinator.coordinator_dead()  # there is nobody to join any more

    async def _successor(self, coordinator: Any) -> str:
        """The member that took this one's place; empty if there is none."""
        instance = coordinator._group_instance_id
        if not instance or not self._member_id or coordinator.member_id:
            return ""
        try:
            answer = await coordinator._send_req(DescribeGroupsRequest([coordinator.group_id]))
        except KafkaError:
            return ""  # the group is looked for again before it is joined
        members = [member[0] for group in answer.groups for member in group[5]]
        # A broker names a static member by its instance, and something random behind it.
        found = [name for name in members if name.startswith(f"{instance}-") and name != self._member_id]
        return str(found[0]) if found else ""

    async def on_thread_stop(self) -> None:
        """Leave the group if others in it may take over at once. A member that has all there is keeps its place, for
        when it is started again."""
        consumer = self._consumer
        if consumer is not None and not _has_all(consumer):
            consumer._coordinator._group_instance_id = None  # aiokafka lets nobody leave who has one
        await super().on_thread_stop()

    async def _fetch_records(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._fetch_records(*args, **kwargs)
        except NoOffsetForPartitionError:
            return {}  # a fetch from before the assignment: the offsets of the stores are being sought right now


def _has_all(consumer: Any) -> bool:
    """Whether a consumer has every partition of what it reads, which is whoever is alone in a group."""
    there = [consumer.partitions_for_topic(topic) or () for topic in consumer.subscription()]
    return len(consumer.assignment()) == sum(map(len, there))


class Consumer(StoredOffsets, driver.Consumer):  # type: ignore[misc]
    """The driver's consumer, starting where the stores stand."""

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def on_start(self) -> None:
        """Look whether the group may be joined, then start. Raises ``NotAuthorized``."""
        group = self.app.conf.id
        try:
            await self.transport.check_group(group)
        except GroupAuthorizationFailedError as error:
            needs = f"READ on group {group}"
            raise await self.transport.why_failed(error, "joining the group", needs=needs) from error
        except (KafkaError, OSError):  # a broker that is away; the consumer tries again by itself
            pass
        await super().on_start()

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:  # noqa: ASYNC109
        """Yield fetched messages. Raises ``OffsetOutOfRange`` where the log lost them, ``NotAuthorized``."""
        try:
            async for item in super().getmany(timeout):
                yield item
        except OffsetOutOfRangeError as error:
            raise OffsetOutOfRange(
                f"the log does not hold the offset to read next: {error}",
                where=shown(self.transport.brokers),
                way_out="start again: a start compares the store with the log, and says what to do",
            ) from error
        except TopicAuthorizationFailedError as error:
            topic = ",".join(map(str, error.args))
            why = await self.transport.why_failed(error, "reading", needs=f"READ on topic {topic}")
            raise why from error

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        if record.value is None:  # nobody of ours writes this; it is as void as any garbage
            record = replace(record, value=b"")
        return super()._to_message(tp, record)


class Producer(driver.Producer):  # type: ignore[misc]
    """The driver's producer, idempotent and without holes."""

    _appends: Appends | None = None

    def _settings_extra(self) -> Mapping[str, Any]:
        return producer_settings(request_timeout_s=self.request_timeout)

    async def on_start(self) -> None:
        """Connect. Raises ``BrokerUnavailable``, ``AccessDenied``."""
        try:
            await super().on_start()
        except KafkaError as error:
            raise await self.transport.why_failed(error, "a producer", needs="WRITE on a topic") from error
        self._appends = Appends(self._producer, self._why_not_appended)

    async def on_stop(self) -> None:
        """Wait for what was sent and disconnect; after a failure, wait for nothing."""
        appends, self._appends = self._appends, None
        if appends is not None and appends.failure is None:
            await appends.flush()
        await super().on_stop()

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
        """Queue a record; the future gives its place in the log once all replicas in sync have it.

        ``timestamp``: Unix seconds, None for now. The future raises what ``Appends.submit`` says. Raises
        ``Unsupported`` for what the embedded log could not keep either.
        """
        if headers or value is None or transactional_id is not None:
            raise Unsupported(f"no headers, absent values or transactions ({topic})", way_out="send a value")
        assert self._appends is not None, "the producer is not started"
        self._send_on_produce_message(key=key, value=value, partition=partition, timestamp=timestamp, headers=headers)
        if partition is None:
            every = sorted(await self._ensure_producer().partitions_for(topic))
            partition = int((self.partitioner or DefaultPartitioner())(key, every, every))
        timestamp_ms = None if timestamp is None else int(timestamp * 1000)
        offset = self._appends.submit(topic, partition, key, value, timestamp_ms=timestamp_ms)
        return asyncio.ensure_future(_placed(offset, TP(topic, partition), timestamp))

    async def flush(self) -> None:
        """Wait until everything sent so far is appended or has failed."""
        await self.buffer.flush()
        if self._appends is not None:
            await self._appends.flush()

    async def _why_not_appended(self, error: BaseException, tp: TopicPartition) -> StateferryError:
        why: StateferryError = await self.transport.why_failed(
            error, f"{tp.topic}[{tp.partition}]", needs=f"WRITE on topic {tp.topic}"
        )
        return why


async def _placed(offset: Awaitable[int], tp: TP, timestamp: float | None) -> RecordMetadata:
    return RecordMetadata(tp.topic, tp.partition, tp, await offset, timestamp, _CREATE_TIME)


class Transport(driver.Transport):  # type: ignore[misc]
    """Makes the consumer and the producer of one cluster."""

    Consumer: ClassVar[type[Consumer]] = Consumer
    Producer: ClassVar[type[Producer]] = Producer

    @property
    def security(self) -> Security:
        """What the application set as ``kafka_security``."""
        return getattr(self.app, "kafka_security", PLAINTEXT)

    @property
    def brokers(self) -> list[Address]:
        """The cluster's brokers, as the application named them."""
        return [Address(url.host or "", url.port or PORT_DEFAULT) for url in self.url]

    async def check_group(self, group: str) -> None:
        """See ``Admin.check_group``."""
        servers = list(map(str, self.brokers))
        timeout_ms = int(GROUP_TIMEOUT_S * 1000)
        admin = Admin(bootstrap_servers=servers, request_timeout_ms=timeout_ms, **self.security.client_settings)
        try:
            await admin.start()
            await admin.check_group(group)
        finally:
            await admin.close()

    async def why_failed(self, error: BaseException, what: str, *, needs: str) -> StateferryError:
        """See ``kafka_access.why_failed``."""
        return await kafka_access.why_failed(error, what, self.brokers, self.security, needs=needs)
