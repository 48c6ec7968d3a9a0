"""What a topic takes on a broker's disk: records, batches and whatever else the broker keeps with them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Int64, Schema, String

from topology.bench.processes import Place
from topology.transports.base import TopicSpec, log_path
from topology.transports.factory import open_broker
from topology.transports.kafka_address import addresses, is_kafka
from topology.transports.kafka_topics import Admin

_LOG_DIRS_KEY = 35


def stored_bytes(place: Place) -> int:
    """Of all segments of the topics under a place's prefix, on the broker that holds most of them. Of an embedded log
    all pages in use. What an append adds is the difference of two."""
    if is_kafka(place.url):
        return asyncio.run(_kafka_bytes(place))
    with closing(sqlite3.connect(f"file:{log_path(place.url)}?mode=ro", uri=True)) as connection:
        facts = ("page_count", "freelist_count", "page_size")
        pages, free, page_bytes = (connection.execute(f"PRAGMA {fact}").fetchone()[0] for fact in facts)
    return int((pages - free) * page_bytes)


_COPIES = 16
"""A log that grows by pages says little of one record."""


def appended_bytes(place: Place, records: list[bytes]) -> int:
    """What these records add to a topic, each in a batch of its own, as at the tip of a chain."""
    _append(place, records)
    before = stored_bytes(place)
    _append(place, records * _COPIES)
    return (stored_bytes(place) - before) // _COPIES


def _append(place: Place, records: list[bytes]) -> None:
    async def append() -> None:
        broker = open_broker(place.url, place.prefix)
        try:
            await broker.ensure_topics([TopicSpec(name="diffs", partitions=1)])
            for record in records:
                await broker.append("diffs", 0, [(None, record)])
        finally:
            await broker.close()

    asyncio.run(append())


async def _kafka_bytes(place: Place) -> int:
    admin = Admin(bootstrap_servers=list(map(str, addresses(place.url))))
    try:
        await admin.start()
        topics = [topic for topic in await admin.list_topics() if topic.startswith(place.prefix)]
        nodes = [broker.nodeId for broker in admin._client.cluster.brokers()]
        answers = [await admin._send_request_to_node(node, _DescribeLogDirs(topics)) for node in nodes]
    finally:
        await admin.close()
    return max(_total_bytes(answer.to_object()) for answer in answers)


def _total_bytes(answer: dict[str, Any]) -> int:
    found = (topic for folder in answer["folders"] for topic in folder["topics"])
    return sum(partition["size"] for topic in found for partition in topic["partitions"])


class _Sizes(Response):  # type: ignore[misc]
    API_KEY = _LOG_DIRS_KEY
    API_VERSION = 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "folders",
            Array(
                ("error_code", Int16),
                ("path", String("utf-8")),
                (
                    "topics",
                    Array(
                        ("name", String("utf-8")),
                        (
                            "partitions",
                            Array(("index", Int32), ("size", Int64), ("offset_lag", Int64), ("is_future", Boolean)),
                        ),
                    ),
                ),
            ),
        ),
    )


class _DescribeLogDirsV1(RequestStruct):  # type: ignore[misc]
    API_KEY = _LOG_DIRS_KEY
    API_VERSION = 1
    RESPONSE_TYPE = _Sizes
    SCHEMA = Schema(("topics", Array(("name", String("utf-8")), ("partitions", Array(Int32)))))


class _DescribeLogDirs(Request[_DescribeLogDirsV1]):  # type: ignore[misc]
    """Kafka's DescribeLogDirs, which aiokafka does not have, of topics of one partition."""

    API_KEY: ClassVar[int] = _LOG_DIRS_KEY

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class([(topic, [0]) for topic in self._topics])
