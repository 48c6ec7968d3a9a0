"""Retention: which snapshots are kept and why, and what of an object store nobody needs any more.

Rules add up: a snapshot goes only if rules are set and none of them keeps it. Whatever the rules, these stay: the
newest of each generation, base states (a generation's replay begins there), and what cannot be read.

Every final height from the **window** on restores: it begins at the lowest snapshot that is kept by count or age, or
by no rule at all, and without a snapshot at the archive's beginning. Snapshots below it are points: they restore to
their own height. So what is archived below the window may go, if somebody says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.archive_names import parse_piece_name, parse_segment_name
from pipeline.leases import Names
from pipeline.objects import ObjectInfo
from pipeline.snapshot import MANIFEST_FILE, Manifest, ManifestName, parse_manifest_name

_DAY_S = 86_400.0
_IN_SNAPSHOT = re.compile(r"(.+/[0-9a-f]{32}/snapshots/\d{12,}-[0-9a-f]{16})/[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What to keep. 0, or nothing, stands for no such rule; without any, all is kept."""

    last: int = 0  # so many of the newest of each generation
    days: float = 0.0  # those put within so many days
    heights: frozenset[int] = frozenset()
    every: int = 0  # the lowest of each run of so many blocks

    @property
    def are_set(self) -> bool:
        return self != Rules()


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
    """An object that nobody needs."""

    name: str
    size_bytes: int
    why: str


def judge(snapshots: Iterable[Snapshot], rules: Rules, now_s: float) -> list[Verdict]:
    """What becomes of each, by generation and height. A clock that went back keeps more, never less."""
    by_generation: dict[bytes, list[Snapshot]] = {}
    for snapshot in sorted(snapshots, key=lambda one: (one.name.generation, one.name.height, one.name.root_start)):
        by_generation.setdefault(snapshot.name.generation, []).append(snapshot)
    return [verdict for one in by_generation.values() for verdict in _judge_generation(one, rules, now_s)]


def _judge_generation(snapshots: Sequence[Snapshot], rules: Rules, now_s: float) -> list[Verdict]:
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
            if one is newest:
                window.append("the newest of its generation")
            if one.name in last:
                window.append(f"among the last {rules.last}")
            if rules.days and now_s - one.modified_s <= rules.days * _DAY_S:
                window.append(f"not older than {rules.days:g} days")
            if one.name.height in rules.heights:
                points.append("its height is to be kept")
            if rules.every and first_of_run[one.name.height // rules.every] is one:
                points.append(f"one per {rules.every} blocks")
            if one.is_base:
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
    infos: Sequence[ObjectInfo], verdicts: Sequence[Verdict], protected: Names, *, archive: bool = False
) -> list[Doomed]:
    """What may go, in the order in which it must: manifests, then parts. ``protected``: by intents and pins.
    ``archive``: also what is archived below the window."""
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
        why = "its snapshot goes" if f"{inside[1]}/{MANIFEST_FILE}" in going else "no manifest names it"
        found.append(Doomed(info.name, info.size_bytes, why))
    if archive:
        found += _archived_below(infos, verdicts, protected)
    return found


def _archived_below(infos: Iterable[ObjectInfo], verdicts: Sequence[Verdict], protected: Names) -> Iterator[Doomed]:
    starts = {one.snapshot.name.generation: window_start(verdicts, one.snapshot.name.generation) for one in verdicts}
    for info in infos:
        segment, piece = parse_segment_name(info.name), parse_piece_name(info.name)
        found = segment or (piece and piece.of)
        start = None if found is None else starts.get(found.generation)
        if found is not None and start is not None and found.last <= start and info.name not in protected:
            yield Doomed(info.name, info.size_bytes, f"every height promised is above {start}")
