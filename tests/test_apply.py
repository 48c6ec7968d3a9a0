"""A block on a state: strict ops, netting, before-values, and the same in references and whole."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from walks import NO_PARENT, block, coin, make_walk, ref

from pipeline.apply import apply_block, apply_references, apply_whole, describe_key
from pipeline.block import Block, Connect, Op
from pipeline.delta import encode_references
from pipeline.diff import decode_reference_body, join_tables
from pipeline.errors import ApplyConflict, BlockInvalid
from pipeline.state import UTXO, Change

CREATE, DELETE, PUT = Op

State = dict[bytes, bytes]


class Held(dict[bytes, bytes]):
    """What a store holds, by storage key; counts its reads."""

    reads = 0

    @classmethod
    def of(cls, state: State) -> Held:
        held = cls()
        for key, value in state.items():
            (at,) = UTXO.storage_keys([key])
            stored = UTXO.with_value(key, held.get(at), value)
            assert stored is not None
            held[at] = stored
        return held

    def read(self, storage_keys: Sequence[bytes]) -> list[bytes | None]:
        self.reads += 1
        return list(map(self.get, storage_keys))

    def write(self, writes: dict[bytes, bytes | None]) -> Held:
        return Held({key: value for key, value in {**self, **writes}.items() if value is not None})


def at_seven(*ops: tuple[Op, bytes] | tuple[Op, bytes, bytes]) -> Block:
    return block(ref(7), NO_PARENT, *ops)


ONE = coin(1)
STATE = {ONE: b"one"}


@pytest.mark.parametrize(
    ("ops", "changes"),
    [
        ([(CREATE, coin(2), b"v")], [Change(coin(2), None, b"v")]),
        ([(DELETE, ONE)], [Change(ONE, b"one", None)]),
        ([(PUT, ONE, b"v")], [Change(ONE, b"one", b"v")]),
        ([(PUT, coin(2), b"")], [Change(coin(2), None, b"")]),
        ([(PUT, ONE, b"one")], []),
        ([(CREATE, coin(2), b"v"), (DELETE, coin(2))], []),
        ([(DELETE, ONE), (CREATE, ONE, b"one")], []),
        ([(DELETE, ONE), (CREATE, ONE, b"v")], [Change(ONE, b"one", b"v")]),
        ([(PUT, ONE, b"v"), (PUT, ONE, b"w")], [Change(ONE, b"one", b"w")]),
        ([(PUT, ONE, b"v"), (DELETE, ONE)], [Change(ONE, b"one", None)]),
        ([(CREATE, coin(2), b"v"), (PUT, coin(2), b"w")], [Change(coin(2), None, b"w")]),
        ([(DELETE, ONE), (CREATE, ONE, b"v"), (DELETE, ONE), (CREATE, ONE, b"one")], []),
        ([(CREATE, coin(3), b"3"), (DELETE, ONE), (CREATE, coin(0), b"0")], None),
        ([], []),
    ],
)
def test_ops_net_to_changes(ops: list, changes: list[Change] | None) -> None:  # type: ignore[type-arg]
    """One change a key, from the value below the block to the last one in it; keys ascend."""
    if changes is None:
        changes = [Change(coin(0), None, b"0"), Change(ONE, b"one", None), Change(coin(3), None, b"3")]
    diff = apply_block(at_seven(*ops), Held.of(STATE).read).diff

    assert (diff.tables[1].changes() if diff.tables else []) == changes


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([(CREATE, ONE, b"v")], "is created, but exists already"),
        ([(CREATE, coin(2), b"v"), (CREATE, coin(2), b"v")], "is created, but exists already"),
        ([(PUT, coin(2), b""), (CREATE, coin(2), b"v")], "is created, but exists already"),
        ([(DELETE, coin(2))], "is deleted, but does not exist"),
        ([(DELETE, ONE), (DELETE, ONE)], "is deleted, but does not exist"),
        ([(DELETE, coin(1, 0, 1))], "is deleted, but does not exist"),
        ([(DELETE, coin(2)), (CREATE, coin(2), b"v")], "is deleted, but does not exist"),
    ],
)
def test_violation_is_invalid(ops: list, message: str) -> None:  # type: ignore[type-arg]
    """Create must find nothing, delete must find something; a key that shares the short key is something else."""
    with pytest.raises(BlockInvalid, match=message):
        apply_block(at_seven(*ops), Held.of(STATE).read)


def test_violation_names_coin_and_height() -> None:
    """A coin is named as its people write it, with the block's height."""
    key = bytes(range(32)) + (258).to_bytes(4, "big")
    name = "1f1e1d1c1b1a191817161514131211100f0e0d0c0b0a09080706050403020100:258"

    with pytest.raises(BlockInvalid, match=f"block at height 7: utxo {name} is deleted"):
        apply_block(at_seven((DELETE, key)), Held().read)
    assert describe_key(UTXO, key) == name


def test_block_reads_once() -> None:
    """All of a table's keys are read in one multi-get."""
    held = Held.of(STATE)
    apply_block(at_seven((DELETE, ONE), (CREATE, ONE, b"v"), (CREATE, coin(2), b"v")), held.read)

    assert held.reads == 1


def test_fresh_is_where_nothing_stood() -> None:
    """A key created into a bucket that exists is not fresh: leaving it out of a write would leave out the others."""
    applied = apply_block(at_seven((CREATE, coin(1, 0, 1), b"v"), (CREATE, coin(2), b"v")), Held.of(STATE).read)

    assert set(applied.effect.fresh) == set(UTXO.storage_keys([coin(2)]))


@pytest.mark.parametrize("seed", range(8))
def test_three_ways_agree(seed: int) -> None:
    """A block, its references and its whole diff make the same writes; the inverse takes them back."""
    held, state = Held(), {}
    for step in make_walk(seed, 40, finality=0):
        if not isinstance(step.event, Connect):
            continue
        applied = apply_block(step.event.block, held.read)
        body = join_tables(
            {number: encode_references(table, applied.shared[number]) for number, table in applied.diff.tables.items()}
        )
        after = held.write(applied.effect.writes)
        state = dict(step.contents[0])

        assert after == Held.of(state)
        assert apply_references(decode_reference_body(body), held.read) == (applied.diff, applied.effect)
        assert apply_whole(applied.diff, held.read) == applied.effect
        assert after.write(apply_whole(applied.diff.inverted(), after.read).writes) == held
        held = after
    assert state


def test_many_keys_make_the_same_writes() -> None:
    """Large blocks, whose keys are placed all at once, end where small ones do."""
    random = Random(1)
    keys = sorted({coin(random.randrange(250), random.randrange(9), random.randrange(2)) for _ in range(600)})
    state = dict.fromkeys(keys[::2], b"v")
    applied = apply_block(
        at_seven(*[(DELETE, key) for key in keys[::2]], *[(CREATE, key, b"w") for key in keys[1::2]]),
        Held.of(state).read,
    )

    assert Held.of(state).write(applied.effect.writes) == Held.of(dict.fromkeys(keys[1::2], b"w"))


@pytest.mark.parametrize("state", [{}, {ONE: b"other"}, {coin(1, 0, 1): b"one"}, {ONE: b"one", coin(2): b"v"}])
def test_whole_diff_meets_only_its_state(state: State) -> None:
    """Every before-value must be what the state holds, absence included."""
    diff = apply_block(at_seven((DELETE, ONE), (CREATE, coin(2), b"v")), Held.of(STATE).read).diff

    with pytest.raises(ApplyConflict, match="does not hold the value"):
        apply_whole(diff, Held.of(state).read)


def test_references_do_not_create_what_exists() -> None:
    """A created key is not named by reference, so its absence is looked up."""
    applied = apply_block(at_seven((CREATE, coin(2), b"v")), Held.of(STATE).read)
    body = join_tables({1: encode_references(applied.diff.tables[1], frozenset())})

    with pytest.raises(ApplyConflict, match="exists before it is created"):
        apply_references(decode_reference_body(body), Held.of({coin(2): b"x"}).read)
