"""The Faust consumer of the embedded log: positions and delivery.

Faust has one loop that takes messages from ``getmany`` and puts each into the queues of the agents that read
its topic; when a queue is full the loop waits, and no other topic flows. So this consumer never fetches more
than fits: each fetch is bounded by ``broker_max_poll_records`` and by the free room of the queues it is for.

A position moves when a record is delivered, not when it is fetched, and a record is delivered only at exactly
the position: what a pause or a seek overtook is read again, and nothing is skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

from faust.types import TP
from faust.types.tuples import ConsumerMessage

from topology.transports.base import Record, StoredOffsets, TopicSpec
from topology.transports.embedded_group import GroupConsumer
from topology.transports.embedded_producer import partition_of
from topology.transports.sqlite_log import SqliteLog

_POLL_RECORDS: Final = 500  # per fetch, where broker_max_poll_records is not set
_NO_ROOM_WAIT_S: Final = 0.005  # a queue that drains without ever having been full says nothing
_CREATE_TIME: Final = 0  # Kafka's number for a timestamp set by the producer


class _Want(NamedTuple):
    tp: TP
    position: int
    queues: list[int]  # ids of the queues that a record of this TP goes to


class LogConsumer(GroupConsumer):
    """Reads the log for the agents of one worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends: dict[TP, int] = {}
        self._turn = 0

    # Positions

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Seek to the group's committed offsets, to the first offset where there is none."""
        assert self._membership is not None, "seek before start"
        committed = await self._off_loop(self._membership.committed)
        offsets = {tp: committed[tp] for tp in self._assignment if tp in committed}
        offsets |= await self.earliest_offsets(*(self._assignment - offsets.keys()))
        await self.seek_wait(offsets)
        return offsets

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        """Seek; a partition that was taken away meanwhile is left out."""
        for tp, offset in partitions.items():
            await self.seek(tp, offset)

    async def _seek(self, partition: TP, offset: int) -> None:
        if partition in self._assignment:
            self._positions[TP(*partition)] = offset
            self._wake.set()

    async def seek_to_beginning(self, *partitions: TP) -> None:
        """Seek to the first offsets."""
        await self.seek_wait(await self.earliest_offsets(*partitions))

    async def position(self, tp: TP) -> int | None:
        """Return the offset that is delivered next, None before the first seek."""
        return self._positions.get(tp)

    async def earliest_offsets(self, *partitions: TP) -> Mapping[TP, int]:
        """Return the first offsets that can be read."""
        log = self._open_log()
        return await self._off_loop(lambda: {tp: log.bounds(*tp)[0] for tp in partitions})

    async def highwaters(self, *partitions: TP) -> Mapping[TP, int]:
        """Return the ends: the offsets that come next."""
        log = self._open_log()
        return await self._off_loop(lambda: {tp: log.bounds(*tp)[1] for tp in partitions})

    def highwater(self, tp: TP) -> int:
        """Return the end as of the last fetch."""
        return self._ends.get(tp, 0)

    # Delivery

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:  # noqa: ASYNC109
        """Yield the next records of the active partitions; at most ``timeout`` seconds pass without one."""
        if not self.flow_active:
            await self.wait(self.can_resume_flow.wait())
        generation = self.app.consumer_generation_id
        fetched = await self._getmany(self._active_partitions, timeout)
        for tp, record in self.scheduler.iterate(fetched):
            if self.should_stop or not self.flow_active or self.app.consumer_generation_id != generation:
                return
            active = tp in self._active_partitions or tp in self._buffered_partitions
            if active and self._positions.get(tp) == record.offset:
                self._positions[tp] = record.offset + 1
                self.app.monitor.track_tp_end_offset(tp, self._ends[tp])
                yield tp, self._to_message(tp, record)
                # Faust has noted the record's offset as read and drops what lies below; a seek made meanwhile wins.
                position = self._positions.get(tp)
                if position is not None and position != record.offset + 1:
                    self._read_offset[tp] = position

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Record]]:  # noqa: ASYNC109
        deadline_s = self.loop.time() + timeout
        while self.flow_active and not self.should_stop:
            self._wake.clear()
            log = self._log
            wanted, room = self._wants(active_partitions or set())
            if wanted and log is not None:
                fetched = await self._off_loop(partial(self._fetch, log, wanted, room))
                if fetched:
                    return fetched
            left_s = deadline_s - self.loop.time()
            if left_s <= 0:
                break
            if not all(room.values()):
                left_s = min(left_s, _NO_ROOM_WAIT_S)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left_s)
        return {}

    def _wants(self, active: set[TP]) -> tuple[list[_Want], dict[int, int]]:
        """Return what to fetch, each time beginning with another TP, and the free room per queue id."""
        tps = sorted(tp for tp in active & self._assignment if tp in self._positions)
        if tps:
            self._turn = (self._turn + 1) % len(tps)
        room: dict[int, int] = {}
        wanted = []
        for tp in tps[self._turn :] + tps[: self._turn]:
            queues = [channel.queue for channel in self.app.topics._tp_index.get(tp, ())]
            for full_queue in queues:
                maxsize = full_queue.maxsize or _POLL_RECORDS
                room[id(full_queue)] = max(0, maxsize - full_queue.qsize())
            wanted.append(_Want(tp, self._positions[tp], [id(each) for each in queues]))
        return wanted, room

    def _fetch(self, log: SqliteLog, wanted: list[_Want], room: dict[int, int]) -> dict[TP, list[Record]]:
        """Read what is wanted and fits, sharing the poll's records fairly; runs off the loop."""
        left = self.app.conf.broker_max_poll_records or _POLL_RECORDS
        fetched: dict[TP, list[Record]] = {}
        for index, (tp, position, queues) in enumerate(wanted):
            _, self._ends[tp] = log.bounds(*tp)
            records_max = min([max(1, left // (len(wanted) - index)), *(room[each] for each in queues)])
            if left == 0 or records_max == 0 or position == self._ends[tp]:
                continue
            records = log.read(
                tp.topic,
                tp.partition,
                position,
                bytes_max=self.app.conf.consumer_max_fetch_size,
                records_max=records_max,
            )
            if records:
                fetched[tp] = records
                left -= len(records)
                for each in queues:
                    room[each] -= len(records)
        return fetched

    def _to_message(self, tp: TP, record: Record) -> ConsumerMessage:
        return ConsumerMessage(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp_ms / 1000.0,
            _CREATE_TIME,
            [],
            record.key,
            record.value,
            None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    def stop_flow(self) -> None:
        """Deliver nothing more until flow resumes."""
        super().stop_flow()
        self._wake.set()

    def on_buffer_drop(self, tp: TP) -> None:
        """Fetch a partition again whose queue had been full."""
        super().on_buffer_drop(tp)
        self._wake.set()

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Fetch paused partitions again, from where they were paused."""
        super().resume_partitions(set(tps))
        self._wake.set()

    # The rest of what Faust asks

    async def create_topic(self, topic: str, partitions: int, replication: int, **kwargs: Any) -> None:
        """Create a topic; retention, replication and the like mean nothing to this log."""
        log = self._open_log()
        await self._off_loop(lambda: log.ensure_topics([TopicSpec(name=topic, partitions=partitions)]))

    def topic_partitions(self, topic: str) -> int | None:
        """Return the topic's number of partitions, None if there is no such topic."""
        return self._open_log().topics().get(topic)

    def key_partition(self, topic: str, key: bytes | None, partition: int | None = None) -> int | None:
        """Return the partition that a key goes to."""
        if partition is not None:
            return partition
        count = self.topic_partitions(topic)
        return None if count is None else partition_of(key, count, self.app.conf.producer_partitioner)

    def _new_topicpartition(self, topic: str, partition: int) -> TP:
        return TP(topic, partition)


class Consumer(StoredOffsets, LogConsumer):  # type: ignore[misc]
    """The consumer of this transport: the log's, started at the stores' offsets."""
