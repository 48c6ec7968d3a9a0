"""The embedded log: order, durability, the errors it names, and groups."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import (
    BrokerUrlError,
    DiskFull,
    Fenced,
    Locked,
    LogCorrupt,
    NotFound,
    OffsetOutOfRange,
    SettingsConflict,
    Unsupported,
    UsageError,
)
from topology.transports.base import RECORD_BYTES_MAX, Broker, Record, TopicSpec, log_path
from topology.transports.factory import open_broker
from topology.transports.sqlite_group import GroupView, Membership, assign
from topology.transports.sqlite_log import SqliteLog

from .conftest import ROOT, Process, wait_until

ALL = 1 << 30


def values(log: SqliteLog, topic: str = "a", partition: int = 0) -> list[bytes]:
    """Return all values, having checked that the offsets are exactly the bounds."""
    first, end = log.bounds(topic, partition)
    records = log.read(topic, partition, first, bytes_max=ALL)
    assert [record.offset for record in records] == list(range(first, end))
    return [record.value for record in records]


class TestRecords:
    def test_round_trip(self, path: Path) -> None:
        """Keys, absent keys, empty values and times come back as they were, across a close."""
        log = SqliteLog(path, now_ms=lambda: 1234)
        log.ensure_topics([TopicSpec(name="t", partitions=1)])
        offsets = log.append("t", 0, [(b"k", b"v"), (None, b""), (b"", b"\0" * 300_000)])
        log.close()
        again = SqliteLog(path)
        records = again.read("t", 0, 0, bytes_max=ALL)
        again.close()

        assert offsets == [0, 1, 2]
        assert records == [
            Record("t", 0, 0, b"k", b"v", 1234),
            Record("t", 0, 1, None, b"", 1234),
            Record("t", 0, 2, b"", b"\0" * 300_000, 1234),
        ]

    def test_partitions_are_apart(self, log: SqliteLog) -> None:
        """Each partition of each topic counts by itself."""
        for number in range(3):
            for topic in "ab":
                for partition in range(2):
                    assert log.append(topic, partition, [(None, f"{topic}{partition}".encode())]) == [number]

        assert values(log, "b", 1) == [b"b1"] * 3

    def test_threads_share_commits_and_keep_their_order(self, log: SqliteLog) -> None:
        """Every thread's own records stand in its order, without a hole."""

        def append(name: str) -> None:
            futures = [log.submit("a", 0, [(None, f"{name}:{number}".encode())]) for number in range(200)]
            assert [future.result() for future in futures] == sorted(future.result() for future in futures)

        threads = [threading.Thread(target=append, args=(name,)) for name in "wxyz"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = values(log)

        assert len(found) == 800
        for name in "wxyz":
            mine = [value for value in found if value.startswith(name.encode())]
            assert mine == [f"{name}:{number}".encode() for number in range(200)]

    def test_bytes_max_and_records_max(self, log: SqliteLog) -> None:
        """A read stops at its bounds, but gives at least one record."""
        log.append("a", 0, [(None, b"x" * 100)] * 10)

        assert len(log.read("a", 0, 0, bytes_max=250)) == 3
        assert len(log.read("a", 0, 0, bytes_max=1)) == 1
        assert len(log.read("a", 0, 4, bytes_max=ALL, records_max=2)) == 2
        assert log.read("a", 0, 10, bytes_max=ALL) == []

    def test_out_of_range(self, log: SqliteLog) -> None:
        """Below the first offset and above the end is an error, not an empty answer."""
        log.append("a", 0, [(None, b"x")] * 5)
        log.delete_records("a", 0, 2)

        for offset in (0, 1, 6):
            with pytest.raises(OffsetOutOfRange, match=rf"\[2, 5\), not {offset}"):
                log.read("a", 0, offset, bytes_max=ALL)

    def test_unknown_topic_or_partition(self, log: SqliteLog) -> None:
        """It is named, and other appends of the same commit go through."""
        good = log.submit("a", 0, [(None, b"x")])
        bad = log.submit("nowhere", 0, [(None, b"x")])

        assert good.result() == [0]
        with pytest.raises(NotFound, match=r"nowhere\[0\]"):
            bad.result()
        with pytest.raises(NotFound, match=r"a\[2\]"):
            log.bounds("a", 2)

    def test_too_large(self, log: SqliteLog) -> None:
        """A record of the largest size fits; one more byte is refused."""
        log.append("a", 0, [(b"k", b"x" * (RECORD_BYTES_MAX - 1))])

        with pytest.raises(UsageError, match="chunks"):
            log.append("a", 0, [(b"k", b"x" * RECORD_BYTES_MAX)])

    def test_missing_record_is_corruption(self, log: SqliteLog, path: Path) -> None:
        """A hole inside the bounds is never passed over."""
        log.append("a", 0, [(None, b"x")] * 5)
        with sqlite3.connect(path) as other:
            other.execute("DELETE FROM record WHERE id % 1024 = 3")
        other.close()

        with pytest.raises(LogCorrupt, match="offset 3"):
            log.read("a", 0, 0, bytes_max=ALL)


class TestDeleteRecords:
    def test_offsets_are_not_reused(self, log: SqliteLog, path: Path) -> None:
        """After everything was deleted, and after a close, offsets go on."""
        log.append("a", 0, [(None, b"x")] * 600)
        log.delete_records("a", 0, 600)
        assert log.bounds("a", 0) == (600, 600)
        other = SqliteLog(path)

        assert other.append("a", 0, [(None, b"y")]) == [600]
        assert values(other) == [b"y"]
        other.close()

    def test_only_below(self, log: SqliteLog) -> None:
        """It deletes what it says, of one partition; below the first offset there is nothing to do."""
        log.append("a", 0, [(None, b"%d" % number) for number in range(10)])
        log.append("a", 1, [(None, b"x")])
        log.delete_records("a", 0, 7)
        log.delete_records("a", 0, 3)

        assert values(log) == [b"7", b"8", b"9"]
        assert values(log, "a", 1) == [b"x"]
        with pytest.raises(OffsetOutOfRange):
            log.delete_records("a", 0, 11)


class TestTopics:
    def test_idempotent(self, log: SqliteLog) -> None:
        """Ensuring what is there changes nothing; another number of partitions is refused whole."""
        log.ensure_topics([TopicSpec(name="a", partitions=2), TopicSpec(name="c", partitions=3)])
        assert log.topics() == {"a": 2, "b": 2, "c": 3}

        with pytest.raises(SettingsConflict, match="2 partitions, not 4"):
            log.ensure_topics([TopicSpec(name="d", partitions=1), TopicSpec(name="a", partitions=4)])
        assert "d" not in log.topics()

    def test_impossible(self) -> None:
        """A topic has a name and a partition."""
        with pytest.raises(UsageError):
            TopicSpec(name="a", partitions=0)


class TestProcesses:
    def test_appending_at_once(self, log: SqliteLog, path: Path, start: Callable[..., Process]) -> None:
        """Several processes append at once; every record is there once, each process's in its order."""
        names = ("p", "q", "r")
        for process in [start("appender.py", str(path), name, "1500") for name in names]:
            assert process.wait() == 0
        found = [value.decode() for value in values(log)]

        assert len(found) == 4500
        for name in names:
            mine = [value for value in found if value.startswith(name + ":")]
            assert mine == [f"{name}:{number}" * (1 + number % 50) for number in range(1500)]

    def test_killed_appender(self, log: SqliteLog, path: Path, start: Callable[..., Process]) -> None:
        """Whenever an appender is killed, what it acknowledged is there and nothing is missing in between."""
        acknowledged: dict[int, str] = {}
        for round_ in range(8):
            process = start("appender.py", str(path), f"round{round_}", "1000000")
            wait_until(lambda process=process, least=20 + 170 * round_: len(process.facts) > least)
            process.end()
            for fact in process.facts:
                assert fact["offset"] not in acknowledged
                acknowledged[fact["offset"]] = fact["value"]
            found = values(log)
            for offset, value in acknowledged.items():
                assert found[offset].startswith(value.encode())

    def test_listener_hears_other_processes(self, log: SqliteLog, path: Path, start: Callable[..., Process]) -> None:
        """A commit of another process wakes the listeners of this one."""
        heard = threading.Event()
        log.add_listener(heard.set)
        start("appender.py", str(path), "p", "1").wait()

        assert heard.wait(30.0)


class TestErrors:
    def test_locked(self, path: Path) -> None:
        """A lock held by somebody else for longer than the timeout is named, and passes."""
        log = SqliteLog(path, busy_timeout_s=0.05)
        log.ensure_topics([TopicSpec(name="a", partitions=1)])
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(Locked, match=r"log\.sqlite"):
            log.append("a", 0, [(None, b"x")])
        other.execute("ROLLBACK")
        other.close()
        assert log.append("a", 0, [(None, b"x")]) == [0]
        log.close()

    @pytest.mark.parametrize("content", [b"not a database" * 1000, b"SQLite format 3\0" + b"\xff" * 9000])
    def test_garbage(self, path: Path, content: bytes) -> None:
        """A file that is no database is named and not touched."""
        path.write_bytes(content)

        with pytest.raises(LogCorrupt, match=r"log\.sqlite"):
            SqliteLog(path)
        assert path.read_bytes() == content

    def test_damaged(self, log: SqliteLog, path: Path, tmp_path: Path) -> None:
        """Damage inside is found when it is read."""
        log.append("a", 0, [(None, b"x" * 1000)] * 500)
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.close()
        copy = tmp_path / "copy.sqlite"
        content = bytearray(path.read_bytes())
        content[8 * 8192 :] = b"\xa5" * len(content[8 * 8192 :])
        copy.write_bytes(content)
        damaged = SqliteLog(copy)

        with pytest.raises(LogCorrupt, match=r"copy\.sqlite"):
            damaged.read("a", 0, 0, bytes_max=ALL)
        damaged.close()

    def test_another_database(self, path: Path) -> None:
        """A database of something else is refused before it is written to."""
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE theirs (x)")
        other.close()

        with pytest.raises(LogCorrupt, match="not an embedded log"):
            SqliteLog(path)

    def test_newer_version(self, log: SqliteLog, path: Path) -> None:
        """A log of a newer build is refused."""
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()

        with pytest.raises(Unsupported, match="version 99"):
            SqliteLog(path)

    def test_no_directory(self, tmp_path: Path) -> None:
        """A missing directory is named with the way out."""
        with pytest.raises(DiskFull, match="create its directory"):
            SqliteLog(tmp_path / "nowhere" / "log.sqlite")

    def test_full_disk(self, log: SqliteLog, path: Path) -> None:
        """A file that may not grow is named; nothing of the append is there; what was there can be read."""
        log.append("a", 0, [(None, b"kept")])
        script = (
            "import resource, sys; from pathlib import Path;"
            "from topology.transports.sqlite_log import SqliteLog;"
            "from pipeline.errors import DiskFull;"
            "log = SqliteLog(Path(sys.argv[1]));"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
            "try:\n    log.append('a', 0, [(None, b'x' * 300_000)] * 3)\n"
            "except DiskFull as error:\n    print(error)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )

        assert "log.sqlite" in ended.stdout, ended.stderr
        assert "make" in ended.stdout or "check the disk" in ended.stdout
        assert values(log) == [b"kept"]

    def test_page_limit(self, log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full database fails the append and takes the next one that fits."""
        monkeypatch.setattr("topology.transports.sqlite_writer.trim_wal", lambda *_: None)
        connection = log._writer._connection
        connection.execute("PRAGMA max_page_count = 40")
        with pytest.raises(DiskFull, match="full"):
            log.append("a", 0, [(None, b"x" * 1_000_000)])

        assert log.append("a", 0, [(None, b"small")]) == [0]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_read_only(self, log: SqliteLog, path: Path) -> None:
        """A file that this user may not write is named with the way out."""
        log.append("a", 0, [(None, b"x")])
        log.close()
        script = (
            "import os, sys; from pathlib import Path;"
            "from topology.transports.sqlite_log import SqliteLog;"
            "from pipeline.errors import DiskFull;"
            "os.chdir(Path(sys.argv[1]).parent); os.chroot('.'); os.setuid(65534)\n"
            "try:\n    SqliteLog(Path('/log.sqlite')).append('a', 0, [(None, b'x')])\n"
            "except DiskFull as error:\n    print(error)"
        )
        path.chmod(0o444)
        path.parent.chmod(0o755)
        ended = subprocess.run(
            [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        log._users = 1  # the fixture closes it again

        assert "log.sqlite" in ended.stdout, ended.stderr
        assert "writable" in ended.stdout

    def test_io_error_stops_the_writer(self, log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an I/O error in a commit nothing more is written until the log is opened again."""
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

        def fail(*_: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("topology.transports.sqlite_writer.write_transaction", fail)
            with pytest.raises(DiskFull):
                log.append("a", 0, [(None, b"x")])

        with pytest.raises(DiskFull):
            log.append("a", 0, [(None, b"x")])


class TestGroups:
    @pytest.fixture
    def clock(self) -> list[int]:
        return [1_000_000]

    @pytest.fixture
    def join(self, path: Path, clock: list[int]) -> Callable[..., Membership]:
        log = SqliteLog(path, now_ms=lambda: clock[0])
        log.ensure_topics([TopicSpec(name="a", partitions=3), TopicSpec(name="b", partitions=3)])

        def join(instance: str | None = None) -> Membership:
            member = Membership(log, group="g", instance=instance, lease_ms=1000)
            member.join(frozenset({"a", "b"}))
            return member

        return join

    def view(self, member: Membership) -> GroupView:
        view = member.view()
        assert view is not None
        return view

    def test_assignment(self) -> None:
        """Partition i of every topic goes to one member; members that do not read a topic get none of it."""
        both = frozenset({"a", "b"})
        assigned = assign([("x", both), ("y", both), ("z", frozenset({"c"}))], {"a": 3, "b": 2, "d": 1})

        assert assigned == {
            "x": {("a", 0), ("a", 2), ("b", 0)},
            "y": {("a", 1), ("b", 1)},
            "z": frozenset(),
        }

    def test_nobody_starts_before_everybody_stopped(self, join: Callable[..., Membership]) -> None:
        """A member that joins waits until the one before has given up what it had."""
        first = join()
        assert self.view(first) == (1, True, {(t, n) for t in "ab" for n in range(3)})
        second = join()
        assert not self.view(second).ready
        first.sync(self.view(first).generation)

        assert self.view(first) == (2, True, {("a", 0), ("a", 2), ("b", 0), ("b", 2)})
        assert self.view(second) == (2, True, {("a", 1), ("b", 1)})

    def test_leave(self, join: Callable[..., Membership]) -> None:
        """Who leaves is not waited for."""
        first, second = join(), join()
        second.leave()
        first.sync(3)

        assert self.view(first) == (3, True, {(t, n) for t in "ab" for n in range(3)})
        assert second.view() is None
        assert not second.commit({("a", 1): 5})

    def test_lease(self, join: Callable[..., Membership], clock: list[int]) -> None:
        """A member that does not renew is removed, is told so, and can come back."""
        first, second = join(), join()
        clock[0] += 900
        assert first.renew()
        clock[0] += 900
        assert first.renew()
        assert not second.renew()
        assert self.view(first).generation == 3
        second.join(frozenset({"a", "b"}))

        assert self.view(second).generation == 4

    def test_lease_from_the_future(self, join: Callable[..., Membership], clock: list[int]) -> None:
        """A clock that was set back does not keep the dead alive."""
        first, second = join(), join()
        clock[0] -= 3_600_000
        assert first.renew()

        assert second.view() is None

    def test_same_instance(self, join: Callable[..., Membership]) -> None:
        """A restart takes over at once, in the same generation; the process it replaced is fenced."""
        old = join("me")
        view = self.view(old)
        new = join("me")

        assert self.view(new) == view
        with pytest.raises(Fenced, match="instance me"):
            old.renew()
        old.leave()
        assert new.commit({("a", 0): 7})
        assert new.committed() == {("a", 0): 7}


class TestBroker:
    async def test_calls(self, path: Path) -> None:
        """A broker does what the protocol says, from many tasks at once."""
        broker: Broker = open_broker(f"embedded://{path}")
        await broker.ensure_topics([TopicSpec(name="t", partitions=1)])
        appended = await asyncio.gather(*[broker.append("t", 0, [(b"k", b"%d" % n)] * 2) for n in range(50)])
        assert sorted(offset for offsets in appended for offset in offsets) == list(range(100))
        await broker.delete_records("t", 0, 98)

        assert await broker.bounds("t", 0) == (98, 100)
        assert [r.offset for r in await broker.read("t", 0, 98, bytes_max=ALL)] == [98, 99]
        with pytest.raises(OffsetOutOfRange):
            await broker.read("t", 0, 97, bytes_max=ALL)
        with pytest.raises(NotFound):
            await broker.bounds("t", 1)
        await broker.close()
        await broker.close()

    def test_shared(self, path: Path) -> None:
        """One process has one log of a file, closed by its last user."""
        one, two = SqliteLog.shared(path), SqliteLog.shared(path)
        assert one is two
        one.close()
        two.ensure_topics([TopicSpec(name="t", partitions=1)])
        two.close()

        three = SqliteLog.shared(path)
        assert three is not one
        assert three.topics() == {"t": 1}
        three.close()

    @pytest.mark.parametrize(
        "url", ["kafka://localhost:9092/x", "embedded://relative/log", "embedded:///", "embedded:///l?x=1", "/l", ""]
    )
    def test_bad_urls(self, url: str) -> None:
        """What this version cannot open is refused with the way out."""
        with pytest.raises(BrokerUrlError, match=r"write (embedded:///absolute|kafka://host:port)"):
            open_broker(url)

    def test_passwords_stay_out_of_errors(self) -> None:
        """Credentials in a URL are not repeated."""
        with pytest.raises(BrokerUrlError) as caught:
            open_broker("kafka://me:secret@host:9092")

        assert "secret" not in str(caught.value)

    def test_log_path(self) -> None:
        """The path is taken as it is written, percent signs decoded."""
        assert log_path("embedded:///var/lib/a%20b/log.sqlite") == Path("/var/lib/a b/log.sqlite")
