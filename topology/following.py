"""What records of the diffs topic do to a shard: from where they are read, and what follows from each.

What a record means is said by `pipeline.replica`; here it has its effect: a frame goes into the group that is written
next, an EPOCH opens or ends a lead, a void record is counted, evidence of a divergence is kept. Whatever makes no sense
is first held against the log, which may have changed under us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import Diverged, FrameCorrupt, Gap, GenerationEnded, LogChanged, StateferryError
from pipeline.frame_reader import Ended, Reign, Void, is_ahead
from pipeline.generation import Generation
from pipeline.replica import Applied, Outcome
from topology import log_check, logs
from topology.committing import Committing
from topology.lead import Lead, State
from topology.shard_store import ShardStore
from topology.transports.base import Broker

log = logs.get()


@dataclass(slots=True, kw_only=True)
class Ends:
    """End offsets of the topics as they were when they were last looked at: what `--until-idle` waits for."""

    blocks: int = 0
    diffs: int = 0


class Following:
    """A shard's way along its diffs.

    * `next_offset` is that of the next record to handle: whoever hands one over moves it on first.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        generation: Generation,
        stored: ShardStore,
        committing: Committing,
        lead: Lead | None,
        ends: Ends,
        on_lead: list[Callable[[], None]],
    ) -> None:
        self.next_offset = 0
        self.voids: Counter[str] = Counter()
        self._broker = broker
        self._generation = generation
        self._stored = stored
        self._committing = committing
        self._lead = lead
        self._ends = ends
        self._on_lead = on_lead

    async def find_place(self) -> int:
        """Take back what the diffs topic lost: the offset from which to read. Raises LogLost, OffsetOutOfRange."""
        stored = self._stored
        if self._lead is not None:
            self._lead.give_up()
        await log_check.follow_back(self._broker, self._generation.diffs_topic, stored.replica, stored.base_meta())
        stored.committed = stored.replica.meta
        self.next_offset = stored.replica.meta.diffs.next_offset
        return self.next_offset

    async def follow(self, offset: int, record: bytes) -> None:
        """One record, in order."""
        replica = self._stored.replica
        try:
            follower = replica.step if self._lead is None else self._lead.follow
            outcome = follower(record, offset)
        except (Diverged, FrameCorrupt, Gap) as error:
            await self._check_log()  # it may have changed under us: that is the first thing to know
            if not isinstance(error, Gap):
                self._quarantine(error, record, offset)
            raise
        if isinstance(outcome, Void) and is_ahead(record, replica.meta):
            await self._check_log()  # of a writer whose EPOCH was never read here: maybe it stands where others stood
        self._take(outcome, offset)

    async def _check_log(self) -> None:
        """Raises LogChanged if the diffs topic does not hold what was followed."""
        topic, meta = self._generation.diffs_topic, self._stored.replica.meta
        if not await log_check.holds(self._broker, topic, meta.shard, meta.diffs):
            raise LogChanged(
                f"the record before offset {meta.diffs.next_offset} is not the one that was followed",
                where=topic,
                way_out="start again: what the log lost is taken back",
            )

    def _take(self, outcome: Outcome, offset: int) -> None:
        match outcome:
            case Applied(step=step):
                in_flight = 0 if self._lead is None else self._lead.in_flight
                self._committing.take(step, more_come=self.next_offset < self._ends.diffs or in_flight > 1)
            case Reign(header=header):
                self._committing.commit()
                if self._lead is not None:
                    self._lead.meet_epoch(header)
                    if self._lead.state is State.LEADING:
                        for begin in self._on_lead:
                            begin()
            case Void(reason=reason):
                self.voids[reason] += 1
                log.info("record_voided", topic=self._generation.diffs_topic, offset=offset, reason=reason)
            case Ended(successor=successor):
                ended, follows = self._generation.generation.hex(), successor.generation.hex()
                log.warning("generation_ended", generation=ended, successor=follows)
                raise GenerationEnded(
                    f"generation {ended} ended here; {follows} follows",
                    way_out="restore the new generation into an empty data directory: `stateferry restore`",
                )

    def _quarantine(self, error: StateferryError, record: bytes, offset: int) -> None:
        stored = self._stored
        folder = stored.data_dir.quarantine(
            error,
            record,
            topic=self._generation.diffs_topic,
            offset=offset,
            seq=stored.replica.meta.seq,
            **stored.where(),
        )
        log.error("node_quarantined", error=error.name, evidence=str(folder))
