"""Steps on their way into a store: pushed as they are computed, accepted as the log makes them valid, then written.

What is accepted is the group. One write batch takes all of it, or its first frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import journal
from pipeline.apply import Effect
from pipeline.frame import Header, Kind
from pipeline.position import Meta, Tip

Undo = dict[bytes, bytes | None]
"""What is written to the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One numbered frame, computed and checked, not yet written."""

    header: Header
    effect: Effect
    before: Tip
    after: Tip
    whole: bytes  # the frame in whole form: the journal's, later the archive's


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What the log made valid and is not written yet: the position after it, and what it does to the journal."""

    meta: Meta
    undo: Undo


class Group:
    """* `steps` are all that were pushed and are not written, `accepted` those of them that the log made valid; both by
      seq, ascending.
    * `undo` is what those accepted do to the journal, all together.
    * `is_dirty`: the position is to be written, with or without frames.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}
        self.accepted: dict[int, Accepted] = {}
        self.undo: Undo = {}
        self.is_dirty = False

    def accept(self, step: Step, before: Meta, after: Meta) -> None:
        """A pushed step is valid: it led from one position to another."""
        header = step.header
        entry = journal.Entry(before=before.common(), frame_bytes=step.whole)  # the same on every node
        undo: Undo = {
            journal.entry_key(header.seq): journal.encode_entry(entry),
            journal.height_key(header.ref.height): None if header.kind is Kind.UNDO else header.seq.to_bytes(8, "big"),
        }
        self.undo |= undo
        self.accepted[header.seq] = Accepted(meta=after, undo=undo)
        self.is_dirty = True

    def up_to(self, seq: int) -> Group:
        """The first frames, as a group of their own."""
        part = Group()
        part.accepted = {number: one for number, one in self.accepted.items() if number <= seq}
        part.undo = _joined(part.accepted)
        return part

    def written(self, seqs: list[int]) -> None:
        """These, the first, are in the store."""
        for seq in seqs:
            del self.steps[seq], self.accepted[seq]
        self.undo = _joined(self.accepted)

    def drop_proposed(self) -> None:
        """Forget what was pushed and not accepted."""
        self.steps = {seq: self.steps[seq] for seq in self.accepted}

    def drop_above(self, seq: int) -> None:
        """Forget what was accepted above a seq, and all that is not."""
        self.accepted = {number: one for number, one in self.accepted.items() if number <= seq}
        self.undo = _joined(self.accepted)
        self.drop_proposed()

    def writes(self, seqs: list[int]) -> dict[bytes, bytes | None]:
        """What frames do to the state, as one."""
        return _merge([self.steps[seq].effect for seq in seqs])


def _joined(group: dict[int, Accepted]) -> Undo:
    return {key: value for one in group.values() for key, value in one.undo.items()}


def _merge(effects: list[Effect]) -> dict[bytes, bytes | None]:
    """A group's writes as one: the last write of a key stands; what came and went inside the group is left out."""
    if len(effects) == 1:
        return effects[0].writes
    merged: dict[bytes, bytes | None] = {}
    fresh: set[bytes] = set()
    for effect in effects:
        fresh.update(set(effect.fresh) - merged.keys())
        merged |= effect.writes
    for key in fresh:
        if merged[key] is None:
            del merged[key]
    return merged
