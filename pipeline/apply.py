"""A block on top of a state: what it changes, or why it cannot be.

Everything is captured in one pass: one multi-get for all keys of a table, the ops in their order over an in-memory
view, then only what differs in the end. A coin created and spent inside the block leaves nothing; a key written twice
keeps the before-value it had below the block. Nothing is written here: a block that fails half-way has done nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import add, not_
from typing import NamedTuple, TypeVar

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.delta import References, resolve
from pipeline.diff import Diff
from pipeline.errors import ApplyConflict, BlockInvalid
from pipeline.state import Reader, Schema, schema_named
from pipeline.table_diff import TableDiff

_IS_CREATE = bytes(code == Op.CREATE for code in range(256))
_IS_DELETE = bytes(code == Op.DELETE for code in range(256))

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
    fresh: Collection[bytes]


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
        plain = _apply_plain(schema, ops, block.ref, read)
        if plain is not None:
            tables[schema.table_id], places[schema.table_id] = plain
            shared[schema.table_id] = frozenset()
            continue
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


def _apply_plain(schema: Schema, ops: Ops, ref: BlockRef, read: Reader) -> tuple[TableDiff, _Places] | None:
    """A table's ops as columns, where their order does not matter: none is put, no two keys meet under a short key, and
    what comes more than once comes and goes. That is nearly every block. None where it does not hold, or where an op
    fails: the general way says which one."""
    if not schema.is_short or ops.codes.count(Op.PUT):
        return None
    passing: list[bytes] = []
    if len(set(ops.keys)) != len(ops.keys):
        ops, often = _split_passing(ops)
        passing = sorted(set(often.keys))
        try:
            stays = _run(schema, often, dict.fromkeys(passing), ref)
        except BlockInvalid:
            return None  # right or wrong by what stands in the state: not known here
        if stays.count(None) != len(passing):
            return None
    if not ops.keys:
        return None
    values = dict(zip(compress(ops.keys, ops.codes.translate(_IS_CREATE)), ops.values, strict=True))
    created = sorted(values)
    deleted = sorted(compress(ops.keys, ops.codes.translate(_IS_DELETE)))
    places = schema.storage_keys([*created, *deleted, *passing])
    read_back = list(read(places))
    count = len(created) + len(deleted)
    storage_keys, stored = places[:count], read_back[:count]
    if read_back[count:].count(None) != len(passing):
        return None
    is_new = stored[: len(created)].count(None) == len(created)
    if not is_new or len(set(storage_keys)) != len(storage_keys):
        return None
    spent = [held for held in stored[len(created) :] if held is not None]
    heads = schema.stored_heads(deleted)
    if len(spent) != len(deleted) or not all(map(bytes.startswith, spent, heads)):
        return None
    befores = list(map(bytes.removeprefix, spent, heads))
    diff = TableDiff(
        schema=schema,
        created_keys=created,
        created_values=list(map(values.__getitem__, created)),
        updated_keys=[],
        updated_befores=[],
        updated_afters=[],
        deleted_keys=deleted,
        deleted_befores=befores,
    )
    return diff, _Places(storage_keys, stored, is_plain=True)


def _split_passing(ops: Ops) -> tuple[Ops, Ops]:
    """Ops without PUTs in two: of keys that come once, and of keys that come more often. Each in their order."""
    seen: set[bytes] = set()
    often = {key for key in ops.keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]
    is_once = [key not in often for key in ops.keys]
    has_value_once = list(compress(is_once, ops.codes.translate(_IS_CREATE)))
    return _only(ops, is_once, has_value_once), _only(ops, map(not_, is_once), map(not_, has_value_once))


def _only(ops: Ops, wanted: Iterable[bool], values_wanted: Iterable[bool]) -> Ops:
    wanted = list(wanted)
    return Ops(
        codes=bytes(compress(ops.codes, wanted)),
        keys=list(compress(ops.keys, wanted)),
        values=list(compress(ops.values, values_wanted)),
    )


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
    fresh: list[bytes] = []
    for table_id, table in diff.tables.items():
        place = places[table_id]
        writes |= _stored_writes(table, place)
        created = place.storage_keys[: len(table.created_keys)]
        fresh += (
            created if place.is_plain else (at for at, held in zip(created, place.held, strict=False) if held is None)
        )
    return Effect(writes=writes, fresh=fresh)


def _stored_writes(diff: TableDiff, place: _Places) -> Writes:
    """What one table's diff makes of the stored bytes."""
    schema = diff.schema
    count = len(diff.created_keys)
    created, others = place.storage_keys[:count], place.storage_keys[count:]
    writes: Writes
    if place.is_plain:
        heads = schema.stored_heads(diff.created_keys)
        writes = dict(zip(created, map(add, heads, diff.created_values), strict=True))
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
