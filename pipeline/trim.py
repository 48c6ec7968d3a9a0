"""Trims: up to which block the records of a generation's topics are needed by nobody, and why not further.

A block's records may go once it is archived in every shard and a restore leads there, for whoever needs it then has a
way without them. Some blocks below that stay, so that who is away for less just reads on; and so does what a restore
under way will read on from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline.archive_names import SegmentName, parse_piece_name, parse_segment_name
from pipeline.snapshot import parse_manifest_name


class Trim(NamedTuple):
    """``height``: of the highest block whose records may go; None: none. ``segments``: one a shard that ends there.
    ``why``: what bounds it, the decisive reason last."""

    height: int | None
    segments: tuple[SegmentName, ...]
    why: tuple[str, ...]


def plan_trim(
    segments: Iterable[SegmentName],
    *,
    shards: int,
    restores_to: int,
    keep_blocks: int,
    pins: Mapping[str, Sequence[str]],
) -> Trim:
    """``segments``: of the generation. ``restores_to``: the height to which the object store leads. ``pins``: what each
    restore under way reads, by the name of its lease."""
    ends: dict[int, dict[int, SegmentName]] = {}
    for name in sorted(segments, key=lambda name: name.first):  # of several, the one with the fewest blocks
        ends.setdefault(name.last, {})[name.shard] = name
    whole = sorted(last for last, by_shard in ends.items() if len(by_shard) == shards and last <= restores_to)
    if not whole:
        return Trim(None, (), ("no segment of every shard ends at a height that restores",))
    why = [f"archived to {whole[-1]} in every shard, and a restore leads to {restores_to}"]
    limit = whole[-1]
    if keep_blocks:
        limit -= keep_blocks
        why.append(f"{keep_blocks} archived blocks stay: those above {limit}")
    for lease, names in sorted(pins.items()):
        needed = _reads_on_from(names)
        if needed is not None and needed < limit:
            limit = needed
            why.append(f"a restore under way may read on from {needed}: {lease}")
    fitting = [last for last in whole if last <= limit]
    if not fitting:
        return Trim(None, (), (*why, f"no segment of every shard ends at or below {limit}"))
    height = fitting[-1]
    return Trim(height, tuple(ends[height][shard] for shard in range(shards)), tuple(why))


def _reads_on_from(names: Iterable[str]) -> int | None:
    """The height whose offsets a restore of these objects has at least: it may end inside the highest one, and then
    knows those from below it. None: it reads nothing of the kind."""
    heights = []
    for name in names:
        manifest, segment, piece = parse_manifest_name(name), parse_segment_name(name), parse_piece_name(name)
        if manifest is not None:
            heights.append(manifest.height)
        elif segment is not None:
            heights.append(segment.first - 1)
        elif piece is not None:
            heights.append(piece.of.first - 1)
    return max(heights, default=None)
