"""The plan of every event at every stand: a table of short vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from walks import NO_PARENT, STAMP, block, ref

from pipeline.block import BlockRef, Connect, Event, Rewind, SourceEpoch
from pipeline.errors import RewindTooDeep, StateferryError, WalkGap, WalkInvalid, WrongChain
from pipeline.walk import Apply, Ignore, Reign, Stand, Step, Undo, plan

AT = Stand(
    chain_id="walk",
    generation=b"g" * 16,
    source=(1, b"s" * 16),
    walk=20,
    tip=ref(10),
    final_height=4,
)
START = replace(AT, tip=None, walk=0, final_height=-1)
NEXT_SOURCE = replace(STAMP, epoch=2, writer=b"t" * 16)


def connect(walk: int, at: BlockRef, parent: BlockRef | None, **stamp: object) -> Connect:
    parent_hash = NO_PARENT if parent is None else parent.block_hash
    return Connect(stamp=replace(STAMP, **stamp), walk=walk, block=block(at, parent_hash))  # type: ignore[arg-type]


def rewind(walk: int, to: BlockRef, **stamp: object) -> Rewind:
    return Rewind(stamp=replace(STAMP, **stamp), walk=walk, to=to)  # type: ignore[arg-type]


def hash_at(height: int) -> bytes:
    return ref(height).block_hash


PLANS: list[tuple[str, Event, Stand, Step]] = [
    ("next block", connect(21, ref(11), ref(10)), AT, Apply(block=block(ref(11), ref(10).block_hash), walk=21)),
    ("first block", connect(1, ref(0), None), START, Apply(block=block(ref(0), NO_PARENT), walk=1)),
    ("first block at any height", connect(1, ref(99), None), START, Apply(block=block(ref(99), NO_PARENT), walk=1)),
    ("rewind by one", rewind(21, ref(9)), AT, Undo(count=1, walk=21)),
    ("rewind to the final height", rewind(21, ref(4)), AT, Undo(count=6, walk=21)),
    ("repeated block", connect(20, ref(10), ref(9)), AT, Ignore(why="repeat")),
    ("repeat that would not even fit", connect(1, ref(77), None), AT, Ignore(why="repeat")),
    ("repeated rewind", rewind(3, ref(9)), AT, Ignore(why="repeat")),
    ("another generation", connect(21, ref(11), ref(10), generation=b"o" * 16), AT, Ignore(why="generation")),
    ("another writer", connect(21, ref(11), ref(10), writer=b"x" * 16), AT, Ignore(why="writer")),
    ("an earlier epoch", rewind(21, ref(9), epoch=0), AT, Ignore(why="writer")),
    ("a later epoch, never opened", connect(21, ref(11), ref(10), epoch=2), AT, Ignore(why="writer")),
    ("next source", SourceEpoch(stamp=NEXT_SOURCE, resume_walk=21), AT, Reign(source=(2, b"t" * 16))),
    ("next source from before", SourceEpoch(stamp=NEXT_SOURCE, resume_walk=1), AT, Reign(source=(2, b"t" * 16))),
    ("the epoch in force again", SourceEpoch(stamp=STAMP, resume_walk=21), AT, Ignore(why="epoch")),
    ("an epoch left out", SourceEpoch(stamp=replace(STAMP, epoch=3), resume_walk=21), AT, Ignore(why="epoch")),
    (
        "an epoch of another generation",
        SourceEpoch(stamp=replace(NEXT_SOURCE, generation=b"o" * 16), resume_walk=99),
        AT,
        Ignore(why="generation"),
    ),
]

REFUSALS: list[tuple[str, Event, Stand, type[StateferryError], str]] = [
    ("another chain", connect(21, ref(11), ref(10), chain_id="test"), AT, WrongChain, "'test'"),
    ("a hole", connect(22, ref(11), ref(10)), AT, WalkGap, "event 22 follows event 20: 1 are missing"),
    ("a hole before a rewind", rewind(30, ref(9)), AT, WalkGap, "9 are missing"),
    ("a source too far on", SourceEpoch(stamp=NEXT_SOURCE, resume_walk=22), AT, WalkGap, "resumes at walk number 22"),
    ("another parent", connect(21, ref(11), ref(10, "'")), AT, WalkInvalid, "but the tip is"),
    ("another height", connect(21, ref(12), ref(10)), AT, WalkInvalid, "but the tip is"),
    ("a parent before anything", connect(1, ref(5), ref(4)), START, WalkInvalid, "nothing stands before it"),
    ("no parent on a tip", connect(21, ref(11), None), AT, WalkInvalid, "but the tip is"),
    ("a rewind to the tip", rewind(21, ref(10)), AT, WalkInvalid, "a rewind to"),
    ("a rewind above the tip", rewind(21, ref(11)), AT, WalkInvalid, "a rewind to"),
    ("a rewind of nothing", rewind(1, ref(0)), START, WalkInvalid, "the tip is None"),
    ("a rewind below the final height", rewind(21, ref(3)), AT, RewindTooDeep, "the final height 4"),
    ("a rewind to another branch", rewind(21, ref(9, "'")), AT, WalkInvalid, "not on the branch"),
]


@pytest.mark.parametrize(("event", "at", "step"), [row[1:] for row in PLANS], ids=[row[0] for row in PLANS])
def test_plan(event: Event, at: Stand, step: Step) -> None:
    """What follows from an event."""
    assert plan(event, at, hash_at) == step


@pytest.mark.parametrize(
    ("event", "at", "error", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_refusal(event: Event, at: Stand, error: type[StateferryError], message: str) -> None:
    """What stops the partition, by name."""
    with pytest.raises(error, match=message):
        plan(event, at, hash_at)
