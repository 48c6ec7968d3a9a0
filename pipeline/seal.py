"""What is computed of a block alone, whatever the blocks before it: the part of a frame that can be made elsewhere.

A diff's gains (what it adds to the LtHash vectors and takes from them), its columns with their digests, and both of its
bodies, compressed, need nothing but the diff. They are most of a primary's work, and another process can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from pipeline.codec import Codec
from pipeline.delta import encode_references
from pipeline.diff import Diff, join_tables
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


Sealer = Callable[[Diff, Shared, Codec], "Future[Seal]"]


def seal(diff: Diff, shared: Shared, codec: Codec) -> Seal:
    """``codec``: of the wire's body."""
    created = diff.created()
    body = diff.encode(created)
    references = {
        table_id: encode_references(table, shared[table_id], created[table_id])
        for table_id, table in diff.tables.items()
    }
    return Seal(
        gains=diff.gains(),
        digests=body.digests,
        whole=pack(join_tables(body.columns), Codec.ZSTD, is_own=True),
        wire=pack(join_tables(references), codec),
    )


def seal_at_once(diff: Diff, shared: Shared, codec: Codec) -> Future[Seal]:
    """A `Sealer` of here and now."""
    sealing: Future[Seal] = Future()
    sealing.set_result(seal(diff, shared, codec))
    return sealing
