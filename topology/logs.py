"""Every event that stateferry logs, by name, with its fields; and how lines look.

One line per unit of work, on stderr: a constant `noun_verbed` name, the rest fields. On a terminal lines are for
people; elsewhere they are JSON. The core does not log.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

import structlog

EVENTS: Final[dict[str, str]] = {
    "node_opened": "role, height, block_hash, root, proof, generation, data_dir",
    "node_closed": "height, seq",
    "base_restored": "height, keys",
    "state_proven": "height, keys, seconds",
    "log_taken_back": "frames, from_seq, to_seq, why",
    "log_changed": "error, message",
    "blocks_log_shorter": "stored_offset, end_offset",
    "splitter_started": "offset, walk",
    "shards_owned": "shards, of",
    "shard_restored": "shard, height, seconds",  # beside the others, from the object store
    "shard_not_restored": "shard, error, message",  # its frames are followed instead
    "prefetch_started": "bytes, processes",  # the state has outgrown memory
    "prefetch_ended": "keys_read, missed",
    "epoch_claimed": "epoch, writer",
    "epoch_lost": "epoch, writer",  # of who won
    "group_committed": "height, seq, blocks, changes, bytes",
    "record_voided": "topic, offset, reason",
    "archive_waits": "error, message",  # the object store cannot be used: what is final stays in the journal
    "segment_archived": "segment, blocks, bytes",
    "range_diff_refused": "range, error, message",
    "archive_squashed": "shard, ranges, seconds",
    "archive_not_squashed": "shard, error, message",
    "archive_gap_left": "first_height, last_height",  # neither archived nor in this node's journal
    "topics_trimmed": "height, records",
    "topics_not_trimmed": "error, message",  # it is tried again
    "lease_not_held": "kind, chain, message",  # what is read or put is not kept from sweeps
    "object_swept": "object, bytes, why",
    "restore_planned_again": "height, manifest",  # what it was to fetch was swept
    "restore_cut_short": "why",  # the next start goes on with it
    "snapshot_not_taken": "error, message",
    "snapshot_taken": "height, manifest, parts, bytes, seconds",
    "generation_ended": "generation, successor",
    "event_refused": "error, message, kept_in",
    "event_mended": "offset, source_epoch",
    "events_taken_back": "from_walk, to_walk",  # void, because another shard refused the first of them
    "store_rejoined": "height, left_height, why",  # restored: what it lacked of the topics is deleted
    "generation_renewed": "left, generation, height, left_height, kept_in",
    "node_quarantined": "error, evidence",
    "worker_failed": "error",  # and the traceback, of what nobody expected
    "stop_cut_short": "seconds",
    "stop_failed": "error",
}
"""Each with its fields. A call that logs another event, or other fields, fails a test; and so does an event here that
nobody logs."""

REPEAT_S: Final = 10.0
"""A library says the same thing at most this often."""


class Sparse(logging.Filter):
    """While a broker is away, every try of every client fails: hundreds of lines that say one thing."""

    def __init__(self) -> None:
        super().__init__()
        self._said_s: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now_s, what = time.monotonic(), (record.name, str(record.msg))
        if now_s - self._said_s.get(what, -REPEAT_S) < REPEAT_S:
            return False
        self._said_s[what] = now_s
        return True


def configure(*, verbose: bool) -> None:
    """Set up logging of this process: ours by `verbose`, libraries from warnings on. All of it goes to stderr."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    # Faust warns at every stop that its tasks were cancelled: that is how it stops.
    for name in ("faust", "mode", "aiokafka"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Sparse())
    renderer: structlog.types.Processor = (
        # Its usual tracebacks show local variables, and a password may be one.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO if verbose else logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get() -> structlog.typing.FilteringBoundLogger:
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
