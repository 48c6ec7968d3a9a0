"""Where stores of several shards can be brought to, for a snapshot of all of them."""

from __future__ import annotations

import pytest
from walks import ref

from pipeline.errors import UsageError
from pipeline.meeting import meeting_height, own_final
from pipeline.position import Meta, Tip

FINALITY = 10


def store(tip: int, journal: int | None = None, base: int = -1) -> Meta:
    """A shard's store at a tip. ``journal``: lowest height that it can take off; None: as far as finality needs."""
    lowest = max(tip - FINALITY + 1, base + 1, 0)
    return Meta(
        chain_id="walk",
        generation=b"g" * 16,
        finality=FINALITY,
        shards=2,
        tip=Tip(ref=ref(tip) if tip >= 0 else None, vectors={}, seq=tip + 1),
        base_height=base,
        highest=tip,
        journal_first_height=lowest if journal is None else journal,
    )


def reach(meta: Meta, archived: int) -> int:
    return max(own_final(meta), archived)


@pytest.mark.parametrize(
    ("one", "other", "archived", "highest"),
    [
        (store(100), store(100), -1, 90),  # together
        (store(100, 80), store(95), -1, 85),  # apart: the one ahead goes back
        (store(100, 0), store(-1), 63, 63),  # of the other nothing is here but its archive
        (store(100, 0), store(30), 63, 63),
        (store(100), store(30), 200, 90),  # nobody goes above the final height of the one that is furthest
        (store(30), store(30), 200, 20),
        (store(60, base=55), store(60, base=55), -1, 55),  # restored a moment ago
    ],
)
def test_highest(one: Meta, other: Meta, archived: int, highest: int) -> None:
    """Each goes back by its journal, and forward by its archive; they meet at the highest height of both."""
    assert meeting_height([one, other], [own_final(one), reach(other, archived)]) == highest
    assert meeting_height([other, one], [reach(other, archived), own_final(one)], highest) == highest


@pytest.mark.parametrize(
    ("one", "other", "height", "says"),
    [
        (store(-1), store(-1), None, "no block is final yet"),
        (store(100), store(-1), None, "no block is final yet"),  # of the other there is no archive either
        (store(100), store(60), None, "too far apart"),
        (store(100, 80), store(95), 86, "final up to height 85"),
        (store(100, 80), store(95, 70), 78, "back to height 79"),
        (store(60, base=55), store(60), 50, "back to height 55"),
    ],
)
def test_nowhere(one: Meta, other: Meta, height: int | None, says: str) -> None:
    """Heights that one of them cannot be brought to are refused, with what they can."""
    with pytest.raises(UsageError, match=says):
        meeting_height([one, other], [own_final(one), own_final(other)], height)
