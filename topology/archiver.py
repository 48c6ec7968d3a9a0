"""The archiver: puts final blocks into the object store, segment by segment, from the store of a proven node."""

from __future__ import annotations

from pipeline import failpoints
from pipeline.archive import (
    Committed,
    Segment,
    archive_prefix,
    covered_to,
    parse_segment_name,
    plan_segments,
    same_history,
    segment_name,
)
from pipeline.errors import ArchiveConflict
from pipeline.objects import AlreadyThere, ObjectStore
from pipeline.position import Meta
from pipeline.replica import Replica


class Archiver:
    """Archives what one node's journal holds.

    * One call of `advance` puts at most one segment, so that it can run between two commits.
    * `gap` names heights, both inclusive, that neither the archive nor this node's journal has: a snapshot taken
      above them makes up for it. Whoever reads it forgets it.
    * What a crash left in between is put again: the name is taken, the history is the same.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self.gap: tuple[int, int] | None = None
        self.last_put: tuple[str, int] | None = None  # name and bytes of the last segment, for the log
        self._objects = objects

    def advance(self, replica: Replica, *, proven: bool, flush: bool = False) -> int:
        """Put the next segment that is due; how many blocks it has, 0 if none is. Call it again until it is 0.

        ``flush`` closes a shorter segment at the final height. Raises ArchiveConflict if another history stands in
        the archive, SegmentCorrupt if what stands there cannot be read.
        """
        if not proven or not plan_segments(replica.meta.archived_to, replica.meta.final_height, flush=flush):
            return 0
        committed = Committed(replica.store)
        meta = committed.meta
        if meta is None:
            return 0
        wanted = replica.meta.archived_to
        start = self._start(committed, meta, wanted)
        if start != wanted:
            replica.archived(start)
        due = plan_segments(start, min(meta.final_height, meta.tip.height), flush=flush)
        if not due:
            return 0
        first, last = due[0]
        data = committed.segment(first, last)
        name = segment_name(meta.chain_id, meta.generation, meta.shard, first, last)
        failpoints.hit("archive.before_put")
        try:
            self._objects.put_new(name, data)
        except AlreadyThere:
            if not same_history(Segment.open(self._objects.get(name)), Segment.open(data)):
                raise ArchiveConflict(
                    f"the archive holds another history of heights {first} to {last} than this node",
                    where=name,
                    way_out="audit this node and the one that archived it: `stateferry verify --level full`",
                ) from None
        failpoints.hit("archive.after_put")
        self.last_put = (name, len(data))
        replica.archived(last + 1)
        return last - first + 1

    def _start(self, committed: Committed, meta: Meta, wanted: int) -> int:
        """The first height to archive: the one wanted, or where this node's journal begins if it has lost that."""
        first = wanted
        stop = min(meta.final_height, meta.tip.height) + 1
        while first < stop and committed.entry(first) is None:
            first += 1
        if first > wanted and meta.journal_first_seq > 1:
            prefix = archive_prefix(meta.chain_id, meta.generation, meta.shard)
            names = [parse_segment_name(info.name) for info in self._objects.list(prefix)]
            reach = covered_to([name for name in names if name is not None], wanted)
            self.gap = (reach, first - 1) if reach < first else None
        return first
