"""Changes to bytes and back: one table's sorted, netted changes as compact columns.

Two forms exist. The **whole** form stands alone: whole keys, before- and after-values. It is what archives, journals
and ids are made of. The **reference** form is for the topic: a key that the reader already holds is named by its short
key (for a coin: 8 bytes of the txid, and the index) and its before-value is not sent. On real blocks nine tenths of a
diff are hash bytes that no compressor touches, so leaving them out is the one thing that helps.

Whole form                                           Reference form
    u32 created, updated, deleted                        u32 created, updated, deleted
    keys created · keys updated · keys deleted           keys created
    values created                                       values created
    befores updated · afters updated                     references updated · afters updated
    befores deleted                                      references deleted

What a column of keys, references or values is, says `columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.columns import Columns, counts_column, keys_column, references_column, values_column
from pipeline.errors import ApplyConflict
from pipeline.state import Schema
from pipeline.table_diff import TableDiff


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """A decoded reference form: what is known before the reader's state was asked."""

    schema: Schema
    created_keys: Sequence[bytes]
    created_values: Sequence[bytes]
    updated_short: Sequence[bytes]
    updated_whole: Sequence[bytes]  # exceptions
    updated_afters: Sequence[bytes]  # of the updates in ascending order of their whole keys
    deleted_short: Sequence[bytes]
    deleted_whole: Sequence[bytes]  # exceptions

    @property
    def has_exceptions(self) -> bool:
        return bool(self.updated_whole or self.deleted_whole)

    def __len__(self) -> int:
        updated, deleted = (self.updated_short, self.updated_whole), (self.deleted_short, self.deleted_whole)
        return len(self.created_keys) + sum(map(len, updated + deleted))

    def storage_keys(self) -> list[bytes]:
        """All storage keys to read, in the order that `resolve` expects."""
        schema = self.schema
        return [
            *schema.storage_keys(self.created_keys),
            *schema.storage_keys_of_short(self.updated_short),
            *schema.storage_keys(self.updated_whole),
            *schema.storage_keys_of_short(self.deleted_short),
            *schema.storage_keys(self.deleted_whole),
        ]


# Encoding


@dataclass(frozen=True, slots=True)
class Created:
    """The columns that both forms have in common, made once for both."""

    keys: bytes
    values: bytes

    @classmethod
    def of(cls, diff: TableDiff) -> Created:
        return cls(
            keys=b"".join(keys_column(diff.schema, diff.created_keys)),
            values=b"".join(values_column(diff.created_values)),
        )


def encode_whole(diff: TableDiff, created: Created | None = None) -> bytes:
    """One table's changes in whole form. This is also the canonical content that ids are made of."""
    schema = diff.schema
    created = created or Created.of(diff)
    return b"".join(
        (
            counts_column(len(diff.created_keys), len(diff.updated_keys), len(diff.deleted_keys)),
            created.keys,
            *keys_column(schema, diff.updated_keys),
            *keys_column(schema, diff.deleted_keys),
            created.values,
            *values_column(diff.updated_befores),
            *values_column(diff.updated_afters),
            *values_column(diff.deleted_befores),
        )
    )


def encode_references(diff: TableDiff, shared: frozenset[bytes] | set[bytes], created: Created | None = None) -> bytes:
    """One table's changes in reference form. ``shared``: the whole keys, among those updated and deleted, whose short
    key is not unique in the state before the block."""
    schema = diff.schema
    created = created or Created.of(diff)
    return b"".join(
        (
            counts_column(len(diff.created_keys), len(diff.updated_keys), len(diff.deleted_keys)),
            created.keys,
            created.values,
            *references_column(schema, diff.updated_keys, shared),
            *values_column(diff.updated_afters),
            *references_column(schema, diff.deleted_keys, shared),
        )
    )


# Decoding


def decode_whole(schema: Schema, data: memoryview) -> TableDiff:
    """The inverse of `encode_whole`. Raises FrameCorrupt for anything that `encode_whole` would not have written."""
    columns = Columns(data, f"changes of table {schema.name}")
    created, updated, deleted = columns.counts()
    layout = (schema.key_bytes, schema.route_bytes)
    created_keys = columns.keys(created, *layout)
    updated_keys = columns.keys(updated, *layout)
    deleted_keys = columns.keys(deleted, *layout)
    diff = TableDiff(
        schema=schema,
        created_keys=created_keys,
        updated_keys=updated_keys,
        deleted_keys=deleted_keys,
        created_values=columns.values(created),
        updated_befores=columns.values(updated),
        updated_afters=columns.values(updated),
        deleted_befores=columns.values(deleted),
    )
    columns.done()
    diff.check()
    return diff


def route_heads(schema: Schema, data: memoryview) -> npt.NDArray[np.uint64]:
    """Of changes in whole form, the first 8 bytes of the routes of their keys, big-endian; some may come twice.
    Raises FrameCorrupt."""
    columns = Columns(data, f"changes of table {schema.name}")
    layout = (schema.key_bytes, schema.route_bytes)
    return np.concatenate([columns.heads(count, *layout) for count in columns.counts()])


def decode_references(schema: Schema, data: memoryview) -> References:
    """The inverse of `encode_references`, as far as it goes without a state. Next: read `References.storage_keys`,
    then `resolve`. Raises FrameCorrupt."""
    columns = Columns(data, f"references of table {schema.name}")
    created, updated, deleted = columns.counts()
    created_keys = columns.keys(created, schema.key_bytes, schema.route_bytes)
    created_values = columns.values(created)
    updated_short, updated_whole = columns.references(updated, schema)
    updated_afters = columns.values(updated)
    deleted_short, deleted_whole = columns.references(deleted, schema)
    columns.done()
    return References(
        schema=schema,
        created_keys=created_keys,
        created_values=created_values,
        updated_short=updated_short,
        updated_whole=updated_whole,
        updated_afters=updated_afters,
        deleted_short=deleted_short,
        deleted_whole=deleted_whole,
    )


def resolve(references: References, stored: Sequence[bytes | None]) -> TableDiff:
    """References to changes, with what the reader's state holds under `References.storage_keys`.

    Raises ApplyConflict if the state is not the one that the references were made against.
    """
    schema = references.schema
    at = len(references.created_keys)
    updated, at = _resolve(schema, references.updated_short, references.updated_whole, stored, at)
    deleted, at = _resolve(schema, references.deleted_short, references.deleted_whole, stored, at)
    assert at == len(stored), (at, len(stored))
    diff = TableDiff(
        schema=schema,
        created_keys=references.created_keys,
        created_values=references.created_values,
        updated_keys=[key for key, _ in updated],
        updated_befores=[value for _, value in updated],
        updated_afters=references.updated_afters,
        deleted_keys=[key for key, _ in deleted],
        deleted_befores=[value for _, value in deleted],
    )
    diff.check()
    return diff


def _resolve(
    schema: Schema, short: Sequence[bytes], whole: Sequence[bytes], stored: Sequence[bytes | None], at: int
) -> tuple[list[tuple[bytes, bytes]], int]:
    """(whole key, before) pairs, ascending, and where the next ones begin in ``stored``."""
    split, rest_bytes = schema.short_at, schema.route_bytes - schema.short_at
    end = 1 + rest_bytes
    found: list[tuple[bytes, bytes]] = []
    if schema.is_short:
        for key, held in zip(short, stored[at : at + len(short)], strict=True):
            if held is None or held[0] != 1:
                raise ApplyConflict(f"a reference of table {schema.name}, {key.hex()}, names no single key")
            found.append((key[:split] + held[1:end] + key[split:], held[end:]))
        found.sort()
    else:
        for key, held in zip(short, stored[at : at + len(short)], strict=True):
            if held is None:
                raise ApplyConflict(f"a reference of table {schema.name}, {key.hex()}, names no key")
            found.append((key, held))
    at += len(short)
    if whole:
        for key, held in zip(whole, stored[at : at + len(whole)], strict=True):
            value = schema.find(key, held)
            if value is None or held is None or held[0] == 1:
                raise ApplyConflict(f"key {key.hex()} of table {schema.name} is not one of several under its short key")
            found.append((key, value))
        found.sort()
    return found, at + len(whole)
