"""The embedded log's file: how it is opened, what tables it has, and what SQLite's errors mean here.

The file is an SQLite database in WAL mode. Several processes of one machine may have it open; a network file
system will not do, because the WAL's index is shared memory.

**What fsync is paid for.** Connections made with ``durable=True`` run ``synchronous=FULL``: every commit has
been through fsync when it returns, so an appended record survives a power cut. Bookkeeping (committed offsets
of groups, leases) runs ``synchronous=NORMAL``: it survives the death of any process, and a power cut may take
back its last moments, never a record. As the WAL is one sequence, the fsync of an append also covers the
bookkeeping before it.

**Identity.** ``application_id`` says that the file is ours, ``user_version`` is the version of the tables.

A record's rowid is ``partition id << 40 | offset``: one b-tree, records of a partition side by side in order,
and the address of a record is computed instead of looked up.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pipeline.errors import DiskFull, Locked, LogCorrupt, StateferryError, Unsupported

SCHEMA_VERSION: Final = 1
OFFSET_BITS: Final = 40  # a million million records per partition

_APPLICATION_ID: Final = 0x53464C47  # "SFLG"
_PAGE_BYTES: Final = 8192  # measured: fastest page size for 1 KB records, and within 5% of it for 300 KB ones
_CHECKPOINT_PAGES: Final = 8192  # 64 MiB of WAL; SQLite's default of 4 MB puts the p99 of an append from 1 to 5 ms
_WAL_BYTES_KEPT: Final = 256 * 1024 * 1024
_BUSY_SLEEP_S: Final = 0.001

_SCHEMA: Final = """
CREATE TABLE topic (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    partitions INTEGER NOT NULL
) STRICT;
CREATE TABLE partition (
    id INTEGER PRIMARY KEY,
    topic_id INTEGER NOT NULL REFERENCES topic,
    number INTEGER NOT NULL,
    first INTEGER NOT NULL DEFAULT 0,
    end INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic_id, number)
) STRICT;
CREATE TABLE record (
    id INTEGER PRIMARY KEY,
    timestamp_ms INTEGER NOT NULL,
    key BLOB,
    value BLOB NOT NULL
) STRICT;
CREATE TABLE consumer_group (
    name TEXT PRIMARY KEY,
    generation INTEGER NOT NULL
) STRICT;
CREATE TABLE member (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    group_name TEXT NOT NULL REFERENCES consumer_group,
    instance TEXT NOT NULL,
    session TEXT NOT NULL,
    topics TEXT NOT NULL,
    synced INTEGER NOT NULL,
    renewed_ms INTEGER NOT NULL,
    lease_ms INTEGER NOT NULL,
    UNIQUE (group_name, instance)
) STRICT;
CREATE TABLE committed (
    group_name TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    next_offset INTEGER NOT NULL,
    PRIMARY KEY (group_name, topic, partition)
) STRICT;
"""

_LOCKED_CODES: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_CORRUPT_CODES: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_DISK_CODES: Final = {
    sqlite3.SQLITE_FULL: ("the disk, or the file's size limit, is full", "make room and start again"),
    sqlite3.SQLITE_READONLY: ("the log cannot be written", "make the file and its directory writable"),
    sqlite3.SQLITE_PERM: ("the log cannot be written", "make the file and its directory writable"),
    sqlite3.SQLITE_CANTOPEN: (
        "the log cannot be opened",
        "create its directory and make the file and the directory readable and writable",
    ),
    sqlite3.SQLITE_IOERR: (
        "the disk does not take the log's bytes",
        "check the disk, its space and the file size limit, and start again",
    ),
}


def connect(path: Path, *, durable: bool, busy_timeout_s: float) -> sqlite3.Connection:
    """Open the log's file, creating it and its tables if they are not there.

    Transactions are explicit: ``write_transaction`` writes, a plain ``BEGIN`` reads. The connection may be
    used from any thread, by one at a time. ``busy_timeout_s``: how long to wait for another process.

    Raises ``LogCorrupt`` for a file that is not a log, ``Unsupported`` for one of a newer version, ``Locked``
    and ``DiskFull``.
    """
    with errors_named(path):
        connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            _check_identity(connection, path)
            # Turning WAL on does not wait for other processes that do the same; it fails at once.
            _until_free(connection, "PRAGMA journal_mode = WAL", busy_timeout_s)
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
            if _check_identity(connection, path) == 0:
                with write_transaction(connection, busy_timeout_s):
                    # Another process may have been first, between the check and the lock.
                    if _check_identity(connection, path) == 0:
                        for statement in _SCHEMA.split(";"):
                            connection.execute(statement)
                        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as the system's own; others pass as they are."""
    try:
        yield
    except sqlite3.Error as error:
        raise named_error(error, path) from error


def named_error(error: sqlite3.Error, path: Path) -> BaseException:
    """Return what ``error`` means here: ``Locked``, ``LogCorrupt``, ``DiskFull``, or the error itself."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    detail = f"{path}: {error}"
    named: StateferryError
    if code in _LOCKED_CODES:
        named = Locked(
            "another process holds the embedded log",
            where=detail,
            way_out="it lets go by itself; if it does not, end that process, then start again",
        )
    elif code in _CORRUPT_CODES:
        named = LogCorrupt(
            "the embedded log's file is damaged or is not a log",
            where=detail,
            way_out="keep the file; replicas restore from the archive into a new log",
        )
    elif code in _DISK_CODES:
        what, way_out = _DISK_CODES[code]
        named = DiskFull(what, where=detail, way_out=way_out)
    else:
        return error
    return named


@contextmanager
def write_transaction(connection: sqlite3.Connection, busy_timeout_s: float) -> Iterator[None]:
    """Hold the file's only write lock for the block; commit at its end, roll back if it raises.

    SQLite's own waiting backs off to 100 ms and is unfair to whoever waits longest. Appends take about 1 ms,
    so this tries about every millisecond.
    """
    _until_free(connection, "BEGIN IMMEDIATE", busy_timeout_s)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # Some errors make SQLite roll back by itself; a second rollback would hide the first error.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def read_transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Give the block one unchanging view of the file. Keep it short: it holds back the WAL's reuse."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


def trim_wal(connection: sqlite3.Connection, path: Path) -> None:
    """Start the WAL anew if readers kept it from being reused until it grew beyond its bound.

    Best effort: a reader that does not let go within 100 ms is tried again at a later commit.
    """
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size > _WAL_BYTES_KEPT:
        connection.execute("PRAGMA busy_timeout = 100")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _until_free(connection: sqlite3.Connection, statement: str, busy_timeout_s: float) -> None:
    deadline_s = time.monotonic() + busy_timeout_s
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline_s:
                    raise
            time.sleep(_BUSY_SLEEP_S * random.uniform(0.2, 1.0))
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")


def _check_identity(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the file's tables, 0 for an empty file; raise for a file that is not ours."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != _APPLICATION_ID and (tables or version or application_id):
        raise LogCorrupt(
            "the file is a database, but not an embedded log",
            where=str(path),
            way_out="name another file",
        )
    if version > SCHEMA_VERSION:
        raise Unsupported(
            f"the embedded log has version {version}, this build reads up to {SCHEMA_VERSION}",
            where=str(path),
            way_out="use a newer build",
        )
    return int(version)
