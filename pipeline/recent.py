"""The last frames of a store, as its journal has them: those that are written, and those on their way (`group`)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from blake3 import blake3

from pipeline import frame, journal
from pipeline.diff import Diff, decode_whole_body, split_tables
from pipeline.errors import StoreCorrupt
from pipeline.frame import Header, Kind
from pipeline.group import Group, Undo
from pipeline.position import Meta, Tip
from pipeline.stores.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """A frame as its journal entry has it. ``diff``: the block's own changes, also of an UNDO frame's entry."""

    before: Tip
    header: Header
    body: bytes
    diff: Diff
    digests: dict[int, bytes]

    @classmethod
    def of(cls, before: Tip, whole: bytes) -> Undone:
        decoded = frame.decode(whole)
        digests = {table_id: blake3(view).digest() for table_id, view in split_tables(decoded.body).items()}
        return cls(
            before=before,
            header=decoded.header,
            body=decoded.body,
            diff=decode_whole_body(decoded.body),
            digests=digests,
        )


class Recent:
    """Frames by their seq, height or walk number."""

    def __init__(self, store: Store, group: Group) -> None:
        self._store = store
        self._group = group

    def entry(self, seq: int) -> Undone:
        """What taking a frame back needs, from the steps not yet written or from the journal."""
        step = self._group.steps.get(seq)
        if step is not None:
            return Undone.of(step.before, step.whole)
        entry = self.stored(seq)
        return Undone.of(entry.before.tip, entry.frame_bytes)

    def stored(self, seq: int) -> journal.Entry:
        data = self._group.undo.get(journal.entry_key(seq)) or self._store.get_undo(journal.entry_key(seq))
        if data is None:
            raise StoreCorrupt(
                f"the journal has no entry for seq {seq}",
                way_out="restore this data directory from a snapshot",
            )
        return journal.decode_entry(data)

    def seq_at(self, height: int) -> int | None:
        """The seq of the frame that connected the current branch's block at a height, while the journal has it."""
        for step in reversed(self._group.steps.values()):
            if step.header.ref.height == height:
                return None if step.header.kind is Kind.UNDO else step.header.seq
        return self.accepted_seq_at(height)

    def accepted_seq_at(self, height: int, undo: Undo | None = None) -> int | None:
        key = journal.height_key(height)
        undo = self._group.undo if undo is None else undo
        data = undo[key] if key in undo else self._store.get_undo(key)
        return None if data is None else int.from_bytes(data, "big")

    def header_at(self, height: int) -> Header:
        """The header of the current branch's block at a height. Raises StoreCorrupt if the journal has none."""
        seq = self.seq_at(height)
        if seq is None:
            raise StoreCorrupt(f"the journal has no block at height {height}")
        return self.header(seq)

    def header_of_walk(self, walk: int, meta: Meta) -> Header | None:
        """The header of the frame that ends an event; None where the journal does not reach it. The UNDO frames of a
        rewind, but its last one, carry the number of the event before it: the first frame of a number is its own."""
        seqs = range(meta.journal_first_seq, max(self._group.steps, default=meta.seq) + 1)
        at = bisect_left(seqs, walk, key=lambda seq: self.header(seq).walk)
        header = self.header(seqs[at]) if at < len(seqs) else None
        if header is None or header.walk != walk or (at == 0 and header.kind is Kind.UNDO):
            return None  # the journal may begin inside of a rewind
        return header

    def header(self, seq: int) -> Header:
        step = self._group.steps.get(seq)
        return self.stored(seq).header if step is None else step.header
