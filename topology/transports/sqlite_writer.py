"""The one thread of a process that writes to the embedded log.

It takes whatever waits in its queue, runs it in one transaction and pays for one fsync (*group commit*): the
more tasks append at once, the cheaper each append, and a task that appends alone waits for nobody.

After an I/O error in a commit nobody knows what the disk holds: the kernel may have dropped the pages that it
could not write, and a second fsync would then succeed without them. So the writer takes no more jobs until
the log is opened again; what is read then is the truth. A full disk is no such error: SQLite notices before
it commits.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pipeline.errors import DiskFull, StateferryError
from topology.transports.sqlite_file import connect, errors_named, trim_wal, write_transaction

T = TypeVar("T")

_COMMIT_BYTES_MAX: Final = 32 * 1024 * 1024  # one transaction; a third of a second on a slow disk
_COMMIT_JOBS_MAX: Final = 4096


class _Job(NamedTuple):
    run: Callable[[sqlite3.Connection], Any]
    bytes: int
    future: Future[Any]


class Writer(threading.Thread):
    """Runs jobs in the order they were submitted and calls ``on_commit`` after every commit.

    * A job's future is resolved after the commit that holds its work, never before.
    * A job raises ``StateferryError`` only before its first write, so that the jobs it shares a transaction
      with are not affected. Any other error fails them all, and nothing of them was written.
    """

    def __init__(self, path: Path, on_commit: Callable[[], None], *, busy_timeout_s: float) -> None:
        """Open the file. Raises what ``connect`` raises."""
        super().__init__(name="embedded-log-writer", daemon=True)
        self._path = path
        self._on_commit = on_commit
        self._busy_timeout_s = busy_timeout_s
        self._failure: BaseException | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopped = False
        self._connection = connect(path, durable=True, busy_timeout_s=busy_timeout_s)

    def submit(self, run: Callable[[sqlite3.Connection], T], job_bytes: int) -> Future[T]:
        """Queue a job; the future gives what ``run`` returned. ``job_bytes``: about what it will write."""
        assert not self._stopped, f"the log {self._path} is closed"
        future: Future[T] = Future()
        # Running from the start: once queued it can be written, so it must not be cancelled.
        future.set_running_or_notify_cancel()
        self._jobs.put(_Job(run, job_bytes, future))
        return future

    def stop(self) -> None:
        """Finish what was submitted, then end the thread and close the connection."""
        self._stopped = True
        self._jobs.put(None)
        self.join()

    def run(self) -> None:
        """Write until stopped."""
        more = True
        while more:
            jobs, more = self._take()
            if jobs:
                self._commit(jobs)
        self._connection.close()

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job, then take what else waits; the flag is False if the thread is to end after them."""
        jobs: list[_Job] = []
        bytes_total = 0
        try:
            job = self._jobs.get()
            while job is not None:
                jobs.append(job)
                bytes_total += job.bytes
                if bytes_total >= _COMMIT_BYTES_MAX or len(jobs) >= _COMMIT_JOBS_MAX:
                    return jobs, True
                job = self._jobs.get_nowait()
        except queue.Empty:
            return jobs, True
        return jobs, False

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            with errors_named(self._path), write_transaction(self._connection, self._busy_timeout_s):
                outcomes = [self._outcome(job) for job in jobs]
        except BaseException as error:  # handed to whoever waits for the jobs
            if _is_io_error(error):
                self._failure = error
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, StateferryError):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
        self._on_commit()
        with suppress(sqlite3.Error, OSError):  # everything is written; a later commit tries again
            trim_wal(self._connection, self._path)

    def _outcome(self, job: _Job) -> Any:
        try:
            return job.run(self._connection)
        except StateferryError as error:
            return error


def _is_io_error(error: BaseException) -> bool:
    code = getattr(error.__cause__, "sqlite_errorcode", 0)
    return isinstance(error, DiskFull) and code & 0xFF == sqlite3.SQLITE_IOERR
