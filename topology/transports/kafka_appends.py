"""Appends to Kafka: one batch of a partition at a time, and none after one that failed.

A client that queues several batches may lose one (it expired before it was sent, the broker refused it) and go on
with the next: the partition has a hole then, and a hole between frames stops every reader. Idempotence does not help,
since a broker that does not know a producer yet takes any sequence number. So records wait here while a batch is under
way, the next batch takes all that fit, and after a failure nothing more goes out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaProducer, TopicPartition

from pipeline.errors import BrokerUnavailable, StateferryError
from topology.transports.base import RECORD_BYTES_MAX

BATCH_BYTES_MAX: Final = RECORD_BYTES_MAX
"""Of one batch, unless its only record is larger by its frame; topics take this with `RECORD_SLACK_BYTES`."""
RECORD_SLACK_BYTES: Final = 64 * 1024
"""What `max.message.bytes` allows above a record: a batch's header and the lengths in it."""

Explain = Callable[[BaseException, TopicPartition], Awaitable[StateferryError]]


def producer_settings(*, request_timeout_s: float) -> dict[str, Any]:
    """What both kinds of producer ask of aiokafka. Frames are compressed already: a second time costs and gains
    nothing."""
    return {
        "acks": "all",
        "enable_idempotence": True,
        "compression_type": None,
        "linger_ms": 0,
        "max_batch_size": BATCH_BYTES_MAX,
        "max_request_size": BATCH_BYTES_MAX + RECORD_SLACK_BYTES,
        "request_timeout_ms": int(request_timeout_s * 1000),
    }


class _Waiting(NamedTuple):
    key: bytes | None
    value: bytes
    timestamp_ms: int | None
    appended: asyncio.Future[int]


class Appends:
    """The records that one producer has to append.

    * Records of a partition are appended in the order of ``submit``.
    * Once an append failed, every later one of any partition fails with the same error: only the log says what
      became of the failed one, so whoever appends has to read it first.
    """

    def __init__(self, producer: AIOKafkaProducer, explain: Explain) -> None:
        self._producer = producer
        self._explain = explain
        self._waiting: dict[TopicPartition, deque[_Waiting]] = {}
        self._tasks: dict[TopicPartition, asyncio.Task[None]] = {}
        self.failure: StateferryError | None = None

    def submit(
        self, topic: str, partition: int, key: bytes | None, value: bytes, *, timestamp_ms: int | None = None
    ) -> asyncio.Future[int]:
        """Queue a record; the future gives its offset once all replicas in sync have it.

        It raises ``BrokerUnavailable``, ``NotFound``, or ``UsageError`` for what the broker refused.
        """
        appended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.failure is not None:
            appended.set_exception(self.failure)
            return appended
        tp = TopicPartition(topic, partition)
        self._waiting.setdefault(tp, deque()).append(_Waiting(key, value, timestamp_ms, appended))
        if tp not in self._tasks:
            self._tasks[tp] = asyncio.create_task(self._append_all(tp))
        return appended

    async def flush(self) -> None:
        """Wait until all that was submitted is appended or has failed."""
        while self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def cancel(self) -> None:
        """Give up what waits."""
        for task in list(self._tasks.values()):
            task.cancel()
        await self.flush()

    async def _append_all(self, tp: TopicPartition) -> None:
        waiting = self._waiting[tp]
        sending: list[_Waiting] = []
        try:
            while waiting and self.failure is None:
                sending = []
                first_offset = await self._append_batch(tp, waiting, sending)
                for offset, each in enumerate(sending, first_offset):
                    if not each.appended.done():
                        each.appended.set_result(offset)
        except asyncio.CancelledError:
            self._fail(BrokerUnavailable("the producer was closed before the broker answered", where=str(tp)))
            raise
        except Exception as error:
            # Before anything else runs: what was submitted behind the failed batch must not overtake it.
            self._fail(BrokerUnavailable(f"{tp.topic}[{tp.partition}]: an append before this one failed"))
            failure = await self._explain(error, tp)
            failure.__cause__ = error
            self._fail(failure)
        finally:
            del self._tasks[tp]
            left = [*sending, *waiting]
            waiting.clear()
            for each in left:
                if not each.appended.done():
                    assert self.failure is not None, "records are left, and nothing failed"
                    each.appended.set_exception(self.failure)
                    each.appended.exception()  # seen: whoever awaits the first of many need not await the others

    async def _append_batch(self, tp: TopicPartition, waiting: deque[_Waiting], sending: list[_Waiting]) -> int:
        """Take what fits from ``waiting`` into ``sending``, append it, and return the first offset."""
        batch = self._producer.create_batch()
        while waiting:
            key, value, timestamp_ms, _ = waiting[0]
            if batch.append(timestamp=timestamp_ms, key=key, value=value) is None:
                break
            sending.append(waiting.popleft())
        batch.close()
        sent = await self._producer.send_batch(batch, tp.topic, partition=tp.partition)
        first_offset = int((await sent).offset)
        if first_offset < 0:  # a duplicate of which the broker does not know the place any more
            raise BrokerUnavailable("the broker does not say where the records stand", where=str(tp))
        return first_offset

    def _fail(self, error: StateferryError) -> None:
        self.failure = error
