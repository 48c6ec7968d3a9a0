"""Notices commits that other processes make to the embedded log.

SQLite has no way to be told, but ``PRAGMA data_version`` answers in microseconds, from shared memory, whether
the file changed since it was last asked. The watch asks every millisecond while the log is in use and slows down to
every 5 ms when it is not: at the tip a record is seen 1 to 5 ms after its commit, and an idle log costs about 1% of
a core, most of it for waking up.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from topology.transports.sqlite_file import connect

_ACTIVE_INTERVAL_S: Final = 0.001
_IDLE_INTERVAL_S: Final = 0.005
_ACTIVE_S: Final = 0.1  # how long after a change the log still counts as in use
_SLOWDOWN: Final = 1.1  # 17 quiet polls from the active interval to the idle one


class Watch(threading.Thread):
    """Calls ``on_change`` after commits to the log, whoever made them; several may be one call.

    A file that can no longer be read also counts as changed: whoever reads next meets the error.
    """

    def __init__(self, path: Path, on_change: Callable[[], None], *, busy_timeout_s: float) -> None:
        super().__init__(name="embedded-log-watch", daemon=True)
        self._on_change = on_change
        self._connection = connect(path, durable=False, busy_timeout_s=busy_timeout_s)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Poll until stopped."""
        seen = self._version()
        changed_s = time.monotonic()
        interval_s = _ACTIVE_INTERVAL_S
        while not self._stopped.wait(interval_s):
            version = self._version()
            if version != seen or version is None:
                self._on_change()
            if version != seen:
                seen = version
                changed_s = time.monotonic()
                interval_s = _ACTIVE_INTERVAL_S
            elif version is None:
                interval_s = _IDLE_INTERVAL_S
            elif time.monotonic() - changed_s > _ACTIVE_S:
                interval_s = min(interval_s * _SLOWDOWN, _IDLE_INTERVAL_S)
        self._connection.close()

    def stop(self) -> None:
        """End the polling and close the connection."""
        self._stopped.set()
        self.join()

    def _version(self) -> int | None:
        try:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:
            return None
        return int(version)
