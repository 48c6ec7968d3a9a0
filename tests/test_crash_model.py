"""Crashes at every fail point of the core, in one process: a primary, a replica and an archive over a list as the log.

A run is a walk, a schedule of who acts when, and crashes: (fail point, hit). A crash is an exception out of the armed
action; whoever acted then loses all but its store, and starts again as a worker does. Whatever crashed, the frames in
force, both states, both journals and the archive are those of a run without a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from torture.sites import differences, timeless, timeless_journal
from walks import FINALITY, OPENING, STAMP, Step, Wire, make_walk

from pipeline import chunk, failpoints, frame
from pipeline.archive import Segment
from pipeline.block import SourceEpoch, encode_event
from pipeline.frame import NO_HASH
from pipeline.frame_reader import Next, Reign
from pipeline.inlet import EventReader
from pipeline.objects.memory import MemoryObjects
from pipeline.position import LogMark, decode_meta, encode_meta
from pipeline.primary import Primary, epoch_frame
from pipeline.replica import Replica
from pipeline.stores.base import META_KEY, Batch
from pipeline.stores.memory import MemoryStore
from topology.archiver import Archiver

EVENTS = 28
SEEDS = int(os.environ.get("STATEFERRY_CRASH_SEEDS", "3"))
"""`make torture` takes more: each seed is another walk, and other hits."""
HITS = 4
"""Of each fail point, for each seed."""
SEEDS_A_ROUND = 3
"""Where the log lost its end, so many seeds in a row share the fail points for each number of frames lost."""
RECORD_BYTES_MAX = 500
"""Most events and frames go in chunks: a crash may leave one half there."""
NAMES = [name for name in failpoints.NAMES if name.split(".")[0] in ("propose", "follow", "store", "archive")]


class Crashed(Exception):
    """What an armed fail point raises."""


def crash(name: str) -> None:
    raise Crashed(name)


def event_records(steps: list[Step]) -> list[bytes]:
    """The blocks topic of a walk."""
    events = [SourceEpoch(stamp=STAMP, resume_walk=1), *(step.event for step in steps)]
    return [
        record
        for number, event in enumerate(events)
        for record in chunk.cut(
            encode_event(event),
            generation=STAMP.generation,
            epoch=STAMP.epoch,
            writer=STAMP.writer,
            number=number,
            record_bytes_max=RECORD_BYTES_MAX,
        )
    ]


@dataclass
class Follower:
    """A node of the model. Only ``store`` outlives a crash."""

    wire: Wire
    store: MemoryStore = field(default_factory=MemoryStore)
    archives: bool = False
    next: int = 0

    def __post_init__(self) -> None:
        self.replica = Replica(self.store, self.wire.meta())

    def start(self) -> None:
        """Open the store; take back what the log lost."""
        held = self.store.get_meta(META_KEY)
        self.replica = Replica(
            self.store, self.wire.meta() if held is None else decode_meta(held), archives=self.archives
        )
        while not self._is_held(self.replica.meta.diffs):
            if self.replica.meta.seq == 0:
                self.replica.meta = self.wire.meta()
                self.store.write(Batch(meta={META_KEY: encode_meta(self.replica.meta)}))
            else:
                self.replica.take_back()
        self.next = self.replica.meta.diffs.next_offset

    def _is_held(self, mark: LogMark) -> bool:
        records = self.wire.records
        return mark.next_offset <= len(records) and frame.digest_of(records[mark.next_offset - 1]) == mark.last_digest

    def act(self, random: Random) -> None:
        for _ in range(random.randrange(1, 9)):
            if self.next < len(self.wire.records):
                self.read()
        if random.random() < 0.5:
            self.replica.commit()

    def read(self) -> Any:
        failpoints.hit("follow.read")
        outcome = self.take(self.wire.records[self.next], self.next)
        self.next += 1
        return outcome

    def take(self, record: bytes, offset: int) -> Any:
        return self.replica.step(record, offset)

    def finish(self) -> None:
        while self.next < len(self.wire.records):
            self.read()
        self.replica.commit()

    def look(self) -> dict[str, Any]:
        return {
            "state": self.store.state,
            "journal": timeless_journal(self.store.undo.items()),
            "position": timeless(decode_meta(self.store.meta[META_KEY])),
        }


@dataclass
class Leader(Follower):
    """A primary of the model, which archives."""

    events: list[bytes] = field(default_factory=list)
    objects: MemoryObjects = field(default_factory=MemoryObjects)
    archives: bool = True
    starts: int = 0
    next_event: int = 0
    primary: Primary | None = None

    def start(self) -> None:
        """Follow all there is, claim, follow up to the claim."""
        self.primary = None
        super().start()
        self.finish()
        self.starts += 1
        self.wire.append([epoch_frame(self.replica.meta, self.starts.to_bytes(16, "big"))])
        failpoints.hit("propose.epoch")
        assert isinstance(self.read(), Reign)
        self.replica.commit()
        self.primary = Primary(self.replica, record_bytes_max=RECORD_BYTES_MAX)
        mark = self.replica.meta.blocks
        self.reader = EventReader(STAMP.generation, previous_digest=mark.last_digest or NO_HASH)
        self.next_event = mark.next_offset

    def take(self, record: bytes, offset: int) -> Any:
        return super().take(record, offset) if self.primary is None else self.primary.follow(record, offset)

    def act(self, random: Random) -> None:
        for _ in range(random.randrange(1, 9)):
            if self.next_event < len(self.events):
                self.propose()
        super().act(random)
        if random.random() < 0.2:
            self.archive()

    def propose(self) -> None:
        assert self.primary is not None
        offset = self.next_event
        self.next_event += 1
        ahead = self.primary.ahead
        found = self.reader.feed(self.events[offset], offset, (ahead.source_epoch, ahead.source_writer))
        if found is None:
            return
        proposals = self.primary.propose(*found)
        if proposals:
            failpoints.hit("propose.computed")
        for proposal in proposals:
            for record in proposal.records:
                self.wire.append([record])
                failpoints.hit("propose.produced")

    def archive(self) -> None:
        while Archiver(self.objects).advance(self.replica, proven=True, flush=True):
            self.replica.commit()

    def finish(self) -> None:
        if self.primary is not None:
            while self.next_event < len(self.events):
                self.propose()
        super().finish()
        if self.primary is not None:
            self.archive()
            self.replica.commit()

    def look(self) -> dict[str, Any]:
        held = super().look() | {"archive": {}}
        for info in self.objects.list(""):
            segment = Segment.open(self.objects.get(info.name))
            held["archive"] |= {entry.ref.height: entry[:3] for entry in segment.entries}
        return held


@dataclass
class World:
    """A leader, a follower, and the order in which they act. ``cut``: frames that the log loses, once, half way."""

    events: list[bytes]
    seed: int
    cut: int = 0
    crashes: int = 0

    def __post_init__(self) -> None:
        self.wire = Wire(OPENING)
        self.leader, self.follower = Leader(self.wire, events=self.events), Follower(self.wire)

    def run(self) -> None:
        random = Random(self.seed)
        leader, follower = self.leader, self.follower
        nodes = (leader, follower)
        for node in nodes:
            self.restart(node)
        while leader.next_event < len(self.events) and (not self.cut or leader.next_event < len(self.events) // 2):
            self.act(random.choice(nodes), random)
        if self.cut:
            self.lose()
            for node in random.sample(nodes, 2):
                self.restart(node)
        for node in nodes:
            self.finish(node)

    def look(self) -> dict[str, Any]:
        return {
            **{f"leader {what}": held for what, held in self.leader.look().items()},
            **{f"follower {what}": held for what, held in self.follower.look().items()},
            "frames": [found[:2] for found in frames_in_force(self.wire)],
        }

    def act(self, node: Follower, random: Random) -> None:
        try:
            node.act(random)
        except Crashed:
            self.crashes += 1
            self.restart(node)

    def restart(self, node: Follower) -> None:
        while True:
            try:
                return node.start()
            except Crashed:
                self.crashes += 1

    def finish(self, node: Follower) -> None:
        while True:
            try:
                return node.finish()
            except Crashed:
                self.crashes += 1
                self.restart(node)

    def lose(self) -> None:
        """Cut the log so that so many numbered frames are gone, with all that stood between and behind them."""
        ends = [end for _, _, end in frames_in_force(self.wire)]
        del self.wire.records[ends[-1 - self.cut] if self.cut < len(ends) else 1 :]


def frames_in_force(wire: Wire) -> list[tuple[int, bytes, int]]:
    """(seq, id, offset behind it) of the frames that a reader of the whole log follows."""
    replica, found = Replica(MemoryStore(), wire.meta()), []
    for offset, record in enumerate(wire.records[1:], 1):
        digest = frame.digest_of(record)
        match replica.reader.feed(record, replica.meta):  # not `step`: whoever looks on passes no fail point
            case Next(header=header, message=message):
                step = replica.compute(header, message)
                replica.push(step)
                replica.accept(step, offset=offset, digest=digest)
            case Reign(header=header):
                replica.meta = replica.meta.after_epoch(header, offset=offset, digest=digest)
        if replica.meta.seq > len(found):
            found.append((replica.meta.seq, replica.meta.frame_id, offset + 1))
    return found


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    failpoints.disarm()  # whatever another test of this process left armed was counted
    yield
    failpoints.disarm()


def undisturbed(events: list[bytes], seed: int, cut: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
    """What a run without a crash leaves, and how often it passed each fail point."""
    failpoints.arm("ingest.published", 0, crash)  # nothing here passes it: it is for the counts
    world = World(events, seed, cut)
    world.run()
    return failpoints.disarm(), world.look()


def disturbed(world: World, crashes: list[tuple[str, int]]) -> dict[str, Any]:
    for name, at in crashes:
        failpoints.arm(name, at, crash)
    world.run()
    failpoints.disarm()
    assert world.crashes >= 1, crashes
    return world.look()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_crash_at_any_hit_changes_nothing(seed: int) -> None:
    """One crash, or two, at hits of every fail point."""
    random = Random(seed)
    events = event_records(make_walk(seed, EVENTS))
    hits, expected = undisturbed(events, seed)
    assert set(hits) == set(NAMES) - {"store.taken_back"}
    assert expected["leader archive"]

    for crashes in draw(hits, NAMES, random, HITS):
        found = disturbed(World(events, seed), crashes)

        assert not differences(found, expected), (seed, crashes)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_crash_around_a_log_that_lost_its_end_changes_nothing(seed: int) -> None:
    """The log loses up to five frames half way; nodes crash before, while they take frames back, and afterwards: three
    seeds in a row at every fail point for every number of frames."""
    random = Random(seed)
    events = event_records(make_walk(seed, EVENTS))
    _, expected = undisturbed(events, seed)
    for cut in range(1, FINALITY):
        hits, found = undisturbed(events, seed, cut)
        assert not differences(found, expected), (seed, cut)

        names = [name for at, name in enumerate(NAMES) if (at + cut + seed) % SEEDS_A_ROUND == 0]
        for crashes in draw(hits, names, random, 1):
            found = disturbed(World(events, seed, cut), crashes)

            assert not differences(found, expected), (seed, cut, crashes)


def draw(hits: dict[str, int], names: list[str], random: Random, count: int) -> Iterator[list[tuple[str, int]]]:
    """A few hits of these names, every third with another name's."""
    for name in sorted(hits.keys() & {*names}):
        for at in sorted(random.sample(range(1, hits[name] + 1), min(count, hits[name]))):
            other = random.choice(sorted(hits))
            again = other != name and random.random() < 0.3
            yield [(name, at), *([(other, random.randint(1, hits[other]))] if again else [])]
