"""Workers under Faust as real processes: what holds on every broker, the embedded log and Kafka."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kafka.fixtures import Place
from topology.transports.base import TopicSpec
from topology.transports.factory import faust_urls

from .conftest import Process, wait_until
from .log import Log
from .test_embedded import arrived, copied, every

Start = Callable[..., Process]
SESSION_TIMEOUT_S = 6.0
"""The least that Kafka allows in its default settings."""


@pytest.fixture
def log(place: Place) -> Iterator[Log]:
    """A log with the topics a and b of two partitions each."""
    log = Log(place)
    log.ensure_topics([TopicSpec(name="a", partitions=2), TopicSpec(name="b", partitions=2)])
    yield log
    log.close()


@pytest.fixture
def worker(start: Start, place: Place, tmp_path: Path) -> Start:
    """Start a Faust worker over the log; options are those of ``faust_worker.py``."""

    def worker(**options: Any) -> Process:
        where = {"broker": ";".join(faust_urls(place.url)), "prefix": place.prefix, "datadir": str(tmp_path / "faust")}
        options["settings"] = {"broker_session_timeout": SESSION_TIMEOUT_S} | options.get("settings", {})
        return start("faust_worker.py", json.dumps(where | {"id": f"{place.prefix}worker"} | options))

    return worker


def fill(log: Log, count: int, topic: str = "a") -> None:
    """Append ``count`` numbered records to each partition."""
    for partition in range(2):
        log.append(topic, partition, [(b"k", f"{partition}:{number}".encode()) for number in range(count)])


class TestOneWorker:
    @pytest.mark.parametrize("isolated", [False, True])
    def test_chain(self, log: Log, worker: Start, isolated: bool) -> None:
        """Everything goes through both agents once, in order per partition; later records as well."""
        fill(log, 100)
        running = worker(isolated=isolated)
        wait_until(lambda: len(arrived(running)) == 200)
        fill(log, 50)
        wait_until(lambda: len(arrived(running)) >= 300)
        assert running.end(signal.SIGTERM) == 0
        values = {p: [f["value"] for f in running.all("arrived") if f["partition"] == p] for p in range(2)}

        for partition in range(2):
            numbers = [*range(100), *range(50)]
            assert values[partition] == [f"{partition}:{number}" for number in numbers]

    def test_restart_goes_on_from_committed(self, log: Log, worker: Start) -> None:
        """Without stores a restart reads from what the group committed, not from the beginning."""
        fill(log, 100)
        running = worker()
        wait_until(lambda: len(arrived(running)) == 200)
        running.end(signal.SIGTERM)
        fill(log, 1)
        again = worker()
        wait_until(lambda: len(again.all("copied")) >= 2)
        again.end()

        assert {fact["copied"] for fact in again.all("copied")} == {100}

    def test_restart_reads_from_stored_offsets(self, log: Log, worker: Start) -> None:
        """The stores' offsets count, not the group's; a topic without a store goes on from the group's."""
        fill(log, 100)
        running = worker()
        wait_until(lambda: len(arrived(running)) == 200)
        running.end(signal.SIGTERM)
        again = worker(stored_offsets={"a": 40})
        wait_until(lambda: len(again.all("copied")) == 120 and len(arrived(again)) == 120)
        again.end()

        assert again.last("asked") == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
        for partition in range(2):
            mine = [fact["copied"] for fact in again.all("copied") if fact["partition"] == partition]
            assert mine == list(range(40, 100))
        assert min(offset for _, offset in arrived(again)) == 100

    def test_failing_hook_ends_the_worker(self, log: Log, worker: Start) -> None:
        """A worker whose stores cannot be opened does not go on without them."""
        running = worker(stored_offsets={"a": 0}, hook_fails=True)

        assert running.wait() != 0
        assert "the store cannot be opened" in running.errors

    def test_stored_offset_out_of_range(self, log: Log, worker: Start) -> None:
        """An offset that the log no longer holds ends the worker; it is never reset in silence."""
        fill(log, 10)
        log.delete_records("a", 0, 5)
        running = worker(stored_offsets={"a": 2, "b": 0})

        assert running.wait() != 0
        assert "OffsetOutOfRange" in running.errors

    def test_backlog_with_full_buffers(self, log: Log, worker: Start) -> None:
        """2,000 small records on two topics, far more than the buffers hold, flow to their end.

        The first agent waits for its own sends, so a loop that waits on one full queue would wait for good.
        """
        fill(log, 500)
        fill(log, 500, "b")
        running = worker(isolated=True, settings={"stream_buffer_maxsize": 32, "broker_max_poll_records": 6})
        wait_until(lambda: len(running.all("arrived")) == 2000, "2000 records")

        assert len(set(arrived(running))) == 2000

    def test_stored_offset_above_the_end(self, log: Log, worker: Start) -> None:
        """An offset that the log does not hold yet ends the worker as well."""
        fill(log, 10)
        running = worker(stored_offsets={"a": 11, "b": 0})

        assert running.wait() != 0
        assert "OffsetOutOfRange" in running.errors

    def test_sigterm_while_busy(self, log: Log, worker: Start) -> None:
        """A worker in the middle of a backlog ends within seconds."""
        fill(log, 1000)
        running = worker(slow_s=0.2)
        wait_until(lambda: running.all("copied"))
        began_s = time.monotonic()
        code = running.end(signal.SIGTERM)

        assert code == 0
        assert time.monotonic() - began_s < 5.0


class TestTwoWorkers:
    def test_killed_worker_is_replaced(self, log: Log, worker: Start) -> None:
        """After a kill the other worker takes over when the session is over; nothing is lost."""
        one, two = worker(isolated=True), worker(isolated=True)
        wait_until(lambda: all(running.last("owned") and len(running.last("owned")) == 2 for running in (one, two)))
        fill(log, 300)
        wait_until(lambda: len(arrived(two)) > 20)
        two.end(signal.SIGKILL)
        wait_until(lambda: len(one.last("owned")) == 4)
        wait_until(lambda: copied(one, two) == every(300))
        ends = [log.bounds("b", partition)[1] for partition in range(2)]

        wait_until(lambda: set(arrived(one, two)) == {(p, offset) for p in range(2) for offset in range(ends[p])})

    def test_killed_instance_is_back_at_once(self, log: Log, worker: Start) -> None:
        """A restart under the same instance id does not wait for the session of a minute."""
        session = {"broker_session_timeout": 60.0}
        one = worker(instance="one", settings=session)
        wait_until(lambda: one.last("owned") and len(one.last("owned")) == 4)
        fill(log, 50)
        wait_until(lambda: len(arrived(one)) >= 100)
        one.end(signal.SIGKILL)
        began_s = time.monotonic()
        again = worker(instance="one", settings=session)
        wait_until(lambda: again.last("owned") and len(again.last("owned")) == 4)
        fill(log, 1)
        wait_until(lambda: {(0, 50), (1, 50)} <= copied(again))

        assert time.monotonic() - began_s < 15.0
