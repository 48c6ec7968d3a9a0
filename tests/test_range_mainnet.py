"""Real blocks in range diffs: at any height the restored coins are those that Bitcoin Core has there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from chains import expected, load_blocks, parse_chain

from pipeline import restore as restoring
from pipeline import squash as squashing
from pipeline.block import Connect, Event, SourceEpoch
from pipeline.commitment.muhash import MuHash
from pipeline.objects import LocalObjects
from pipeline.shards import join_metas
from pipeline.sources import coins
from pipeline.splitting import split_event
from tests.ferries import opened
from tests.walks import FINALITY, GENERATION, OPENING, STAMP, Wire, Writer, content
from topology.archiver import Archiver
from topology.restore_plans import Request
from topology.restorer import restore
from topology.squasher import archives, squash

STEPS = expected("mainnet_0_599")
TOP = 599 - FINALITY
LEVELS = (64, 128, 256)
HEIGHTS = {1: 14, 2: 6}
"""Random ones, by the number of shards."""


def events() -> Iterator[Event]:
    yield SourceEpoch(stamp=STAMP, resume_walk=1)
    for walk, block in enumerate(parse_chain(load_blocks("mainnet_0_599")), 1):
        yield Connect(stamp=STAMP, walk=walk, block=block)


@pytest.fixture(scope="module", params=HEIGHTS)
def archived(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, LocalObjects]:
    """The archive of the first 594 blocks, with range diffs of up to 256."""
    shards, folder = request.param, tmp_path_factory.mktemp("mainnet")
    objects, generation = LocalObjects(folder / "objects"), replace(GENERATION, shards=shards)
    nodes = [
        Writer(Wire(replace(OPENING, generation=generation, shard=shard)), archives=True) for shard in range(shards)
    ]
    for node in nodes:
        node.start(record_bytes_max=1 << 20)
    for offset, event in enumerate(events()):
        for node, part in zip(nodes, split_event(event, shards), strict=True):
            node.propose(part, offset)
            node.follow_and_commit()
    for node in nodes:
        while Archiver(objects).advance(node.replica, proven=True, flush=True):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squashing, "LEVELS", LEVELS)
        for archive in archives(objects):
            spans = [one.name[3:] for one in squash(objects, archive, folder / "squashing")]
            assert {(0, 255), (256, 511), (384, 511), (512, 575)} <= set(spans)
    return shards, objects


def test_heights(archived: tuple[int, LocalObjects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number of coins and MuHash; range diffs wherever one ends at or below the height."""
    shards, objects = archived
    monkeypatch.setattr(restoring, "PENDING_BYTES_MAX", 5_000)
    heights = {63, 255, 256, 511, TOP, *Random(shards).sample(range(TOP), HEIGHTS[shards])}
    for height in sorted(heights):
        data_dir = tmp_path / str(height)
        restored = restore(objects, data_dir, Request(height=height), claimed=True)
        held: dict[bytes, bytes] = {}
        for folder in [data_dir] if shards == 1 else sorted((data_dir / "shards").iterdir()):
            with opened(folder) as store:
                held |= content(store)
        muhash = MuHash()
        for key, value in held.items():
            muhash.insert(coins.element(key, value))

        assert restored.meta == join_metas(restored.metas)
        assert restored.ref.height == height
        assert restored.range_diffs == shards * range_diffs(height)
        assert (len(held), muhash.digest()[::-1].hex()) == (STEPS[height]["coins"], STEPS[height]["muhash"])


def range_diffs(height: int) -> int:
    """How many of them lead there: of each level as many as fit, the largest first."""
    left, count = height + 1, 0
    for level in reversed(LEVELS):
        count += left // level
        left %= level
    return count
