"""A Kafka cluster as a ``Broker``: what is asked and written beside the agents.

Nothing here belongs to a consumer group. A topic is looked up before it is read or written, without creating it: a
cluster that makes topics on demand would make them with a retention that loses records.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    OffsetOutOfRangeError,
    UnknownTopicOrPartitionError,
)

from pipeline.errors import NotFound, OffsetOutOfRange, SettingsConflict, StateferryError, UsageError
from topology.transports import kafka_access
from topology.transports.base import RECORD_BYTES_MAX, Record, TopicFacts, TopicSpec
from topology.transports.kafka_address import Address, shown
from topology.transports.kafka_appends import Appends, producer_settings
from topology.transports.kafka_security import PLAINTEXT, Security
from topology.transports.kafka_topics import Admin

T = TypeVar("T")

REQUEST_TIMEOUT_S: Final = 30.0
"""Of one request, and of all tries of one call: a broker that restarts is back by then."""
_RETRY_S: Final = 0.1
_FETCH_WAIT_MS: Final = 50
_FETCH_BYTES_MAX: Final = 4 << 20


class KafkaBroker:
    """A ``Broker`` over a Kafka cluster; the promises are the protocol's.

    Every call raises ``BrokerUnavailable`` if the cluster does not answer within ``REQUEST_TIMEOUT_S``.
    """

    def __init__(
        self,
        brokers: Sequence[Address],
        security: Security = PLAINTEXT,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Connects to nothing yet: the first call does."""
        self._brokers = brokers
        self._security = security
        self._request_timeout_s = request_timeout_s
        self._counts: dict[str, int] = {}  # partitions of the topics seen
        self._admin: Admin | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._producer: AIOKafkaProducer | None = None
        self._appends: Appends | None = None
        self._connecting = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._is_closed = False

    # Topics

    async def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        """See ``Broker.ensure_topics``."""
        missing = []
        for spec in specs:
            try:
                self._check_count(spec, await self._count(spec.name))
            except NotFound:
                missing.append(spec)
        for spec in missing:
            name = spec.name
            await self._ask(f"creating topic {name}", partial(self._create, spec), needs=f"CREATE on topic {name}")
            made = partial(self._count_made, name)
            self._check_count(spec, await self._ask(f"topic {name}", made, needs=f"DESCRIBE on topic {name}"))

    def _check_count(self, spec: TopicSpec, count: int) -> None:
        if count != spec.partitions:
            raise SettingsConflict(
                f"topic {spec.name} has {count} partitions, not {spec.partitions}",
                where=self._where,
                way_out="use another topic prefix, or make the topic anew",
            )

    async def _create(self, spec: TopicSpec) -> None:
        await (await self._connected_admin()).create(spec)

    async def _count_made(self, topic: str) -> int:
        """Partitions of a topic that was made a moment ago: not every broker knows it yet."""
        try:
            self._counts[topic] = await (await self._connected_admin()).partitions(topic)
        except UnknownTopicOrPartitionError:
            raise LeaderNotAvailableError(f"topic {topic} is being made") from None
        return self._counts[topic]

    async def _count(self, topic: str) -> int:
        """Raises ``NotFound`` for an unknown topic."""
        if topic not in self._counts:

            async def look() -> int:
                return int(await (await self._connected_admin()).partitions(topic))

            self._counts[topic] = await self._ask(f"topic {topic}", look, needs=f"DESCRIBE on topic {topic}")
        return self._counts[topic]

    async def _known(self, topic: str, partition: int) -> TopicPartition:
        """Raises ``NotFound`` for an unknown topic or partition."""
        if not 0 <= partition < await self._count(topic):
            raise NotFound(
                f"there is no {topic}[{partition}]",
                where=self._where,
                way_out="create the topic first, and check the partition's number",
            )
        return TopicPartition(topic, partition)

    async def describe(self, topic: str) -> TopicFacts:
        """See ``Broker.describe``."""
        count = await self._count(topic)

        async def look() -> TopicFacts:
            admin = await self._connected_admin()
            return TopicFacts(partitions=count, config=await admin.config(topic), copies=await admin.copies(topic))

        return await self._ask(f"topic {topic}", look, needs=f"DESCRIBE_CONFIGS on topic {topic}")

    # Records

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """See ``Broker.bounds``."""
        tp = await self._known(topic, partition)

        async def look() -> tuple[int, int]:
            consumer = await self._connected_consumer()
            first, end = await asyncio.gather(consumer.beginning_offsets([tp]), consumer.end_offsets([tp]))
            return first[tp], end[tp]

        try:
            return await self._ask(f"{topic}[{partition}]", look, needs=f"DESCRIBE on topic {topic}")
        except StateferryError:
            self._counts.pop(topic, None)  # the topic may be gone
            await self._known(topic, partition)
            raise

    async def read(self, topic: str, partition: int, offset: int, *, bytes_max: int) -> list[Record]:
        """See ``Broker.read``."""
        first, end = await self.bounds(topic, partition)
        if not first <= offset <= end:
            raise OffsetOutOfRange(
                f"{topic}[{partition}] holds offsets [{first}, {end}), not {offset}",
                where=self._where,
                way_out="start again from an offset inside, or restore",
            )
        tp = TopicPartition(topic, partition)
        read = partial(self._read, tp, offset, end, bytes_max)
        async with self._reading:
            return await self._ask(f"reading {topic}[{partition}]", read, needs=f"READ on topic {topic}")

    async def _read(self, tp: TopicPartition, offset: int, end: int, bytes_max: int) -> list[Record]:
        records: list[Record] = []
        if offset >= end:
            return records
        consumer = await self._connected_consumer()
        deadline_s = time.monotonic() + self._request_timeout_s
        consumer.assign([tp])
        try:
            consumer.seek(tp, offset)
            while offset < end and bytes_max > 0:
                for found in (await consumer.getmany(tp, timeout_ms=1000)).get(tp, ()):
                    if found.offset >= end or bytes_max <= 0:
                        return records
                    value = found.value or b""
                    records.append(Record(tp.topic, tp.partition, found.offset, found.key, value, found.timestamp))
                    bytes_max -= len(found.key or b"") + len(value)
                offset = await consumer.position(tp)
                if time.monotonic() > deadline_s:
                    raise KafkaTimeoutError(f"no record at offset {offset}")
        except OffsetOutOfRangeError:
            raise OffsetOutOfRange(f"{tp.topic}[{tp.partition}] lost offset {offset}", where=self._where) from None
        finally:
            consumer.unsubscribe()  # else it goes on fetching
        return records

    async def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        """See ``Broker.append``."""
        for key, value in records:
            size = len(key or b"") + len(value)
            if size > RECORD_BYTES_MAX:
                raise UsageError(
                    f"a record of {size} bytes for {topic}[{partition}] is larger than {RECORD_BYTES_MAX}",
                    way_out="send it in chunks",
                )
        await self._known(topic, partition)
        appends = await self._ask("a producer", self._connected_appends, needs=f"WRITE on topic {topic}")
        sent = [appends.submit(topic, partition, key, value) for key, value in records]
        if sent:
            await asyncio.wait(sent)
        return [each.result() for each in sent]

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """See ``Broker.delete_records``."""
        _, end = await self.bounds(topic, partition)
        if before_offset > end:
            raise OffsetOutOfRange(
                f"{topic}[{partition}] ends at {end}; nothing can be deleted up to {before_offset}",
                where=self._where,
                way_out="name an offset up to the end",
            )

        async def delete() -> None:
            admin = await self._connected_admin()
            await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before_offset)})

        await self._ask(f"deleting records of {topic}[{partition}]", delete, needs=f"DELETE on topic {topic}")

    async def close(self) -> None:
        """See ``Broker.close``."""
        self._is_closed = True
        async with self._connecting:
            await self._drop_producer(flush=True)
            for client in (self._consumer and self._consumer.stop, self._admin and self._admin.close):
                if client is not None:
                    with suppress(KafkaError, TimeoutError):
                        async with asyncio.timeout(self._request_timeout_s):
                            await client()
            self._admin = self._consumer = None

    # Connections

    async def _connected_admin(self) -> Admin:
        async with self._connecting:
            if self._admin is None:
                self._admin = await self._started(Admin)
            return self._admin

    async def _connected_consumer(self) -> AIOKafkaConsumer:
        async with self._connecting:
            if self._consumer is None:
                settings = {
                    "auto_offset_reset": "none",
                    "enable_auto_commit": False,
                    "fetch_max_wait_ms": _FETCH_WAIT_MS,
                    "max_partition_fetch_bytes": _FETCH_BYTES_MAX,
                }
                self._consumer = await self._started(AIOKafkaConsumer, **settings)
            return self._consumer

    async def _connected_appends(self) -> Appends:
        async with self._connecting:
            if self._appends is not None and self._appends.failure is not None:
                await self._drop_producer(flush=False)  # one that failed appends nothing more
            if self._appends is None:
                settings = producer_settings(request_timeout_s=self._request_timeout_s)
                self._producer = await self._started(AIOKafkaProducer, **settings)
                self._appends = Appends(self._producer, self._why_not_appended)
            return self._appends

    async def _drop_producer(self, *, flush: bool) -> None:
        producer, appends = self._producer, self._appends
        self._producer = self._appends = None
        if producer is None or appends is None:
            return
        with suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(self._request_timeout_s):
                if flush:
                    await appends.flush()
                await producer.stop()

    async def _started(self, make: Callable[..., T], **settings: Any) -> T:
        """A client of aiokafka, connected. Raises ``BrokerUnavailable``."""
        assert not self._is_closed, "the broker is closed"
        await kafka_access.check_access(self._brokers, self._security)
        settings = {"request_timeout_ms": int(self._request_timeout_s * 1000)} | settings
        servers = list(map(str, self._brokers))
        client: Any = make(bootstrap_servers=servers, **self._security.client_settings, **settings)
        try:
            await client.start()
        except BaseException:
            await (client.close if isinstance(client, Admin) else client.stop)()
            raise
        return client  # type: ignore[no-any-return]

    async def _ask(self, what: str, call: Callable[[], Awaitable[T]], *, needs: str) -> T:
        """What ``call`` gives, tried again for a while after errors that pass. ``needs``: see ``why_failed``."""
        deadline_s = time.monotonic() + self._request_timeout_s
        while True:
            try:
                return await call()
            except (KafkaError, TimeoutError) as error:
                passes = getattr(error, "retriable", False) and not isinstance(error, UnknownTopicOrPartitionError)
                if not passes or time.monotonic() > deadline_s or self._is_closed:
                    why = await kafka_access.why_failed(error, what, self._brokers, self._security, needs=needs)
                    raise why from error
            await asyncio.sleep(_RETRY_S)

    async def _why_not_appended(self, error: BaseException, tp: TopicPartition) -> StateferryError:
        what, needs = f"{tp.topic}[{tp.partition}]", f"WRITE on topic {tp.topic}"
        return await kafka_access.why_failed(error, what, self._brokers, self._security, needs=needs)

    @property
    def _where(self) -> str:
        return shown(self._brokers)
