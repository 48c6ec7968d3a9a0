"""A block on top of a state: what it changes, or why it cannot be.

Everything is captured in one pass: one multi-get for all keys of a table, the ops in their order over an in-memory
view, then only what differs in the end. A coin created and spent inside the block leaves nothing; a key written twice
keeps the before-value it had below the block. Nothing is written here: a block that fails half-way has done nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, TypeVar

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.delta import References, TableDiff, resolve
from pipeline.diff import Diff
from pipeline.errors import ApplyConflict, BlockInvalid
from pipeline.state import Reader, Schema, schema_named

_IS_CREATE = bytes(code == Op.CREATE for code in range(256))
_IS_DELETE = bytes(code == Op.DELETE for code in range(256))
_CREATED_TWICE = "is created, but exists already"
_DELETED_TWICE = "is deleted, but does not exist (spent before, or never there)"

_T = TypeVar("_T")

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
    places: dict[int, _Places] = {}
    for name in sorted(block.tables):
        schema = schema_named(name)
        ops = block.tables[name]
        keys = sorted(set(ops.keys))  # RocksDB answers ascending keys twice as fast
        storage_keys = schema.storage_keys(keys)
        stored = read(storage_keys)
        befores = schema.find_all(keys, stored)
        afters = _run(schema, ops, dict(zip(keys, befores, strict=True)), block.ref)
        netted, order = _net(schema, keys, befores, afters)
        if not order:
            continue
        tables[schema.table_id] = netted
        places[schema.table_id] = _Places.of(netted, _pick(storage_keys, order), _pick(stored, order))
        shared[schema.table_id] = _shared(netted, places[schema.table_id])
    whole = Diff(tables=tables)
    return Applied(diff=whole, effect=_effect(whole, places), shared=shared)


def apply_references(tables: Mapping[int, References], read: Reader) -> tuple[Diff, Effect]:
    """A frame's references on the state that ``read`` shows. Raises ApplyConflict."""
    resolved: dict[int, TableDiff] = {}
    places: dict[int, _Places] = {}
    for table_id, references in tables.items():
        storage_keys = references.storage_keys()
        stored, held = _read_sorted(storage_keys, read)
        diff = resolve(references, stored)
        created = stored[: len(diff.created_keys)]
        for key, value in zip(diff.created_keys, created, strict=True):
            if value is not None and diff.schema.find(key, value) is not None:
                raise _conflict(diff.schema, key, "exists before it is created")
        resolved[table_id] = diff
        if references.has_exceptions:  # they were sorted in among the others
            storage_keys = diff.schema.storage_keys(_keys_of(diff))
            stored = [held[at] for at in storage_keys]
        places[table_id] = _Places.of(diff, storage_keys, stored)
    whole = Diff(tables=resolved)
    return whole, _effect(whole, places)


def apply_whole(diff: Diff, read: Reader) -> Effect:
    """A diff in whole form (an undo, an archived frame) on the state that ``read`` shows. Raises ApplyConflict unless
    every before-value is what the state holds."""
    places: dict[int, _Places] = {}
    for table_id, table in diff.tables.items():
        schema = table.schema
        keys = _keys_of(table)
        befores = [*[None] * len(table.created_keys), *table.updated_befores, *table.deleted_befores]
        storage_keys = schema.storage_keys(keys)
        stored, _ = _read_sorted(storage_keys, read)
        values = schema.find_all(keys, stored)
        if values != befores:
            key = next(key for key, one, other in zip(keys, values, befores, strict=True) if one != other)
            raise _conflict(schema, key, "does not hold the value that the change starts from")
        places[table_id] = _Places.of(table, storage_keys, stored)
    return _effect(diff, places)


class _Places(NamedTuple):
    """Where a table's changes stand, created, then updated, then deleted: storage keys, and what is there before.

    ``is_plain``: nothing stands where keys are created, no key that exists shares its storage key, none is updated:
    every block that nobody made up to be otherwise.
    """

    storage_keys: list[bytes]
    held: list[bytes | None]
    is_plain: bool

    @classmethod
    def of(cls, table: TableDiff, storage_keys: list[bytes], held: list[bytes | None]) -> _Places:
        count = len(table.created_keys)
        is_plain = (
            table.schema.is_short
            and not table.updated_keys
            and held[:count].count(None) == count
            and all(value is not None and value[0] == 1 for value in held[count:])
            and len(set(storage_keys)) == len(storage_keys)
        )
        return cls(storage_keys, held, is_plain)


def _keys_of(table: TableDiff) -> list[bytes]:
    return [*table.created_keys, *table.updated_keys, *table.deleted_keys]


def _pick(column: Sequence[_T], order: Sequence[int]) -> list[_T]:
    return list(map(column.__getitem__, order))


def _read_sorted(storage_keys: list[bytes], read: Reader) -> tuple[list[bytes | None], Held]:
    """What stands under keys, in their order and by key; read in ascending order."""
    ascending = sorted(storage_keys)
    held = dict(zip(ascending, read(ascending), strict=True))
    return list(map(held.__getitem__, storage_keys)), held


def _net(
    schema: Schema, keys: Sequence[bytes], befores: Sequence[bytes | None], afters: Sequence[bytes | None]
) -> tuple[TableDiff, list[int]]:
    """What differs in the end, and where it stood in ``keys``: created, then updated, then deleted."""
    created: list[int] = []
    updated: list[int] = []
    deleted: list[int] = []
    for at, (before, after) in enumerate(zip(befores, afters, strict=True)):
        if before is None:
            if after is not None:
                created.append(at)
        elif after is None:
            deleted.append(at)
        elif before != after:
            updated.append(at)
    diff = TableDiff(
        schema=schema,
        created_keys=_pick(keys, created),
        created_values=[value for value in _pick(afters, created) if value is not None],
        updated_keys=_pick(keys, updated),
        updated_befores=[value for value in _pick(befores, updated) if value is not None],
        updated_afters=[value for value in _pick(afters, updated) if value is not None],
        deleted_keys=_pick(keys, deleted),
        deleted_befores=[value for value in _pick(befores, deleted) if value is not None],
    )
    return diff, created + updated + deleted


def _effect(diff: Diff, places: Mapping[int, _Places]) -> Effect:
    writes: Writes = {}
    fresh: set[bytes] = set()
    for table_id, table in diff.tables.items():
        place = places[table_id]
        writes |= _stored_writes(table, place)
        created = place.storage_keys[: len(table.created_keys)]
        fresh.update(
            created if place.is_plain else (at for at, held in zip(created, place.held, strict=False) if held is None)
        )
    return Effect(writes=writes, fresh=frozenset(fresh))


def _stored_writes(diff: TableDiff, place: _Places) -> Writes:
    """What one table's diff makes of the stored bytes."""
    schema = diff.schema
    count = len(diff.created_keys)
    created, others = place.storage_keys[:count], place.storage_keys[count:]
    writes: Writes
    if place.is_plain:
        start, stop = schema.short_at, schema.route_bytes
        writes = {
            at: b"\x01" + key[start:stop] + value
            for at, key, value in zip(created, diff.created_keys, diff.created_values, strict=True)
        }
        writes.update(dict.fromkeys(others))
        return writes
    if schema.is_short:
        return _shared_writes(diff, place)
    writes = dict(zip(created, diff.created_values, strict=True))
    writes.update(zip(others, diff.updated_afters, strict=False))
    writes.update(dict.fromkeys(others[len(diff.updated_keys) :]))
    return writes


def _shared_writes(diff: TableDiff, place: _Places) -> Writes:
    """The general way, key by key: updates, and keys that meet under one short key."""
    held = dict(zip(place.storage_keys, place.held, strict=True))
    writes: Writes = {}
    for key, _, after in diff.changes():
        (at,) = diff.schema.storage_keys([key])
        writes[at] = diff.schema.with_value(key, writes[at] if at in writes else held.get(at), after)
    return writes


def _run(schema: Schema, ops: Ops, after: dict[bytes, bytes | None], ref: BlockRef) -> list[bytes | None]:
    """The ops in their order over ``after``, which holds every key's value before; each key's value in the end."""
    if len(after) == len(ops.keys) and not ops.codes.count(Op.PUT):
        return _run_once_each(schema, ops, after, ref)
    values = iter(ops.values)
    create, delete = Op.CREATE.value, Op.DELETE.value
    for code, key in zip(ops.codes, ops.keys, strict=True):
        if code == delete:
            if after[key] is None:
                raise _invalid(schema, key, ref, _DELETED_TWICE)
            after[key] = None
        else:
            if code == create and after[key] is not None:
                raise _invalid(schema, key, ref, _CREATED_TWICE)
            after[key] = next(values)
    return list(after.values())


def _run_once_each(schema: Schema, ops: Ops, after: dict[bytes, bytes | None], ref: BlockRef) -> list[bytes | None]:
    """`_run` where no key comes twice and none is put: order does not matter, so columns are run instead of ops."""
    created = list(compress(ops.keys, ops.codes.translate(_IS_CREATE)))
    deleted = list(compress(ops.keys, ops.codes.translate(_IS_DELETE)))
    for key, value in zip(created, map(after.__getitem__, created), strict=True):
        if value is not None:
            raise _invalid(schema, key, ref, _CREATED_TWICE)
    for key, value in zip(deleted, map(after.__getitem__, deleted), strict=True):
        if value is None:
            raise _invalid(schema, key, ref, _DELETED_TWICE)
    after.update(zip(created, ops.values, strict=True))
    after.update(dict.fromkeys(deleted))
    return list(after.values())


def _shared(diff: TableDiff, place: _Places) -> frozenset[bytes]:
    """Keys that exist and share their short key with others, before the block."""
    if place.is_plain or not diff.schema.is_short:
        return frozenset()
    existing = zip([*diff.updated_keys, *diff.deleted_keys], place.held[len(diff.created_keys) :], strict=True)
    return frozenset(key for key, value in existing if value is not None and value[0] != 1)


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
