"""Comparing by roots, partials and keys: what is found is what differs, and what is equal is not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison import (
    Difference,
    Heights,
    Point,
    aligned,
    differing_changes,
    differing_entries,
    differing_runs,
    first_difference,
)
from pipeline.diff import Diff
from pipeline.parts import Part
from pipeline.state import UTXO, Change
from pipeline.table_diff import table_diff
from pipeline.verify import audit
from tests.walks import coin, ref

Held = dict[bytes, bytes]


def stored(state: Held) -> list[tuple[bytes, bytes]]:
    """A state of whole keys as a store's entries."""
    entries: Held = {}
    for key, value in state.items():
        (at,) = UTXO.storage_keys([key])
        entries[at] = UTXO.with_value(key, entries.get(at), value) or b""
    return sorted(entries.items())


def cut(entries: Sequence[tuple[bytes, bytes]], sizes: Iterator[int]) -> list[Part]:
    """Entries as parts of so many each."""
    parts, at = [], 0
    while at < len(entries):
        run = entries[at : at + next(sizes)]
        found = audit(iter(run))
        parts.append(
            Part(
                name=f"part-{len(parts)}",
                size_bytes=1,
                digest=bytes(32),
                keys=found.keys,
                first_key=run[0][0],
                last_key=run[-1][0],
                partials=found.vectors,
            )
        )
        at += len(run)
    return parts


def state(random: Random, keys: int) -> Held:
    return {coin(random.randrange(250), random.randrange(2), random.randrange(2)): b"%d" % at for at in range(keys)}


def expected(one: Held, other: Held) -> list[Difference]:
    return [
        Difference("utxo", key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_states_part_by_part(seed: int) -> None:
    """However both are cut, the runs of parts that differ hold exactly the keys that differ."""
    random = Random(seed)
    one = state(random, random.randrange(120))
    other = dict(one)
    for _ in range(random.randrange(4)):
        other.pop(random.choice([*other, None]), None)
        other[coin(random.randrange(250))] = random.randbytes(3)
    a, b = stored(one), stored(other)
    parts_a = cut(a, iter(lambda: random.randrange(1, 9), 0))
    parts_b = cut(b, iter(lambda: random.randrange(1, 9), 0))
    found: list[Difference] = []
    for run_a, run_b in differing_runs(parts_a, parts_b):
        found += differing_entries(within(a, run_a), within(b, run_b))
    runs = list(aligned(parts_a, parts_b))

    assert found == expected(one, other)
    assert [part for run, _ in runs for part in run] == parts_a
    assert [part for _, run in runs for part in run] == parts_b


def within(entries: list[tuple[bytes, bytes]], parts: Sequence[Part]) -> Iterator[tuple[bytes, bytes]]:
    return (entry for entry in entries if any(part.first_key <= entry[0] <= part.last_key for part in parts))


def test_equal_parts_are_not_read() -> None:
    """One value of forty parts: one part of each side is to be read."""
    one = {coin(number): b"%d" % number for number in range(200)}
    other = one | {coin(77): b"other"}
    runs = list(differing_runs(cut(stored(one), iter([5] * 40)), cut(stored(other), iter([5] * 40))))

    assert [(len(a), len(b)) for a, b in runs] == [(1, 1)]
    assert runs[0][0][0].first_key <= UTXO.storage_keys([coin(77)])[0] <= runs[0][0][0].last_key


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=5), st.integers(0, 400))
def test_the_first_height(runs: list[tuple[int, int]], parting: int) -> None:
    """The first height at or above the one where two histories part, and the one before it, by few looks."""
    heights = Heights([])
    for start, count in runs:
        if not any(run.start <= start + count and start <= run.stop for run in heights.runs):
            heights = Heights([*heights.runs, range(start, start + count)])
    everything = [height for run in heights.runs for height in run]
    looks: list[int] = []

    def is_alike(height: int) -> bool:
        looks.append(height)
        return height < parting

    above = [height for height in everything if height >= parting]
    below = [height for height in everything if height < parting]

    assert first_difference(heights, is_alike) == ((above[0], below[-1] if below else None) if above else None)
    assert len(looks) <= 2 + len(everything).bit_length()


def test_heights_in_common() -> None:
    """Runs cut each other."""
    one, other = Heights([range(10, 20), range(0, 5)]), Heights([range(3, 12), range(18, 30)])

    assert one.common(other).runs == [range(3, 5), range(10, 12), range(18, 20)]
    assert [one.common(other)[at] for at in range(6)] == [3, 4, 10, 11, 18, 19]


def test_points() -> None:
    """Within a generation frame ids decide, where both are known; else block and root."""
    point = Point(ref(5), b"r" * 32, b"g" * 16, b"i" * 32)

    assert point.is_like(point)
    assert not point.is_like(point._replace(frame_id=b"j" * 32))
    assert point.is_like(point._replace(frame_id=b""))
    assert point.is_like(point._replace(generation=b"h" * 16, frame_id=b"j" * 32))
    assert not point.is_like(point._replace(frame_id=b"", root=b"s" * 32))
    assert not point.is_like(point._replace(generation=b"h" * 16, ref=ref(5, "b")))


def test_changes_on_equal_states() -> None:
    """Keys that end alike are left out; where one side did nothing, the value before stands."""
    one = Diff(
        tables={
            1: table_diff(
                UTXO,
                [
                    Change(coin(1), None, b"new"),
                    Change(coin(2), b"old", b"a"),
                    Change(coin(3), b"old", None),
                    Change(coin(4), b"old", b"same"),
                ],
            )
        }
    )
    other = Diff(tables={1: table_diff(UTXO, [Change(coin(2), b"old", b"b"), Change(coin(4), b"old", b"same")])})

    assert list(differing_changes([one], [other])) == [
        Difference("utxo", coin(1), b"new", None),
        Difference("utxo", coin(2), b"a", b"b"),
        Difference("utxo", coin(3), None, b"old"),
    ]
    assert list(differing_changes([one], [Diff(tables={})]))[3] == Difference("utxo", coin(4), b"same", b"old")
