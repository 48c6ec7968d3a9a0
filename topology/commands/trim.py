"""`stateferry topics trim`: delete the records that nobody needs any more."""

from __future__ import annotations

from typing import Any

import click

from pipeline.errors import NotFound, UsageError
from pipeline.objects import open_objects
from topology import topics, trimmer
from topology.commands.common import ask_broker, common_options, emit, signature_option
from topology.settings import Settings
from topology.signing import required_signer
from topology.transports.base import Broker
from topology.trimmer import Found


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and why not more.")
@click.option(
    "--keep-blocks",
    "trim_keep_blocks",
    type=click.IntRange(0),
    metavar="N",
    help="So many archived blocks stay: a node that was away for less goes on without a restore.",
)
@signature_option
@common_options
def trim(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Delete the records of blocks that are archived, and that a restore leads behind.

    Before anything goes, the topic `generations` says where the others are read from. Readers that lack what went
    restore by themselves; no offset is ever reset. It may be run again, while everything runs, and killed.
    """
    keep_blocks = settings.trim_keep_blocks
    if keep_blocks is None:
        raise UsageError(
            "how many archived blocks are to stay was not said", way_out="--keep-blocks 1008 is a week of Bitcoin"
        )

    async def work(broker: Broker) -> dict[str, Any]:
        generation = await topics.current_generation(broker)
        if generation is None:
            raise NotFound("there is no generation on this broker yet", way_out="publish blocks: `stateferry ingest`")
        topics.check_chain(settings.chain, generation.chain_id, settings.broker_url)
        objects = open_objects(settings.objects_url)
        found = await trimmer.look(broker, objects, generation, keep_blocks, required_signer(settings))
        if not dry_run:
            await trimmer.trim(broker, found)
        return _document(found, settings.topic_prefix, dry_run=dry_run)

    document = ask_broker(settings, work)
    emit(document, as_json=as_json, text=lambda: _text(document))


def _document(found: Found, prefix: str, *, dry_run: bool) -> dict[str, Any]:
    floor = found.floor
    return {
        "dry_run": dry_run,
        "height": None if floor is None else floor.ref.height,
        "walk": None if floor is None else floor.blocks.walk,
        "records": found.records,
        "trimmed": [cut._asdict() | {"topic": prefix + cut.topic} for cut in found.cuts],
        "why": list(found.why),
    }


def _text(document: dict[str, Any]) -> str:
    verb = "would go" if document["dry_run"] else "gone"
    lines = [f"why       {reason}" for reason in document["why"]]
    lines += [
        f"{verb:<9} {cut['topic']}[{cut['partition']}]  [{cut['first']}, {cut['before']})"
        for cut in document["trimmed"]
    ]
    behind = "" if document["height"] is None else f", up to block {document['height']}"
    lines.append(f"{verb:<9} {document['records']:,} records{behind}")
    return "\n".join(lines)
