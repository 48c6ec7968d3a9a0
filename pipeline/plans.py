"""Plans of restores: what will be fetched and applied, step by step, and what that costs.

A **hop** leads a shard from one height to a higher one: a range diff from the height below its first block to its last;
a segment from any height inside, or right below, to any other. `routes` finds the hops.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.archive_names import RangeObject, SegmentName
from pipeline.errors import ArchiveConflict, UsageError
from pipeline.parts import Part
from pipeline.position import BEFORE_FIRST_HEIGHT
from pipeline.snapshot import Manifest, ManifestName

OPEN_S = 0.05
INGEST_S = 0.003
INGEST_S_PER_BYTE = 0.05e-9
RANGE_S_PER_BYTE = 135e-9
FRAME_S_PER_BYTE = 135e-9
FRAME_S = 0.0004
"""Rates of a restore, measured on a core of an EPYC: 290 frames of 2,000 changes, 47.9 MB, took 6.8 s, the range diffs
of 256 of those blocks, 12.8 MB, 1.8 s (`stateferry bench archive`); snapshots by `bench restore`."""
_BYTES_PER_KEY = 60
"""Of a snapshot or a range diff: what is known of keys where no manifest says their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What differs from place to place by more than twice; whoever plans may have measured it. Seconds; as they stand,
    of objects in a local folder, and a core of an EPYC."""

    request: float = 0.0006
    byte: float = 1.5e-9
    start: float = 0.3  # of a helper process
    key: float = 1.5e-6  # hashed on one core


RATES = Rates()


class SegmentObject(NamedTuple):
    """A segment as a listing shows it."""

    name: SegmentName
    size_bytes: int


class SnapshotObject(NamedTuple):
    """A snapshot as a listing shows it. ``size_bytes``: of all its parts."""

    name: ManifestName
    size_bytes: int
    parts: int


Hop = SegmentObject | RangeObject


class Step(NamedTuple):
    """One thing to do, from one height to another. ``shard`` -1: all of them."""

    kind: str  # snapshot, range, frames
    name: str
    shard: int
    from_height: int
    to_height: int
    requests: int
    size_bytes: int
    apply_s: float  # estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a restore will take, in seconds, by what it does."""

    fetch_s: float
    ingest_s: float
    ranges_s: float
    frames_s: float
    prove_s: float  # 0: it is not proven

    @property
    def seconds(self) -> float:
        return self.fetch_s + self.ingest_s + self.ranges_s + self.frames_s + self.prove_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """``manifest`` None: from the empty state before the first block. ``segments`` and ``ranges`` lead every shard from
    there to ``height``. ``only``: the one shard that is wanted; None: all."""

    chain_id: str
    generation: bytes
    height: int
    manifest: Manifest | None
    segments: tuple[SegmentObject, ...]
    ranges: tuple[RangeObject, ...] = ()
    shards: int = 1
    only: int | None = None
    rates: Rates = field(default=RATES, compare=False)

    @property
    def wanted(self) -> Sequence[int]:
        """The shards."""
        return range(self.shards) if self.only is None else [self.only]

    @property
    def parts(self) -> list[Part]:
        """Of the shards that are wanted."""
        if self.manifest is None:
            return []
        return [part for shard in self.wanted for part in self.manifest.parts_of(shard)]

    @property
    def manifest_name(self) -> str:
        """Empty without one."""
        return "" if self.manifest is None else self.manifest.name

    @property
    def names(self) -> list[str]:
        """The objects that it reads."""
        manifest = self.manifest
        parts = [] if manifest is None else [manifest.name, *map(manifest.part_name, self.parts)]
        pieces = [str(piece) for one in self.ranges for piece in one.pieces]
        return parts + pieces + [str(segment.name) for segment in self.segments]

    @property
    def hops(self) -> list[Hop]:
        return [*self.segments, *self.ranges]

    def hops_of(self, shard: int) -> list[Hop]:
        """In the order of their heights."""
        return sorted((hop for hop in self.hops if hop.name.shard == shard), key=lambda hop: hop.name.last)

    @property
    def size_bytes(self) -> int:
        """What will be fetched."""
        return sum(part.size_bytes for part in self.parts) + sum(hop.size_bytes for hop in self.hops)

    @property
    def requests(self) -> int:
        return len(self.parts) + len(self.segments) + sum(len(one.sizes) for one in self.ranges)

    @property
    def steps(self) -> list[Step]:
        """In their order, shard by shard."""
        steps, start = [], BEFORE_FIRST_HEIGHT
        if self.manifest is not None:
            start, size = self.manifest.height, sum(part.size_bytes for part in self.parts)
            took_s = ingest_s(size)
            one = Step("snapshot", self.manifest.name, -1, BEFORE_FIRST_HEIGHT, start, len(self.parts), size, took_s)
            steps.append(one)
        for shard in self.wanted:
            at = start
            for hop in self.hops_of(shard):
                at = max(at, hop.name.first - 1)  # a chain's first block may have any height
                stop = min(hop.name.last, self.height)
                if stop > at:
                    steps.append(step_of(hop, at, stop))
                at = stop
        return steps

    @property
    def frames(self) -> int:
        """How many archived frames will be applied."""
        return sum(step.to_height - step.from_height for step in self.steps if step.kind == "frames")

    def estimate(self, *, cores: int) -> Estimate:
        """``cores``: that hash in the end; 0: the state stays claimed."""
        steps = self.steps
        keys = self.manifest.keys if self.manifest is not None else 0
        keys += sum(step.size_bytes for step in steps if step.kind == "range") // _BYTES_PER_KEY

        def applied(kind: str) -> float:
            return sum(step.apply_s for step in steps if step.kind == kind)

        return Estimate(
            fetch_s=fetch_s(self.requests, self.size_bytes, self.rates),
            ingest_s=OPEN_S + applied("snapshot"),
            ranges_s=applied("range"),
            frames_s=applied("frames"),
            prove_s=self.rates.start + keys * self.rates.key / cores if cores else 0.0,
        )


def fetch_s(requests: int, size_bytes: int, rates: Rates = RATES) -> float:
    return requests * rates.request + size_bytes * rates.byte


def ingest_s(size_bytes: int) -> float:
    return INGEST_S + size_bytes * INGEST_S_PER_BYTE


def step_of(hop: Hop, at: int, stop: int) -> Step:
    if isinstance(hop, RangeObject):
        apply_s = hop.size_bytes * RANGE_S_PER_BYTE
        return Step("range", str(hop.name), hop.name.shard, at, stop, len(hop.sizes), hop.size_bytes, apply_s)
    share = (stop - at) / (hop.name.last - hop.name.first + 1)
    apply_s = (stop - at) * FRAME_S + share * hop.size_bytes * FRAME_S_PER_BYTE
    return Step("frames", str(hop.name), hop.name.shard, at, stop, 1, hop.size_bytes, apply_s)


# Parts that others need too


def check_one_chain(chains: Collection[str], where: str = "") -> None:
    """Whoever asked for no chain means the only one that an object store has. Raises UsageError if it has several."""
    if len(chains) > 1:
        raise UsageError(
            f"the object store holds several chains: {', '.join(sorted(chains))}",
            where=where,
            way_out="say which one: --chain",
        )


def newest_names(names: Iterable[ManifestName], height: int | None) -> list[ManifestName]:
    """Of each generation, the newest manifest at or below ``height``.

    Raises ArchiveConflict if two snapshots of one height and generation have different roots.
    """
    newest: dict[bytes, ManifestName] = {}
    for name in names:
        if height is not None and name.height > height:
            continue
        other = newest.get(name.generation)
        if other is not None and other.height == name.height and other.root_start != name.root_start:
            raise ArchiveConflict(
                f"two snapshots of height {name.height} have different roots: {other} and {name}",
                way_out="audit the nodes that published them, then delete the wrong one's manifest",
            )
        if other is None or name.height > other.height:
            newest[name.generation] = name
    return list(newest.values())


def lead(segments: Sequence[SegmentObject], at: int, height: int | None) -> tuple[list[SegmentObject], int]:
    """The fewest segments that lead on from the block at ``at``, and how far they reach."""
    hops: list[SegmentObject] = []
    while height is None or at < height:
        fitting = [segment for segment in segments if segment.name.first <= at + 1 <= segment.name.last]
        if not fitting:
            break
        hops.append(max(fitting, key=lambda segment: (segment.name.last, segment.name.first)))
        at = hops[-1].name.last
    return hops, at if height is None else min(at, height)
