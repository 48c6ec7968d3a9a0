"""Named places where a test may end the process: crashes are input, not luck.

Each place calls `hit` with its name, every time it is passed. Nothing happens unless the shell around the core armed a
name (see `topology.settings`): then, at the given hit, the armed action runs. The names are all here, so that a test
can walk through every one and assert that it was reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

NAMES: Final = (
    "propose.computed",  # frames are computed, nothing is produced
    "propose.produced",  # frames were handed to the broker, which has acknowledged them
    "propose.epoch",  # the own EPOCH is in the log, nothing else
    "follow.read",  # a frame was read back, nothing of it is written
    "follow.stepped",  # a frame was checked and computed, not written
    "store.before_write",  # the batch is made
    "store.after_write",  # the batch is in the store, its layers still stand
    "store.taken_back",  # one frame of a lost log was taken back
    "archive.before_put",  # a segment is made
    "archive.after_put",  # a segment is in the object store, the store does not know
    "squash.before_put",  # a piece of a range diff is made
    "squash.after_put",  # one piece is in the object store
    "snapshot.checkpointed",  # the copy exists
    "snapshot.rolled_back",  # the copy stands at the final height
    "snapshot.part_put",  # one part is in the object store
    "snapshot.before_manifest",  # all parts are, the manifest is not
    "snapshot.after_manifest",  # the snapshot exists
    "restore.planned",  # the plan is written down
    "restore.part_fetched",  # one part is here and checked
    "restore.piece_fetched",  # one piece of a range diff is here and checked
    "restore.before_ingest",  # all parts are here
    "restore.after_ingest",  # the store has them, but no position yet
    "restore.chunk_applied",  # one chunk of a range diff was applied
    "restore.frame_applied",  # one archived frame was applied
    "prove.range_hashed",  # a helper process hashed its share, nobody knows
    "prove.hashed",  # every key was hashed, the proof is not written
    "ingest.published",  # one batch of events is acknowledged
    "split.sent",  # one event was handed to the broker for every shard
)

_hits: Counter[str] = Counter()
_armed: dict[str, tuple[int, Callable[[str], None]]] = {}


def arm(name: str, at_hit: int, action: Callable[[str], None]) -> None:
    """Run ``action`` at the ``at_hit``-th time (from 1) that ``name`` is passed. Raises KeyError for unknown names."""
    if name not in NAMES:
        raise KeyError(name)
    _armed[name] = (at_hit, action)


def disarm() -> dict[str, int]:
    """Arm nothing any more, and count from 0 again. How often each name was passed while something was armed."""
    counted = dict(_hits)
    _armed.clear()
    _hits.clear()
    return counted


def hit(name: str) -> None:
    assert name in NAMES, name
    if not _armed:
        return
    _hits[name] += 1
    at_hit, action = _armed.get(name, (0, None))
    if action is not None and _hits[name] == at_hit:
        action(name)
