"""The part of the embedded log's Faust consumer that has a place in a group: joining, rebalancing, leaving.

A task follows the group (``sqlite_group``). On a new generation it gives up all partitions through Faust's
callbacks, waits until every other member has, and takes up the new ones. Then Faust seeks (``StoredOffsets``)
and flow resumes. Messages carry the generation, by which Faust drops what was in flight.

A consumer that stops leaves its group, so that others take over at once; one that is killed is replaced when
its lease runs out, or at once by a process of the same instance id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from faust.transport import consumer
from faust.types import TP
from mode import Service

from pipeline.errors import NotFound, Unsupported
from topology.transports.base import TopicSpec
from topology.transports.lease import LeaseKeeper
from topology.transports.sqlite_group import GroupView, Membership
from topology.transports.sqlite_log import SqliteLog

T = TypeVar("T")

_SYNC_POLL_S: Final = 0.01


class GroupConsumer(consumer.Consumer):  # type: ignore[misc]
    """A member of the group named by the app's id, with the log open and its partitions assigned.

    ``broker_session_timeout`` is the lease, ``broker_heartbeat_interval`` how often it is renewed, and
    ``consumer_group_instance_id`` the name under which a restart takes over at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.app.client_only:
            raise Unsupported("the embedded log has no client-only consumers", way_out="run a worker")
        self._log: SqliteLog | None = None
        self._membership: Membership | None = None
        self._lease: LeaseKeeper | None = None
        self._group_task: asyncio.Task[Any] | None = None
        self._wanted_topics: frozenset[str] = frozenset()
        self._joined_topics: frozenset[str] | None = None
        self._assignment: frozenset[TP] = frozenset()
        self._positions: dict[TP, int] = {}  # next offset to deliver; none before the first seek
        self._wake = asyncio.Event()  # something may be there to fetch
        self._group_changed = asyncio.Event()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="embedded-consumer")

    async def on_start(self) -> None:
        """Open the log; joining waits for ``subscribe``."""
        await super().on_start()
        conf = self.app.conf
        log = self._log = await self._off_loop(lambda: SqliteLog.shared(self.transport.path))
        self._membership = await self._off_loop(
            lambda: Membership(
                log,
                group=conf.id,
                instance=conf.consumer_group_instance_id,
                lease_ms=int(conf.broker_session_timeout * 1000),
            )
        )
        log.add_listener(self._on_log_changed)

    async def on_stop(self) -> None:
        """Commit what was acked, leave the group, close the log."""
        try:
            await super().on_stop()
        finally:
            task = self._group_task
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                await asyncio.wait([task], timeout=5.0)
            await self._off_loop(self._leave)
            self._threads.shutdown(wait=False)

    def _leave(self) -> None:
        log, self._log = self._log, None
        membership, self._membership = self._membership, None
        if self._lease is not None:
            self._lease.stop()
        try:
            if membership is not None:
                membership.leave()
        finally:
            if membership is not None:
                membership.close()
            if log is not None:
                log.remove_listener(self._on_log_changed)
                log.close()

    async def subscribe(self, topics: Iterable[str]) -> None:
        """Read these topics from the next generation on; topics that do not exist are declared.

        Raises ``NotFound`` for a topic that does not exist where ``topic_allow_declare`` is off.
        """
        wanted = frozenset(topics)
        log = self._open_log()
        known = await self._off_loop(log.topics)
        conf = self.app.conf
        partitions = {name: topic.partitions for topic in self.app.topics for name in topic.topics}
        missing = [
            TopicSpec(name=name, partitions=partitions.get(name) or conf.topic_partitions)
            for name in sorted(wanted - known.keys())
        ]
        if missing and not conf.topic_allow_declare:
            raise NotFound(
                f"there is no topic {missing[0].name}", where=str(log.path), way_out="create the topic first"
            )
        if missing:
            await self._off_loop(lambda: log.ensure_topics(missing))
        self._wanted_topics = wanted
        self._group_changed.set()

    @Service.task  # type: ignore[untyped-decorator]
    async def _follow_group(self) -> None:
        self._group_task = asyncio.current_task()
        while not self.should_stop:
            await self.wait(self._group_changed.wait())
            self._group_changed.clear()
            if self._lease is not None and self._lease.failure is not None:
                raise self._lease.failure
            membership = self._membership
            if not self.should_stop and membership is not None:
                await self._rebalance(membership)

    async def _rebalance(self, membership: Membership) -> None:
        """Take up the group's generation, if it is not the one this worker has."""
        view: GroupView | None = None
        if self._lease is not None:
            view = await self._off_loop(membership.view)
            same_topics = self._joined_topics == self._wanted_topics
            if view is not None and view.generation == self._lease.generation and same_topics:
                return
        await self._rebalance_ended()
        # What was acked is committed first, so that whoever takes over repeats as little as possible.
        await self.commit()
        self.app.on_rebalance_start()
        await self.on_partitions_revoked(set(self._assignment))
        self._assignment = frozenset()
        self._positions.clear()
        view = await self._all_synced(membership, view)
        assert self._lease is not None
        self._lease.generation = view.generation
        self._assignment = frozenset(TP(topic, number) for topic, number in view.assignment)
        self.app.consumer_generation_id = view.generation
        await self.on_partitions_assigned(set(self._assignment), view.generation)

    async def _all_synced(self, membership: Membership, view: GroupView | None) -> GroupView:
        """Return the first generation that every live member has made room for, joining if need be."""
        synced: int | None = None
        while True:
            if view is None or self._joined_topics != self._wanted_topics:
                topics = self._wanted_topics
                await self._off_loop(partial(membership.join, topics))
                self._joined_topics = topics
                if self._lease is None:
                    self._lease = LeaseKeeper(
                        membership,
                        renew_s=self.app.conf.broker_heartbeat_interval,
                        on_change=self._on_group_changed,
                    )
                    self._lease.start()
            elif view.ready:
                return view
            elif view.generation != synced:
                synced = view.generation
                await self._off_loop(partial(membership.sync, synced))
            else:
                await asyncio.sleep(_SYNC_POLL_S)
            view = await self._off_loop(membership.view)

    async def _rebalance_ended(self) -> None:
        """Wait until Faust finished the last rebalance: stores that it opens must be whole to be closed."""
        deadline_s = self.loop.time() + self.app.conf.broker_rebalance_timeout
        # Faust only has a flag for this, no event.
        while self.app.rebalancing and not self.should_stop and self.loop.time() < deadline_s:
            await asyncio.sleep(_SYNC_POLL_S)

    def assignment(self) -> set[TP]:
        """Return the partitions that this worker reads."""
        return set(self._assignment)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        membership = self._membership
        if membership is None:
            return False
        mine = {tuple(tp): offset for tp, offset in offsets.items() if tp in self._assignment}
        return await self._off_loop(lambda: membership.commit(mine))

    def _on_log_changed(self) -> None:
        with suppress(RuntimeError):  # the loop ended before the listener was removed
            self.loop.call_soon_threadsafe(self._wake.set)

    def _on_group_changed(self) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._group_changed.set)

    def _open_log(self) -> SqliteLog:
        assert self._log is not None, "the consumer is not started"
        return self._log

    async def _off_loop(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
