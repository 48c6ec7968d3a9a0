"""When a running node takes a snapshot by itself.

A **trigger** says how soon one is wanted: after so many final blocks, so many archived bytes, so many seconds. The
**cost rule** says when one is worth it: a full snapshot costs what the state weighs, and saves restores what was
archived since the last one. So it waits until that is a share of what the last one weighed. Whatever is asked for,
nothing is taken where neither height nor root moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggers:
    """0 stands for no such trigger; without any, snapshots are taken on demand only."""

    blocks: int = 0
    archived_bytes: int = 0
    seconds: float = 0.0
    share: float = 0.0  # of the last snapshot's bytes, that must have been archived since; 0: any

    @property
    def are_set(self) -> bool:
        return bool(self.blocks or self.archived_bytes or self.seconds)


class Last(NamedTuple):
    """The newest snapshot in the object store. ``root_start``: the first 8 bytes of its root."""

    height: int
    root_start: bytes
    size_bytes: int
    put_s: float


class Final(NamedTuple):
    """The newest final block that is archived. ``root`` None: not known here, so it counts as another one."""

    height: int
    root: bytes | None


class Due(NamedTuple):
    """Whether one is to be taken now, and why or why not."""

    is_due: bool
    why: str


def due(triggers: Triggers, last: Last | None, final: Final, archived_bytes: int, now_s: float) -> Due:
    """``archived_bytes``: of segments above ``last``. A clock that went back waits longer, no more."""
    if not triggers.are_set:
        return Due(False, "on demand only")
    if final.height < 0:
        return Due(False, "no block is final yet")
    if last is None:
        return Due(True, "there is none")
    if final.height <= last.height:
        return Due(False, f"no block became final since height {last.height}")
    if final.root is not None and final.root[:8] == last.root_start:
        return Due(False, f"the state is that of height {last.height}")
    wanted = _wanted(triggers, last, final, archived_bytes, now_s)
    if not wanted.is_due:
        return wanted
    worth = int(triggers.share * last.size_bytes)
    if archived_bytes < worth:
        return Due(False, f"{wanted.why}, but restores fetch only {archived_bytes:,} bytes of {worth:,} for want of it")
    return wanted


def _wanted(triggers: Triggers, last: Last, final: Final, archived_bytes: int, now_s: float) -> Due:
    blocks, seconds, left = final.height - last.height, now_s - last.put_s, []
    for limit, has, unit in (
        (triggers.blocks, blocks, "blocks"),
        (triggers.archived_bytes, archived_bytes, "archived bytes"),
        (triggers.seconds, seconds, "seconds"),
    ):
        if limit and has >= limit:
            return Due(True, f"{has:,.0f} {unit} since height {last.height}")
        if limit:
            left.append(f"{limit - has:,.0f} {unit}")
    return Due(False, f"in {' or '.join(left)}")
