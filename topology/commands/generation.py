"""`stateferry generation`: show the generation in force, and start a new one from a snapshot."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import Any

import click

from pipeline import generation as generations
from pipeline.errors import NotFound, OffsetOutOfRange, UsageError
from pipeline.frame_reader import reign
from pipeline.generation import Generation
from pipeline.objects import ObjectStore, open_objects
from pipeline.position import NO_WRITER, Meta
from pipeline.shards import check_shards
from pipeline.signature import check_signature
from pipeline.snapshot import Manifest
from topology import base_state, floors, topics
from topology.commands.common import ask_broker, common_options, emit, rows
from topology.rescaling import rescale
from topology.settings import Settings
from topology.signing import required_signer, signing_key
from topology.transports.base import Broker

_SCRATCH_FOLDER = "rescaling"


@click.group("generation")
def generation_group() -> None:
    """One unbroken history of topics and seqs, and what follows it."""


@generation_group.command("show")
@common_options
def show(settings: Settings, as_json: bool) -> None:
    """The generation in force on the broker."""

    async def work(broker: Broker) -> dict[str, Any]:
        found = await topics.current_generation(broker)
        if found is None:
            raise NotFound("there is no generation on this broker yet", way_out="publish blocks: `stateferry ingest`")
        return _document(found)

    document = ask_broker(settings, work)
    emit(document, as_json=as_json, text=lambda: rows(document))


@generation_group.command("new")
@click.option("--height", type=int, help="Of the snapshot to begin from. [default: the newest]")
@click.option("--shards", type=int, help="How many it has, a power of two. [default: as many as before]")
@click.option(
    "--broker-lost", is_flag=True, help="The broker has no topics any more: go on from the object store alone."
)
@common_options
def new(settings: Settings, height: int | None, shards: int | None, broker_lost: bool, as_json: bool) -> None:
    """End this generation and begin another from a snapshot: after a reorg deeper than finality, or a lost topic or
    broker, or with another number of shards.

    Every reader of the old topics stops at their end and says so; data directories are restored from the new
    generation's base; the source publishes again from its position.
    """

    async def work(broker: Broker) -> dict[str, Any]:
        ended, objects = await topics.current_generation(broker), open_objects(settings.objects_url)
        if ended is not None and broker_lost:
            raise UsageError(f"the broker has generation {ended.generation.hex()}", way_out="leave --broker-lost out")
        if ended is None and not broker_lost:
            raise NotFound(
                "there is no generation on this broker to end", way_out="if it lost its topics: --broker-lost"
            )
        if ended is not None:
            topics.check_chain(settings.chain, ended.chain_id, settings.broker_url)
            manifest = await asyncio.to_thread(base_state.newest_manifest, objects, ended, height)
        else:
            manifest = await asyncio.to_thread(base_state.newest_of_all, objects, settings.chain, height)
        check_signature(manifest.signature, manifest.digest, required_signer(settings), manifest.name)
        wanted = Generation(
            generation=secrets.token_bytes(16),
            chain_id=manifest.chain_id,
            number=manifest.generation_number + 1,
            previous=manifest.generation,
            base=manifest.tip.ref,
            shards=manifest.shards if shards is None else check_shards(shards),
        )
        # Base manifest, record in `generations`, ends of the old partitions: a crash in between leaves either the old
        # generation, or the new one with old partitions that simply stop.
        base = await asyncio.to_thread(_publish_base, settings, objects, manifest, wanted)
        begun = await topics.open_generation(broker, base_state.with_base(wanted, base))
        if ended is not None:
            await _end(broker, ended, begun, manifest)
        await topics.ensure_openings(broker, begun, manifest.finality)
        return _document(begun) | {"ended": manifest.generation.hex(), "from_manifest": manifest.name}

    document = ask_broker(settings, work)
    emit(document, as_json=as_json, text=lambda: rows(document))


def _publish_base(settings: Settings, objects: ObjectStore, manifest: Manifest, wanted: Generation) -> Manifest:
    key = signing_key(settings.sign_key_file)
    if wanted.shards == manifest.shards:
        return base_state.republish(objects, manifest, wanted, key)
    return rescale(objects, manifest, wanted, settings.data_dir / _SCRATCH_FOLDER, key=key)


async def _end(broker: Broker, ended: Generation, successor: Generation, manifest: Manifest) -> None:
    """End the partitions of a generation. ``manifest``: a snapshot of it."""
    for shard in range(ended.shards):
        meta = await _last_epoch(broker, ended, manifest.resumes[shard])
        if meta is not None:
            record = generations.encode_end(successor, ended, shard=shard, epoch=meta.epoch + 1, writer=NO_WRITER)
            await broker.append(ended.diffs_topic, shard, [(None, record)])


async def _last_epoch(broker: Broker, ended: Generation, resume: Meta) -> Meta | None:
    """The epoch in force at the end of a shard's diffs, by the EPOCH records there; None if it was never opened.

    Read from the first record on; where that was deleted, from a floor, or else from the snapshot's ``resume``. Raises
    OffsetOutOfRange if the topic holds neither place.
    """
    shard = resume.shard
    first, end = await broker.bounds(ended.diffs_topic, shard)
    if first == 0:
        opened = await topics.opening(broker, ended, shard)
        if opened is None:
            return None
        meta = opened[0].meta(offset=0, digest=b"")
    elif (floor := await floors.of_frames(broker, ended, shard)) is not None:
        meta = replace(resume, epoch=floor.epoch, writer=floor.writer, diffs=floor.mark)
    elif first <= resume.diffs.next_offset <= end:
        meta = resume
    else:
        raise OffsetOutOfRange(
            f"the diffs topic begins at offset {first}; which epoch was in force there is not known",
            where=f"{ended.diffs_topic}[{shard}]",
            way_out="take a snapshot first: `stateferry snapshot`, on a node that follows the topic",
        )
    async for record in topics.records(broker, ended.diffs_topic, meta.diffs.next_offset, partition=shard):
        header = reign(record.value, meta)
        if header is not None:
            meta = replace(meta, epoch=header.epoch, writer=header.writer)
    return meta


def _document(found: Generation) -> dict[str, Any]:
    return {
        "generation": found.generation.hex(),
        "number": found.number,
        "chain": found.chain_id,
        "previous": found.previous.hex() if found.number > 1 else None,
        "base": topics.ref_text(found.base),
        "base_manifest": found.base_manifest or None,
        "shards": found.shards,
        "blocks_topic": found.blocks_topic,
        "diffs_topic": found.diffs_topic,
    }
