"""The collector: sweeps out of an object store what no rule keeps and nobody needs.

It lists, says in a mark what is going to go, waits a grace, lists again, and deletes only what may go by both lists:
manifests first, then parts. Leases that come up meanwhile keep what they name, manifests that come up keep their parts.
A publisher whose objects a mark names waits for its end and looks at them again (`snapshotter.publish`), a restore that
finds something gone plans again; so nothing here is wrong, only wasteful, if a lease ends too early.

Killed anywhere it leaves a mark, which the next one removes once it is dead, and some of what it was to delete.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pipeline.archive_names import parse_segment_name
from pipeline.errors import ManifestCorrupt, NotFound, SegmentCorrupt, Unsupported
from pipeline.leases import GRACE_S, LEASE_S, Kind, Lease, LeaseName, Names, dead, parse_lease_name
from pipeline.objects import LocalObjects, ObjectInfo, ObjectStore
from pipeline.objects.local import Draft
from pipeline.plans import check_one_chain
from pipeline.retention import Doomed, Rules, Snapshot, Verdict, doomed, expired, judge
from pipeline.segment_index import SegmentIndex
from pipeline.snapshot import Manifest, parse_manifest_name
from topology import logs
from topology.holding import CLOCK, Clock, Holding, read_leases
from topology.restore_plans import read_manifest

log = logs.get()

SWEEP_S = 900.0
"""What deletes may take in all; the next sweep goes on."""
_MARGIN_S = 300.0
"""A mark outlasts the last delete by this: a request that was on its way then is through, or given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """An object store at one time. ``dead``: leases that nobody holds any more; ``held``: all others."""

    chain_id: str
    infos: Sequence[ObjectInfo]
    verdicts: Sequence[Verdict]
    doomed: Sequence[Doomed]
    held: Sequence[LeaseName]
    dead: Sequence[LeaseName]
    drafts: Sequence[Draft]
    expired: Collection[bytes]  # generations


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """``left``: what was to go and could not in time."""

    deleted: Sequence[Doomed]
    drafts: Sequence[Draft]
    left: int


def chain_of(objects: ObjectStore, chain_id: str) -> str:
    """The chain asked for, or the only one there is. Raises UsageError, NotFound."""
    if chain_id:
        return chain_id
    found = sorted({info.name.split("/", 1)[0] for info in objects.list() if "/" in info.name})
    check_one_chain(found)
    if not found:
        raise NotFound("the object store is empty", way_out="check --objects")
    return found[0]


def look(
    objects: ObjectStore,
    chain_id: str,
    rules: Rules,
    *,
    archive: bool = False,
    before: Look | None = None,
    clock: Clock = CLOCK,
) -> Look:
    """What is there, and what of it may go. ``before``: what was seen a grace ago; without it an expired lease counts
    as dead. Raises LeaseCorrupt and what the store raises."""
    infos = list(objects.list(f"{chain_id}/"))
    names = {info.name for info in infos}
    snapshots = _snapshots(objects, infos, names)
    expired_now = expired(snapshots, _archived(objects, infos, snapshots), rules, clock.now_s())
    verdicts = judge(snapshots, rules, clock.now_s(), expired_now)
    leases = [lease for info in infos if (lease := parse_lease_name(info.name)) is not None]
    seen = leases if before is None else [*before.held, *before.dead]
    gone = dead(leases, seen, clock.now_s())
    held = [lease for lease in leases if lease not in gone]
    holding = [lease for lease in held if lease.kind is not Kind.MARK]
    kept = [name for _, lease in read_leases(objects, holding) for name in lease.names]
    drafts = objects.drafts() if isinstance(objects, LocalObjects) else ()
    old = [draft for draft in drafts if clock.now_s() - draft.modified_s > 2 * LEASE_S]
    return Look(
        chain_id=chain_id,
        infos=infos,
        verdicts=verdicts,
        doomed=doomed(infos, verdicts, Names(kept), archive=archive, gone=expired_now),
        held=held,
        dead=gone,
        drafts=[draft for draft in old if before is None or draft in before.drafts],
        expired=expired_now,
    )


def _snapshots(objects: ObjectStore, infos: Sequence[ObjectInfo], names: set[str]) -> list[Snapshot]:
    found = []
    for info in infos:
        name = parse_manifest_name(info.name)
        if name is None:
            continue
        manifest: Manifest | None = None
        with suppress(NotFound):  # another sweep's, meanwhile
            modified_s = objects.modified_s(info.name)
            with suppress(ManifestCorrupt, Unsupported):
                manifest = read_manifest(objects, info.name)
            parts = () if manifest is None else manifest.parts
            lacks = next((part.name for part in parts if f"{name.folder}/{part.name}" not in names), "")
            found.append(Snapshot(name, modified_s, manifest, lacks))
    return found


def _archived(objects: ObjectStore, infos: Sequence[ObjectInfo], snapshots: Sequence[Snapshot]) -> dict[bytes, int]:
    """The generations of which something is archived, with their numbers: by a snapshot, or one of their segments."""
    known = {one.name.generation: one.manifest.generation_number for one in snapshots if one.manifest is not None}
    found: dict[bytes, int] = {}
    for info in infos:
        name = parse_segment_name(info.name)
        if name is None or name.generation in found:
            continue
        if name.generation not in known:
            with suppress(NotFound, SegmentCorrupt, Unsupported):
                read = partial(objects.get_range, info.name)
                known[name.generation] = SegmentIndex.read(name, info.size_bytes, read).resume.generation_number
        if name.generation in known:
            found[name.generation] = known[name.generation]
    return found


def sweep(
    objects: ObjectStore,
    first: Look,
    rules: Rules,
    *,
    archive: bool = False,
    grace_s: float = GRACE_S,
    clock: Clock = CLOCK,
) -> Swept:
    """Delete what may go by ``first``, which was just looked at, and still may after a grace. Raises LeaseCorrupt and
    what the store raises; then it may be done again."""
    if not first.doomed and not first.dead and not first.drafts:
        return Swept(deleted=(), drafts=(), left=0)
    marked = {one.name for one in first.doomed}
    mark = Lease(names=tuple(marked), lasts_s=int(grace_s + SWEEP_S + _MARGIN_S))
    marking = Holding(objects, first.chain_id, Kind.MARK, mark, clock)
    began_s = clock.steady_s()
    marking.renew()
    clock.sleep(grace_s)
    second = look(objects, first.chain_id, rules, archive=archive, before=first, clock=clock)
    # A manifest that came meanwhile, and that no rule keeps, is for the next sweep: until then it has its parts.
    going = [one for one in second.doomed if one.name in marked and one.behind in {"", *marked}]
    deleted: list[Doomed] = []
    for one in going:
        if clock.steady_s() - began_s > grace_s + SWEEP_S:
            break
        objects.delete(one.name)
        deleted.append(one)
        log.info("object_swept", object=one.name, bytes=one.size_bytes, why=one.why)
    for lease in second.dead:
        objects.delete(str(lease))
    for draft in second.drafts:
        draft.path.unlink(missing_ok=True)
    marking.end()
    return Swept(deleted=deleted, drafts=second.drafts, left=len(going) - len(deleted))
