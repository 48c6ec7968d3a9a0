"""Several chains on one broker: every topic of a chain begins with its prefix, and nothing else knows of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from pipeline.errors import UsageError
from topology.transports.base import Broker, Record, TopicFacts, TopicSpec

_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]{0,100}")


def check_prefix(prefix: str) -> str:
    """The prefix itself. Raises ``UsageError`` for what no topic's name may hold."""
    if _PREFIX.fullmatch(prefix) is None:
        raise UsageError(
            f"no topic's name can begin with {prefix!r}", way_out="use up to 100 letters, digits, '.', '_' and '-'"
        )
    return prefix


class PrefixedBroker:
    """A ``Broker`` whose topics are those of another one that begin with a prefix."""

    def __init__(self, broker: Broker, prefix: str) -> None:
        self._broker = broker
        self._prefix = check_prefix(prefix)

    async def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        """See ``Broker.ensure_topics``."""
        await self._broker.ensure_topics([replace(spec, name=self._prefix + spec.name) for spec in specs])

    async def describe(self, topic: str) -> TopicFacts:
        """See ``Broker.describe``."""
        return await self._broker.describe(self._prefix + topic)

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """See ``Broker.bounds``."""
        return await self._broker.bounds(self._prefix + topic, partition)

    async def read(self, topic: str, partition: int, offset: int, *, bytes_max: int) -> list[Record]:
        """See ``Broker.read``."""
        found = await self._broker.read(self._prefix + topic, partition, offset, bytes_max=bytes_max)
        return [record._replace(topic=topic) for record in found]

    async def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        """See ``Broker.append``."""
        return await self._broker.append(self._prefix + topic, partition, records)

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """See ``Broker.delete_records``."""
        await self._broker.delete_records(self._prefix + topic, partition, before_offset)

    async def close(self) -> None:
        """See ``Broker.close``."""
        await self._broker.close()
