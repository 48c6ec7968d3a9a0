"""Blocks that are begun before those below them are sealed: the same frames, whenever the seals come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.block import Rewind, SourceEpoch
from pipeline.codec import Codec
from pipeline.diff import Diff
from pipeline.errors import StateferryError
from pipeline.frame import digest_of
from pipeline.primary import Primary, Reading
from pipeline.seal import Seal, Shared, seal
from tests.walks import RECORD_BYTES_MAX, STAMP, Step, Wire, Writer, content, make_walk


class Late:
    """Seals when it is told to: in any order, as other processes would."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, diff: Diff, shared: Shared, codec: Codec) -> Future[Seal]:
        sealing: Future[Seal] = Future()
        self.waiting.append(lambda: sealing.set_result(seal(diff, shared, codec)))
        return sealing

    def some(self, random: Random) -> None:
        random.shuffle(self.waiting)
        for _ in range(random.randint(0, len(self.waiting))):
            self.waiting.pop()()

    def all(self) -> None:
        while self.waiting:
            self.waiting.pop()()


def reading(offset: int) -> Reading:
    return Reading(first=offset, last=offset, digest=digest_of(b"%d" % offset), previous_digest=b"p" * 32)


def records_at_once(steps: list[Step]) -> list[bytes]:
    writer = Writer(Wire())
    writer.start()
    assert writer.primary is not None
    for offset, event in enumerate([SourceEpoch(stamp=STAMP, resume_walk=1), *(step.event for step in steps)]):
        for proposal in writer.primary.propose(event, reading(offset)):
            writer.wire.append(proposal.records)
    return writer.wire.records


@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 30))
def test_seals_may_come_late(seed: int, count: int) -> None:
    """Any number of blocks is begun ahead, seals come in any order, frames are read back in between: the log is the
    one that a primary writes which does one thing after the other."""
    random, late, steps = Random(seed), Late(), make_walk(seed, count)
    writer = Writer(Wire())
    writer.start()
    primary = writer.primary = Primary(writer.replica, record_bytes_max=RECORD_BYTES_MAX, sealer=late.submit)

    def finish() -> None:
        while primary.begun and (primary.sealing is None or primary.sealing.done()):
            writer.wire.append(primary.finish().records)

    for offset, event in enumerate([SourceEpoch(stamp=STAMP, resume_walk=1), *(step.event for step in steps)]):
        if isinstance(event, Rewind):
            late.all()
            finish()
        primary.begin(event, reading(offset))
        late.some(random)
        if random.random() < 0.5:
            finish()
        if random.random() < 0.3:
            writer.follow_and_commit()
    late.all()
    finish()
    writer.follow_and_commit()

    assert writer.wire.records == records_at_once(steps)
    assert content(writer.store) == steps[-1].contents[-1]
    assert primary.in_flight == primary.proposed_bytes == writer.replica.layers.dirty_bytes == 0
    assert (primary.ahead.tip, primary.ahead.frame_id) == (writer.meta.tip, writer.meta.frame_id)


def test_refused_block_behind_unsealed_ones_leaves_them() -> None:
    """What was begun before goes out; the position is that of the last good block."""
    late, steps = Late(), make_walk(5, 3)
    writer = Writer(Wire())
    writer.start()
    primary = writer.primary = Primary(writer.replica, record_bytes_max=RECORD_BYTES_MAX, sealer=late.submit)
    events = [SourceEpoch(stamp=STAMP, resume_walk=1), *(step.event for step in steps)]
    for offset, event in enumerate(events[:3]):
        primary.begin(event, reading(offset))
    ahead = primary.ahead

    with pytest.raises(StateferryError):
        primary.begin(SourceEpoch(stamp=STAMP, resume_walk=1), reading(3))
        primary.begin(make_walk(6, 4)[3].event, reading(3))
    assert (primary.ahead.walk, primary.ahead.tip.ref) == (ahead.walk, ahead.tip.ref)
    late.all()
    while primary.begun:
        writer.wire.append(primary.finish().records)
    primary.begin(events[3], reading(3))
    late.all()
    writer.wire.append(primary.finish().records)

    assert writer.wire.records == records_at_once(steps)
