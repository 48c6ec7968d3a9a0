"""Keeps a group member alive and notices when its group changes.

The lease is renewed from a thread of its own, so that a worker whose event loop is busy for a while does not
lose its partitions. The price is that a worker whose event loop hangs for good keeps them until its process
ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from pipeline.errors import Locked, StateferryError
from topology.transports.sqlite_group import Membership

_POLL_S: Final = 0.05  # how soon a join or leave of another member is noticed; one small read each


class LeaseKeeper(threading.Thread):
    """Renews ``membership`` every ``renew_s`` and calls ``on_change`` from its thread.

    ``on_change`` is called while the group's generation is not ``generation``, which the owner sets when it
    has taken up a new one; when the member was removed; and once, at the end, if renewing failed for good
    (``failure``).
    """

    def __init__(self, membership: Membership, *, renew_s: float, on_change: Callable[[], None]) -> None:
        super().__init__(name="embedded-log-lease", daemon=True)
        self.generation = 0
        self.failure: StateferryError | None = None
        self._membership = membership
        self._renew_s = renew_s
        self._on_change = on_change
        self._stopped = threading.Event()

    def run(self) -> None:
        """Renew and look until stopped."""
        renewed_s = time.monotonic()
        while not self._stopped.wait(min(_POLL_S, self._renew_s)):
            alive = True
            try:
                if time.monotonic() - renewed_s >= self._renew_s:
                    alive = self._membership.renew()
                    renewed_s = time.monotonic()
                generation = self._membership.generation()
            except Locked:
                # Tried again at once. If it lasts longer than the lease, the others remove this member.
                continue
            except StateferryError as error:
                self.failure = error
                self._on_change()
                return
            if not alive or generation != self.generation:
                self._on_change()

    def stop(self) -> None:
        """End the renewing; the member's row stays as it is."""
        self._stopped.set()
        if self.is_alive():
            self.join()
