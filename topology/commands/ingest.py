"""`stateferry ingest`: a source's blocks onto the blocks topic."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.block import Block, BlockRef
from pipeline.errors import BlockOrphan, NotFound, SettingsConflict, UsageError
from pipeline.generation import FINALITY_DEFAULT, Generation
from pipeline.objects import open_objects
from pipeline.shards import SHARDS_MAX
from pipeline.sources import bitcoin, bitcoin_files, synthetic
from topology import base_state, source, topic_check, topics
from topology.commands.common import ask_broker, common_options, console, emit, is_terminal, rows
from topology.settings import CHAIN_DEFAULT, Settings
from topology.signing import signing_key
from topology.source import Offer, Publisher
from topology.transports.base import Broker

BLOCKS_DEFAULT = 100
LIVE_COINS_MAX = 200_000
"""Of an endless chain, at most this many are known and may be spent: some 50 MB."""
_GROWTH = 9
"""Of so many changes, one adds to the coins of a synthetic chain."""


@click.group()
def ingest() -> None:
    """Publish blocks as events: connect, and rewind where the branch changes."""


_shards_option = click.option(
    "--shards",
    type=int,
    help=f"Of the generation that this opens: a power of two up to {SHARDS_MAX}. [default: as the topics were made, 1]",
)


_resume_option = click.option(
    "--resume-from",
    type=click.IntRange(min=1),
    metavar="WALK",
    help="Say everything again from this walk number on: what the topic says from there is void. The primary that "
    "stopped at a bad event names the number, and goes on from there.",
)


@ingest.command("bitcoin")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--again", is_flag=True, help="Take blocks of a branch that was left before.")
@click.option(
    "--base-coins",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines of the coins that stand before the first block: published as a base manifest.",
)
@click.option("--base-height", type=click.IntRange(min=0), help="Height of the first block's parent, without BIP34.")
@_resume_option
@_shards_option
@common_options
def ingest_bitcoin(
    settings: Settings,
    files: tuple[Path, ...],
    again: bool,
    base_coins: Path | None,
    base_height: int | None,
    resume_from: int | None,
    shards: int | None,
    as_json: bool,
) -> None:
    """Blocks from FILES: blk*.dat, raw blocks, or hex lines; plain, .gz, .zst or .bz2; in the order given."""

    async def publish(broker: Broker) -> dict[str, Any]:
        generation = await topics.current_generation(broker)
        topics.check_shards(shards, generation)
        if base_coins is not None:
            generation = await _base_generation(settings, broker, generation, files[0], base_coins, base_height, shards)
        if generation is None:
            _check_first_block(files[0])
            generation = await _new_generation(settings, broker, shards)
        publisher = await _open_publisher(settings, broker, generation, resume_from)
        return await _publish(publisher, generation, _bitcoin_offers(files), again=again, total=None)

    settings.data_dir.mkdir(parents=True, exist_ok=True)  # the log may be in there
    document = ask_broker(settings, publish)
    emit(document, as_json=as_json, text=lambda: rows(document))


@ingest.command("synthetic")
@click.option("--blocks", "count", type=click.IntRange(min=1), help="How many.  [default: 100]")
@click.option("--endless", is_flag=True, help="Until stopped, above the block that the topic stands at.")
@click.option("--changes", type=click.IntRange(min=2), default=2000, show_default=True, help="Per block.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--from-height", type=click.IntRange(min=0), help="Go on above this block. [default: an empty chain]")
@click.option("--reorg-every", type=click.IntRange(min=1), help="Leave the branch after every so many blocks.")
@click.option("--reorg-depth", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--interval-s", type=click.FloatRange(min=0), default=0.0, help="Wait between blocks, as a chain does.")
@_resume_option
@_shards_option
@common_options
def ingest_synthetic(
    settings: Settings,
    count: int | None,
    endless: bool,
    changes: int,
    seed: int,
    from_height: int | None,
    reorg_every: int | None,
    reorg_depth: int,
    interval_s: float,
    resume_from: int | None,
    shards: int | None,
    as_json: bool,
) -> None:
    """A made-up chain of heavier blocks: the same seed, the same bytes."""
    if endless and (count, from_height) != (None, None):
        raise UsageError("--endless goes on above the topic's tip: it takes no --blocks and no --from-height")
    total = None if endless else count or BLOCKS_DEFAULT

    async def publish(broker: Broker) -> dict[str, Any]:
        generation = await topics.current_generation(broker)
        topics.check_shards(shards, generation)
        generation = generation or await _new_generation(settings, broker, shards)
        publisher = await _open_publisher(settings, broker, generation, resume_from)
        parent = publisher.position.branch.tip if endless else None
        if from_height is not None:
            parent = publisher.position.branch.at(from_height)
            if parent is None:
                raise NotFound(f"the branch on the topic has no block at height {from_height}")
        make = partial(_synthetic, changes=changes, seed=seed, reorg_every=reorg_every, reorg_depth=reorg_depth)
        made = _endless(parent, changes, make) if total is None else make(parent, total)
        return await _publish(publisher, generation, source.offers(made), total=total, interval_s=interval_s)

    settings.data_dir.mkdir(parents=True, exist_ok=True)  # the log may be in there
    document = ask_broker(settings, publish)
    emit(document, as_json=as_json, text=lambda: rows(document))


def _endless(
    parent: BlockRef | None, changes: int, make: Callable[[BlockRef | None, int], Iterator[Block]]
) -> Iterator[Block]:
    """Chains on top of each other without end. Each forgets the coins of the one before, which stay unspent."""
    count = max(1, _GROWTH * LIVE_COINS_MAX // changes)
    while True:
        for block in make(parent, count):
            yield block
            parent = block.ref


def _synthetic(
    parent: BlockRef | None, count: int, *, changes: int, seed: int, reorg_every: int | None, reorg_depth: int
) -> Iterator[Block]:
    chain = synthetic.SyntheticChain(
        seed=seed,
        changes=changes,
        first_height=0 if parent is None else parent.height + 1,
        parent_hash=bytes(32) if parent is None else parent.block_hash,
    )
    for number in range(1, count + 1):
        yield from chain.extend(1)
        if reorg_every is not None and number % reorg_every == 0 and number > reorg_depth + 10 and number < count:
            chain.fork(reorg_depth, number)


async def _open_publisher(
    settings: Settings, broker: Broker, generation: Generation, resume_from: int | None
) -> Publisher:
    """Raises WrongChain, and SettingsConflict for topics that a worker would refuse."""
    topics.check_chain(settings.chain, generation.chain_id, settings.broker_url)
    await topic_check.check(broker, generation, settings.topic_prefix)
    return await source.open_publisher(broker, generation, resume_from)


async def _publish(
    publisher: Publisher,
    generation: Generation,
    offered: Iterator[Offer],
    *,
    again: bool = False,
    total: int | None,
    interval_s: float = 0.0,
) -> dict[str, Any]:
    started_s = time.monotonic()
    connected = skipped = rewinds = 0
    with Progress(
        TextColumn("ingest"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("height {task.fields[height]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not is_terminal(),
        transient=True,
    ) as progress:
        task = progress.add_task("ingest", total=total, height="-")
        try:
            for offer in offered:
                said = await publisher.offer(offer, again=again)
                connected += said.ref is not None
                skipped += said.ref is None
                rewinds += said.rewound_to is not None
                progress.update(task, advance=1, height="-" if said.ref is None else said.ref.height)
                if interval_s and said.ref is not None:
                    await publisher.flush()
                    await asyncio.sleep(interval_s)
        finally:
            await publisher.flush()  # what was read before a bad block is published: nothing is lost
        publisher.check_reached()
    tip = publisher.position.branch.tip
    return {
        "chain": generation.chain_id,
        "generation": generation.generation.hex(),
        "connected": connected,
        "skipped": skipped,
        "rewinds": rewinds,
        "walk": publisher.position.walk,
        "height": -1 if tip is None else tip.height,
        "block_hash": "" if tip is None else tip.block_hash[::-1].hex(),
        "seconds": round(time.monotonic() - started_s, 3),
    }


def _bitcoin_offers(files: tuple[Path, ...]) -> Iterator[Offer]:
    for file in files:
        for raw in bitcoin_files.read_blocks(file):
            header = bitcoin.parse_header(raw.data, where=raw.where)

            def make(height: int, raw: bitcoin_files.RawBlock = raw) -> Block:
                return bitcoin.parse_block(raw.data, height, where=raw.where)

            yield Offer(block_hash=header.block_hash, parent_hash=header.parent_hash, make=make, where=raw.where)


def _check_first_block(file: Path) -> None:
    """A generation is opened only for blocks that can be its first. Raises BlockOrphan, BlockCorrupt."""
    raw = next(bitcoin_files.read_blocks(file))
    header = bitcoin.parse_header(raw.data, where=raw.where)
    if header.parent_hash != bitcoin.NO_PARENT:
        bitcoin.parse_block(raw.data, 0, where=raw.where)  # garbage has a parent too
        raise BlockOrphan(
            f"block {header.block_hash[::-1].hex()} has the parent {header.parent_hash[::-1].hex()}, and the topic is "
            "empty",
            where=raw.where,
            way_out="ingest from the chain's first block on, or give the coins before it with --base-coins",
        )


async def _new_generation(settings: Settings, broker: Broker, shards: int | None) -> Generation:
    wanted = Generation(
        generation=secrets.token_bytes(16),
        chain_id=settings.chain or CHAIN_DEFAULT,
        shards=shards or await topics.shards_of_topics(broker),
    )
    return await topics.open_generation(broker, wanted)


async def _base_generation(
    settings: Settings,
    broker: Broker,
    found: Generation | None,
    file: Path,
    coins: Path,
    base_height: int | None,
    shards: int | None,
) -> Generation:
    """The generation that begins with imported coins, opened here if there is none."""
    raw = next(bitcoin_files.read_blocks(file))
    header = bitcoin.parse_header(raw.data, where=raw.where)
    height = bitcoin.bip34_height(raw.data)
    if base_height is None and height is None:
        raise UsageError(
            "the first block does not name its height", where=raw.where, way_out="give --base-height, its parent's"
        )
    base = BlockRef(base_height if base_height is not None else (height or 0) - 1, header.parent_hash)
    if found is not None:
        if found.base is None or (found.base != base and found.number == 1):
            raise SettingsConflict(
                f"the topics begin at {topics.ref_text(found.base)}, not at the base {base}",
                way_out="leave --base-coins out, or use an empty broker",
            )
        return found
    wanted = Generation(
        generation=secrets.token_bytes(16),
        chain_id=settings.chain or CHAIN_DEFAULT,
        base=base,
        shards=shards or await topics.shards_of_topics(broker),
    )
    published = await asyncio.to_thread(
        base_state.publish_base,
        open_objects(settings.objects_url),
        settings.data_dir / "importing",
        wanted,
        FINALITY_DEFAULT if settings.finality is None else settings.finality,
        bitcoin_files.read_base_coins(coins),
        key=signing_key(settings.sign_key_file),
    )
    return await topics.open_generation(broker, base_state.with_base(wanted, published))
