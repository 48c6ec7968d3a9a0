"""`stateferry gc` and `prove-restorable`: what an object store keeps, and whether that is enough."""

from __future__ import annotations

from typing import Any

import click

from pipeline.errors import Gap
from pipeline.leases import GRACE_S
from pipeline.objects import open_objects
from pipeline.restorable import Restorable
from pipeline.retention import Doomed
from topology import collector
from topology.collector import Look, Swept
from topology.commands.common import common_options, console, emit, rules_of, rules_options
from topology.promises import promises
from topology.settings import Settings


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and why all else stays.")
@click.option(
    "--archive", is_flag=True, help="Also segments and range diffs below the lowest height that rules promise."
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=GRACE_S,
    show_default=True,
    metavar="SECONDS",
    help="Between the mark and the deletes. Below 60, leases of machines with wrong clocks may be missed.",
)
@rules_options
@common_options
def gc(settings: Settings, dry_run: bool, archive: bool, grace_s: float, as_json: bool) -> None:
    """Delete snapshots that no rule keeps, and what nobody finished. Nothing that a restore under way reads."""
    objects, rules = open_objects(settings.objects_url), rules_of(settings)
    chain = collector.chain_of(objects, settings.chain)
    seen, swept = collector.look(objects, chain, rules, archive=archive), None
    if not dry_run:
        if seen.doomed and grace_s:
            console.print(f"{len(seen.doomed)} objects are marked; they go in {grace_s:g} s")
        swept = collector.sweep(objects, seen, rules, archive=archive, grace_s=grace_s)
    document = _document(seen, swept)
    emit(document, as_json=as_json, text=lambda: _text(document))


def _document(seen: Look, swept: Swept | None) -> dict[str, Any]:
    going = seen.doomed if swept is None else swept.deleted
    drafts = seen.drafts if swept is None else swept.drafts
    return {
        "chain": seen.chain_id,
        "dry_run": swept is None,
        "kept": [
            {
                "height": verdict.snapshot.name.height,
                "root": verdict.snapshot.name.root_start.hex(),
                "generation": verdict.snapshot.name.generation.hex(),
                "why": list(verdict.keeps),
            }
            for verdict in seen.verdicts
            if verdict.keeps
        ],
        "held": [str(lease) for lease in seen.held],
        "swept": [_one(one) for one in going],
        "swept_bytes": sum(one.size_bytes for one in going) + sum(draft.size_bytes for draft in drafts),
        "drafts": [str(draft.path) for draft in drafts],
        "dead_leases": [str(lease) for lease in seen.dead],
        "left": 0 if swept is None else swept.left,
    }


def _one(one: Doomed) -> dict[str, Any]:
    return {"object": one.name, "bytes": one.size_bytes, "why": one.why}


def _text(document: dict[str, Any]) -> str:
    verb = "would go" if document["dry_run"] else "gone"
    lines = [f"kept      {one['height']} {one['root']}  {', '.join(one['why'])}" for one in document["kept"]]
    lines += [f"held      {name}" for name in document["held"]]
    lines += [f"{verb:<9} {one['object']}  {one['bytes']:,} bytes: {one['why']}" for one in document["swept"]]
    lines += [f"{verb:<9} {path}: nobody finished it" for path in document["drafts"]]
    lines.append(f"{verb:<9} {len(document['swept'])} objects, {document['swept_bytes']:,} bytes")
    if document["left"]:
        lines.append(f"left      {document['left']} objects, for want of time: run it again")
    return "\n".join(lines)


@click.command("prove-restorable")
@rules_options
@common_options
def prove_restorable(settings: Settings, as_json: bool) -> None:
    """For every final height that is promised, say what restores it, or name the hole. Exit code 4 with a hole.

    It goes by names and manifests: `verify --level stored` reads what they name.
    """
    objects = open_objects(settings.objects_url)
    chain = collector.chain_of(objects, settings.chain)
    found = promises(objects, chain, rules_of(settings))
    holes = [hole for one in found for hole in one.holes]
    document = {"chain": chain, "restorable": not holes, "generations": [_promise(one) for one in found]}
    emit(document, as_json=as_json, text=lambda: "\n".join(map(_promise_text, found)))
    if holes:
        raise click.exceptions.Exit(Gap.exit_code)


def _promise(one: Restorable) -> dict[str, Any]:
    return {
        "generation": one.generation.hex(),
        "first_height": one.first,
        "last_height": one.last,
        "ways": [{"from": span.first, "to": span.last, "snapshot": span.start} for span in one.spans],
        "holes": [{"from": hole.first, "to": hole.last, "why": hole.why} for hole in one.holes],
    }


def _promise_text(one: Restorable) -> str:
    promised = "no height is promised" if one.first is None else f"heights {one.first} to {one.last} are promised"
    lines = [f"generation {one.generation.hex()}: {promised}"]
    for span in one.spans:
        start = "the empty state" if span.start is None else f"the snapshot of {span.start}"
        lines.append(f"  {span.first} to {span.last}  from {start}")
    lines += [f"  {hole.first} to {hole.last}  HOLE: {hole.why}" for hole in one.holes]
    return "\n".join(lines)
