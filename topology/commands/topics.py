"""`stateferry topics`: the topics of a chain, made and checked by hand where nodes may not make them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import click

from pipeline.errors import NotFound, SettingsConflict
from pipeline.shards import SHARDS_MAX
from topology import topic_check, topics
from topology.commands.acls import acls_command
from topology.commands.common import ask_broker, common_options, emit
from topology.commands.trim import trim
from topology.settings import Settings
from topology.transports.base import Broker, TopicSpec


@click.group("topics")
def topics_group() -> None:
    """What a chain's topics are, whether they keep every record, and making them.

    There are three, of one partition each: `generations`, `blocks` and `diffs`. A later generation has its own `blocks`
    and `diffs`. With several shards `diffs` has a partition for each, as `shard-blocks` has, and there is a compacted
    topic `anchors`. Workers need no others.
    """


topics_group.add_command(acls_command)
topics_group.add_command(trim)


@topics_group.command("create")
@click.option(
    "--shards",
    type=int,
    help=f"Of the first generation, which is fixed by them: a power of two up to {SHARDS_MAX}. [default: 1]",
)
@click.option(
    "--replication",
    type=click.IntRange(1),
    help="Copies of every record, on as many brokers. From three on, two must have a record before it counts as "
    "appended. [default: 3, or as many as there are brokers]",
)
@common_options
def create(settings: Settings, shards: int | None, replication: int | None, as_json: bool) -> None:
    """Make the topics that are missing. Doing it again changes nothing."""

    async def make(broker: Broker) -> list[dict[str, Any]]:
        generation = await topics.current_generation(broker)
        topics.check_shards(shards, generation)
        specs = topic_check.topics_of(generation, shards=shards or await topics.shards_of_topics(broker))
        await broker.ensure_topics([replace(spec, copies=replication or 0) for spec in specs])
        return [await _described(broker, spec.name, settings.topic_prefix) for spec in specs]

    _show(_run(settings, make), as_json=as_json)


@topics_group.command("describe")
@common_options
def describe(settings: Settings, as_json: bool) -> None:
    """The topics as the broker has them. Ends with 13 if one is not there."""

    async def look(broker: Broker) -> list[dict[str, Any]]:
        return [await _described(broker, spec.name, settings.topic_prefix) for spec in await _specs(broker)]

    _show(_run(settings, look), as_json=as_json)


@topics_group.command("check")
@common_options
def check(settings: Settings, as_json: bool) -> None:
    """Whether the topics keep every record in order. Ends with 2, and the commands that mend them, if not."""

    async def look(broker: Broker) -> tuple[list[str], list[topic_check.Problem]]:
        specs = await _specs(broker)
        return [spec.name for spec in specs], await topic_check.problems(broker, specs)

    names, found = _run(settings, look)
    prefix = settings.topic_prefix
    if found:
        raise SettingsConflict(
            "; ".join(f"topic {prefix}{problem.topic} {problem.what}" for problem in found),
            where=settings.broker_url,
            way_out="; ".join(problem.way_out(prefix) for problem in found),
        )
    document = {"checked": [prefix + name for name in names], "problems": []}
    emit(document, as_json=as_json, text=lambda: f"{', '.join(prefix + name for name in names)}: as they must be")


async def _specs(broker: Broker) -> list[TopicSpec]:
    return topic_check.topics_of(await topics.current_generation(broker), shards=await topics.shards_of_topics(broker))


async def _described(broker: Broker, name: str, prefix: str) -> dict[str, Any]:
    """``first`` and ``end``: of all partitions, added up."""
    facts = await broker.describe(name)
    bounds = [await broker.bounds(name, partition) for partition in range(facts.partitions)]
    first, end = map(sum, zip(*bounds, strict=True))
    config = {setting: facts.config[setting] for setting in _SHOWN if setting in facts.config}
    return {
        "topic": prefix + name,
        "partitions": facts.partitions,
        "copies": facts.copies,
        "first": first,
        "end": end,
        "config": config,
    }


_SHOWN = (
    *("cleanup.policy", "retention.ms", "retention.bytes", "max.message.bytes", "compression.type"),
    *("min.insync.replicas", "unclean.leader.election.enable"),
)


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    def line(topic: dict[str, Any]) -> str:
        config = " ".join(f"{name}={value}" for name, value in topic["config"].items())
        partitions = f"{topic['partitions']} partition{'' if topic['partitions'] == 1 else 's'}"
        copies = "" if topic["copies"] == 1 else f" in {topic['copies']} copies"
        return f"{topic['topic']}  {partitions}{copies}, [{topic['first']}, {topic['end']})  {config}".rstrip()

    emit(found, as_json=as_json, text=lambda: "\n".join(map(line, found)))


def _run(settings: Settings, ask: Callable[[Broker], Awaitable[Any]]) -> Any:
    if not settings.broker:
        raise NotFound("no broker is named", way_out="name one with --broker or STATEFERRY_BROKER")
    return ask_broker(settings, ask)
