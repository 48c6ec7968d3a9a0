"""Topics of a Kafka cluster: how ours are made, and how one is looked at without making it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupAuthorizationFailedError, TopicAlreadyExistsError
from aiokafka.errors import for_code as error_of
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.metadata import MetadataRequest

from pipeline.errors import UsageError
from topology.transports.base import RECORD_BYTES_MAX, TopicSpec
from topology.transports.kafka_appends import RECORD_SLACK_BYTES

MESSAGE_BYTES_MAX: Final = RECORD_BYTES_MAX + RECORD_SLACK_BYTES
TOPIC_CONFIG: Final = {
    "cleanup.policy": "delete",  # compaction would take frames out of the middle
    "retention.ms": "-1",  # stateferry deletes records itself, once they are archived
    "retention.bytes": "-1",
    "max.message.bytes": str(MESSAGE_BYTES_MAX),
    "compression.type": "producer",  # as they come: frames and events are compressed
}
"""What every topic of ours is created with."""
COMPACTED_CONFIG: Final = {
    "cleanup.policy": "compact",
    "segment.bytes": str(16 << 20),  # what is still written to is never compacted
}
"""What a compacted one has instead."""
_OF_A_GROUP: Final = 0
_NO_GENERATION: Final = -1
COPIES: Final = 3
"""Of every record, where there are as many brokers: one may be lost, and nothing waits for it."""


def in_sync_min(copies: int) -> int:
    """How many copies must have a record before it counts as appended: with two, no single broker can lose it."""
    return 2 if copies > 2 else 1


class Admin(AIOKafkaAdminClient):  # type: ignore[misc]
    """aiokafka's admin client, with the calls that we need of it."""

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has, with a leader each. Raises ``UnknownTopicOrPartitionError``, and errors
        to try again after while the topic is being made."""
        found = await self._send_request(MetadataRequest([topic], allow_auto_topic_creation=False))
        (described,) = found.to_object()["topics"]
        for code in (described["error_code"], *(each["error_code"] for each in described["partitions"])):
            if code:
                raise error_of(code)(topic)
        return len(described["partitions"])

    async def copies(self, topic: str) -> int:
        """On how many brokers every partition of a topic is, at least."""
        found = await self._send_request(MetadataRequest([topic], allow_auto_topic_creation=False))
        (described,) = found.to_object()["topics"]
        return min((len(each["replicas"]) for each in described["partitions"]), default=1)

    async def create(self, spec: TopicSpec) -> None:
        """Create a topic, unless somebody else just did. A broker's own default would be one copy.

        Raises ``UsageError`` for more copies than there are brokers.
        """
        cluster = await self._send_request(MetadataRequest([], allow_auto_topic_creation=False))
        brokers = len(cluster.to_object()["brokers"])
        copies = spec.copies or min(COPIES, brokers)
        if copies > brokers:
            raise UsageError(
                f"{copies} copies of topic {spec.name} were asked for, and there are {brokers} brokers",
                way_out="start more brokers, or ask for fewer copies",
            )
        in_sync = {"min.insync.replicas": str(in_sync_min(copies))}
        topic = NewTopic(
            name=spec.name,
            num_partitions=spec.partitions,
            replication_factor=copies,
            replica_assignments=None,
            topic_configs=TOPIC_CONFIG | in_sync | (COMPACTED_CONFIG if spec.compacted else {}),
        )
        created = await self.create_topics([topic])
        _, code, reason = created.topic_errors[0]
        if code not in (0, TopicAlreadyExistsError.errno):
            raise error_of(code)(reason)

    async def check_group(self, group: str) -> None:
        """Whether one may be a member of a consumer group: aiokafka's consumer would wait for ever, and say nothing.

        Raises ``GroupAuthorizationFailedError``.
        """
        found = await self._send_request(FindCoordinatorRequest(group, _OF_A_GROUP))
        code = found.error_code
        if not code:
            nobody = HeartbeatRequest(group, _NO_GENERATION, "")  # takes the permission, and changes nothing
            code = (await self._send_request_to_node(found.coordinator_id, nobody)).error_code
        if code == GroupAuthorizationFailedError.errno:
            raise GroupAuthorizationFailedError(group)

    async def config(self, topic: str) -> Mapping[str, str]:
        """All settings of a topic, those that it has by default included."""
        (found,) = await self.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        code, reason, _, _, entries = found.resources[0]
        if code:
            raise error_of(code)(reason)
        return {name: value or "" for name, value, *_ in entries}
