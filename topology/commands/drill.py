"""`stateferry drill`: everything but the object store is lost, in a scratch directory.

    1. a replica's store is restored to the newest height, and proven
    2. a generation of topics is made on a log that was empty: its base is the newest snapshot with archived blocks
       above it, its events are what the archived frames did
    3. a primary makes frames of those events, a replica follows them, and hashes every key

The roots at the end of both ways must be equal. What was final and not yet archived is what a real loss would lose.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline import frame
from pipeline.archive_names import parse_segment_name
from pipeline.block import Block, Op, Ops
from pipeline.diff import decode_whole_body
from pipeline.errors import NotFound, RootMismatch
from pipeline.frame import Header
from pipeline.generation import Generation
from pipeline.objects import LocalObjects, ObjectStore, open_objects
from pipeline.plans import SegmentObject, lead
from pipeline.restore import Stage
from pipeline.snapshot import Manifest, parse_manifest_name
from topology import base_state, restorer, source, topics
from topology.building import held_meta
from topology.commands.common import ask_worker, common_options, console, emit, rows, signature_option
from topology.data_dir import DataDir
from topology.demo.processes import Processes
from topology.fetching import open_segment
from topology.restore_plans import Request, read_manifest
from topology.restorer import Restored
from topology.settings import Settings
from topology.signing import required_signer
from topology.transports.factory import open_broker


@click.command()
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where there is room for the state five times. [default: the system's place for temporary files]",
)
@signature_option
@common_options
def drill(settings: Settings, scratch: Path | None, as_json: bool) -> None:
    """Restore, and rebuild the topics, from the object store alone; prove both; say how much was lost and how long it
    took. Nothing of this node, its broker or the object store is changed, and the scratch goes afterwards."""
    objects = open_objects(settings.objects_url)
    with tempfile.TemporaryDirectory(prefix="stateferry-drill-", dir=scratch) as made:
        folder, started_s = Path(made), time.monotonic()
        console.print("restoring the newest state", style="dim")
        request = Request(chain=settings.chain or None, signer=required_signer(settings))
        node = DataDir(folder / "restored")
        with node:
            restored = restorer.restore(objects, node.path, request)
        restored_s = time.monotonic() - started_s
        console.print(f"rebuilding the topics up to height {restored.ref.height}", style="dim")
        rebuilt = asyncio.run(_rebuild(objects, folder, restored))
        document = _loss(settings, objects, restored) | {
            "restored_height": restored.ref.height,
            "block_hash": restored.ref.block_hash[::-1].hex(),
            "root": restored.meta.tip.root.hex(),
            "keys": restored.keys,
            "manifest": restored.manifest_name or None,
            "rto_claimed_s": round(sum(restored.seconds.get(stage, 0.0) for stage in _BEFORE_CLAIMED), 3),
            "rto_proven_s": round(restored_s, 3),
            **rebuilt,
            "rto_topics_s": round(time.monotonic() - started_s, 3),
        }
    emit(document, as_json=as_json, text=lambda: rows(document))


_BEFORE_CLAIMED = [stage for stage in Stage if stage not in (Stage.CLAIMED, Stage.PROVE, Stage.PROVEN)]


def _loss(settings: Settings, objects: ObjectStore, restored: Restored) -> dict[str, Any]:
    """What lies above the archive's end: in blocks, if this node knows the tip, and in seconds since the last put."""
    status = ask_worker(settings, {"what": "status"})
    tip = None if status is None else status["height"]
    if tip is None:
        metas = [held_meta(one.store_path) for one in DataDir(settings.data_dir).shard_dirs]
        tip = min((meta.tip.height for meta in metas if meta is not None), default=None)
    names = [info.name for info in objects.list(f"{restored.meta.chain_id}/{restored.meta.generation.hex()}/")]
    put_s = 0.0
    for name in names:
        segment = parse_segment_name(name)
        if name == restored.manifest_name or (segment is not None and segment.last == restored.ref.height):
            with suppress(NotFound):
                put_s = max(put_s, objects.modified_s(name))
    return {
        "chain": restored.meta.chain_id,
        "tip_height": tip,
        "rpo_blocks": None if tip is None else max(0, tip - restored.ref.height),
        "rpo_seconds": round(max(0.0, time.time() - put_s), 3),
    }


# Topics


async def _rebuild(objects: ObjectStore, folder: Path, restored: Restored) -> dict[str, Any]:
    """A generation on a new log, followed by a primary and a replica. Raises RootMismatch, and what they raise."""
    height, started_s = restored.ref.height, time.monotonic()
    chain, generation = restored.meta.chain_id, restored.meta.generation
    infos = list(objects.list(f"{chain}/{generation.hex()}/"))
    listed = [(parse_segment_name(info.name), info.size_bytes) for info in infos]
    segments = [SegmentObject(name, size) for name, size in listed if name is not None]
    snapshots = [name for info in infos if (name := parse_manifest_name(info.name)) is not None]
    below = sorted((name for name in snapshots if name.height <= height), key=lambda name: name.height)
    lower = [name for name in below if name.height < height]
    base = (lower or below)[-1] if below else None
    manifest = None if base is None else read_manifest(objects, str(base))
    target = LocalObjects(folder / "objects")
    url = f"embedded://{folder}/log.sqlite"
    begun = await _begin(objects, target, url, restored, manifest)
    shards = [[one for one in segments if one.name.shard == shard] for shard in range(restored.meta.shards)]
    broker = open_broker(url)
    try:
        publisher = await source.open_publisher(broker, begun)
        blocks = 0
        for offer in source.offers(_blocks(objects, shards, manifest, height)):
            await publisher.offer(offer)
            blocks += 1
        await publisher.flush()
    finally:
        await broker.close()
    published_s = time.monotonic() - started_s
    found = await _follow(folder, url, height, restored)
    root = restored.meta.tip.root.hex()
    if found["root"] != root:
        raise RootMismatch(
            f"the topics that were rebuilt end in root {found['root']}, the restored state's is {root}",
            way_out="audit the object store: `stateferry verify --level replay`",
        )
    return {
        "topics_from": None if manifest is None else manifest.height,
        "topics_blocks": blocks,
        "topics_published_s": round(published_s, 3),
        "replica_proof": found["proof"],
    }


async def _begin(
    objects: ObjectStore, target: ObjectStore, url: str, restored: Restored, manifest: Manifest | None
) -> Generation:
    """The first generation of an empty log, with its base in ``target``."""
    wanted = Generation(
        generation=secrets.token_bytes(16), chain_id=restored.meta.chain_id, shards=restored.meta.shards
    )
    if manifest is not None:
        wanted = replace(wanted, base=manifest.tip.ref)
        copied = await asyncio.to_thread(base_state.republish, objects, manifest, wanted, target=target)
        wanted = base_state.with_base(wanted, copied)
    broker = open_broker(url)
    try:
        return await topics.open_generation(broker, wanted)
    finally:
        await broker.close()


def _blocks(
    objects: ObjectStore, shards: Sequence[Sequence[SegmentObject]], manifest: Manifest | None, height: int
) -> Iterator[Block]:
    """What the archived frames of all shards did, as blocks to apply again."""
    begin = min((one.name.first for one in shards[0]), default=0) - 1
    at = begin if manifest is None else manifest.height
    by_shard = [_frames(objects, lead(one, at, height)[0], at, height) for one in shards]
    for frames in zip(*by_shard, strict=True):
        header = frames[0][0]
        ops: dict[str, tuple[bytearray, list[bytes], list[bytes]]] = {}
        for _, body in frames:
            for table in decode_whole_body(body).tables.values():
                codes, keys, values = ops.setdefault(table.schema.name, (bytearray(), [], []))
                codes += bytes([Op.PUT]) * (len(table.created_keys) + len(table.updated_keys))
                codes += bytes([Op.DELETE]) * len(table.deleted_keys)
                keys += [*table.created_keys, *table.updated_keys, *table.deleted_keys]
                values += [*table.created_values, *table.updated_afters]
        yield Block(
            ref=header.ref,
            parent_hash=header.parent_hash,
            time_s=header.block_time_s,
            tables={
                name: Ops(codes=bytes(codes), keys=keys, values=values) for name, (codes, keys, values) in ops.items()
            },
        )


def _frames(
    objects: ObjectStore, hops: Sequence[SegmentObject], at: int, height: int
) -> Iterator[tuple[Header, bytes]]:
    """Of one shard, one segment in memory at a time."""
    for hop in hops:
        segment = open_segment(objects.get(str(hop.name)), hop.name)
        for data in segment.frames(max(at + 1, segment.first)):
            decoded = frame.decode(data)
            if decoded.header.ref.height > height:
                return
            yield decoded.header, decoded.body
        at = max(at, segment.last)


async def _follow(folder: Path, url: str, height: int, restored: Restored) -> dict[str, Any]:
    """A primary to ``height``, then a replica, which hashes every key: where that stands."""
    processes = Processes(folder)
    places = ["--broker", url, "--objects", f"file://{folder}/objects"]
    finality = ["--finality", str(restored.meta.finality)]
    try:
        for role in ("primary", "replica"):
            options = ["--role", role, "--until-height", str(height), *(finality if role == "primary" else [])]
            await processes.command("run", *options, *places, "--data-dir", str(folder / role))
        return await processes.command("verify", "--level", "full", "--data-dir", str(folder / "replica"), *places)
    finally:
        await processes.close()
