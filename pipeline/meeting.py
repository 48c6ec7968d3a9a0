"""Where a snapshot is taken: a final height that every shard's store can be brought to.

A store goes back by its journal, and above its own final height it goes forward by what is archived of its shard. So a
shard that belongs to another worker, whose store here stays behind, is in a snapshot like the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UsageError
from pipeline.position import BEFORE_FIRST_HEIGHT, Meta


def own_final(meta: Meta) -> int:
    """The highest final height that a store can go back to by itself."""
    return min(meta.final_height, meta.tip.height)


def meeting_height(metas: Sequence[Meta], reaches: Sequence[int], height: int | None = None) -> int:
    """Where these stores, one a shard, can be brought to: ``height``, or the highest there is (None).

    ``reaches``: for each, how far `own_final` and the archive lead. None goes further than the store that is furthest:
    what is above is for whoever has it. Raises UsageError.
    """
    finals = list(map(own_final, metas))
    highest = min(*reaches, max(finals)) if len(metas) > 1 else finals[0]
    first = metas[0]
    if highest == BEFORE_FIRST_HEIGHT:
        raise UsageError(
            f"no block is final yet: the tip is {first.tip.ref}, finality {first.finality} blocks",
            way_out=f"wait until {first.finality} blocks stand on top of the first one",
        )
    lowest = max(0, *(max(meta.journal_first_height - 1, meta.base_height) for meta in metas))
    if lowest > highest:
        raise UsageError(
            f"the shards are too far apart to meet: one goes back to height {lowest} at most, another forward to "
            f"{highest}",
            way_out="try again once `stateferry status` shows that all have caught up",
        )
    target = highest if height is None else height
    if not lowest <= target <= highest:
        raise UsageError(
            f"height {target} cannot be snapshotted: this node can go back to height {lowest}, and blocks are final up "
            f"to height {highest}",
            way_out="`stateferry restore --height` reaches any archived height",
        )
    return target
