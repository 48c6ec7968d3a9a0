"""Retention: which snapshots are kept and why, and what of an object store nobody needs any more.

Rules add up: a snapshot goes only if rules are set and none of them keeps it. Whatever the rules, these stay: the
newest of each generation, base states (a generation's replay begins there), and what cannot be read.

That ends for a generation that has **expired**: another one began so many days ago, and has gone on from where it
began (a snapshot above its base state, or something archived; a base state alone may be of an attempt that was given
up). Then its newest and its base state are kept no more, nor are its last so many.

Every final height from the **window** on restores: it begins at the lowest snapshot that is kept by count or age, or
by no rule at all, and without a snapshot at the archive's beginning. Snapshots below it are points: they restore to
their own height. So what is archived below the window may go, if somebody says so.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.archive_names import PieceName, RangeName, parse_piece_name, parse_segment_name
from pipeline.leases import Names
from pipeline.objects import ObjectInfo
from pipeline.snapshot import MANIFEST_FILE, Manifest, ManifestName, parse_manifest_name

ENDED_DAYS = 30.0
"""Somebody who finds out in four weeks that a new generation was a mistake can still go back."""
_DAY_S = 86_400.0
_IN_SNAPSHOT = re.compile(r"(.+/[0-9a-f]{32}/snapshots/\d{12,}-[0-9a-f]{16})/[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What to keep. 0, or nothing, stands for no such rule; without any, all is kept."""

    last: int = 0  # so many of the newest of each generation
    days: float = 0.0  # those put within so many days
    heights: frozenset[int] = frozenset()
    every: int = 0  # the lowest of each run of so many blocks
    ended_days: float = ENDED_DAYS  # until a generation expires behind which another one began; keeps nothing by itself

    @property
    def are_set(self) -> bool:
        return any((self.last, self.days, self.heights, self.every))


class Snapshot(NamedTuple):
    """One as retention sees it. ``manifest`` None: it cannot be read. ``lacks``: the first part that is not there."""

    name: ManifestName
    modified_s: float
    manifest: Manifest | None
    lacks: str = ""

    @property
    def is_base(self) -> bool:
        return self.manifest is not None and all(resume.seq == 0 for resume in self.manifest.resumes)


class Verdict(NamedTuple):
    """``keeps``: the reasons, none if it goes. ``opens_window``: whether heights above it are promised too."""

    snapshot: Snapshot
    keeps: tuple[str, ...]
    opens_window: bool


class Doomed(NamedTuple):
    """An object that nobody needs. ``behind``: the manifest that must go before it; empty: none names it."""

    name: str
    size_bytes: int
    why: str
    behind: str = ""


def expired(
    snapshots: Sequence[Snapshot], archived: Mapping[bytes, int], rules: Rules, now_s: float
) -> frozenset[bytes]:
    """Generations that ended long enough ago. ``archived``: those of which something is archived, with their numbers.
    None without rules."""
    numbers, began_s, moved = dict(archived), dict[bytes, float](), set(archived)
    for one in snapshots:
        if one.manifest is not None and not one.lacks:
            generation = one.name.generation
            numbers[generation] = one.manifest.generation_number
            began_s[generation] = min(one.modified_s, began_s.get(generation, one.modified_s))
            if not one.is_base:
                moved.add(generation)
    later = [(numbers[generation], at_s) for generation, at_s in began_s.items() if generation in moved]

    def has_expired(number: int) -> bool:
        ends_s = min((at_s for other, at_s in later if other > number), default=math.inf)
        return now_s - ends_s > rules.ended_days * _DAY_S

    return frozenset(one for one, number in numbers.items() if rules.are_set and has_expired(number))


def judge(
    snapshots: Iterable[Snapshot], rules: Rules, now_s: float, gone: Collection[bytes] = frozenset()
) -> list[Verdict]:
    """What becomes of each, by generation and height. ``gone``: generations that have expired. A clock that went back
    keeps more, never less."""
    by_generation: dict[bytes, list[Snapshot]] = {}
    for snapshot in sorted(snapshots, key=lambda one: (one.name.generation, one.name.height, one.name.root_start)):
        by_generation.setdefault(snapshot.name.generation, []).append(snapshot)
    return [
        verdict
        for generation, one in by_generation.items()
        for verdict in _judge_generation(one, rules, now_s, is_gone=generation in gone)
    ]


def _judge_generation(snapshots: Sequence[Snapshot], rules: Rules, now_s: float, *, is_gone: bool) -> list[Verdict]:
    whole = [one for one in snapshots if one.manifest is not None and not one.lacks]
    newest = whole[-1] if whole else None
    last = {one.name for one in whole[-rules.last :]} if rules.last else set()
    first_of_run: dict[int, Snapshot] = {}
    for one in whole:
        first_of_run.setdefault(one.name.height // rules.every if rules.every else 0, one)
    verdicts = []
    for one in snapshots:
        window: list[str] = []
        points: list[str] = []
        if one.manifest is None:
            points.append("its manifest cannot be read")
        elif not one.lacks:
            if not rules.are_set:
                window.append("no rule is set")
            if one is newest and not is_gone:
                window.append("the newest of its generation")
            if one.name in last and not is_gone:
                window.append(f"among the last {rules.last}")
            if rules.days and now_s - one.modified_s <= rules.days * _DAY_S:
                window.append(f"not older than {rules.days:g} days")
            if one.name.height in rules.heights:
                points.append("its height is to be kept")
            if rules.every and first_of_run[one.name.height // rules.every] is one:
                points.append(f"one per {rules.every} blocks")
            if one.is_base and not is_gone:
                points.append("a generation begins from it")
        verdicts.append(Verdict(one, (*window, *points), bool(window)))
    return verdicts


def window_start(verdicts: Iterable[Verdict], generation: bytes) -> int | None:
    """The height from which on every one is promised; None: from the archive's beginning."""
    heights = [
        verdict.snapshot.name.height
        for verdict in verdicts
        if verdict.opens_window and verdict.snapshot.name.generation == generation
    ]
    return min(heights, default=None)


def doomed(
    infos: Sequence[ObjectInfo],
    verdicts: Sequence[Verdict],
    protected: Names,
    *,
    archive: bool = False,
    gone: Collection[bytes] = frozenset(),
) -> list[Doomed]:
    """What may go, in the order in which it must: manifests, then parts. ``protected``: by intents and pins.
    ``archive``: also what is archived below the window, and of generations that are ``gone``, which have expired."""
    sizes = {info.name: info.size_bytes for info in infos}
    manifests: list[Doomed] = []
    needed: list[str] = []
    for (name, _, manifest, lacks), keeps, _ in verdicts:
        if not keeps and str(name) not in protected:
            why = f"part {lacks} is missing" if lacks else "no rule keeps it"
            manifests.append(Doomed(str(name), sizes.get(str(name), 0), why))
        elif manifest is None:
            needed.append(f"{name.folder}/")
        else:
            needed += [manifest.part_name(part) for part in manifest.parts]
    stays, going = Names(needed), {one.name for one in manifests}
    found = list(manifests)
    for info in infos:
        inside = _IN_SNAPSHOT.fullmatch(info.name)
        if inside is None or info.name in protected or info.name in stays or parse_manifest_name(info.name):
            continue
        behind = f"{inside[1]}/{MANIFEST_FILE}"
        if behind in going:
            found.append(Doomed(info.name, info.size_bytes, "its snapshot goes", behind))
        else:
            found.append(Doomed(info.name, info.size_bytes, "no manifest names it"))
    archived = list(_archived_below(infos, verdicts, protected, gone)) if archive else []
    below = {one.name for one in archived}
    return found + archived + [one for one in _unfinished(infos, protected) if one.name not in below]


def _unfinished(infos: Iterable[ObjectInfo], protected: Names) -> Iterator[Doomed]:
    """Pieces of range diffs that have not all of theirs: who made them holds an intent, or has ended."""
    pieces: dict[tuple[RangeName, int], list[tuple[PieceName, int]]] = defaultdict(list)
    for info in infos:
        piece = parse_piece_name(info.name)
        if piece is not None:
            pieces[piece.of, piece.total].append((piece, info.size_bytes))
    for (_, total), found in pieces.items():
        for piece, size_bytes in found if len(found) < total else ():
            if str(piece) not in protected:
                yield Doomed(str(piece), size_bytes, "its range diff was never finished")


def _archived_below(
    infos: Iterable[ObjectInfo], verdicts: Sequence[Verdict], protected: Names, gone: Collection[bytes]
) -> Iterator[Doomed]:
    starts = {one.snapshot.name.generation: window_start(verdicts, one.snapshot.name.generation) for one in verdicts}
    for info in infos:
        segment, piece = parse_segment_name(info.name), parse_piece_name(info.name)
        found = segment or (piece and piece.of)
        if found is None or info.name in protected:
            continue
        start = starts.get(found.generation)
        if found.generation in gone and start is None:
            yield Doomed(info.name, info.size_bytes, "its generation has expired")
        elif start is not None and found.last <= start:
            yield Doomed(info.name, info.size_bytes, f"every height promised is above {start}")
