"""The archiver: puts final blocks into the object store, segment by segment, from the store of a proven node."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import failpoints
from pipeline.archive import Committed, Contents, Segment, build_segment, covered_to, plan_segments, same_history
from pipeline.archive_names import SegmentName, archive_prefix, parse_segment_name
from pipeline.errors import ArchiveConflict
from pipeline.objects import AlreadyThere, ObjectStore
from pipeline.position import Meta
from pipeline.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A segment that is to be archived. ``first`` is above ``wanted`` where the node's journal has lost what is
    between; ``is_lost`` if that may be missing in the archive too. ``last`` is below ``first``, and there are no
    contents, if nothing else is due."""

    prefix: str
    name: str
    contents: Contents | None
    wanted: int
    first: int
    last: int
    is_lost: bool

    @property
    def blocks(self) -> int:
        return self.last - self.first + 1

    @property
    def frame_bytes(self) -> int:
        return 0 if self.contents is None else sum(map(len, self.contents.frames))


class Archiver:
    """Archives what one node's journal holds: `plan` reads it, `put` is for any thread, `done` tells the node.

    * One segment at a time, so that it can run between two commits.
    * What a crash left in between is put again: the name is taken, the history is the same.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def advance(self, replica: Replica, *, proven: bool, flush: bool = False) -> int:
        """Put the next segment that is due; how many blocks it has, 0 if none is. Call it again until it is 0.

        ``flush`` as of `plan`. Raises what `put` raises.
        """
        due = self.plan(replica, proven=proven, flush=flush)
        if due is None:
            return 0
        self.put(due)
        self.done(replica, due)
        return due.blocks

    def plan(self, replica: Replica, *, proven: bool, flush: bool = False) -> Due | None:
        """The next segment that is due, or None. ``flush`` closes a shorter one at the final height."""
        if not proven or not plan_segments(replica.meta.archived_to, replica.meta.final_height, flush=flush):
            return None
        committed = Committed(replica.store)
        meta = committed.meta
        if meta is None:
            return None
        wanted = replica.meta.archived_to
        start = _journal_start(committed, meta, wanted)
        if start != wanted:
            replica.archived(start)
        due = plan_segments(start, min(meta.final_height, meta.tip.height), flush=flush)
        is_lost = start > wanted and meta.journal_first_seq > 1
        if not due and not is_lost:
            return None
        first, last = due[0] if due else (start, start - 1)
        return Due(
            prefix=archive_prefix(meta.chain_id, meta.generation, meta.shard),
            name=str(SegmentName(meta.chain_id, meta.generation, meta.shard, first, last)) if due else "",
            contents=committed.contents(first, last) if due else None,
            wanted=wanted,
            first=first,
            last=last,
            is_lost=is_lost,
        )

    def put(self, due: Due) -> tuple[int, int] | None:
        """Put a segment. Returns the heights, both inclusive, that neither the archive nor the node's journal has: a
        snapshot taken above them makes up for it.

        Raises ArchiveConflict if another history stands in the archive, SegmentCorrupt if what stands there cannot be
        read.
        """
        gap = self._gap(due) if due.is_lost else None
        if due.contents is not None:
            self._put(due, build_segment(*due.contents))
        return gap

    def done(self, replica: Replica, due: Due) -> None:
        """A segment is in the archive: the next commit may prune what it holds."""
        replica.archived(due.last + 1)

    def _put(self, due: Due, data: bytes) -> None:
        failpoints.hit("archive.before_put")
        try:
            self._objects.put_new(due.name, data)
        except AlreadyThere:
            if not same_history(Segment.open(self._objects.get(due.name)), Segment.open(data)):
                raise ArchiveConflict(
                    f"the archive holds another history of heights {due.first} to {due.last} than this node",
                    where=due.name,
                    way_out="audit this node and the one that archived it: `stateferry verify --level full`",
                ) from None
        failpoints.hit("archive.after_put")

    def _gap(self, due: Due) -> tuple[int, int] | None:
        names = [parse_segment_name(info.name) for info in self._objects.list(due.prefix)]
        reach = covered_to([name for name in names if name is not None], due.wanted)
        return (reach, due.first - 1) if reach < due.first else None


def _journal_start(committed: Committed, meta: Meta, wanted: int) -> int:
    """The first height to archive: the one wanted, or where the journal begins if it has lost that."""
    first = wanted
    stop = min(meta.final_height, meta.tip.height) + 1
    while first < stop and committed.entry(first) is None:
        first += 1
    return first
