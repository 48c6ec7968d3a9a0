"""One table's netted changes in one block, as columns in memory: what both forms of a frame (`delta`) are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import FrameCorrupt
from pipeline.state import Change, Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDiff:
    """One table's netted changes in one block.

    * Each group's keys ascend strictly; no key stands in two groups.
    * Values stand at the position of their key. An update's before and after differ.
    """

    schema: Schema
    created_keys: Sequence[bytes]
    created_values: Sequence[bytes]
    updated_keys: Sequence[bytes]
    updated_befores: Sequence[bytes]
    updated_afters: Sequence[bytes]
    deleted_keys: Sequence[bytes]
    deleted_befores: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.created_keys) + len(self.updated_keys) + len(self.deleted_keys)

    def inverted(self) -> TableDiff:
        """The changes that take these back."""
        return TableDiff(
            schema=self.schema,
            created_keys=self.deleted_keys,
            created_values=self.deleted_befores,
            updated_keys=self.updated_keys,
            updated_befores=self.updated_afters,
            updated_afters=self.updated_befores,
            deleted_keys=self.created_keys,
            deleted_befores=self.created_values,
        )

    def changes(self) -> list[Change]:
        """The same as one ascending list."""
        changes = [Change(key, None, value) for key, value in zip(self.created_keys, self.created_values, strict=True)]
        changes += map(Change, self.updated_keys, self.updated_befores, self.updated_afters)
        changes += [
            Change(key, value, None) for key, value in zip(self.deleted_keys, self.deleted_befores, strict=True)
        ]
        changes.sort()
        return changes

    def check(self) -> None:
        """Raises FrameCorrupt unless the invariants hold. Decoders call it; builders hold them by construction."""
        everything = [*self.created_keys, *self.updated_keys, *self.deleted_keys]
        if len(set(everything)) != len(everything):
            raise FrameCorrupt(f"a key of table {self.schema.name} is changed twice")
        for before, after in zip(self.updated_befores, self.updated_afters, strict=True):
            if before == after:
                raise FrameCorrupt(f"an update of table {self.schema.name} changes nothing")


def table_diff(schema: Schema, changes: Sequence[Change]) -> TableDiff:
    """Ascending changes to columns."""
    created = [change for change in changes if change.before is None]
    deleted = [change for change in changes if change.after is None]
    updated = [change for change in changes if change.before is not None and change.after is not None]
    return TableDiff(
        schema=schema,
        created_keys=[change.key for change in created],
        created_values=[change.after or b"" for change in created],
        updated_keys=[change.key for change in updated],
        updated_befores=[change.before or b"" for change in updated],
        updated_afters=[change.after or b"" for change in updated],
        deleted_keys=[change.key for change in deleted],
        deleted_befores=[change.before or b"" for change in deleted],
    )
