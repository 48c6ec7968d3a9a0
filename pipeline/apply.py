"""A block on top of a state: what it changes, or why it cannot be.

Everything is captured in one pass: one multi-get for all keys of a table, the ops in their order over an in-memory
view, then only what differs in the end. A coin created and spent inside the block leaves nothing; a key written twice
keeps the before-value it had below the block. Nothing is written here: a block that fails half-way has done nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.delta import References, TableDiff, resolve, table_diff
from pipeline.diff import Diff
from pipeline.errors import ApplyConflict, BlockInvalid
from pipeline.state import Change, Reader, Schema, schema_named

Writes = dict[bytes, "bytes | None"]
"""What stands in the store afterwards, by storage key; None: nothing."""

Held = Mapping[bytes, "bytes | None"]
"""What stood in the store before, by storage key, for every key changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a diff makes of the store. ``fresh``: the storage keys at which nothing stood before, so that a group of
    frames in which such a key comes and goes need not write it at all."""

    writes: Writes
    fresh: frozenset[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A block's diff, what it makes of the store, and the keys that the wire must name whole."""

    diff: Diff
    effect: Effect
    shared: Mapping[int, frozenset[bytes]]  # by table id: changed keys that share a short key before the block


def apply_block(block: Block, read: Reader) -> Applied:
    """One block on the state that ``read`` shows. Raises BlockInvalid, naming table, key and height."""
    tables: dict[int, TableDiff] = {}
    shared: dict[int, frozenset[bytes]] = {}
    held: dict[bytes, bytes | None] = {}
    for name in sorted(block.tables):
        schema = schema_named(name)
        ops = block.tables[name]
        keys = list(dict.fromkeys(ops.keys))
        storage_keys = schema.storage_keys(keys)
        stored = read(storage_keys)
        before = dict(zip(keys, schema.find_all(keys, stored), strict=True))
        after = _run(schema, ops, before, block.ref)
        netted = sorted(Change(key, before[key], value) for key, value in after.items() if before[key] != value)
        if not netted:
            continue
        diff = table_diff(schema, netted)
        held.update(zip(storage_keys, stored, strict=True))
        tables[schema.table_id] = diff
        shared[schema.table_id] = _shared(schema, diff, held)
    whole = Diff(tables=tables)
    return Applied(diff=whole, effect=_effect(whole, held), shared=shared)


def apply_references(tables: Mapping[int, References], read: Reader) -> tuple[Diff, Effect]:
    """A frame's references on the state that ``read`` shows. Raises ApplyConflict."""
    resolved: dict[int, TableDiff] = {}
    held: dict[bytes, bytes | None] = {}
    for table_id, references in tables.items():
        storage_keys = references.storage_keys()
        stored = read(storage_keys)
        diff = resolve(references, stored)
        created = stored[: len(diff.created_keys)]
        for key, value in zip(diff.created_keys, created, strict=True):
            if value is not None and diff.schema.find(key, value) is not None:
                raise _conflict(diff.schema, key, "exists before it is created")
        resolved[table_id] = diff
        held.update(zip(storage_keys, stored, strict=True))
    whole = Diff(tables=resolved)
    return whole, _effect(whole, held)


def apply_whole(diff: Diff, read: Reader) -> Effect:
    """A diff in whole form (an undo, an archived frame) on the state that ``read`` shows. Raises ApplyConflict unless
    every before-value is what the state holds."""
    held: dict[bytes, bytes | None] = {}
    for table in diff.tables.values():
        schema = table.schema
        keys = [*table.created_keys, *table.updated_keys, *table.deleted_keys]
        befores = [*[None] * len(table.created_keys), *table.updated_befores, *table.deleted_befores]
        storage_keys = schema.storage_keys(keys)
        stored = read(storage_keys)
        values = schema.find_all(keys, stored)
        if values != befores:
            key = next(key for key, one, other in zip(keys, values, befores, strict=True) if one != other)
            raise _conflict(schema, key, "does not hold the value that the change starts from")
        held.update(zip(storage_keys, stored, strict=True))
    return _effect(diff, held)


def _effect(diff: Diff, held: Held) -> Effect:
    writes: Writes = {}
    fresh: list[bytes] = []
    for table in diff.tables.values():
        created = table.schema.storage_keys(table.created_keys)
        writes |= _stored_writes(table, created, held)
        fresh += [key for key in created if held[key] is None]
    return Effect(writes=writes, fresh=frozenset(fresh))


def _stored_writes(diff: TableDiff, created: list[bytes], held: Held) -> Writes:
    """What one table's diff makes of the stored bytes. ``created``: storage keys of the created keys."""
    schema = diff.schema
    deleted = schema.storage_keys(diff.deleted_keys)
    if not schema.is_short:
        updated = schema.storage_keys(diff.updated_keys)
        writes: Writes = dict(zip(created, diff.created_values, strict=True))
        writes.update(zip(updated, diff.updated_afters, strict=True))
        writes.update(dict.fromkeys(deleted))
        return writes
    start, stop = schema.short_at, schema.route_bytes
    writes = {
        at: b"\x01" + key[start:stop] + value
        for at, key, value in zip(created, diff.created_keys, diff.created_values, strict=True)
    }
    writes.update(dict.fromkeys(deleted))
    plain = (
        not diff.updated_keys
        and len(writes) == len(created) + len(deleted)
        and not any(map(held.get, created))
        and all(value is not None and value[0] == 1 for value in map(held.get, deleted))
    )
    return writes if plain else _shared_writes(diff, held)


def _shared_writes(diff: TableDiff, held: Held) -> Writes:
    """The general way, key by key: updates, and keys that meet under one short key."""
    schema = diff.schema
    writes: Writes = {}
    for key, _, after in diff.changes():
        (at,) = schema.storage_keys([key])
        writes[at] = schema.with_value(key, writes[at] if at in writes else held.get(at), after)
    return writes


def _run(schema: Schema, ops: Ops, before: Mapping[bytes, bytes | None], ref: BlockRef) -> dict[bytes, bytes | None]:
    """The ops in their order over the values before; what each key holds after."""
    after = dict(before)
    values = iter(ops.values)
    create, delete = Op.CREATE.value, Op.DELETE.value
    for code, key in zip(ops.codes, ops.keys, strict=True):
        if code == delete:
            if after[key] is None:
                raise _invalid(schema, key, ref, "is deleted, but does not exist (spent before, or never there)")
            after[key] = None
        else:
            if code == create and after[key] is not None:
                raise _invalid(schema, key, ref, "is created, but exists already")
            after[key] = next(values)
    return after


def _shared(schema: Schema, diff: TableDiff, held: Held) -> frozenset[bytes]:
    if not schema.is_short:
        return frozenset()
    existing = [*diff.updated_keys, *diff.deleted_keys]
    return frozenset(
        key
        for key, value in zip(existing, map(held.get, schema.storage_keys(existing)), strict=True)
        if value is not None and value[0] != 1
    )


def describe_key(schema: Schema, key: bytes) -> str:
    """A key as its chain's people write it: txid:index for a coin, else hex."""
    if schema.name == "utxo":
        return f"{key[31::-1].hex()}:{int.from_bytes(key[32:], 'big')}"
    return key.hex()


def _invalid(schema: Schema, key: bytes, ref: BlockRef, what: str) -> BlockInvalid:
    return BlockInvalid(
        f"block at height {ref.height}: {schema.name} {describe_key(schema, key)} {what}",
        where=f"block {ref}",
        way_out="the source published an invalid block; nothing of it was applied",
    )


def _conflict(schema: Schema, key: bytes, what: str) -> ApplyConflict:
    return ApplyConflict(f"{schema.name} {describe_key(schema, key)} {what}")
