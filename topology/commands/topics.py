"""`stateferry topics`: the topics of a chain, made and checked by hand where nodes may not make them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import click

from pipeline.errors import NotFound, SettingsConflict
from topology import topic_check, topics
from topology.commands.common import ask_broker, common_options, emit
from topology.settings import Settings
from topology.transports.base import Broker, TopicSpec


@click.group("topics")
def topics_group() -> None:
    """What a chain's topics are, whether they keep every record, and making them.

    There are three, of one partition each: `generations`, `blocks` and `diffs`. A later generation has its own `blocks`
    and `diffs`. Workers need no others.
    """


@topics_group.command("create")
@common_options
def create(settings: Settings, as_json: bool) -> None:
    """Make the topics that are missing. Doing it again changes nothing."""

    async def make(broker: Broker) -> list[dict[str, Any]]:
        names = topic_check.topics_of(await topics.current_generation(broker))
        await broker.ensure_topics([TopicSpec(name=name, partitions=1) for name in names])
        return [await _described(broker, name, settings.topic_prefix) for name in names]

    _show(_run(settings, make), as_json=as_json)


@topics_group.command("describe")
@common_options
def describe(settings: Settings, as_json: bool) -> None:
    """The topics as the broker has them. Ends with 13 if one is not there."""

    async def look(broker: Broker) -> list[dict[str, Any]]:
        names = topic_check.topics_of(await topics.current_generation(broker))
        return [await _described(broker, name, settings.topic_prefix) for name in names]

    _show(_run(settings, look), as_json=as_json)


@topics_group.command("check")
@common_options
def check(settings: Settings, as_json: bool) -> None:
    """Whether the topics keep every record in order. Ends with 2, and the commands that mend them, if not."""

    async def look(broker: Broker) -> tuple[list[str], list[topic_check.Problem]]:
        names = topic_check.topics_of(await topics.current_generation(broker))
        return names, await topic_check.problems(broker, names)

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


async def _described(broker: Broker, name: str, prefix: str) -> dict[str, Any]:
    facts = await broker.describe(name)
    first, end = await broker.bounds(name, 0)
    config = {setting: facts.config[setting] for setting in _SHOWN if setting in facts.config}
    return {"topic": prefix + name, "partitions": facts.partitions, "first": first, "end": end, "config": config}


_SHOWN = (
    *("cleanup.policy", "retention.ms", "retention.bytes", "max.message.bytes", "compression.type"),
    *("min.insync.replicas", "unclean.leader.election.enable"),
)


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    def line(topic: dict[str, Any]) -> str:
        config = " ".join(f"{name}={value}" for name, value in topic["config"].items())
        return (
            f"{topic['topic']}  {topic['partitions']} partition, [{topic['first']}, {topic['end']})  {config}".rstrip()
        )

    emit(found, as_json=as_json, text=lambda: "\n".join(map(line, found)))


def _run(settings: Settings, ask: Callable[[Broker], Awaitable[Any]]) -> Any:
    if not settings.broker:
        raise NotFound("no broker is named", way_out="name one with --broker or STATEFERRY_BROKER")
    return ask_broker(settings, ask)
