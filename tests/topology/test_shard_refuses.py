"""A block that one shard refuses and the others apply: the chain stands below it, and goes on once a source has said
the block again. What the others made of it is taken back, on every node."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.block import Op
from pipeline.errors import BlockInvalid
from pipeline.generation import decode_generation
from pipeline.inlet import EventReader, SourcePosition
from pipeline.sources.branch import Branch
from tests.processes import Command
from tests.topology.forge import Source, coin_key, ops
from tests.topology.sharded import Sharded, same

pytestmark = pytest.mark.usefixtures("each_broker")

LAST, END = 20, 30  # walk numbers: of the last good event, and of the chain's end
FINALITY = ("--finality", 16)
CHAIN = ("ingest", "synthetic", "--changes", 40, "--blocks")
IN_0, IN_1 = coin_key(5), coin_key(404)  # a coin of each of two shards
AHEAD_MAX = 32  # frames; more than finality


@pytest.fixture(scope="module")
def straight(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """A run without anything bad."""
    site = Sharded(tmp_path_factory.mktemp("straight") / "site").begin(2)
    site.here(*CHAIN, END).ok()
    site.follow_both(*FINALITY)
    return site


@pytest.fixture
def site(tmp_path: Path) -> Sharded:
    """The first blocks, at both nodes; then one that only the first shard can apply, and a walk on top of it."""
    site = Sharded(tmp_path / "site").begin(2)
    site.here(*CHAIN, LAST).ok()
    site.follow_both(*FINALITY)
    return site


def branch_of(site: Sharded) -> Branch:
    """What the topic says."""
    position = SourcePosition(generation := decode_generation(site.records("generations")[-1]))
    reader = EventReader(generation.generation, with_ops=False)
    for offset, record in enumerate(site.records("blocks")):
        found = reader.feed(record, offset, position.source)
        assert found is not None
        position.follow(found[0])
    return position.branch


def say_bad(site: Sharded, blocks: int) -> None:
    """A spend of nothing in the second shard, and more on top, with a reorg that reaches below it."""
    branch, source = branch_of(site), Source(site)
    tip, fork = branch.tip, branch.at(LAST - 4)
    assert tip is not None and fork is not None
    at = source.connect(tip, ops((Op.CREATE, IN_0), (Op.DELETE, IN_1)))
    for number in range(1, blocks):
        if number == 2:
            source.rewind(fork)
            at = fork
        at = source.connect(at, ops((Op.CREATE, coin_key(256 * number)), (Op.CREATE, coin_key(256 * number + 255))))


def apply_bad(site: Sharded) -> None:
    """One shard refuses, the other one is through."""
    say_bad(site, 8)
    with site.running("primary", "p") as worker:
        wait_for_refusal(site, worker, LAST + 2)


def wait_for_refusal(site: Sharded, worker: Command, height: int) -> None:
    """Until one shard refuses, and the other one stands at a height."""

    def stand_there(found: dict[str, Any]) -> bool:
        shards = {one["shard"]: one for one in found["shards"]}
        return len(shards) == 2 and bool(shards[1]["refused"]) and shards[0]["height"] == height

    status = site.wait_for_status("p", worker, stand_there)
    assert not next(one for one in status["shards"] if one["shard"] == 0)["refused"]


def mend(site: Sharded) -> None:
    found = site.here(*CHAIN, END, "--resume-from", LAST + 1).ok()
    assert (found["connected"], found["walk"]) == (END - LAST, END)


def as_straight(site: Sharded, straight: Sharded, nodes: list[str]) -> None:
    """Nodes hold what an undisturbed run holds, at the same position in every shard."""
    same(site, nodes)
    assert site.content(nodes[0]) == straight.content("p")
    for meta, expected in zip(site.metas(nodes[0]), straight.metas("p"), strict=True):
        assert (meta.tip, meta.seq, meta.walk, meta.final_height) == (
            expected.tip,
            expected.seq,
            expected.walk,
            expected.final_height,
        )


def test_said_again(site: Sharded, straight: Sharded) -> None:
    """Who applied it takes it back: a primary, a replica that was there, and one that comes later."""
    apply_bad(site)
    said = site.here("run", "--role", "primary", "--until-idle").failed(BlockInvalid)
    assert f"--resume-from {LAST + 1}" in said
    site.follow("replica", "r")
    first, second = site.metas("p")
    assert first.walk > second.walk == LAST
    assert site.meta("r").walk == LAST
    mend(site)
    site.follow_both()
    site.follow("replica", "late")

    as_straight(site, straight, ["p", "r", "late"])
    assert site.anchored()[END - 1] == straight.anchored()[END - 1]


def test_none_runs_away(site: Sharded, straight: Sharded) -> None:
    """The others go no further than they can take back, and a replica holds no more of it than of any group."""
    say_bad(site, 60)
    small = {"STATEFERRY_GROUP_BYTES_MAX": "65536"}
    with site.running("primary", "p") as worker, site.running("replica", "r", env=small) as follower:
        # The bad block, one more, five blocks taken off, and all others: no event is more than one frame but that one.
        wait_for_refusal(site, worker, LAST - 4 + AHEAD_MAX - 7)
        mend(site)
        site.wait_for("p", worker, height=END - 1, in_flight=0)
        site.wait_for("r", follower, height=END - 1)

    as_straight(site, straight, ["p", "r"])


@pytest.mark.parametrize("point", ["propose.epoch:3", "store.taken_back:1", "store.taken_back:4"])
def test_killed_while_it_takes_back(point: str, site: Sharded, straight: Sharded) -> None:
    """kill -9 in the middle, and a start."""
    apply_bad(site)
    mend(site)
    killed = site.command("run", "--role", "primary", "--until-idle", env={"STATEFERRY_FAILPOINT": point})
    assert killed.code == -signal.SIGKILL
    site.follow_both()

    as_straight(site, straight, ["p", "r"])


def test_shards_of_two_workers(site: Sharded, straight: Sharded) -> None:
    """Each has a shard: what one refuses the other takes back."""
    with site.running("primary", "p") as first, site.running("primary", "q") as second:
        site.wait_for_status("q", second, lambda found: len(found["shards"]) == 1)
        say_bad(site, 60)
        for node, worker in (("p", first), ("q", second)):
            site.wait_for_status(node, worker, lambda found: bool(found["shards"]))
        mend(site)
        for node, worker in (("p", first), ("q", second)):
            site.wait_for_status(node, worker, lambda found: all(one["height"] == END - 1 for one in found["shards"]))
    site.follow("replica", "r")
    site.follow("primary", "p")

    as_straight(site, straight, ["p", "r"])
