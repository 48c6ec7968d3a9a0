"""A process beside a primary's, which seals its blocks: hashing and encoding would hold the worker's interpreter.

It needs no state and keeps none: diffs in, seals out, in order. It ends with the worker, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor

from pipeline.codec import Codec
from pipeline.diff import Diff
from pipeline.errors import StateferryError
from pipeline.seal import Seal, Shared, seal, seal_at_once

_CHANGES_MIN = 200
"""A smaller block is sealed here: it takes no longer than asking."""


class Sealing:
    """Seals blocks in a process of its own, which starts with the first block that is worth it; or here, if it is not
    ``beside``.

    * `submit` is a `pipeline.seal.Sealer`; what it returns raises BrokenProcessPool if the process was killed.
    """

    def __init__(self, *, beside: bool = True) -> None:
        self._beside = beside
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, diff: Diff, shared: Shared, codec: Codec) -> Future[Seal]:
        if not self._beside or diff.op_count < _CHANGES_MIN:
            return seal_at_once(diff, shared, codec)
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and the store's
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        return self._pool.submit(seal, diff, shared, codec)

    def close(self) -> None:
        """What was submitted and not sealed is dropped. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def sealing_lost() -> StateferryError:
    """What a BrokenProcessPool says to whoever runs the worker."""
    return StateferryError(
        "the process that seals blocks was ended by somebody else",
        way_out="start again; if it happens again, see whether memory runs out",
    )


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's business
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
