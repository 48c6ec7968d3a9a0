"""The synthetic chain: the same for the same seed, valid at every block, with the statistics it promises."""

from __future__ import annotations

import chains
import pytest
from blake3 import blake3

from pipeline.block import Block, Op
from pipeline.sources import coins, synthetic
from pipeline.sources.synthetic import FORK_DEPTH_MAX, SyntheticChain
from pipeline.state import UTXO


def test_equal_seeds_give_equal_blocks() -> None:
    """Blocks depend on seed, size and start, on nothing else."""
    first = list(synthetic.blocks(20, changes=50, seed=7))

    assert first == list(synthetic.blocks(20, changes=50, seed=7))
    assert first == list(SyntheticChain(seed=7, changes=50).extend(20))
    assert first != list(synthetic.blocks(20, changes=50, seed=8))


def test_blocks_are_what_they_were() -> None:
    """A golden hash: benchmarks of different versions read the same chain."""
    *_, last = synthetic.blocks(30, changes=100, seed=1)
    ops = last.tables[UTXO.name]

    assert last.ref.block_hash.hex() == "2c697a9c377b944af2abc117365c88c128dc1d7144077e3bc1d4512414d1fb60"
    assert (
        blake3(ops.codes + b"".join(ops.keys) + b"".join(ops.values)).hexdigest()
        == "4884ac38943b7064431f2b623767e4d02214ece9de9c767f964ff24baa2fee7e"
    )


def test_blocks_follow_each_other() -> None:
    """Heights, parents and times go on from where the chain starts."""
    parent = b"\x11" * 32
    for index, block in enumerate(
        synthetic.blocks(5, changes=9, seed=1, first_height=100, parent_hash=parent, time_s=1_000)
    ):
        assert block.ref.height == 100 + index
        assert block.parent_hash == parent
        assert block.time_s == 1_000 + 600 * (100 + index)
        parent = block.ref.block_hash


@pytest.mark.parametrize("changes", [1, 2, 3, 10, 1_000])
def test_every_block_is_valid(changes: int) -> None:
    """Creates find nothing, deletes find something, keys stand once in a block; values are coins."""
    model = chains.CoinModel()
    for block in synthetic.blocks(40, changes=changes, seed=3):
        ops = block.tables[UTXO.name]
        assert len(set(ops.keys)) == len(ops.keys)
        assert {len(key) for key in ops.keys} == {UTXO.key_bytes}
        model.connect(block)

    for value in model.coins.values():
        assert coins.encode(coins.decode(value)) == value


def test_statistics_hold() -> None:
    """0.8 spends a create, half of them young, 60-byte values, scripts of 50 bytes."""
    born: dict[bytes, int] = {}
    young = spends = creates = value_bytes = script_bytes = 0
    chain = SyntheticChain(seed=5, changes=2_000)
    for block in chain.extend(100):
        ops = block.tables[UTXO.name]
        deleted = ops.codes.count(Op.DELETE)
        assert block.op_count == 2_000
        for key in ops.keys[:deleted]:
            young += block.ref.height - born.pop(key) <= 10
        born |= dict.fromkeys(ops.keys[deleted:], block.ref.height)
        if block.ref.height:
            spends += deleted
            creates += len(ops.values)
        value_bytes += sum(map(len, ops.values))
        script_bytes += sum(len(coins.decode(value).script) for value in ops.values)
    made = creates + 2_000

    assert chain.live_count == len(born)
    assert 0.79 < spends / creates < 0.81
    assert 0.5 < young / spends < 0.85  # half, and whatever of the other half happens to be young
    assert 56 < value_bytes / made < 62
    assert 46 < script_bytes / made < 54


def test_a_fork_is_another_branch() -> None:
    """Another salt leaves the common blocks and shares none after them; both branches are valid."""
    chain, model = SyntheticChain(seed=2, changes=60), chains.CoinModel()
    main = list(chain.extend(30))
    for block in main:
        model.connect(block)
    tip = chain.fork(12, salt=1)
    for _ in range(12):
        model.disconnect()
    assert tip == chain.tip == main[17].ref
    assert chain.live_count == len(model.coins)
    side = list(chain.extend(15))
    for block in side:
        model.connect(block)

    assert side[0].parent_hash == main[17].ref.block_hash
    assert not keys_of(side) & created(main[18:])
    assert chain.live_count == len(model.coins)


@pytest.mark.parametrize(("length", "depth"), [(130, FORK_DEPTH_MAX), (130, 1), (30, 30), (30, 25), (5, 5)])
def test_going_back_and_on_with_the_same_salt_repeats_the_blocks(length: int, depth: int) -> None:
    """Equal block hashes mean equal blocks, also after other branches were tried."""
    chain = SyntheticChain(seed=2, changes=30)
    main = list(chain.extend(length))
    chain.fork(depth, salt=9)
    list(chain.extend(depth // 2))
    chain.fork(depth // 2, salt=0)

    assert list(chain.extend(depth)) == main[length - depth :]


@pytest.mark.parametrize(("length", "depth"), [(130, 101), (30, 31), (5, -1)])
def test_a_fork_too_deep_is_refused(length: int, depth: int) -> None:
    """100 blocks, or as many as the chain has."""
    chain = SyntheticChain(seed=2, changes=5)
    list(chain.extend(length))

    with pytest.raises(ValueError, match="deep"):
        chain.fork(depth, salt=1)


def test_two_deep_forks_in_a_row_are_refused() -> None:
    """What the first one took off is not there for the second."""
    chain = SyntheticChain(seed=2, changes=5)
    list(chain.extend(130))
    chain.fork(100, salt=1)

    with pytest.raises(ValueError, match="deep"):
        chain.fork(1, salt=2)


def keys_of(blocks: list[Block]) -> set[bytes]:
    return {key for block in blocks for key in block.tables[UTXO.name].keys}


def created(blocks: list[Block]) -> set[bytes]:
    keys = set()
    for block in blocks:
        ops = block.tables[UTXO.name]
        keys |= {key for code, key in zip(ops.codes, ops.keys, strict=True) if code == Op.CREATE}
    return keys
