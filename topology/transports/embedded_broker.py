"""The embedded log as a ``Broker``: the same calls, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pipeline.errors import NotFound
from topology.transports.base import Record, TopicFacts, TopicSpec
from topology.transports.sqlite_log import SqliteLog

T = TypeVar("T")


class EmbeddedBroker:
    """A ``Broker`` over the log in one file; the promises are the protocol's.

    All brokers, producers and consumers of a process share one ``SqliteLog`` of a file, and with it their
    commits.
    """

    def __init__(self, path: Path) -> None:
        """Open the log. Raises what ``SqliteLog`` raises."""
        self._log: SqliteLog | None = SqliteLog.shared(path)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="embedded-broker")

    async def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        """See ``Broker.ensure_topics``."""
        await self._off_loop(lambda: self._open_log().ensure_topics(specs))

    async def describe(self, topic: str) -> TopicFacts:
        """See ``Broker.describe``."""
        known = await self._off_loop(lambda: self._open_log().topics())
        if topic not in known:
            raise NotFound(f"there is no topic {topic}", way_out="create the topic first")
        return TopicFacts(partitions=known[topic], config={})

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """See ``Broker.bounds``."""
        return await self._off_loop(lambda: self._open_log().bounds(topic, partition))

    async def read(self, topic: str, partition: int, offset: int, *, bytes_max: int) -> list[Record]:
        """See ``Broker.read``."""
        return await self._off_loop(lambda: self._open_log().read(topic, partition, offset, bytes_max=bytes_max))

    async def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        """See ``Broker.append``."""
        return await asyncio.wrap_future(self._open_log().submit(topic, partition, records))

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """See ``Broker.delete_records``."""
        await self._off_loop(lambda: self._open_log().delete_records(topic, partition, before_offset))

    async def close(self) -> None:
        """See ``Broker.close``."""
        log, self._log = self._log, None
        if log is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, log.close)
            self._threads.shutdown(wait=False)

    def _open_log(self) -> SqliteLog:
        assert self._log is not None, "the broker is closed"
        return self._log

    async def _off_loop(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
