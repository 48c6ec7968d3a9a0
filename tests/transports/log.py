"""A broker for tests that are not asynchronous: every call waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from aiokafka.admin import AIOKafkaAdminClient

from tests.kafka.fixtures import Place
from topology.transports.base import Record, TopicSpec
from topology.transports.factory import open_broker

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0


class Log:
    """A ``Broker`` on an event loop of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

        async def opened() -> Any:
            return open_broker(place.url, place.prefix)

        self._broker = self._wait(opened())

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(CALL_TIMEOUT_S)

    def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        self._wait(self._broker.ensure_topics(specs))

    def bounds(self, topic: str, partition: int = 0) -> tuple[int, int]:
        return self._wait(self._broker.bounds(topic, partition))

    def read(self, topic: str, partition: int = 0) -> list[Record]:
        """Everything that is there."""
        first, _ = self.bounds(topic, partition)
        return self._wait(self._broker.read(topic, partition, first, bytes_max=1 << 40))

    def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        return self._wait(self._broker.append(topic, partition, records))

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        self._wait(self._broker.delete_records(topic, partition, before_offset))

    def remake(self, topic: str, records: Sequence[tuple[bytes | None, bytes]]) -> None:
        """Delete a topic of Kafka and make it anew with these records, from offset 0 on."""

        async def delete() -> None:
            admin = AIOKafkaAdminClient(bootstrap_servers=self._place.url.removeprefix("kafka://"))
            await admin.start()
            name = self._place.prefix + topic
            await admin.delete_topics([name])
            while name in await admin.list_topics():
                await asyncio.sleep(0.02)
            await admin.close()

        self._wait(delete())
        other = Log(self._place)  # this one remembers the topic
        try:
            other.ensure_topics([TopicSpec(name=topic, partitions=1)])
            other.append(topic, 0, records)
        finally:
            other.close()

    def close(self) -> None:
        self._wait(self._broker.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
