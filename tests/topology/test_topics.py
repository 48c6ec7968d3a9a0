"""Topics by commands: made, described, checked; and a worker that refuses those which would lose records."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from pipeline.errors import NotFound, SettingsConflict, UsageError
from tests.chains import block_files
from tests.topology.commands import Site
from topology.topic_check import problems_of
from topology.transports.base import TopicFacts, TopicSpec

NAMES = ["generations", "blocks", "diffs"]
GOOD = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": "1114112"}


def make_by_hand(site: Site, partitions: int = 1, **config: str) -> None:
    """The diffs topic as somebody else made it; `_` stands for the point in a setting's name."""

    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=site.place.url.removeprefix("kafka://"))
        await admin.start()
        settings = GOOD | {name.replace("_", "."): value for name, value in config.items()}
        made = await admin.create_topics([NewTopic(f"{site.place.prefix}diffs", partitions, 1, None, settings)])
        await admin.close()
        assert made.topic_errors[0][1] == 0, made

    asyncio.run(make())


@pytest.mark.usefixtures("each_broker")
def test_create_describe_check(tmp_path: Path) -> None:
    """Made once, as they must be; a chain is ingested into what is there, and followed."""
    site = Site(tmp_path)
    site.here("topics", "describe").failed(NotFound)
    site.here("topics", "check").failed(NotFound)
    made = site.here("topics", "create").ok()
    assert [topic["topic"] for topic in made] == [site.place.prefix + name for name in NAMES]
    assert all((topic["partitions"], topic["first"], topic["end"]) == (1, 0, 0) for topic in made)
    assert site.here("topics", "create").ok() == site.here("topics", "describe").ok() == made
    assert site.here("topics", "check").ok()["problems"] == []
    site.ingest(*block_files("mainnet_0_599"))
    site.follow_both()
    ends = [topic["end"] for topic in site.here("topics", "describe").ok()]

    assert ends == [1, 601, 602]
    if site.place.is_kafka:
        assert all(topic["config"].items() >= GOOD.items() for topic in made)


@pytest.mark.usefixtures("kafka_only")
@pytest.mark.parametrize(
    ("partitions", "config", "says", "mends"),
    [
        (1, {"cleanup_policy": "compact"}, "cleaned up by compact", "--add-config cleanup.policy=delete"),
        (1, {"retention_ms": "604800000"}, "retention.ms=604800000", "--add-config retention.ms=-1"),
        (1, {"retention_bytes": "1000000"}, "retention.bytes=1000000", "--add-config retention.bytes=-1"),
        (1, {"max_message_bytes": "900000"}, "no record above 900000", "--add-config max.message.bytes="),
        (2, {}, "2 partitions", "topic prefix"),
    ],
)
def test_wrong_topics_are_refused(
    partitions: int, config: dict[str, str], says: str, mends: str, tmp_path: Path
) -> None:
    """Nothing is published to, or started on, topics that would lose or reorder frames: source, workers and the check
    say what mends it."""
    site = Site(tmp_path)
    make_by_hand(site, partitions, **config)
    ingest = ("ingest", "bitcoin", *block_files("mainnet_0_599"))
    for words in (ingest, ("run", "--role", "primary", "--until-idle"), ("run", "--role", "replica", "--until-idle")):
        said = site.here(*words).failed(SettingsConflict)
        assert says in said and mends in said
        assert f"{site.place.prefix}diffs" in said
    if partitions == 1:
        assert site.records("diffs") == site.records("blocks") == []
        said = site.here("topics", "check").failed(SettingsConflict)
        assert says in said and mends in said


@pytest.mark.parametrize(
    ("facts", "count"),
    [
        (TopicFacts(partitions=1, config={}), 0),
        (TopicFacts(partitions=1, config=GOOD), 0),
        (TopicFacts(partitions=3, config=GOOD), 1),
        (TopicFacts(partitions=1, config=GOOD | {"cleanup.policy": "compact,delete", "retention.ms": "1"}), 2),
        (TopicFacts(partitions=1, copies=3, config=GOOD | {"min.insync.replicas": "2"}), 0),
        (TopicFacts(partitions=1, copies=3, config=GOOD | {"min.insync.replicas": "1"}), 1),
        (TopicFacts(partitions=1, copies=1, config=GOOD | {"min.insync.replicas": "1"}), 0),
        (TopicFacts(partitions=1, copies=2, config=GOOD | {"unclean.leader.election.enable": "true"}), 1),
    ],
)
def test_problems(facts: TopicFacts, count: int) -> None:
    """Every problem is named, not only the first."""
    found: list[Any] = problems_of(TopicSpec(name="diffs", partitions=1), facts)

    assert len(found) == count


def test_problems_of_shards() -> None:
    """A topic with a partition a shard must have them all; a compacted one may lose what is old."""
    compacted = TopicFacts(partitions=1, config=GOOD | {"cleanup.policy": "compact", "retention.ms": "1"})

    assert [one.what for one in problems_of(TopicSpec(name="diffs", partitions=4), TopicFacts(partitions=2, config={}))]
    assert problems_of(TopicSpec(name="anchors", partitions=1, compacted=True), compacted) == []


@pytest.mark.usefixtures("each_broker")
def test_topics_of_shards(tmp_path: Path) -> None:
    """The topics say how many shards the first generation gets; from then on the generation does."""
    site = Site(tmp_path)
    site.here("topics", "create", "--shards", 3).failed(UsageError)
    made = site.here("topics", "create", "--shards", 4).ok()
    names = ["generations", "blocks", "diffs", "shard-blocks", "anchors"]
    assert [(topic["topic"], topic["partitions"]) for topic in made] == [
        (site.place.prefix + name, 4 if name in ("diffs", "shard-blocks") else 1) for name in names
    ]
    assert site.here("topics", "create").ok() == made
    assert site.here("topics", "check").ok()["problems"] == []
    site.here("ingest", "synthetic", "--blocks", 1, "--shards", 2).failed(SettingsConflict)
    site.here("ingest", "synthetic", "--blocks", 1).ok()
    site.here("ingest", "synthetic", "--blocks", 1, "--shards", 2).failed(SettingsConflict)
    site.here("topics", "create", "--shards", 1).failed(SettingsConflict)

    assert site.here("generation", "show").ok()["shards"] == 4
    if site.place.is_kafka:
        assert made[-1]["config"]["cleanup.policy"] == "compact"
