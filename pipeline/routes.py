"""Routes of restores: which snapshot, range diffs and segments lead to a height at the least cost.

Decided from what a listing says, before anything is read. A **start** is a snapshot, or the empty state where the
archive begins at the first block. Of all ways from a start to the height the cheapest is taken: requests, bytes that
come in, bytes of each kind that are applied, by the rates of `plans`. All shards begin at one snapshot and end at one
height; each takes its own hops in between. Newer generations are preferred, whatever they cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.archive import SEGMENT_BLOCKS
from pipeline.archive_names import RangeObject
from pipeline.errors import NotFound
from pipeline.plans import RATES, Hop, Rates, SegmentObject, SnapshotObject, fetch_s, ingest_s, newest_names, step_of
from pipeline.position import BEFORE_FIRST_HEIGHT
from pipeline.snapshot import ManifestName


class History(NamedTuple):
    """What names do not say of a generation."""

    number: int
    shards: int


class Ways:
    """The hops of one shard, by where they begin."""

    def __init__(self, segments: Iterable[SegmentObject], ranges: Iterable[RangeObject]) -> None:
        self._ranges: dict[int, list[RangeObject]] = defaultdict(list)
        self._segments: dict[int, list[SegmentObject]] = defaultdict(list)
        self.heights: set[int] = set()  # at which a hop ends, or a range diff begins
        for one in ranges:
            self._ranges[one.name.first].append(one)
            self.heights |= {one.name.first - 1, one.name.last}
        for segment in segments:
            name = segment.name
            for slot in range(name.first // SEGMENT_BLOCKS, name.last // SEGMENT_BLOCKS + 1):
                self._segments[slot].append(segment)
            self.heights.add(name.last)

    def hops(self, at: int) -> Iterator[Hop]:
        """Those that lead on from a height."""
        yield from self._ranges.get(at + 1, ())
        for segment in self._segments.get((at + 1) // SEGMENT_BLOCKS, ()):
            if segment.name.first <= at + 1 <= segment.name.last:
                yield segment

    def furthest(self, starts: Iterable[int]) -> dict[int, int]:
        """How far they lead from each height of theirs, and of ``starts``."""
        reach: dict[int, int] = {}
        for at in sorted(self.heights | set(starts), reverse=True):
            reach[at] = max((reach[hop.name.last] for hop in self.hops(at)), default=at)
        return reach

    def cheapest(self, height: int, starts: Iterable[int], rates: Rates) -> dict[int, tuple[float, Hop | None]]:
        """To ``height`` from each height from which they lead there: the seconds, and the first hop."""
        ways: dict[int, tuple[float, Hop | None]] = {height: (0.0, None)}
        for at in sorted(one for one in self.heights | set(starts) if one < height)[::-1]:
            best: tuple[float, Hop | None] = (math.inf, None)
            for hop in self.hops(at):
                stop = hop.name.last if isinstance(hop, RangeObject) else min(hop.name.last, height)
                if stop in ways:
                    step = step_of(hop, at, stop)
                    cost = ways[stop][0] + step.apply_s + fetch_s(step.requests, step.size_bytes, rates)
                    best = min(best, (cost, hop), key=lambda way: way[0])
            if best[1] is not None:
                ways[at] = best
        return ways

    def path(self, ways: Mapping[int, tuple[float, Hop | None]], at: int) -> Iterator[Hop]:
        """The hops of a cheapest way."""
        while (hop := ways[at][1]) is not None:
            yield hop
            at = hop.name.last if hop.name.last in ways else max(ways)


class Route(NamedTuple):
    """What a plan is made of once the snapshot's manifest was read."""

    generation: bytes
    height: int
    snapshot: ManifestName | None
    segments: tuple[SegmentObject, ...]
    ranges: tuple[RangeObject, ...]


def find_route(
    snapshots: Sequence[SnapshotObject],
    segments: Sequence[SegmentObject],
    ranges: Sequence[RangeObject],
    height: int | None = None,
    *,
    histories: Mapping[bytes, History],
    needs_snapshot: bool = False,
    rates: Rates = RATES,
) -> Route:
    """The way to ``height`` (None: as far as the archive leads), all of one chain. ``histories``: of each generation.
    ``needs_snapshot``: the archive alone will not do, where a snapshot leads there too.

    Raises NotFound, naming what is missing; ArchiveConflict if two snapshots of the height that it would start from
    have different roots.
    """
    found = {one.name.generation for one in snapshots}
    found |= {one.name.generation for one in segments} | {one.name.generation for one in ranges}
    missing = ""
    for generation in sorted(found, key=lambda one: (histories[one].number, one), reverse=True):
        routes = _Routes(
            generation,
            [one for one in snapshots if one.name.generation == generation],
            [one for one in segments if one.name.generation == generation],
            [one for one in ranges if one.name.generation == generation],
            histories[generation],
            rates,
        )
        route = routes.to(height, needs_snapshot=needs_snapshot)
        if route is not None:
            return route
        missing = missing or routes.missing(height)
    wanted = "any height" if height is None else f"height {height}"
    raise NotFound(
        f"nothing in the object store leads to {wanted}{missing or ': no snapshot and no archive is there'}",
        way_out="`stateferry status` lists what there is",
    )


class _Start(NamedTuple):
    height: int
    snapshot: SnapshotObject | None

    def cost_s(self, rates: Rates) -> float:
        if self.snapshot is None:
            return 0.0
        return fetch_s(self.snapshot.parts + 1, self.snapshot.size_bytes, rates) + ingest_s(self.snapshot.size_bytes)


class _Routes:
    """One generation's."""

    def __init__(
        self,
        generation: bytes,
        snapshots: Sequence[SnapshotObject],
        segments: Sequence[SegmentObject],
        ranges: Sequence[RangeObject],
        history: History,
        rates: Rates,
    ) -> None:
        self._generation = generation
        self._rates = rates
        self._starts = [_Start(one.name.height, one) for one in snapshots]
        firsts = [one.name.first for one in segments] + [one.name.first for one in ranges]
        self._begin = min(firsts, default=None)
        # Only a first generation can begin before the first block; later ones begin from a manifest.
        self._empty = [] if self._begin is None or history.number > 1 else [_Start(self._begin - 1, None)]
        self._ways = [
            Ways(
                [one for one in segments if one.name.shard == shard],
                [one for one in ranges if one.name.shard == shard],
            )
            for shard in range(history.shards)
        ]

    def to(self, height: int | None, *, needs_snapshot: bool) -> Route | None:
        """None: nothing leads there. An archive that begins above height 0 may begin above the first block too, so its
        empty state is the last thing to try."""
        if self._begin == 0 and not needs_snapshot:
            return self._cheapest([*self._starts, *self._empty], height)
        return self._cheapest(self._starts, height) or self._cheapest(self._empty, height)

    def _cheapest(self, starts: Sequence[_Start], height: int | None) -> Route | None:
        at = {start.height for start in starts}
        for target in self._targets(starts) if height is None else [height]:
            ways = [one.cheapest(target, at, self._rates) for one in self._ways]
            fitting = [
                start
                for start in starts
                if all(start.height in one for one in ways) and (start.snapshot or start.height < target)
            ]
            if not fitting:
                continue
            best = min(fitting, key=lambda start: start.cost_s(self._rates) + sum(one[start.height][0] for one in ways))
            newest_names(
                (start.snapshot.name for start in starts if start.snapshot), best.height
            )  # raises if two differ
            hops = [hop for one, way in zip(self._ways, ways, strict=True) for hop in one.path(way, best.height)]
            return Route(
                generation=self._generation,
                height=target,
                snapshot=None if best.snapshot is None else best.snapshot.name,
                segments=tuple(hop for hop in hops if isinstance(hop, SegmentObject)),
                ranges=tuple(hop for hop in hops if isinstance(hop, RangeObject)),
            )
        return None

    def _targets(self, starts: Sequence[_Start]) -> list[int]:
        """Heights that all shards may come to, highest first."""
        at = {start.height for start in starts}
        reaches = [one.furthest(at) for one in self._ways]
        highest = {start.height: min(reach[start.height] for reach in reaches) for start in starts}
        ends = at.union(*(one.heights for one in self._ways))
        top = max(highest.values(), default=BEFORE_FIRST_HEIGHT)
        return sorted((end for end in ends if min(at) <= end <= top), reverse=True) if at else []

    def missing(self, height: int | None) -> str:
        """Why nothing leads there."""
        starts = [start for start in (*self._empty, *self._starts) if height is None or start.height < height]
        if not starts:
            begins = self._begin if self._begin is not None else min(start.height for start in self._starts)
            return f": the archive begins at height {begins}"
        at = max(start.height for start in starts)
        reaches = [one.furthest([at])[at] for one in self._ways]
        reached = min(reaches)
        of_shard = f" of shard {reaches.index(reached)}" if len(reaches) > 1 else ""
        return f": from height {at} the archive leads to {reached}, block {reached + 1}{of_shard} is missing"
