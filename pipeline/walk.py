"""The walk of events: from what a source says to the frames that follow, without computing any of them.

The source chooses the branch; this decides only whether an event follows from where the store is. The answer is a
step: connect, undo so many blocks, or ignore. Anything else is an error that stops the partition, naming the event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.block import Block, BlockRef, Connect, Event, Rewind, SourceEpoch
from pipeline.errors import RewindTooDeep, WalkGap, WalkInvalid, WrongChain


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where the next event meets the store. ``source``: (epoch, writer) in force on the blocks topic."""

    chain_id: str
    generation: bytes
    source: tuple[int, bytes]
    walk: int
    tip: BlockRef | None
    final_height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignore:
    """Nothing follows: a repeat, or a writer not in force."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """A new source writer is in force."""

    source: tuple[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    block: Block
    walk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """Take ``count`` blocks off, one frame each; the last carries ``walk``."""

    count: int
    walk: int


Step = Ignore | Reign | Apply | Undo

HashAt = Callable[[int], bytes]
"""The hash of the current branch's block at a height between the final height and the tip."""


def plan(event: Event, at: Stand, hash_at: HashAt) -> Step:
    """What follows from one event. Raises WrongChain, WalkGap, WalkInvalid, RewindTooDeep."""
    stamp = event.stamp
    if stamp.generation != at.generation:
        return Ignore(why="generation")
    source = (stamp.epoch, stamp.writer)
    is_next = isinstance(event, SourceEpoch) and stamp.epoch == at.source[0] + 1
    if stamp.chain_id != at.chain_id and (source == at.source or is_next):
        raise WrongChain(f"an event of chain {stamp.chain_id!r}, this directory holds {at.chain_id!r}")
    match event:
        case SourceEpoch(resume_walk=resume_walk):
            if not is_next:
                return Ignore(why="epoch")
            if resume_walk > at.walk + 1:
                raise WalkGap(f"a source resumes at walk number {resume_walk}, but the last one applied is {at.walk}")
            return Reign(source=source)
        case Connect() | Rewind() if source != at.source:
            return Ignore(why="writer")
        case Connect(walk=walk) | Rewind(walk=walk) if walk <= at.walk:
            return Ignore(why="repeat")
        case Connect(walk=walk) | Rewind(walk=walk) if walk > at.walk + 1:
            raise WalkGap(
                f"event {walk} follows event {at.walk}: {walk - at.walk - 1} are missing",
                way_out="publish the missing events again from the source",
            )
        case Connect(walk=walk, block=block):
            _check_connect(block, at.tip)
            return Apply(block=block, walk=walk)
        case Rewind(walk=walk, to=to):
            return Undo(count=_depth(to, at, hash_at), walk=walk)


def _check_connect(block: Block, tip: BlockRef | None) -> None:
    if tip is None:
        # Before the first block any height may come: a base state without coins is an empty one.
        if block.parent_hash != bytes(32):
            raise WalkInvalid(f"block {block.ref} has a parent, but nothing stands before it")
    elif block.parent_hash != tip.block_hash or block.ref.height != tip.height + 1:
        raise WalkInvalid(
            f"block {block.ref} has the parent {block.parent_hash[::-1].hex()}, but the tip is {tip}",
            way_out="the source must rewind to a common block first; if the topic lost events and others took their "
            "place, `stateferry generation new` begins again from a snapshot",
        )


def _depth(to: BlockRef, at: Stand, hash_at: HashAt) -> int:
    if at.tip is None or to.height >= at.tip.height:
        raise WalkInvalid(f"a rewind to {to}, but the tip is {at.tip}")
    if to.height < at.final_height:
        raise RewindTooDeep(
            f"a rewind to the fork point {to} is deeper than finality: the tip is {at.tip}, the final height "
            f"{at.final_height}",
            way_out="begin a generation from a snapshot at or below the fork: `stateferry generation new --height`; if "
            "there is none, `stateferry restore --height` into an empty directory and `stateferry snapshot` make one",
        )
    if hash_at(to.height) != to.block_hash:
        raise WalkInvalid(f"a rewind to {to}, which is not on the branch of the tip {at.tip}")
    return at.tip.height - to.height
