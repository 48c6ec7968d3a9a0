"""Whether topics are as they must be: a broker that loses, drops or reorders frames is refused before anything flows.

The rules are Kafka's settings by name. The embedded log has none, and passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from pipeline.errors import SettingsConflict
from pipeline.generation import GENERATIONS_TOPIC, Generation
from topology import topics
from topology.transports.base import RECORD_BYTES_MAX, Broker, TopicFacts, TopicSpec

BATCH_HEADER_BYTES: Final = 1024
"""More than a batch of one record takes above it."""
_KEEPS: Final = {"retention.ms": "after that time", "retention.bytes": "above that size"}


class Problem(NamedTuple):
    """What is wrong with a topic, and the setting that mends it; empty: none does."""

    topic: str
    what: str
    setting: str

    def way_out(self, prefix: str) -> str:
        """A command that mends it."""
        if not self.setting:
            return "this cannot be changed later: use another --topic-prefix, and ingest again"
        return (
            f"kafka-configs.sh --bootstrap-server HOST:PORT --alter --entity-type topics --entity-name "
            f"{prefix}{self.topic} --add-config {self.setting}"
        )


def topics_of(generation: Generation | None, *, shards: int = 1) -> list[TopicSpec]:
    """A chain's topics; before its first generation, those that it will have with so many ``shards``."""
    if generation is None:
        generation = Generation(generation=bytes(16), chain_id="", shards=shards)
    return [TopicSpec(name=GENERATIONS_TOPIC, partitions=1), *topics.specs_of(generation)]


def problems_of(spec: TopicSpec, facts: TopicFacts) -> list[Problem]:
    """Everything that would lose or reorder records of a topic."""
    found = []
    topic, config = spec.name, facts.config
    if facts.partitions != spec.partitions:
        wanted = "exactly one" if spec.partitions == 1 else f"{spec.partitions}, one a shard"
        found.append(Problem(topic, f"has {facts.partitions} partitions, and order needs {wanted}", ""))
    if not spec.compacted and config.get("cleanup.policy", "delete") != "delete":
        what = f"is cleaned up by {config['cleanup.policy']}, which takes records out of the middle"
        found.append(Problem(topic, what, "cleanup.policy=delete"))
    for setting, when in _KEEPS.items():
        if not spec.compacted and config.get(setting, "-1") != "-1":
            what = f"has {setting}={config[setting]}: the broker deletes records {when}, archived or not"
            found.append(Problem(topic, what, f"{setting}=-1"))
    needed = RECORD_BYTES_MAX + BATCH_HEADER_BYTES
    if int(config.get("max.message.bytes", needed)) < needed:
        what = f"takes no record above {config['max.message.bytes']} bytes, and ours have up to {RECORD_BYTES_MAX}"
        found.append(Problem(topic, what, f"max.message.bytes={needed}"))
    if facts.copies > 2 and int(config.get("min.insync.replicas", 2)) < 2:
        what = f"has {facts.copies} copies, and counts a record as kept when one of them has it"
        found.append(Problem(topic, what, "min.insync.replicas=2"))
    if facts.copies > 1 and config.get("unclean.leader.election.enable", "false") != "false":
        what = "may be led by a copy that lacks records"
        found.append(Problem(topic, what, "unclean.leader.election.enable=false"))
    return found


async def problems(broker: Broker, specs: Sequence[TopicSpec]) -> list[Problem]:
    """Of several topics. Raises NotFound for one that is not there."""
    return [problem for spec in specs for problem in problems_of(spec, await broker.describe(spec.name))]


async def check(broker: Broker, generation: Generation, prefix: str) -> None:
    """Raises SettingsConflict for topics that nothing should be written to."""
    for problem in await problems(broker, topics_of(generation)):
        raise SettingsConflict(
            f"topic {prefix}{problem.topic} {problem.what}",
            way_out=problem.way_out(prefix),
        )
