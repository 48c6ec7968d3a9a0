"""What is computed of a block alone, whatever the blocks before it: the part of a frame that can be made elsewhere.

A diff's gains (what it adds to the LtHash vectors and takes from them), its columns with their digests, and both of its
bodies, compressed, need nothing but the diff. They are most of a primary's work, and another process can do it. The
gains are most of that again, and they come in portions: whoever waits for a seal can make some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.codec import Codec
from pipeline.commitment import lthash
from pipeline.delta import encode_references
from pipeline.diff import WHOLE, Diff, Portion, join_tables
from pipeline.frame import Packed, pack

Shared = Mapping[int, frozenset[bytes]]
"""By table id: the changed keys that the wire must name whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """``gains`` and ``digests`` by table id: the vector to add to the table's, and what the frame id is made of.
    ``whole`` and ``wire``: the bodies of both forms."""

    gains: Mapping[int, bytes]
    digests: Mapping[int, bytes]
    whole: Packed
    wire: Packed

    def plus(self, gains: Mapping[int, bytes]) -> Seal:
        """With the gains of the portions that this one lacks."""
        return replace(self, gains=lthash.combine(self.gains, gains))


class Pending(Protocol):
    """A seal that is being made: a Future, or what waits like one."""

    def done(self) -> bool: ...

    def result(self) -> Seal:
        """Waits for it."""


Sealer = Callable[[Diff, Shared, Codec], Pending]


def seal(diff: Diff, shared: Shared, codec: Codec, portions: Iterable[Portion] = (WHOLE,)) -> Seal:
    """``codec``: of the wire's body. ``portions``: those of the gains to make here, asked for one after another."""
    created = diff.created()
    body = diff.encode(created)
    references = {
        table_id: encode_references(table, shared[table_id], created[table_id])
        for table_id, table in diff.tables.items()
    }
    return Seal(
        digests=body.digests,
        whole=pack(join_tables(body.columns), Codec.ZSTD, is_own=True),
        wire=pack(join_tables(references), codec),
        gains=diff.gains(portions),
    )


def seal_at_once(diff: Diff, shared: Shared, codec: Codec) -> Future[Seal]:
    """A `Sealer` of here and now."""
    sealing: Future[Seal] = Future()
    sealing.set_result(seal(diff, shared, codec))
    return sealing
