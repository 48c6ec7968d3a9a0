"""What an object store can restore: for every height that is promised the snapshot it starts from, or the hole.

Decided from names and sizes alone. What the objects hold is for `verify` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pipeline.archive_names import RangeObject
from pipeline.plans import Hop, SegmentObject
from pipeline.retention import Verdict, window_start
from pipeline.routes import History, Ways


class Span(NamedTuple):
    """Heights, both inclusive. ``start``: the height of the snapshot from which they are restored; None: from the
    empty state before the first block."""

    first: int
    last: int
    start: int | None


class Hole(NamedTuple):
    """Heights, both inclusive, that are promised and that nothing leads to."""

    first: int
    last: int
    why: str


class Restorable(NamedTuple):
    """One generation. ``first``, ``last``: the window, in which every height is promised; None: it promises none."""

    generation: bytes
    first: int | None
    last: int | None
    spans: list[Span]
    holes: list[Hole]


def restorable(
    generation: bytes,
    verdicts: Iterable[Verdict],
    segments: Sequence[SegmentObject],
    ranges: Sequence[RangeObject],
    history: History,
    *,
    everything: bool,
    from_empty: bool,
    has_expired: bool = False,
) -> Restorable:
    """One generation, by its snapshots that are kept and by what is archived of it. ``everything``: no rule is set, so
    that whatever the object store has is promised, from its first height on. ``from_empty``: the archive begins with
    the chain's first block. ``has_expired``: without a window only the heights of snapshots that are kept are promised.
    """
    kept = [one for one in verdicts if one.keeps and one.snapshot.name.generation == generation]
    whole = sorted(
        one.snapshot.name.height for one in kept if one.snapshot.manifest is not None and not one.snapshot.lacks
    )
    starts: list[tuple[int, int | None]] = [(height, height) for height in whole]
    hops: list[Hop] = [*segments, *ranges]
    firsts = [hop.name.first for hop in hops]
    window = None if everything else window_start(kept, generation)
    has_window = window is not None or not has_expired
    if firsts and from_empty and has_window:
        starts.insert(0, (min(firsts) - 1, None))
    if not starts:
        return Restorable(generation, None, None, [], [])
    ways, ends = [], []
    for shard in range(history.shards):
        mine = [one for one in segments if one.name.shard == shard]
        mine_ranges = [one for one in ranges if one.name.shard == shard]
        ways.append(Ways(mine, mine_ranges))
        ends.append(max((hop.name.last for hop in hops if hop.name.shard == shard), default=-1))
    spans: list[Span] = []
    for at, start in starts:
        led = [_led_to(one, at) for one in ways]
        for first, last in _meet(led):
            if start is not None or last > at:
                spans.append(Span(max(first, at if start is not None else at + 1), last, start))
    points = [(height, height) for height in (one.snapshot.name.height for one in kept)]
    if not has_window:
        return Restorable(generation, None, None, _first_ways(spans), sorted(set(_holes(spans, points))))
    first = min(at if start is not None else at + 1 for at, start in starts) if window is None else window
    last = max(min(ends), *whole) if whole else min(ends)
    return Restorable(generation, first, last, _first_ways(spans), sorted(set(_holes(spans, [(first, last), *points]))))


def _led_to(ways: Ways, start: int) -> list[tuple[int, int]]:
    """The heights that hops lead to from a height, as runs in their order; itself among them."""
    runs = [(start, start)]
    for at in sorted(height for height in ways.heights | {start} if height >= start):
        if any(first <= at <= last for first, last in runs):
            for hop in ways.hops(at):
                runs.append((hop.name.last, hop.name.last) if isinstance(hop, RangeObject) else (at + 1, hop.name.last))
            runs = _joined(runs)
    return runs


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in their order, none beside or inside another."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined


def _meet(by_shard: Sequence[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The heights that all shards are led to."""
    met = by_shard[0]
    for runs in by_shard[1:]:
        met = [
            (max(first, other_first), min(last, other_last))
            for first, last in met
            for other_first, other_last in runs
            if max(first, other_first) <= min(last, other_last)
        ]
    return met


def _first_ways(spans: Iterable[Span]) -> list[Span]:
    """Each height once, from the nearest snapshot below it."""
    ways: list[Span] = []
    for one in sorted(spans, key=lambda span: (span.start is not None, span.start or 0), reverse=True):
        left = [(one.first, one.last)]
        for other in ways:
            left = [cut for first, last in left for cut in _without(first, last, other)]
        ways += [Span(first, last, one.start) for first, last in left]
    return sorted(ways, key=lambda span: span.first)


def _without(first: int, last: int, taken: Span) -> Iterator[tuple[int, int]]:
    if first < taken.first:
        yield first, min(last, taken.first - 1)
    if taken.last < last:
        yield max(first, taken.last + 1), last


def _holes(spans: Iterable[Span], wanted: Iterable[tuple[int, int]]) -> Iterator[Hole]:
    runs = _joined((span.first, span.last) for span in spans)
    for first, last in wanted:
        at = first
        for covered_first, covered_last in runs:
            if covered_last < at or at > last:
                continue
            if covered_first > at:
                yield Hole(at, min(last, covered_first - 1), _why(at))
            at = max(at, covered_last + 1)
        if at <= last:
            yield Hole(at, last, _why(at))


def _why(height: int) -> str:
    return f"nothing leads to height {height}: no segment has it behind a snapshot that is there"
