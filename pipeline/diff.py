"""What one block did to the state, whole: every table's netted changes, which can be inverted, squashed and encoded.

A `Diff` in whole form is the unit of everything durable: the journal keeps it to undo the block, the archive keeps it
for ever, frame ids are made of its digests. Undoing is applying the inverted diff; there is no second walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from pipeline.commitment import lthash
from pipeline.delta import Created, References, decode_references, decode_whole, encode_whole
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.state import SCHEMAS, Change
from pipeline.table_diff import TableDiff, table_diff

BODY_BYTES_MAX = 256 << 20
"""Bound of a diff's columns, decompressed."""

Vectors = Mapping[int, bytes]
"""LtHash vectors by table id."""

EMPTY_COUNTS: dict[int, int] = dict.fromkeys(SCHEMAS, 0)
EMPTY_VECTORS: Vectors = dict.fromkeys(SCHEMAS, lthash.ZERO)


class Portion(NamedTuple):
    """One of ``total`` portions into which each list of changes is cut, all of about one length."""

    number: int
    total: int

    def of(self, items: Sequence[bytes]) -> Sequence[bytes]:
        count = len(items)
        return items[count * self.number // self.total : count * (self.number + 1) // self.total]


WHOLE = Portion(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Tables without changes are left out."""

    tables: Mapping[int, TableDiff]

    @property
    def op_count(self) -> int:
        return sum(map(len, self.tables.values()))

    def inverted(self) -> Diff:
        return Diff(tables={table_id: table.inverted() for table_id, table in self.tables.items()})

    def created(self) -> dict[int, Created]:
        """The columns that the whole and the reference form share: for whoever encodes both."""
        return {table_id: Created.of(table) for table_id, table in self.tables.items()}

    def encode(self, created: Mapping[int, Created] | None = None) -> WholeBody:
        """The diff's columns in whole form, with the digest of each table's."""
        created = created or {}
        return WholeBody.of(
            {table_id: encode_whole(self.tables[table_id], created.get(table_id)) for table_id in sorted(self.tables)}
        )

    def count(self, counts: Mapping[int, int]) -> dict[int, int]:
        """How many keys each table has after this diff, from how many before."""
        after = dict(counts)
        for table_id, table in self.tables.items():
            after[table_id] += len(table.created_keys) - len(table.deleted_keys)
        return after

    def advance(self, vectors: Vectors) -> dict[int, bytes]:
        """The vectors after this diff, from those before it: what a replica computes for itself."""
        return lthash.combine(vectors, self.gains())

    def gains(self, portions: Iterable[Portion] = (WHOLE,)) -> dict[int, bytes]:
        """What this diff adds to the vectors of the tables it changes; or what some portions of it add: those of all
        portions of one cut sum up to the whole (`lthash.combine`)."""
        accumulators = {table_id: lthash.Accumulator() for table_id in self.tables}
        for portion in portions:
            for table_id, table in self.tables.items():
                accumulator = accumulators[table_id]
                for keys, values, count in (
                    (table.created_keys, table.created_values, accumulator.add),
                    (table.deleted_keys, table.deleted_befores, accumulator.subtract),
                    (table.updated_keys, table.updated_afters, accumulator.add),
                    (table.updated_keys, table.updated_befores, accumulator.subtract),
                ):
                    if keys:
                        count(lthash.elements(table_id, portion.of(keys), portion.of(values)))
        return {table_id: accumulator.vector() for table_id, accumulator in accumulators.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBody:
    """A diff's columns and the digests that its id is made of, by table id."""

    columns: Mapping[int, bytes]
    digests: Mapping[int, bytes]

    @classmethod
    def of(cls, columns: Mapping[int, bytes]) -> WholeBody:
        return cls(columns=columns, digests={table_id: blake3(column).digest() for table_id, column in columns.items()})


def join_tables(columns: Mapping[int, bytes]) -> bytes:
    """Tables' columns as one body: u8 count, then per table u8 id, u32 length, columns; ids ascending."""
    parts = [bytes([len(columns)])]
    for table_id in sorted(columns):
        column = columns[table_id]
        parts += (bytes([table_id]), len(column).to_bytes(4, "little"), column)
    return b"".join(parts)


def split_tables(body: bytes) -> dict[int, memoryview]:
    """The inverse of `join_tables`. Raises FrameCorrupt and Unsupported (an unknown table)."""
    view = memoryview(body)
    if not view:
        raise FrameCorrupt("a body without a table count")
    tables: dict[int, memoryview] = {}
    at, previous = 1, 0
    for _ in range(view[0]):
        head = bytes(view[at : at + 5])
        if len(head) < 5:
            raise FrameCorrupt("a body ends inside a table's head")
        table_id, size = head[0], int.from_bytes(head[1:], "little")
        if table_id not in SCHEMAS:
            raise Unsupported(f"table id {table_id} is unknown to this build", way_out="upgrade")
        if table_id <= previous or at + 5 + size > len(view):
            raise FrameCorrupt(f"table {table_id} of a body is out of order or cut off")
        tables[table_id] = view[at + 5 : at + 5 + size]
        at, previous = at + 5 + size, table_id
    if at != len(view):
        raise FrameCorrupt("bytes are left over after a body's tables")
    return tables


def decode_whole_body(body: bytes) -> Diff:
    """A body of whole columns as a diff. Raises FrameCorrupt, Unsupported."""
    tables = {table_id: decode_whole(SCHEMAS[table_id], view) for table_id, view in split_tables(body).items()}
    if not all(map(len, tables.values())):
        raise FrameCorrupt("a body names a table without changes")
    return Diff(tables=tables)


def decode_reference_body(body: bytes) -> dict[int, References]:
    """A body of reference columns, table by table. Raises FrameCorrupt, Unsupported."""
    tables = {table_id: decode_references(SCHEMAS[table_id], view) for table_id, view in split_tables(body).items()}
    if not all(map(len, tables.values())):
        raise FrameCorrupt("a body names a table without changes")
    return tables


def squash(diffs: Sequence[Diff]) -> Diff:
    """Consecutive diffs, oldest first, as the one diff from before the first to after the last.

    Raises FrameCorrupt if one does not follow from the one before (a before-value that is not the last after-value).
    """
    merged: dict[int, dict[bytes, tuple[bytes | None, bytes | None]]] = {}
    for diff in diffs:
        for table_id, table in diff.tables.items():
            changes = merged.setdefault(table_id, {})
            for key, before, after in table.changes():
                first, last = changes.get(key, (before, before))
                if last != before:
                    raise FrameCorrupt(
                        f"diffs do not follow each other at key {key.hex()} of table {table.schema.name}"
                    )
                changes[key] = (first, after)
    tables = {}
    for table_id, changes in merged.items():
        netted = [Change(key, first, last) for key, (first, last) in sorted(changes.items()) if first != last]
        if netted:
            tables[table_id] = table_diff(SCHEMAS[table_id], netted)
    return Diff(tables=tables)
