"""Trimming: deleting the records of a generation's topics that nobody needs any more (`pipeline.trim`).

First a floor is said on the topic `generations` (`pipeline.floor`), then records go, partition by partition. Killed in
between, everybody finds the floor, and the next trim deletes the rest: by the same floor, so that two at once, or one
again, delete the same. `generations` is never trimmed, and `anchors` keeps itself short.

What is deleted is in the object store, by its names, its newest manifest and the segments at the cut. A trim compares
these with the topics first: what it is about to delete is what was archived, and not what another topic of this name
holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.archive_names import parse_segment_name
from pipeline.errors import ArchiveConflict, LogLost, NotFound
from pipeline.floor import EventsFloor, Floor, FramesFloor, ShardFloor, encode_floor
from pipeline.generation import GENERATIONS_TOPIC, Generation
from pipeline.leases import Kind
from pipeline.objects import ObjectStore
from pipeline.plans import RestorePlan
from pipeline.position import BEFORE_FIRST_HEIGHT, LogMark, Meta
from pipeline.splitting import stood_at
from pipeline.trim import Trim, plan_trim
from topology import floors, log_check, logs
from topology.fetching import open_segment
from topology.holding import listed_leases, read_leases
from topology.restore_plans import Request, plan_restore
from topology.transports.base import Broker

log = logs.get()


class Cut(NamedTuple):
    """Records of one partition that may go: ``first`` up to ``before``."""

    topic: str
    partition: int
    first: int
    before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What may go now. ``floor`` None: nothing. ``is_said``: it stands on `generations` already."""

    floor: Floor | None
    is_said: bool
    cuts: tuple[Cut, ...]
    why: tuple[str, ...]

    @property
    def records(self) -> int:
        return sum(cut.before - cut.first for cut in self.cuts)


async def look(
    broker: Broker, objects: ObjectStore, generation: Generation, keep_blocks: int, signer: bytes | None = None
) -> Found:
    """What may go, and why not more. ``keep_blocks``: so many archived blocks stay. ``signer``: as of a `Request`, of
    those who will restore.

    Raises LogLost if the topics do not hold what was archived, ArchiveConflict, and what the object store raises.
    """
    planned = await asyncio.to_thread(_plan, objects, generation, keep_blocks, signer)
    if planned.height is None:
        return Found(floor=None, is_said=False, cuts=(), why=planned.why)
    said = max(await floors.of(broker, generation), key=lambda floor: floor.ref.height, default=None)
    if said is not None and said.ref.height > planned.height:
        why = f"trimmed to {said.ref.height} before"
        return Found(floor=None, is_said=True, cuts=(), why=(*planned.why, why))
    is_said = said is not None and said.ref.height == planned.height
    if said is None or not is_said:
        resumes = await asyncio.to_thread(_resumes, objects, planned)
        said = await _make_floor(broker, generation, resumes)
    return Found(floor=said, is_said=is_said, cuts=tuple(await _cuts(broker, generation, said)), why=planned.why)


async def trim(broker: Broker, found: Found) -> None:
    """Delete what was found. It may be done again, and by several at once."""
    floor = found.floor
    if floor is None or not found.cuts:
        return
    if not found.is_said:
        await broker.append(GENERATIONS_TOPIC, 0, [(None, encode_floor(floor))])
    for cut in found.cuts:
        await broker.delete_records(cut.topic, cut.partition, cut.before)
    log.info("topics_trimmed", height=floor.ref.height, records=found.records)


# What the object store says


def _plan(objects: ObjectStore, generation: Generation, keep_blocks: int, signer: bytes | None) -> Trim:
    chain_id, generation_id = generation.chain_id, generation.generation
    try:
        plan = plan_restore(objects, Request(chain=chain_id, generation=generation_id, signer=signer))
    except NotFound as error:
        return Trim(None, (), (f"no state can be restored: {error.what}",))
    names = (parse_segment_name(info.name) for info in objects.list(f"{chain_id}/{generation_id.hex()}/archive/"))
    # One that expired is nobody's any more. A clock that says so too early makes a restore begin again, at worst.
    pins = [one for one in listed_leases(objects, chain_id) if one.kind is Kind.PIN and one.expires_s >= time.time()]
    return plan_trim(
        [name for name in names if name is not None],
        shards=generation.shards,
        restores_to=_goes_on_from(plan),
        keep_blocks=keep_blocks,
        pins={str(name): lease.names for name, lease in read_leases(objects, pins)},
    )


def _goes_on_from(plan: RestorePlan) -> int:
    """The height whose offsets are known after a restore: inside a segment or range diff they are not."""
    start = BEFORE_FIRST_HEIGHT if plan.manifest is None else plan.manifest.height
    ends = [[hop.name.last for hop in plan.hops_of(shard) if hop.name.last <= plan.height] for shard in plan.wanted]
    return min(max(start, *one) if one else start for one in ends)


def _resumes(objects: ObjectStore, planned: Trim) -> list[Meta]:
    """Where each shard goes on from behind the cut."""
    return [open_segment(objects.get(str(name)), name).resume for name in planned.segments]


# What the topics say


async def _make_floor(broker: Broker, generation: Generation, resumes: Sequence[Meta]) -> Floor:
    shards = []
    for resume in resumes:
        frames = FramesFloor(mark=resume.diffs, epoch=resume.epoch, writer=resume.writer)
        shards.append(ShardFloor(frames=frames, events=_events_floor(resume, resume.blocks)))
    refs = {one.events.ref for one in shards}
    if len(refs) > 1:
        raise ArchiveConflict(
            f"the archive ends with different blocks in different shards: {', '.join(map(str, refs))}",
            way_out="audit the nodes that archived them: `stateferry verify --level full`",
        )
    blocks = shards[0].events
    if generation.shards > 1:
        # A rewind may have come between what two shards archived of one height: the lower one is for both.
        lowest = min(resumes, key=lambda resume: resume.walk)
        blocks = _events_floor(lowest, await _mark_on_blocks(broker, generation, lowest))
    return Floor(generation=generation.generation, ref=blocks.ref, blocks=blocks, shards=tuple(shards))


def _events_floor(resume: Meta, mark: LogMark) -> EventsFloor:
    assert resume.tip.ref is not None
    source = (resume.source_epoch, resume.source_writer)
    return EventsFloor(ref=resume.tip.ref, mark=mark, walk=resume.walk, source=source)


async def _mark_on_blocks(broker: Broker, generation: Generation, resume: Meta) -> LogMark:
    """Where on `blocks` the event stands of which a shard read its part last."""
    topic, offset = generation.shard_blocks_topic, resume.blocks.next_offset - 1
    record = (await broker.read(topic, resume.shard, offset, bytes_max=1))[0]
    return LogMark(next_offset=stood_at(record.value), last_digest=b"")


async def _cuts(broker: Broker, generation: Generation, floor: Floor) -> list[Cut]:
    """What goes by a floor. Raises LogLost."""
    wanted = []
    for shard, one in enumerate(floor.shards):
        wanted.append((generation.diffs_topic, shard, one.frames.mark, 0))
        if generation.shards > 1:
            # Who goes on behind an event looks at its last record, for where on `blocks` it stood.
            wanted.append((generation.shard_blocks_topic, shard, one.events.mark, 1))
    wanted.append((generation.blocks_topic, 0, floor.blocks.mark, 0))
    cuts = []
    for topic, partition, mark, kept in wanted:
        first, _ = await broker.bounds(topic, partition)
        before = mark.next_offset - kept
        if before <= first:
            continue
        if not await log_check.holds(broker, topic, partition, mark):
            raise LogLost(
                f"the topic does not hold the record before offset {mark.next_offset} that was archived",
                where=f"{topic}[{partition}]",
                way_out="nothing was deleted; it lost records, or is another topic of this name",
            )
        cuts.append(Cut(topic, partition, first, before))
    return cuts
