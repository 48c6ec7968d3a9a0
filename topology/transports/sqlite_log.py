"""The embedded log: topics, partitions and records in one SQLite file, shared by a machine's processes.

**Appending.** All writes of a process go through one thread (``sqlite_writer``), which commits together what
waits together; a future is resolved only after that commit. See ``sqlite_file`` for what fsync covers. Other
processes take turns by the file's write lock.

**Offsets.** ``partition.end`` is the next offset to hand out and moves in the transaction that writes the
records, so offsets are dense, and as it only grows they are never used twice, even when every record was
deleted.

**Reading.** Every read is one short transaction and so sees whole appends only. Listeners are called after
each commit: by the writing thread for commits of this process, by the watch (``sqlite_watch``) for those of
others.

Deleted records leave free pages that later appends use; the file itself does not shrink.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar, Final

from pipeline.errors import (
    LogCorrupt,
    NotFound,
    OffsetOutOfRange,
    SettingsConflict,
    UsageError,
)
from topology.transports.base import RECORD_BYTES_MAX, Record, TopicSpec
from topology.transports.sqlite_file import (
    OFFSET_BITS,
    connect,
    errors_named,
    read_transaction,
)
from topology.transports.sqlite_watch import Watch
from topology.transports.sqlite_writer import Writer

BUSY_TIMEOUT_S: Final = 10.0  # an append of another process takes milliseconds; this is a process that hangs

_DELETE_SLICE: Final = 256  # records per transaction of delete_records, so that appends get in between
_OFFSET_MASK: Final = (1 << OFFSET_BITS) - 1


def unix_ms() -> int:
    """Return the time now, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class SqliteLog:
    """The log in one file. Methods may be called from any thread, and block it.

    Invariants:

    * For every partition exactly the offsets in ``[first, end)`` have a record.
    * ``first`` and ``end`` never go down.
    """

    _shared: ClassVar[dict[Path, SqliteLog]] = {}
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S, now_ms: Callable[[], int] = unix_ms
    ) -> None:
        """Open the log, creating it if it is not there.

        Raises ``LogCorrupt``, ``Unsupported``, ``Locked`` or ``DiskFull``.
        """
        self.path = path
        self.now_ms = now_ms
        self.busy_timeout_s = busy_timeout_s
        self._users = 1
        self._partition_ids: dict[tuple[str, int], int] = {}  # what the reader has seen committed
        self._listeners: list[Callable[[], None]] = []
        self._watch: Watch | None = None
        self._writer = Writer(path, self._notify, busy_timeout_s=busy_timeout_s)
        self._reader = connect(path, durable=False, busy_timeout_s=busy_timeout_s)
        self._reading = threading.Lock()
        self._writer.start()

    @classmethod
    def shared(cls, path: Path) -> SqliteLog:
        """Return this process's one log of that file, so that all its appends share commits.

        Every call needs its own ``close()``.
        """
        path = path.resolve()
        with cls._shared_lock:
            log = cls._shared.get(path)
            if log is None:
                log = cls._shared[path] = cls(path)
            else:
                log._users += 1
            return log

    def close(self) -> None:
        """Write what was submitted and close the file, when its last user in this process closes it."""
        with self._shared_lock:
            self._users -= 1
            if self._users:
                return
            if self._shared.get(self.path) is self:
                del self._shared[self.path]
        if self._watch is not None:
            self._watch.stop()
        self._writer.stop()
        with self._reading:
            self._reader.close()

    # Topics

    def ensure_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Create the topics that are not there. Raises ``SettingsConflict``, see ``Broker.ensure_topics``."""

        def run(connection: sqlite3.Connection) -> None:
            known = dict(connection.execute("SELECT name, partitions FROM topic"))
            for spec in specs:
                if known.get(spec.name, spec.partitions) != spec.partitions:
                    raise SettingsConflict(
                        f"topic {spec.name} has {known[spec.name]} partitions, not {spec.partitions}",
                        where=str(self.path),
                        way_out="a topic keeps its partitions; name another topic or a new log",
                    )
            for spec in {spec.name: spec for spec in specs if spec.name not in known}.values():
                cursor = connection.execute(
                    "INSERT INTO topic (name, partitions) VALUES (?, ?)", (spec.name, spec.partitions)
                )
                connection.executemany(
                    "INSERT INTO partition (topic_id, number) VALUES (?, ?)",
                    [(cursor.lastrowid, number) for number in range(spec.partitions)],
                )

        self._writer.submit(run, 0).result()

    def topics(self) -> dict[str, int]:
        """Return every topic's number of partitions."""
        with self._reading, errors_named(self.path):
            return dict(self._reader.execute("SELECT name, partitions FROM topic ORDER BY name"))

    # Records

    def submit(
        self,
        topic: str,
        partition: int,
        records: Sequence[tuple[bytes | None, bytes]],
        *,
        timestamp_ms: int | None = None,
    ) -> Future[list[int]]:
        """Queue records for the next commit; the future gives their offsets when they are durable.

        Submits of one thread to one partition keep their order. The future raises what ``Broker.append``
        raises.
        """
        bytes_total = 0
        for key, value in records:
            size = len(key or b"") + len(value)
            if size > RECORD_BYTES_MAX:
                raise UsageError(
                    f"a record of {size} bytes for {topic}[{partition}] is larger than {RECORD_BYTES_MAX}",
                    way_out="send it in chunks",
                )
            bytes_total += size
        written_ms = self.now_ms() if timestamp_ms is None else timestamp_ms

        def run(connection: sqlite3.Connection) -> list[int]:
            partition_id = self._partition_id(connection, topic, partition)
            (end,) = connection.execute(
                "UPDATE partition SET end = end + ? WHERE id = ? RETURNING end", (len(records), partition_id)
            ).fetchone()
            offsets = list(range(end - len(records), end))
            base = partition_id << OFFSET_BITS
            connection.executemany(
                "INSERT INTO record (id, timestamp_ms, key, value) VALUES (?, ?, ?, ?)",
                [
                    (base | offset, written_ms, key, value)
                    for offset, (key, value) in zip(offsets, records, strict=True)
                ],
            )
            return offsets

        return self._writer.submit(run, bytes_total)

    def append(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, bytes]]) -> list[int]:
        """Append records and return their offsets once they are durable; see ``Broker.append``."""
        return self.submit(topic, partition, records).result()

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """Return ``(first, end)``, half-open. Raises ``NotFound``."""
        with self._reading, errors_named(self.path):
            _, first, end = self._partition_row(topic, partition)
        return first, end

    def read(
        self, topic: str, partition: int, offset: int, *, bytes_max: int, records_max: int = 100_000
    ) -> list[Record]:
        """Return records from ``offset`` on; see ``Broker.read``. ``records_max`` bounds their number too.

        Raises ``LogCorrupt`` if the file misses a record that it should hold.
        """
        records: list[Record] = []
        bytes_left = bytes_max
        with self._reading, errors_named(self.path), read_transaction(self._reader):
            partition_id, first, end = self._partition_row(topic, partition)
            if not first <= offset <= end:
                raise OffsetOutOfRange(
                    f"{topic}[{partition}] holds offsets [{first}, {end}), not {offset}",
                    where=str(self.path),
                    way_out="start again from an offset inside, or restore",
                )
            base = partition_id << OFFSET_BITS
            stop = min(end, offset + records_max)
            rows = self._reader.execute(
                "SELECT id, timestamp_ms, key, value FROM record WHERE id >= ? AND id < ? ORDER BY id",
                (base | offset, base + stop),
            )
            for row_id, timestamp_ms, key, value in rows:
                if row_id != base | offset + len(records):
                    break
                records.append(Record(topic, partition, row_id & _OFFSET_MASK, key, value, timestamp_ms))
                bytes_left -= len(key or b"") + len(value)
                if bytes_left <= 0:
                    stop = offset + len(records)
                    break
        if offset + len(records) != stop:
            raise LogCorrupt(
                f"{topic}[{partition}] misses the record at offset {offset + len(records)}",
                where=str(self.path),
                way_out="keep the file; replicas restore from the archive into a new log",
            )
        return records

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """Delete records below ``before_offset``, oldest first, in slices; see ``Broker.delete_records``.

        What a crash interrupts is finished by the next call.
        """

        def run(connection: sqlite3.Connection) -> bool:
            partition_id = self._partition_id(connection, topic, partition)
            first, end = connection.execute("SELECT first, end FROM partition WHERE id = ?", (partition_id,)).fetchone()
            if before_offset > end:
                raise OffsetOutOfRange(
                    f"{topic}[{partition}] ends at {end}; nothing can be deleted up to {before_offset}",
                    where=str(self.path),
                    way_out="name an offset up to the end",
                )
            stop = min(before_offset, first + _DELETE_SLICE)
            if stop > first:
                base = partition_id << OFFSET_BITS
                connection.execute("UPDATE partition SET first = ? WHERE id = ?", (stop, partition_id))
                connection.execute("DELETE FROM record WHERE id >= ? AND id < ?", (base | first, base + stop))
            return bool(stop < before_offset)

        while self._writer.submit(run, 0).result():
            pass

    # Listeners

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` soon after every commit of any process, from a thread of this log.

        It must return at once, and may be called when nothing changed.
        """
        with self._shared_lock:
            self._listeners = [*self._listeners, listener]
            if self._watch is None:
                self._watch = Watch(self.path, self._notify, busy_timeout_s=self.busy_timeout_s)
                self._watch.start()

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` no more, apart from a call that is under way."""
        with self._shared_lock:
            self._listeners = [other for other in self._listeners if other != listener]

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    # Rows

    def _partition_row(self, topic: str, partition: int) -> tuple[int, int, int]:
        """Return ``(id, first, end)`` as the reader sees it. Raises ``NotFound``."""
        partition_id = self._partition_ids.get((topic, partition))
        if partition_id is None:
            # Ids never change, so what was committed once can be remembered.
            partition_id = self._partition_id(self._reader, topic, partition)
            self._partition_ids[topic, partition] = partition_id
        first, end = self._reader.execute("SELECT first, end FROM partition WHERE id = ?", (partition_id,)).fetchone()
        return partition_id, first, end

    def _partition_id(self, connection: sqlite3.Connection, topic: str, partition: int) -> int:
        row = connection.execute(
            "SELECT p.id FROM partition p JOIN topic t ON t.id = p.topic_id WHERE t.name = ? AND p.number = ?",
            (topic, partition),
        ).fetchone()
        if row is None:
            raise NotFound(
                f"there is no {topic}[{partition}]",
                where=str(self.path),
                way_out="create the topic first, and check the partition's number",
            )
        return int(row[0])
