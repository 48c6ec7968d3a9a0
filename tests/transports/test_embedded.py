"""The embedded log under Faust: real workers in processes of their own, one log between them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from faust.types import TP

from pipeline.errors import BrokerUrlError
from topology.transports.base import StoredOffsets
from topology.transports.embedded import Transport
from topology.transports.embedded_producer import partition_of
from topology.transports.sqlite_log import SqliteLog

from .conftest import Process, wait_until

Start = Callable[..., Process]


def fill(log: SqliteLog, count: int, topic: str = "a", partitions: int = 2) -> None:
    """Append ``count`` numbered records to each partition."""
    for partition in range(partitions):
        log.append(topic, partition, [(b"k", f"{partition}:{number}".encode()) for number in range(count)])


def arrived(*workers: Process) -> list[tuple[int, int]]:
    """Return (partition, offset) of what came through the second agent, in order of printing per worker."""
    return [(f["partition"], f["arrived"]) for worker in workers for f in worker.all("arrived")]


def owns(worker: Process, *partitions: int) -> bool:
    """Say whether these, of both topics, are what the worker was last assigned."""
    return worker.last("owned") == sorted([topic, number] for topic in "ab" for number in partitions)


def copied(*workers: Process) -> set[tuple[int, int]]:
    """Return (partition, offset) of what the first agent has handled, on any worker.

    Where partitions move, records that were not committed yet are handled again by the next worker, as on Kafka.
    """
    return {(f["partition"], f["copied"]) for worker in workers for f in worker.all("copied")}


def every(count: int) -> set[tuple[int, int]]:
    """Return (partition, offset) of the first ``count`` records of both partitions."""
    return {(partition, number) for partition in range(2) for number in range(count)}


class TestOneWorker:
    @pytest.mark.parametrize("poll", [6, 500])
    def test_backlog_with_full_buffers(self, log: SqliteLog, worker: Start, poll: int) -> None:
        """A backlog far larger than the buffers, on two topics at once, flows to its end at any poll size.

        The first agent waits for its own sends, so a loop that waits on one full queue would wait for good.
        """
        fill(log, 500)
        fill(log, 500, "b")
        settings = {"stream_buffer_maxsize": 32, "broker_max_poll_records": poll}
        running = worker(isolated=True, settings=settings)
        wait_until(lambda: len(running.all("arrived")) == 2000, "2000 records")

        assert len(set(arrived(running))) == 2000

    def test_pause(self, log: SqliteLog, worker: Start) -> None:
        """What was fetched when a partition was paused is delivered when it resumes: once, in order."""
        fill(log, 200)
        running = worker(pause_at=20, isolated=True)
        wait_until(lambda: copied(running) == every(200))

        mine = [fact["copied"] for fact in running.all("copied") if fact["partition"] == 1]
        assert mine == list(range(200))

    @pytest.mark.parametrize("back_to", [10, 0])
    def test_seek_back(self, log: SqliteLog, worker: Start, back_to: int) -> None:
        """A seek in the middle of a delivery takes effect: everything from there comes again, in order."""
        fill(log, 200)
        running = worker(seek_at=50, seek_to=back_to, isolated=True)

        def mine() -> list[int]:
            return [fact["copied"] for fact in running.all("copied") if fact["partition"] == 1]

        wait_until(lambda: mine()[-1:] == [199])
        assert mine()[back_to - 200 :] == list(range(back_to, 200))

    def test_full_disk_ends_the_worker(self, log: SqliteLog, worker: Start) -> None:
        """A send that cannot be made durable fails its agent, and with it the worker."""
        fill(log, 1)
        running = worker(file_bytes_max=200_000, value_bytes=300_000)

        assert running.wait() != 0
        assert "DiskFull" in running.errors
        assert not running.all("copied")

    def test_sigterm_while_busy(self, log: SqliteLog, worker: Start) -> None:
        """A worker in the middle of a backlog ends within seconds, and leaves its group."""
        fill(log, 1000)
        running = worker(slow_s=0.2)
        wait_until(lambda: running.all("copied"))
        began_s = time.monotonic()
        code = running.end(signal.SIGTERM)
        ended_s = time.monotonic()

        assert code == 0
        assert ended_s - began_s < 5.0
        assert log._reader.execute("SELECT count(*) FROM member").fetchone() == (0,)


class TestTwoWorkers:
    def test_partitions_move(self, log: SqliteLog, worker: Start) -> None:
        """A second worker takes over its share, a worker that stops gives its share back at once."""
        lease = {"broker_session_timeout": 60.0}
        one = worker(settings=lease)
        wait_until(lambda: owns(one, 0, 1))
        two = worker(settings=lease)
        wait_until(lambda: owns(one, 0) and owns(two, 1))
        fill(log, 50)
        wait_until(lambda: copied(one, two) == every(50))
        assert {partition for partition, _ in copied(one)} == {0}
        assert {partition for partition, _ in copied(two)} == {1}
        assert two.end(signal.SIGTERM) == 0
        wait_until(lambda: owns(one, 0, 1))
        fill(log, 10)

        wait_until(lambda: copied(one, two) == every(60))

    def test_killed_worker_is_replaced(self, log: SqliteLog, worker: Start) -> None:
        """After a kill the other worker takes over when the lease of two seconds is over; nothing is lost."""
        one = worker(isolated=True)
        wait_until(lambda: owns(one, 0, 1))
        two = worker(isolated=True)
        wait_until(lambda: owns(one, 0) and owns(two, 1))
        fill(log, 300)
        wait_until(lambda: len(arrived(two)) > 20)
        two.end(signal.SIGKILL)
        wait_until(lambda: owns(one, 0, 1))
        wait_until(
            lambda: (
                {f["copied"] for f in two.all("copied") + one.all("copied") if f["partition"] == 1} >= set(range(300))
            )
        )
        end = log.bounds("b", 1)[1]

        wait_until(lambda: {o for p, o in arrived(one, two) if p == 1} == set(range(end)))

    def test_replaced_instance_ends(self, log: SqliteLog, worker: Start) -> None:
        """Two workers under one instance id: the older one is fenced and ends."""
        one = worker(instance="me")
        wait_until(lambda: owns(one, 0, 1))
        two = worker(instance="me")
        wait_until(lambda: owns(two, 0, 1))

        assert one.wait() != 0
        assert "Fenced" in one.errors

    def test_instance_takes_over_at_once(self, log: SqliteLog, worker: Start) -> None:
        """A restart under the same instance id does not wait for the lease of a minute, nor disturb the other."""
        lease = {"broker_session_timeout": 60.0}
        one = worker(instance="one", settings=lease)
        two = worker(instance="two", settings=lease)
        wait_until(lambda: sorted([owns(one, 0), owns(two, 1)]) == [True, True] or (owns(one, 1) and owns(two, 0)))
        owned = two.last("owned")
        generation = one.last("generation")
        two.end(signal.SIGKILL)
        again = worker(instance="two", settings=lease)
        wait_until(lambda: again.last("owned") == owned)

        assert again.last("generation") == generation
        assert one.last("generation") == generation


class TestStoredOffsets:
    class Driver:
        """What the mixin needs of any driver's consumer, Kafka's included."""

        def __init__(self, app: Any, committed: Mapping[TP, int | None]) -> None:
            self.app = app
            self.committed = committed
            self.sought: dict[TP, int] = {}
            self.seeks = 0

        def assignment(self) -> set[TP]:
            return set(self.committed)

        async def seek_to_committed(self) -> Mapping[TP, int | None]:
            return self.committed

        async def earliest_offsets(self, *tps: TP) -> Mapping[TP, int]:
            return dict.fromkeys(tps, 3)

        async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
            self.sought |= partitions

        async def perform_seek(self) -> None:
            self.seeks += 1
            await self.seek_to_committed()

        async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:  # noqa: ASYNC109
            await self.perform_seek()
            yield TP("a", 0), "message"

    class Consumer(StoredOffsets, Driver):
        pass

    class App:
        stored_offsets: Any = None

    async def test_where_each_goes(self) -> None:
        """Stored offset, else committed, else first."""
        app = self.App()
        committed = {TP("a", 0): 9, TP("b", 0): 8, TP("c", 0): None, TP("d", 0): -1}
        consumer = self.Consumer(app, committed)

        async def stored_offsets(assignment: set[TP]) -> dict[TP, int]:
            assert assignment == set(committed)
            return {TP("a", 0): 5, TP("elsewhere", 0): 1}

        app.stored_offsets = stored_offsets
        offsets = await consumer.seek_to_committed()

        assert offsets == {TP("a", 0): 5, TP("b", 0): 8, TP("c", 0): 3, TP("d", 0): 3}
        assert consumer.sought == offsets

    async def test_without_stores(self) -> None:
        """Without the attribute, the group's offsets count, and the first one where there is none."""
        consumer = self.Consumer(self.App(), {TP("a", 0): 9, TP("b", 0): None})

        assert await consumer.seek_to_committed() == {TP("a", 0): 9, TP("b", 0): 3}
        assert consumer.sought == {TP("a", 0): 9, TP("b", 0): 3}

    async def test_fetch_loop_does_not_seek(self) -> None:
        """The seek of a fetch loop that was stopped is left out, one from elsewhere is made."""
        consumer = self.Consumer(self.App(), {TP("a", 0): 9})
        assert [item async for item in consumer.getmany(1.0)] == [(TP("a", 0), "message")]
        assert consumer.seeks == 0
        await asyncio.create_task(consumer.perform_seek())

        assert consumer.seeks == 1


class TestTransport:
    def test_entry_point(self) -> None:
        """Faust finds the transport by its URL."""
        from faust.transport.drivers import by_url  # noqa: PLC0415

        assert by_url("embedded:///l.sqlite") is Transport

    def test_urls(self) -> None:
        """One file, absolute."""
        assert Transport(["embedded:///x/l.sqlite"], None).path == Path("/x/l.sqlite")
        for urls in (["embedded:///x", "embedded:///y"], ["embedded://x"]):
            with pytest.raises(BrokerUrlError):
                Transport(urls, None)

    def test_keys_go_where_kafka_puts_them(self) -> None:
        """The partition of a key is that of Kafka's own clients (murmur2)."""
        assert [partition_of(key, 8) for key in (b"21", b"foobar", b"a-little-bit-long-string")] == [
            (-973932308 & 0x7FFFFFFF) % 8,
            (-790332482 & 0x7FFFFFFF) % 8,
            (-985981536 & 0x7FFFFFFF) % 8,
        ]
