"""Consumer groups of the embedded log: who reads which partition, and how far each group has read.

A member is a row with a lease. It renews the lease as long as its process lives; whoever renews also removes
the members whose lease ran out. Every join, leave and removal gives the group a new *generation*. A member
that sees one gives up its partitions, says so (``sync``), and takes up its new ones only when every live
member has: so no partition ever has two readers.

The assignment is a function of the members alone: partition ``i`` of every topic goes to the same member, the
``i``-th in order of joining, modulo their number. Co-partitioned topics therefore meet in one worker, and the
oldest member keeps partition 0 whoever comes and goes.

An *instance* is a member's name over restarts. A process that joins under a name that is there takes the row
over at once, with the same generation and partitions: a restart after a kill does not wait for a lease. Each
process has a *session* of its own, so the one that was replaced, should it still run, is refused as fenced.

Offsets committed here are for lag displays and for agents without a store. Leases use the wall clock, as a
machine's monotonic clock starts anew at boot; a lease from the future counts as expired.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.errors import Fenced
from topology.transports.sqlite_file import connect, errors_named, write_transaction
from topology.transports.sqlite_log import SqliteLog

Partition = tuple[str, int]
"""A topic and a number."""


class GroupView(NamedTuple):
    """The group as one member sees it."""

    generation: int
    ready: bool  # every live member has given up what it had before this generation
    assignment: frozenset[Partition]


def assign(
    members: Sequence[tuple[str, frozenset[str]]], partitions: Mapping[str, int]
) -> dict[str, frozenset[Partition]]:
    """Return each member's partitions.

    ``members``: names with their topics, in order of joining. ``partitions``: number of partitions per topic;
    topics without an entry have none.
    """
    owned: dict[str, set[Partition]] = {name: set() for name, _ in members}
    for topic, count in partitions.items():
        readers = [name for name, topics in members if topic in topics]
        for number in range(count if readers else 0):
            owned[readers[number % len(readers)]].add((topic, number))
    return {name: frozenset(mine) for name, mine in owned.items()}


class Membership:
    """One process's membership in a group. Methods block, and may be called from any thread.

    The life of a membership: ``join``, then ``sync`` and ``view`` until ready, ``renew`` more often than the
    lease is long, ``leave``. A member whose lease ran out is told so by ``renew`` and joins again.
    """

    def __init__(self, log: SqliteLog, *, group: str, instance: str | None, lease_ms: int) -> None:
        """Prepare for joining. ``instance`` None: a new name each time."""
        self._log = log
        self._group = group
        self._session = secrets.token_hex(16)
        self._instance = instance or self._session
        self._lease_ms = lease_ms
        self._lock = threading.Lock()
        self._connection = connect(log.path, durable=False, busy_timeout_s=log.busy_timeout_s)

    def close(self) -> None:
        """Close the connection; the member's row stays until it leaves or its lease runs out."""
        with self._lock:
            self._connection.close()

    def join(self, topics: frozenset[str]) -> None:
        """Become a member that reads ``topics``, or take over the row of the same instance."""
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO consumer_group VALUES (?, 0)", (self._group,))
            self._remove_expired()
            row = connection.execute(
                "SELECT topics FROM member WHERE group_name = ? AND instance = ?",
                (self._group, self._instance),
            ).fetchone()
            wanted = json.dumps(sorted(topics))
            if row is None or row[0] != wanted:
                self._next_generation()
            # A process that joins holds nothing from before, so it is in sync with the generation as it is.
            connection.execute(
                "INSERT INTO member (group_name, instance, session, topics, synced, renewed_ms, lease_ms)"
                " SELECT name, ?, ?, ?, generation, ?, ? FROM consumer_group WHERE name = ?"
                " ON CONFLICT (group_name, instance) DO UPDATE SET session = excluded.session,"
                " topics = excluded.topics, synced = excluded.synced, renewed_ms = excluded.renewed_ms,"
                " lease_ms = excluded.lease_ms",
                (self._instance, self._session, wanted, self._log.now_ms(), self._lease_ms, self._group),
            )

    def renew(self) -> bool:
        """Renew the lease and remove members whose lease ran out; False if this one had been removed.

        Raises ``Fenced`` if another process took this instance over.
        """
        with self._writing() as connection:
            # Before the others: who renews is alive, even if late.
            renewed = connection.execute(
                "UPDATE member SET renewed_ms = ? WHERE group_name = ? AND instance = ? AND session = ?",
                (self._log.now_ms(), self._group, self._instance, self._session),
            ).rowcount
            self._remove_expired()
            if not renewed:
                self._check_session()
            return bool(renewed)

    def generation(self) -> int:
        """Return the group's generation; 0 before anybody joined. Cheap enough to be called all the time."""
        with self._lock, errors_named(self._log.path):
            row = self._connection.execute(
                "SELECT generation FROM consumer_group WHERE name = ?", (self._group,)
            ).fetchone()
        return row[0] if row else 0

    def sync(self, generation: int) -> None:
        """Say that this member holds nothing that an earlier generation than this one gave it."""
        with self._writing() as connection:
            connection.execute(
                "UPDATE member SET synced = ? WHERE group_name = ? AND instance = ? AND session = ?",
                (generation, self._group, self._instance, self._session),
            )

    def view(self) -> GroupView | None:
        """Return the group as it is; None if this member was removed. Raises ``Fenced``."""
        with self._lock, errors_named(self._log.path):
            connection = self._connection
            connection.execute("BEGIN")
            try:
                (generation,) = connection.execute(
                    "SELECT generation FROM consumer_group WHERE name = ?", (self._group,)
                ).fetchone()
                rows = connection.execute(
                    "SELECT instance, topics, synced, session FROM member WHERE group_name = ? ORDER BY id",
                    (self._group,),
                ).fetchall()
                partitions = dict(connection.execute("SELECT name, partitions FROM topic"))
                self._check_session()
            finally:
                connection.execute("COMMIT")
        if all(session != self._session for *_, session in rows):
            return None
        assignment = assign([(instance, frozenset(json.loads(topics))) for instance, topics, _, _ in rows], partitions)
        ready = all(synced >= generation for _, _, synced, _ in rows)
        return GroupView(generation, ready, assignment[self._instance])

    def leave(self) -> None:
        """Leave the group, so that others take over at once. Nothing happens if this is not a member."""
        with self._writing() as connection:
            left = connection.execute(
                "DELETE FROM member WHERE group_name = ? AND instance = ? AND session = ?",
                (self._group, self._instance, self._session),
            ).rowcount
            if left:
                self._next_generation()

    def commit(self, offsets: Mapping[Partition, int]) -> bool:
        """Store the group's next offsets; False, and nothing stored, if this is not a member any more."""
        with self._writing() as connection:
            member = connection.execute(
                "SELECT 1 FROM member WHERE group_name = ? AND session = ?", (self._group, self._session)
            ).fetchone()
            if member is not None:
                connection.executemany(
                    "INSERT INTO committed VALUES (?, ?, ?, ?) ON CONFLICT (group_name, topic, partition)"
                    " DO UPDATE SET next_offset = excluded.next_offset",
                    [(self._group, topic, number, offset) for (topic, number), offset in offsets.items()],
                )
            return member is not None

    def committed(self) -> dict[Partition, int]:
        """Return the group's next offsets, for the partitions that have one."""
        with self._lock, errors_named(self._log.path):
            rows = self._connection.execute(
                "SELECT topic, partition, next_offset FROM committed WHERE group_name = ?", (self._group,)
            ).fetchall()
        return {(topic, number): offset for topic, number, offset in rows}

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with (
            self._lock,
            errors_named(self._log.path),
            write_transaction(self._connection, self._log.busy_timeout_s),
        ):
            yield self._connection

    def _next_generation(self) -> None:
        self._connection.execute("UPDATE consumer_group SET generation = generation + 1 WHERE name = ?", (self._group,))

    def _remove_expired(self) -> None:
        now_ms = self._log.now_ms()
        removed = self._connection.execute(
            "DELETE FROM member WHERE group_name = ? AND instance != ?"
            " AND (renewed_ms + lease_ms < ? OR renewed_ms > ? + lease_ms)",
            (self._group, self._instance, now_ms, now_ms),
        ).rowcount
        if removed:
            self._next_generation()

    def _check_session(self) -> None:
        row = self._connection.execute(
            "SELECT session FROM member WHERE group_name = ? AND instance = ?", (self._group, self._instance)
        ).fetchone()
        if row is not None and row[0] != self._session:
            raise Fenced(
                f"another process joined group {self._group} as instance {self._instance}",
                where=str(self._log.path),
                way_out="run one worker per instance id",
            )
