"""Up to where topics may be trimmed, and why not further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pipeline.archive_names import RangeName, SegmentName
from pipeline.snapshot import ManifestName
from pipeline.trim import plan_trim

GENERATION = b"g" * 16


def segment(first: int, last: int, shard: int = 0) -> SegmentName:
    return SegmentName("main", GENERATION, shard, first, last)


WHOLE = [segment(first, first + 63) for first in (0, 64, 128, 192)]
PIECE = str(RangeName("main", GENERATION, 0, 128, 191).pieces(1)[0])
MANIFEST = str(ManifestName("main", GENERATION, 100, bytes(8)))


@pytest.mark.parametrize(
    ("segments", "shards", "restores_to", "keep", "pins", "height"),
    [
        (WHOLE, 1, 255, 0, {}, 255),
        (WHOLE, 1, 255, 1, {}, 191),
        (WHOLE, 1, 255, 64, {}, 191),
        (WHOLE, 1, 255, 193, {}, None),
        (WHOLE, 1, 200, 0, {}, 191),  # a restore ends inside the last one
        (WHOLE, 1, -1, 0, {}, None),
        ([], 1, 255, 0, {}, None),
        # A shard that is behind holds all back, and so does one whose segment ends elsewhere.
        ([*WHOLE, segment(0, 63, 1), segment(64, 127, 1)], 2, 255, 0, {}, 127),
        ([*WHOLE, segment(0, 63, 1), segment(64, 100, 1)], 2, 255, 0, {}, 63),
        ([*WHOLE[:1], segment(0, 50, 1)], 2, 255, 0, {}, None),
        # Restores under way read on from where what they read leads; at least from below the last of it.
        (WHOLE, 1, 255, 0, {"pin": [str(WHOLE[1]), str(WHOLE[2])]}, 127),
        (WHOLE, 1, 255, 0, {"pin": [PIECE]}, 127),
        (WHOLE, 1, 255, 0, {"pin": [MANIFEST]}, 63),
        (WHOLE, 1, 255, 0, {"pin": [MANIFEST, PIECE]}, 127),
        (WHOLE, 1, 255, 0, {"one": [PIECE], "other": [str(WHOLE[1])]}, 63),
        (WHOLE, 1, 255, 0, {"pin": [str(WHOLE[0])]}, None),
        (WHOLE, 1, 255, 0, {"pin": ["main/something/else"]}, 255),
        (WHOLE, 1, 255, 100, {"pin": [PIECE]}, 127),
    ],
)
def test_height(
    segments: Sequence[SegmentName],
    shards: int,
    restores_to: int,
    keep: int,
    pins: Mapping[str, Sequence[str]],
    height: int | None,
) -> None:
    found = plan_trim(segments, shards=shards, restores_to=restores_to, keep_blocks=keep, pins=pins)

    assert found.height == height
    assert [name.last for name in found.segments] == [height] * (0 if height is None else shards)
    assert found.why


def test_why() -> None:
    """Every bound is named, a pin by its lease."""
    found = plan_trim(WHOLE, shards=1, restores_to=255, keep_blocks=10, pins={"main/leases/pin-1": [PIECE]})

    assert found.why == (
        "archived to 255 in every shard, and a restore leads to 255",
        "10 archived blocks stay: those above 245",
        "a restore under way may read on from 127: main/leases/pin-1",
    )
