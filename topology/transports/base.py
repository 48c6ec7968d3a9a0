"""What stateferry asks of a broker: the seam between the system and Kafka or the embedded log.

Faust's agents read and write through a Faust transport. Everything beside the agents (a source that publishes
events, a start that compares the log's last record with the store, ``status``, the creation of topics,
retention) goes through ``Broker``: a few calls, the same for every broker, so that no part of the system knows
which one it has.

``StoredOffsets`` is the other half of the seam. The position of a partition is what its *store* says, never
what the consumer group says, and Faust has one hook that is awaited after a rebalance and before the first
record flows: ``Consumer.seek_to_committed()``. The mixin answers that hook from the application's stores. It
stands before Faust's consumer class of any transport in the bases of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from pipeline.errors import BrokerUrlError, UsageError

if TYPE_CHECKING:
    from faust.types import TP

RECORD_BYTES_MAX: Final = 1024 * 1024
"""Most bytes of one record, key and value together. Larger things are chunked by whoever writes them."""

_URL_HINT: Final = "write embedded:///absolute/path/log.sqlite, or kafka://host:port"


class Record(NamedTuple):
    """One record of a partition, as the log holds it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    timestamp_ms: int  # Unix time of the append, by the writer's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """A topic that must exist."""

    name: str
    partitions: int  # 1 or more; fixed for the life of the topic
    compacted: bool = False  # of records with the same key the last one is enough; a broker may keep all of them
    copies: int = 0  # of every record, where there are several brokers; 0: three, or as many as there are brokers

    def __post_init__(self) -> None:
        if not self.name or self.partitions < 1:
            raise UsageError(
                f"topic {self.name!r} with {self.partitions} partitions cannot be",
                way_out="give it a name and at least one partition",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicFacts:
    """A topic as the broker has it."""

    partitions: int
    config: Mapping[str, str]  # Kafka's names and values; empty where a broker has nothing to set
    copies: int = 1  # of every record, on as many brokers


class Broker(Protocol):
    """A log of topics and partitions.

    What every implementation promises:

    * Offsets of a partition are handed out once each, ascending, and never reused, not even after records
      were deleted. ``first <= offset < end`` are the ones that can be read.
    * A record whose ``append`` returned survives the death of this process, and a power cut as far as the
      broker's own durability setting reaches.
    * Records of one ``append`` stand in the partition in the order given. If it raises, either none of them is there
      or the first ones of them are: never a later one without those before it.
    * Calls may be made concurrently from tasks of one event loop. Nothing blocks that loop.
    """

    async def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Create the topics that do not exist yet; doing it again changes nothing.

        Raises ``SettingsConflict`` if one exists with another number of partitions.
        """

    async def describe(self, topic: str) -> TopicFacts:
        """Return what the broker says of a topic. Raises ``NotFound``."""

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """Return ``(first, end)``: the half-open range of offsets that can be read.

        An empty partition has ``first == end``. Raises ``NotFound`` for an unknown topic or partition.
        """

    async def read(self, topic: str, partition: int, offset: int, *, bytes_max: int) -> list[Record]:
        """Return records from ``offset`` on, about ``bytes_max`` bytes of keys and values.

        Never waits. At least one record comes back if there is one, however large; an empty list means that
        ``offset`` is the end. Raises ``OffsetOutOfRange`` below the first offset and above the end,
        ``NotFound`` for an unknown topic or partition.
        """

    async def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        """Append ``(key, value)`` pairs in order and return their offsets once they are durable.

        Raises ``NotFound`` for an unknown topic or partition and ``UsageError`` for a record larger than
        ``RECORD_BYTES_MAX``. After ``Locked`` or ``DiskFull`` nothing of it was written; after
        ``BrokerUnavailable`` only the log says what was.
        """

    async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """Delete every record below ``before_offset``; ``before_offset`` equal to the end deletes all.

        Below the first offset it does nothing. Raises ``OffsetOutOfRange`` above the end.
        """

    async def close(self) -> None:
        """Finish what was appended and let go of the broker. Closing twice is closing once."""


def log_path(url: str) -> Path:
    """Return the file that an ``embedded://`` URL names.

    Raises ``BrokerUrlError`` for any other scheme, for a host, and for a path that is not absolute.
    """
    parts = urlsplit(url)
    # What stands before an @ may be a password, and errors end up in logs.
    shown = f"{parts.scheme}://...@{url.rpartition('@')[2]}" if "@" in url else url
    if parts.scheme != "embedded":
        raise BrokerUrlError(
            "a broker URL begins with embedded:// or kafka://",
            where=shown,
            way_out=_URL_HINT,
        )
    path = Path(unquote(parts.path))
    if parts.netloc or parts.query or parts.fragment or not path.is_absolute() or not path.name:
        raise BrokerUrlError("the URL does not name one file", where=shown, way_out=_URL_HINT)
    return path


class StoredOffsets:
    """Makes a Faust consumer start every assignment at the offsets that the application's stores hold.

    The application sets ``app.stored_offsets``, an async callable from a set of TPs to a mapping of TP to the
    next offset to read. It is awaited after every rebalance, before the first record flows, and has about
    ``broker_request_timeout`` (90 s) to answer; an exception ends the worker.

    * A TP in the answer is read from that offset, whatever the group committed.
    * A TP not in the answer is read from the group's committed offset, or from the first one if there is
      none.
    * Without the attribute, or with None, no TP is in the answer.
    * Calls never overlap, and none is made while partitions are being taken away.
    """

    app: Any
    assignment: Callable[[], set[TP]]
    earliest_offsets: Callable[..., Awaitable[Mapping[TP, int]]]
    seek_wait: Callable[[Mapping[TP, int]], Awaitable[None]]

    _fetch_task: asyncio.Task[Any] | None = None
    _seek_lock: asyncio.Lock | None = None

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Seek every assigned TP to its stored offset and return the offsets sought."""
        stored_offsets = getattr(self.app, "stored_offsets", None)
        if self._seek_lock is None:
            self._seek_lock = asyncio.Lock()
        async with self._seek_lock:
            assignment = set(self.assignment())
            stored = {} if stored_offsets is None else await stored_offsets(set(assignment))
            offsets = {tp: stored[tp] for tp in assignment if tp in stored}
            rest = assignment - offsets.keys()
            if rest:
                committed = await self._committed()
                known = {tp: offset for tp, offset in committed.items() if offset is not None and offset >= 0}
                offsets |= {tp: known[tp] for tp in rest if tp in known}
                new = rest - offsets.keys()
                if new:
                    first = await self.earliest_offsets(*new)
                    offsets |= {tp: first[tp] for tp in new}
            if offsets:
                await self.seek_wait(offsets)
            return offsets

    async def perform_seek(self) -> None:
        """Seek for a new assignment; called by Faust.

        Faust's fetch loop calls this too, when flow stopped under it, which is while partitions are being
        taken away: the stores must not be opened again then, and the seek is made good when flow resumes. So
        a call from that loop does nothing.
        """
        if self._fetch_task is None or asyncio.current_task() is not self._fetch_task:
            await super().perform_seek()  # type: ignore[misc]

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:  # noqa: ASYNC109
        """Yield fetched messages as the driver does, remembering which task is the fetch loop."""
        self._fetch_task = asyncio.current_task()
        async for item in super().getmany(timeout):  # type: ignore[misc]
            yield item

    async def _committed(self) -> Mapping[TP, int]:
        committed: Mapping[TP, int] = await super().seek_to_committed()  # type: ignore[misc]
        return committed
