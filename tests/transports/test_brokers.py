"""What every ``Broker`` promises, over the embedded log and over Kafka, with and without a prefix."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from pipeline.errors import NotFound, OffsetOutOfRange, SettingsConflict, UsageError
from tests.kafka.fixtures import Place
from topology.transports.base import RECORD_BYTES_MAX, Broker, Record, TopicSpec
from topology.transports.factory import open_broker

ALL = 1 << 40
TOPICS = [TopicSpec(name="a", partitions=2), TopicSpec(name="b", partitions=1)]


@pytest.fixture
async def broker(place: Place) -> AsyncIterator[Broker]:
    """A broker with the topics a, of two partitions, and b, of one."""
    broker = open_broker(place.url, place.prefix)
    await broker.ensure_topics(TOPICS)
    yield broker
    await broker.close()


async def values(broker: Broker, topic: str = "a", partition: int = 0) -> list[bytes]:
    """All values, having checked that the offsets are exactly the bounds."""
    first, end = await broker.bounds(topic, partition)
    records = await broker.read(topic, partition, first, bytes_max=ALL)
    assert [record.offset for record in records] == list(range(first, end))

    return [record.value for record in records]


async def test_round_trip(broker: Broker, place: Place) -> None:
    """Keys, absent keys and empty values come back as they were, to another client as well."""
    began_ms = int(time.time() * 1000)
    appended = [(b"k", b"v"), (None, b""), (b"", b"\0" * 300_000)]
    assert await broker.append("a", 0, appended) == [0, 1, 2]
    again = open_broker(place.url, place.prefix)
    records = await again.read("a", 0, 0, bytes_max=ALL)
    await again.close()

    assert [record._replace(timestamp_ms=0) for record in records] == [
        Record("a", 0, offset, key, value, 0) for offset, (key, value) in enumerate(appended)
    ]
    assert all(began_ms - 1000 <= record.timestamp_ms <= time.time() * 1000 + 1000 for record in records)


async def test_partitions_are_apart(broker: Broker) -> None:
    """Each partition of each topic counts by itself, and is empty at first."""
    places = [("a", 0), ("a", 1), ("b", 0)]
    assert [await broker.bounds(*place) for place in places] == [(0, 0)] * 3
    assert await broker.read("a", 0, 0, bytes_max=ALL) == []
    for number in range(3):
        for topic, partition in places:
            assert await broker.append(topic, partition, [(None, f"{topic}{partition}".encode())]) == [number]

    assert await values(broker, "a", 1) == [b"a1"] * 3


async def test_appends_at_once(broker: Broker) -> None:
    """Records of one append stand in its order, and appends in the order in which they were called."""
    calls = [[(None, b"%d:%d" % (call, number)) for number in range(7)] for call in range(200)]
    offsets = await asyncio.gather(*[broker.append("a", 0, records) for records in calls])

    assert [offset for each in offsets for offset in each] == list(range(1400))
    assert await values(broker) == [value for records in calls for _, value in records]


async def test_append_of_nothing(broker: Broker) -> None:
    """It is no append."""
    assert await broker.append("a", 0, []) == []
    assert await broker.bounds("a", 0) == (0, 0)


async def test_append_of_much(broker: Broker) -> None:
    """An append far larger than a record stands there whole, in order."""
    records = [(None, bytes([number]) * 700_000) for number in range(20)]

    assert await broker.append("a", 0, records) == list(range(20))
    assert await values(broker) == [value for _, value in records]


async def test_bytes_max(broker: Broker) -> None:
    """A read stops at its bound, but gives at least one record; the end gives none."""
    await broker.append("a", 0, [(None, b"x" * 100)] * 10)

    assert len(await broker.read("a", 0, 0, bytes_max=250)) == 3
    assert [record.offset for record in await broker.read("a", 0, 4, bytes_max=1)] == [4]
    assert await broker.read("a", 0, 10, bytes_max=ALL) == []


async def test_reads_at_once(broker: Broker) -> None:
    """Readers of several partitions do not disturb each other."""
    for topic, partition in (("a", 0), ("a", 1), ("b", 0)):
        await broker.append(topic, partition, [(None, f"{topic}{partition}:{n}".encode()) for n in range(50)])
    found = await asyncio.gather(*[values(broker, *place) for place in [("a", 0), ("a", 1), ("b", 0)] * 4])

    for (topic, partition), read in zip([("a", 0), ("a", 1), ("b", 0)] * 4, found, strict=True):
        assert read == [f"{topic}{partition}:{n}".encode() for n in range(50)]


async def test_delete_records(broker: Broker) -> None:
    """It deletes what it says, of one partition; offsets go on; below the first offset there is nothing to do."""
    await broker.append("a", 0, [(None, b"%d" % number) for number in range(10)])
    await broker.append("a", 1, [(None, b"x")])
    await broker.delete_records("a", 0, 7)
    await broker.delete_records("a", 0, 3)
    assert await values(broker) == [b"7", b"8", b"9"]
    assert await values(broker, "a", 1) == [b"x"]
    await broker.delete_records("a", 0, 10)

    assert await broker.bounds("a", 0) == (10, 10)
    assert await broker.append("a", 0, [(None, b"y")]) == [10]


async def test_out_of_range(broker: Broker) -> None:
    """Below the first offset and above the end is an error, not an empty answer."""
    await broker.append("a", 0, [(None, b"x")] * 5)
    await broker.delete_records("a", 0, 2)

    for offset in (0, 1, 6):
        with pytest.raises(OffsetOutOfRange, match=rf"\[2, 5\), not {offset}"):
            await broker.read("a", 0, offset, bytes_max=ALL)
    with pytest.raises(OffsetOutOfRange):
        await broker.delete_records("a", 0, 6)


async def test_unknown_topic_or_partition(broker: Broker) -> None:
    """It is named, whatever is asked of it, and asking does not make it."""
    for _ in range(2):
        for topic, partition in (("nowhere", 0), ("a", 2), ("b", 1)):
            with pytest.raises(NotFound, match=topic):
                await broker.bounds(topic, partition)
            with pytest.raises(NotFound, match=topic):
                await broker.read(topic, partition, 0, bytes_max=ALL)
            with pytest.raises(NotFound, match=topic):
                await broker.append(topic, partition, [(None, b"x")])
            with pytest.raises(NotFound, match=topic):
                await broker.delete_records(topic, partition, 0)


async def test_too_large(broker: Broker) -> None:
    """A record of the largest size fits; one more byte is refused, with all that was appended with it."""
    await broker.append("a", 0, [(b"k", b"x" * (RECORD_BYTES_MAX - 1))])

    with pytest.raises(UsageError, match="chunks"):
        await broker.append("a", 0, [(None, b"y"), (b"k", b"x" * RECORD_BYTES_MAX)])
    assert [len(value) for value in await values(broker)] == [RECORD_BYTES_MAX - 1]


async def test_ensure_topics(broker: Broker) -> None:
    """Ensuring what is there changes nothing; another number of partitions is refused, and nothing else is made."""
    await broker.append("a", 0, [(None, b"x")])
    await broker.ensure_topics([*TOPICS, TopicSpec(name="c", partitions=3)])
    assert await broker.bounds("c", 2) == (0, 0)
    assert await values(broker) == [b"x"]

    with pytest.raises(SettingsConflict, match="2 partitions, not 4"):
        await broker.ensure_topics([TopicSpec(name="d", partitions=1), replace(TOPICS[0], partitions=4)])
    with pytest.raises(NotFound):
        await broker.bounds("d", 0)


async def test_topics_made_at_once(place: Place) -> None:
    """Two that make the same topics at the same moment both have them."""
    brokers = [open_broker(place.url, place.prefix) for _ in range(2)]
    await asyncio.gather(*[broker.ensure_topics(TOPICS) for broker in brokers])
    await asyncio.gather(*[broker.append("b", 0, [(None, b"x")]) for broker in brokers])

    assert await values(brokers[0], "b") == [b"x"] * 2
    for broker in brokers:
        await broker.close()


async def test_prefixes_are_apart(place: Place) -> None:
    """Topics of the same name under two prefixes have nothing in common."""
    brokers = [open_broker(place.url, place.prefix + name) for name in ("one.", "two.")]
    for number, broker in enumerate(brokers):
        await broker.ensure_topics(TOPICS)
        await broker.append("a", 0, [(None, b"%d" % number)])

    assert [await values(broker) for broker in brokers] == [[b"0"], [b"1"]]
    for broker in brokers:
        await broker.close()


@pytest.mark.parametrize("prefix", ["a b", "ä.", "x/", "x" * 101])
def test_bad_prefix(prefix: str) -> None:
    """What cannot begin a topic's name is refused before anything is asked."""
    with pytest.raises(UsageError, match="begin with"):
        open_broker("kafka://localhost:1", prefix)


async def test_close_twice(place: Place) -> None:
    """Closing twice is closing once, also without a call before."""
    broker = open_broker(place.url, place.prefix)
    await broker.close()
    await broker.close()
