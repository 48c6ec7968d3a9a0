"""Whole diffs: bodies of several tables, inverting and squashing against dicts, counts and vectors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from walks import coin

from pipeline.commitment import lthash
from pipeline.diff import (
    EMPTY_COUNTS,
    EMPTY_VECTORS,
    Diff,
    Portion,
    decode_reference_body,
    decode_whole_body,
    join_tables,
    split_tables,
    squash,
)
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.state import UTXO, Change
from pipeline.table_diff import table_diff

State = dict[bytes, bytes]
EMPTY_TABLE = bytes(12) + (bytes(4) + b"\x01") * 3 + b"\x01" * 4

states = st.dictionaries(
    st.builds(coin, st.integers(0, 3), st.integers(0, 1), st.integers(0, 1)), st.binary(max_size=2), max_size=8
)


def between(before: State, after: State) -> Diff:
    keys = sorted(before.keys() | after.keys())
    changes = [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    return Diff(tables={1: table_diff(UTXO, changes)} if changes else {})


def applied(diff: Diff, state: State) -> State:
    held = dict(state)
    for table in diff.tables.values():
        for key, before, after in table.changes():
            assert held.pop(key, None) == before
            if after is not None:
                held[key] = after
    return held


def vectors_of(state: State) -> dict[int, bytes]:
    accumulator = lthash.Accumulator()
    accumulator.add(lthash.elements(1, list(state), list(state.values())) if state else [])
    return {1: accumulator.vector()}


@given(states, states, st.integers(1, 12))
def test_portions_sum_up(before: State, after: State, total: int) -> None:
    """Gains made portion by portion, in any order and by whomever, are those of the whole."""
    diff = between(before, after)
    gains = dict.fromkeys(diff.tables, lthash.ZERO)
    for number in reversed(range(total)):
        gains = lthash.combine(gains, diff.gains([Portion(number, total)]))

    assert gains == diff.gains() == diff.gains(Portion(number, total) for number in range(total))


@given(states, states)
def test_diff_leads_there_and_back(before: State, after: State) -> None:
    """A diff takes one state to the other, its inverse back; vectors and counts go along."""
    diff = between(before, after)

    assert applied(diff, before) == after
    assert applied(diff.inverted(), after) == before
    assert diff.advance(vectors_of(before)) == vectors_of(after)
    assert diff.inverted().advance(vectors_of(after)) == vectors_of(before)
    assert diff.count({1: len(before)}) == {1: len(after)}
    assert diff.op_count == sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


@given(states, states)
def test_body_round_trip(before: State, after: State) -> None:
    """A diff's body is read back as the same diff."""
    diff = between(before, after)

    assert decode_whole_body(join_tables(diff.encode().columns)) == diff


@given(st.lists(states, min_size=1, max_size=5))
def test_squash_is_the_diff_of_the_ends(path: list[State]) -> None:
    """Consecutive diffs squash to the one from the first state to the last: what came back is left out."""
    diffs = [between(before, after) for before, after in itertools.pairwise(path)]

    assert squash(diffs) == between(path[0], path[-1])


def test_squash_refuses_what_does_not_follow() -> None:
    """A before-value that is not the last after-value is a hole in the history."""
    one, two = between({}, {coin(1): b"a"}), between({coin(1): b"b"}, {})

    with pytest.raises(FrameCorrupt, match="do not follow"):
        squash([one, two])
    with pytest.raises(FrameCorrupt, match="do not follow"):
        squash([one, one])


def test_empty_state_has_empty_vectors_and_counts() -> None:
    """A diff without tables leaves the empty state as it is."""
    assert Diff(tables={}).advance(EMPTY_VECTORS) == {1: lthash.ZERO}
    assert Diff(tables={}).count(EMPTY_COUNTS) == {1: 0}


def test_tables_are_joined_in_order() -> None:
    """A count, then id, length and columns of each table, ascending."""
    body = join_tables({2: b"two", 1: b"one"})

    assert body == b"\x02" + b"\x01\x03\0\0\0one" + b"\x02\x03\0\0\0two"
    assert bytes(split_tables(join_tables({1: b"one"}))[1]) == b"one"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01",
        b"\x01\x01\0\0\0",
        b"\x01\x01\x04\0\0\0one",
        b"\0x",
        b"\x01\x01\x02\0\0\0one",
        b"\x02\x01\0\0\0\0\x01\0\0\0\0",
    ],
    ids=["nothing", "no-head", "head-cut", "cut", "trailing", "longer", "twice"],
)
def test_malformed_body_is_corrupt(body: bytes) -> None:
    """Tables ascend, fit, and fill the body."""
    with pytest.raises(FrameCorrupt):
        split_tables(body)


def test_unknown_table_is_unsupported() -> None:
    """A table that this build does not know is told apart from damage."""
    with pytest.raises(Unsupported, match="table id 7"):
        split_tables(join_tables({7: b""}))


def test_table_without_changes_is_corrupt() -> None:
    """In both forms a table that changes nothing is left out: another encoding would have another id."""
    references = bytes(12) + bytes(4) + b"\x01\x01" + (bytes(4) + (bytes(4) + b"\x01") * 2) + b"\x01"
    references += bytes(4) + (bytes(4) + b"\x01") * 2

    with pytest.raises(FrameCorrupt, match="without changes"):
        decode_whole_body(join_tables({1: EMPTY_TABLE}))
    with pytest.raises(FrameCorrupt, match="without changes"):
        decode_reference_body(join_tables({1: references}))
