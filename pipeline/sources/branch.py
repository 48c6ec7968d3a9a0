"""Which branch a source is on, and what the next block it finds means.

Blocks arrive in whatever order files and nodes give them. The topic takes a walk: connect a block on top of
the position, or rewind to an earlier block of the current branch. `plan` turns the one into the other:

* a block that stands on the current branch is skipped: reading the same files twice publishes nothing;
* a block whose parent is the tip connects;
* a block whose parent is an earlier block of the branch rewinds to it, then connects. Whoever names the file
  chooses the branch: no work is compared, the node that wrote the block has done so;
* a block that was connected once and then left by a rewind is skipped, unless the reader asked for it
``again``.
  Otherwise reading "A, then B" twice would walk from B back to A and to B again;
* any other block has a parent that nobody knows: `BlockOrphan`.

A `Branch` is nothing but what the topic's own events say: `connect` and `rewind` rebuild it after a start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.block import BlockRef
from pipeline.errors import BlockOrphan, WalkInvalid, WrongChain

_NO_PARENT = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Nothing to publish. ``was_left``: the block stood on a branch that was left (False: on the current
    one)."""

    was_left: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """The block goes on top of the tip, at ``height``."""

    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RewindThenConnect:
    """``to`` must become the tip first; then the block goes on top of it, at ``height``."""

    to: BlockRef
    height: int


Plan = Skip | Connect | RewindThenConnect


class Connected(NamedTuple):
    """What `Branch.connect` did. ``was_left``: the block stood on a branch that was left before."""

    was_left: bool


class Rewound(NamedTuple):
    """What `Branch.rewind` did: hashes of the blocks it left, from the lowest."""

    left: tuple[bytes, ...]


_NEW, _AGAIN = Connected(False), Connected(True)
"""One of each: a long walk holds references to them."""


class Branch:
    """The current branch, from its base to its tip, and the hashes of all blocks that were left.

    - Heights are dense and ascending; a hash stands at most once.
    - A hash is on the branch, or left, or unknown: never two of these.
    - The base, where there is one, is never rewound: its block's content is not known here.
    """

    __slots__ = ("_first_height", "_has_base", "_hashes", "_heights", "_left")

    def __init__(self, base: BlockRef | None = None) -> None:
        self._first_height = 0 if base is None else base.height
        self._has_base = base is not None
        self._hashes: list[bytes] = [] if base is None else [base.block_hash]
        self._heights: dict[bytes, int] = {} if base is None else {base.block_hash: base.height}
        self._left: set[bytes] = set()

    @property
    def tip(self) -> BlockRef | None:
        """The block on top; the base if nothing is on top of it; None if there is no block at all."""
        if not self._hashes:
            return None
        return BlockRef(self._first_height + len(self._hashes) - 1, self._hashes[-1])

    def ref(self, block_hash: bytes) -> BlockRef | None:
        """The block of the current branch that has this hash."""
        height = self._heights.get(block_hash)
        return None if height is None else BlockRef(height, block_hash)

    def at(self, height: int) -> BlockRef | None:
        """The block of the current branch at this height."""
        index = height - self._first_height
        return BlockRef(height, self._hashes[index]) if 0 <= index < len(self._hashes) else None

    def was_left(self, block_hash: bytes) -> bool:
        """Whether the block was connected once and does not stand on the current branch any more."""
        return block_hash in self._left

    def connect(self, ref: BlockRef, parent_hash: bytes) -> Connected:
        """A block became the tip. Raises WalkInvalid unless it goes on top of the tip."""
        tip = self.tip
        expected = (0, _NO_PARENT) if tip is None else (tip.height + 1, tip.block_hash)
        if (ref.height, parent_hash) != expected or ref.block_hash in self._heights:
            raise WalkInvalid(f"block {ref} on parent {_shown(parent_hash)} does not go on top of {tip or 'nothing'}")
        self._hashes.append(ref.block_hash)
        self._heights[ref.block_hash] = ref.height
        was_left = ref.block_hash in self._left
        self._left.discard(ref.block_hash)
        return _AGAIN if was_left else _NEW

    def rewind(self, to: BlockRef) -> Rewound:
        """``to`` became the tip; what was above it is left. Raises WalkInvalid unless it stands on the
        branch."""
        if self.ref(to.block_hash) != to:
            raise WalkInvalid(f"a rewind to {to}, which does not stand on the branch of {self.tip or 'nothing'}")
        keep = to.height - self._first_height + 1
        left = self._hashes[keep:]
        del self._hashes[keep:]
        for block_hash in left:
            del self._heights[block_hash]
        self._left.update(left)
        return Rewound(tuple(left))

    def take_back(self, step: Connected | Rewound) -> None:
        """The last step, which `connect` or `rewind` gave, was never taken: its blocks are as they were before."""
        match step:
            case Connected(was_left=was_left):
                block_hash = self._hashes.pop()
                del self._heights[block_hash]
                if was_left:
                    self._left.add(block_hash)
            case Rewound(left=left):
                for block_hash in left:
                    self._heights[block_hash] = self._first_height + len(self._hashes)
                    self._hashes.append(block_hash)
                self._left.difference_update(left)

    @property
    def base(self) -> BlockRef | None:
        """What nothing is known below; None: the branch is known from its first block on."""
        return BlockRef(self._first_height, self._hashes[0]) if self._has_base else None

    @property
    def begins_with(self) -> BlockRef | None:
        """The chain's first block, or None: not seen yet, or below the base."""
        return None if self._has_base or not self._hashes else BlockRef(0, self._hashes[0])


def plan(branch: Branch, parent_hash: bytes, block_hash: bytes, *, again: bool = False, where: str = "") -> Plan:
    """What to publish for the next block. ``again``: walk back onto branches that were left. ``where``
    names the block's place for errors.

    Raises BlockOrphan (its parent is unknown, or stands on a branch that was left) and WrongChain (it is a
    chain's first block, and the branch begins with another one).
    """
    if branch.ref(block_hash):
        return Skip(was_left=False)
    was_left = branch.was_left(block_hash)
    if was_left and not again:
        return Skip(was_left=True)
    parent, tip = branch.ref(parent_hash), branch.tip
    if parent is not None:
        height = parent.height + 1
        return Connect(height=height) if parent == tip else RewindThenConnect(to=parent, height=height)
    if parent_hash == _NO_PARENT:
        if tip is None:
            return Connect(height=0)
        if branch.begins_with is not None:
            raise WrongChain(
                f"block {_shown(block_hash)} is the first of another chain than that of {branch.begins_with}",
                where=where,
            )
    raise BlockOrphan(
        f"block {_shown(block_hash)} has parent {_shown(parent_hash)}, {_whereabouts(branch, parent_hash)}",
        where=where,
        way_out=_way_out(branch, parent_hash, again=again),
    )


def _whereabouts(branch: Branch, parent_hash: bytes) -> str:
    if branch.was_left(parent_hash):
        return f"which stands on a branch that was left for that of {branch.tip}"
    return f"which is unknown; the tip is {branch.tip or 'not there yet'}"


def _way_out(branch: Branch, parent_hash: bytes, *, again: bool) -> str:
    if branch.tip is None:
        return "begin with the chain's first block, or with a base"
    if branch.was_left(parent_hash) and not again:
        return "to walk back onto that branch, ingest it from the fork point on with --again"
    if branch.base is not None:
        return f"ingest blocks that meet the branch, which is known from {branch.base} on"
    return "ingest the blocks in between first"


def _shown(block_hash: bytes) -> str:
    return block_hash[::-1].hex()
