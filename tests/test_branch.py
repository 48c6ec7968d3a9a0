"""The branch a source is on: which blocks are skipped, connected, rewound to, refused."""

from __future__ import annotations

import chains
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.block import BlockRef
from pipeline.errors import BlockOrphan, WalkInvalid, WrongChain
from pipeline.sources.bitcoin import parse_header
from pipeline.sources.branch import Branch, Connect, Plan, RewindThenConnect, Skip, plan

ROOT = bytes(32)


def block_hash(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def walk(branch: Branch, blocks: list[tuple[bytes, bytes]], *, again: bool = False) -> list[Plan]:
    """Ingest (hash, parent) pairs as a source does; what was published."""
    published: list[Plan] = []
    for own, parent in blocks:
        step = plan(branch, parent, own, again=again)
        match step:
            case Skip():
                continue
            case RewindThenConnect(to=to, height=height):
                branch.rewind(to)
            case Connect(height=height):
                pass
        branch.connect(BlockRef(height, own), parent)
        published.append(step)
    return published


def chain(*names: str, on: str = "") -> list[tuple[bytes, bytes]]:
    """(hash, parent) pairs, each block on the one before it."""
    parents = [on, *names]
    return [
        (block_hash(name), block_hash(parent) if parent else ROOT) for name, parent in zip(names, parents, strict=False)
    ]


A = chain("0", "1", "2", "3", "4")
B = chain("3A", "4A", "5A", on="2")


def ref(height: int, name: str) -> BlockRef:
    return BlockRef(height, block_hash(name))


def test_a_chain_connects_from_its_first_block() -> None:
    """Heights count from 0 where there is no base."""
    branch = Branch()
    assert branch.tip is None

    assert walk(branch, A) == [Connect(height=height) for height in range(5)]
    assert branch.tip == ref(4, "4")


def test_a_chain_connects_on_a_base() -> None:
    """Heights count from the base, which itself is skipped and can be rewound to but not below."""
    branch = Branch(ref(2, "2"))

    assert walk(branch, A[2:]) == [Connect(height=3), Connect(height=4)]
    assert walk(branch, B) == [RewindThenConnect(to=ref(2, "2"), height=3), Connect(height=4), Connect(height=5)]
    with pytest.raises(BlockOrphan):
        plan(branch, block_hash("1"), block_hash("2A"))
    with pytest.raises(BlockOrphan):
        plan(branch, ROOT, block_hash("0"))


def test_a_side_branch_rewinds_to_its_fork_point() -> None:
    """A then B: back to 2, then three blocks of B."""
    branch = Branch()
    walk(branch, A)

    assert walk(branch, B) == [RewindThenConnect(to=ref(2, "2"), height=3), Connect(height=4), Connect(height=5)]
    assert branch.tip == ref(5, "5A")
    assert branch.was_left(block_hash("3"))
    assert branch.was_left(block_hash("4"))


def test_reading_the_same_files_again_publishes_nothing() -> None:
    """A, B, then A, B: what was left stays left, what is current stays current."""
    branch = Branch()
    walk(branch, A + B)

    assert walk(branch, A + B) == []
    assert branch.tip == ref(5, "5A")


def test_there_and_back_again() -> None:
    """With `again`, A after B walks back onto A: its common blocks are skipped."""
    branch = Branch()
    walk(branch, A + B)

    assert walk(branch, A, again=True) == [RewindThenConnect(to=ref(2, "2"), height=3), Connect(height=4)]
    assert branch.tip == ref(4, "4")
    assert not branch.was_left(block_hash("3"))
    assert branch.was_left(block_hash("3A"))
    assert walk(branch, A, again=True) == []
    assert walk(branch, B) == []


def test_again_with_both_files_ends_on_the_last() -> None:
    """With `again` the files are walked as if for the first time."""
    branch = Branch()
    walk(branch, A + B)
    published = walk(branch, A + B, again=True)

    assert published == [
        RewindThenConnect(to=ref(2, "2"), height=3),
        Connect(height=4),
        RewindThenConnect(to=ref(2, "2"), height=3),
        Connect(height=4),
        Connect(height=5),
    ]


def test_a_new_block_on_a_left_branch_needs_again() -> None:
    """Its parent is known but not current: refused with the way out, taken with `again` from the fork point on."""
    branch = Branch()
    walk(branch, A + B)
    longer = [*A, *chain("5", "6", on="4")]
    with pytest.raises(BlockOrphan, match="--again"):
        walk(branch, longer)
    with pytest.raises(BlockOrphan, match="in between"):
        walk(branch, longer[4:], again=True)

    walk(branch, longer, again=True)

    assert branch.tip == ref(6, "6")


def test_an_orphan_is_named() -> None:
    """Block, parent and place stand in the error."""
    branch = Branch()
    with pytest.raises(BlockOrphan, match="with a base"):
        plan(branch, block_hash("1"), block_hash("2"))
    walk(branch, A)
    with pytest.raises(BlockOrphan) as caught:
        plan(branch, block_hash("8"), block_hash("9"), where="blk00000.dat, byte 8")

    for part in (block_hash("9")[::-1].hex(), block_hash("8")[::-1].hex(), "blk00000.dat, byte 8"):
        assert part in str(caught.value)


def test_another_chain_s_first_block_is_refused() -> None:
    """A second genesis belongs to another chain."""
    branch = Branch()
    walk(branch, A)

    with pytest.raises(WrongChain):
        plan(branch, ROOT, block_hash("other"))


def test_lookups() -> None:
    """By hash and by height, on the current branch only."""
    branch = Branch(ref(2, "2"))
    walk(branch, A[3:] + B)

    assert branch.at(2) == branch.ref(block_hash("2")) == ref(2, "2")
    assert branch.at(4) == ref(4, "4A")
    assert branch.ref(block_hash("4")) is None
    assert branch.at(1) is None
    assert branch.at(6) is None


@pytest.mark.parametrize(
    ("new", "parent"),
    [(ref(5, "x"), "3"), (ref(4, "x"), "4"), (ref(6, "x"), "4"), (ref(5, "4"), "4")],
)
def test_events_that_do_not_follow_are_refused(new: BlockRef, parent: str) -> None:
    """A connect goes on top of the tip, at its height plus one, once."""
    branch = Branch()
    walk(branch, A)

    with pytest.raises(WalkInvalid):
        branch.connect(new, block_hash(parent))


def test_a_first_block_without_base_has_no_parent() -> None:
    """An empty branch begins at height 0 with parent zero."""
    with pytest.raises(WalkInvalid):
        Branch().connect(ref(0, "0"), block_hash("x"))
    with pytest.raises(WalkInvalid):
        Branch().connect(ref(1, "0"), ROOT)


@pytest.mark.parametrize("to", [ref(3, "2"), ref(3, "3"), ref(6, "x")])
def test_rewind_to_another_branch_is_refused(to: BlockRef) -> None:
    """A rewind names a block of the current branch, with its height."""
    branch = Branch()
    walk(branch, A + B)

    with pytest.raises(WalkInvalid):
        branch.rewind(to)


@pytest.mark.parametrize("name", ["reorg_btcd", "reorg_floresta"])
def test_real_reorgs(name: str) -> None:
    """There and back on real blocks: the steps that an independent program lists."""
    parts = {"reorg_btcd": ["main", "side"], "reorg_floresta": ["genesis", "A", "B", "A"]}[name]
    branch = Branch()
    for part in parts:
        headers = [parse_header(raw) for raw in chains.load_blocks(name, part)]
        walk(branch, [(header.block_hash, header.parent_hash) for header in headers], again=True)
    last = chains.expected(name)[-1]

    assert branch.tip is not None
    assert (branch.tip.height, branch.tip.block_hash[::-1].hex()) == (last["height"], last["tip"])


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=60))
def test_a_walk_rebuilds_its_branch(choices: list[tuple[int, bool]]) -> None:
    """Any tree in any order: what a walk published, replayed, gives the same branch; read again it gives nothing."""
    blocks: list[tuple[bytes, bytes]] = chain("0")
    for number, (parent, _) in enumerate(choices):
        blocks.append((block_hash(f"n{number}"), blocks[parent % len(blocks)][0]))
    branch, replayed = Branch(), Branch()
    taken: list[tuple[bytes, bytes]] = []
    for own, parent_hash in blocks:
        try:
            (step,) = walk(branch, [(own, parent_hash)])
        except BlockOrphan:
            continue
        taken.append((own, parent_hash))
        if isinstance(step, RewindThenConnect):
            replayed.rewind(step.to)
        replayed.connect(BlockRef(getattr(step, "height"), own), parent_hash)  # noqa: B009

    assert replayed.tip == branch.tip
    assert walk(branch, taken) == []
    assert all(branch.was_left(own) != (branch.ref(own) is not None) for own, _ in taken)
