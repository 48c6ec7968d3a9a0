"""What is Kafka's own: addresses, why a broker cannot be reached, appends without holes, how topics are made."""

from __future__ import annotations

import asyncio
import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from pipeline.errors import BrokerUnavailable, BrokerUrlError, StateferryError, UsageError
from tests.kafka.fixtures import Place
from tests.kafka.server import Server
from topology.transports.base import TopicSpec
from topology.transports.factory import KAFKA_SCHEME, faust_urls, open_broker
from topology.transports.kafka_access import check_access, why_failed
from topology.transports.kafka_address import Address, addresses
from topology.transports.kafka_appends import Appends

ALL = 1 << 40


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "found"),
        [
            ("kafka://localhost", [("localhost", 9092)]),
            ("kafka://one:1,two.example:2,three", [("one", 1), ("two.example", 2), ("three", 9092)]),
            ("kafka://10.0.0.1:9093/", [("10.0.0.1", 9093)]),
            ("kafka://[::1]:9094,[fe80::1]", [("::1", 9094), ("fe80::1", 9092)]),
        ],
    )
    def test_read(self, url: str, found: list[tuple[str, int]]) -> None:
        """Hosts with and without a port, of any family; Faust gets the same ones."""
        assert addresses(url) == found
        assert faust_urls(url) == [f"{KAFKA_SCHEME}://{Address(*each)}" for each in found]

    @pytest.mark.parametrize(
        "url",
        [
            *("kafka://", "kafka://a:0", "kafka://a:65536", "kafka://a:b", "kafka://a/topic", "kafka://a,,b"),
            *("kafka://a?x=1", "kafka://a#x", "kafka://a b", "kafka:/a", "kafka://me:secret@a", "kafka://::1"),
        ],
    )
    def test_bad(self, url: str) -> None:
        """Anything else says how to write one, and repeats no password."""
        with pytest.raises(BrokerUrlError, match="kafka://host:port") as caught:
            addresses(url)
        assert "secret" not in str(caught.value)

    def test_entry_point(self) -> None:
        """Faust finds our transport by its scheme, and knows all brokers."""
        from faust.transport.drivers import by_url  # noqa: PLC0415

        from topology.transports.kafka import Transport  # noqa: PLC0415

        urls = faust_urls("kafka://one:1,[::1]:2")
        assert by_url(urls[0]) is Transport


@pytest.fixture
def deaf() -> Iterator[Address]:
    """A listener whose queue is full: it neither takes nor refuses another connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = Address(*listener.getsockname())
        with socket.socket() as first, socket.socket() as second:
            for taken in (first, second):
                taken.setblocking(False)
                taken.connect_ex(address)
            yield address


@pytest.fixture
def refusing() -> Address:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return Address(*taken.getsockname())


class TestUnreachable:
    async def test_refused(self, refusing: Address) -> None:
        with pytest.raises(BrokerUnavailable, match=rf"TCP: {refusing} refused the connection"):
            await check_access([refusing])

    async def test_name(self) -> None:
        with pytest.raises(BrokerUnavailable, match=r"DNS: the name nowhere\.invalid does not resolve"):
            await check_access([Address("nowhere.invalid", 9092)])

    async def test_timeout(self, deaf: Address) -> None:
        with pytest.raises(BrokerUnavailable, match=rf"timeout: {deaf} did not take a TCP connection within 0.2 s"):
            await check_access([deaf], timeout_s=0.2)

    async def test_all_are_named(self, refusing: Address) -> None:
        """Of several brokers every one says why."""
        with pytest.raises(BrokerUnavailable, match=r"DNS: .*invalid.*; TCP: 127.* refused"):
            await check_access([Address("nowhere.invalid", 9092), refusing])

    async def test_calls_say_so(self, refusing: Address) -> None:
        """The first call of a broker says at once what is wrong, and a close after it is quiet."""
        broker = open_broker(f"kafka://{refusing}")
        async with asyncio.timeout(5):
            with pytest.raises(BrokerUnavailable, match="refused"):
                await broker.bounds("a", 0)
            await broker.close()

    async def test_not_kafka(self) -> None:
        """Something that is not Kafka took the connection."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        broker = open_broker(f"kafka://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(BrokerUnavailable, match="did not answer as Kafka without TLS does"):
            await broker.bounds("a", 0)
        await broker.close()
        server.close()


class Producer:
    """aiokafka's producer as far as ``Appends`` uses it; fails the batches whose numbers are given."""

    def __init__(self, failing: dict[int, Exception]) -> None:
        self.failing = failing
        self.log: list[bytes] = []
        self.batches = 0

    class Batch:
        def __init__(self) -> None:
            self.values: list[bytes] = []

        def append(self, *, timestamp: Any, key: Any, value: bytes) -> object:
            if len(self.values) == 3:
                return None
            self.values.append(value)
            return object()

        def close(self) -> None:
            pass

    def create_batch(self) -> Batch:
        return self.Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        self.batches += 1
        number = self.batches
        sent: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer() -> None:
            if number in self.failing:
                sent.set_exception(copy.copy(self.failing[number]))
                return
            placed = type("Placed", (), {"offset": len(self.log)})
            self.log += batch.values
            sent.set_result(placed)

        asyncio.get_running_loop().call_later(0.001, answer)
        return sent


async def explain(error: BaseException, tp: TopicPartition) -> StateferryError:
    await asyncio.sleep(0.01)  # as long as a look at the network takes
    return await why_failed(error, tp.topic, [])


class TestAppends:
    async def test_nothing_follows_a_failed_batch(self) -> None:
        """Whatever was submitted behind it, before or while its failure is looked into, is not sent: no hole."""
        producer = Producer({2: MessageSizeTooLargeError()})
        appends = Appends(producer, explain)
        sent = [appends.submit("t", 0, None, b"%d" % number) for number in range(9)]
        while producer.batches < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        sent += [appends.submit("t", 0, None, b"late"), appends.submit("t", 1, None, b"elsewhere")]
        results = await asyncio.gather(*sent, return_exceptions=True)

        assert results[:3] == [0, 1, 2]
        assert producer.log == [b"0", b"1", b"2"]
        assert all(isinstance(result, UsageError | BrokerUnavailable) for result in results[3:])
        assert isinstance(results[3], UsageError) and "max.message.bytes" in str(results[3])
        with pytest.raises(UsageError):
            await appends.submit("t", 0, None, b"later")
        assert producer.batches == 2

    async def test_one_batch_at_a_time(self) -> None:
        """What is submitted while a batch is under way goes out in the next ones, as many as fit."""
        producer = Producer({})
        appends = Appends(producer, explain)
        offsets = await asyncio.gather(*[appends.submit("t", 0, None, b"%d" % number) for number in range(10)])

        assert offsets == list(range(10))
        assert producer.log == [b"%d" % number for number in range(10)]
        assert producer.batches == 4

    async def test_no_place_is_no_success(self) -> None:
        """A duplicate whose place the broker forgot is not believed: only what is read back is."""
        producer = Producer({})
        appends = Appends(producer, explain)
        producer.log = [b"x"] * 3

        async def forgotten(*_: Any, **__: Any) -> asyncio.Future[Any]:
            sent: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            sent.set_result(type("Placed", (), {"offset": -1}))
            return sent

        producer.send_batch = forgotten  # type: ignore[method-assign]
        with pytest.raises(BrokerUnavailable, match="where the records stand"):
            await appends.submit("t", 0, None, b"y")

    async def test_cancelled(self) -> None:
        """Giving up fails what waits, and ends."""
        appends = Appends(Producer({1: KafkaTimeoutError()}), explain)
        sent = appends.submit("t", 0, None, b"x")
        await asyncio.sleep(0)
        await appends.cancel()

        with pytest.raises(BrokerUnavailable, match="closed"):
            await sent


class TestTopics:
    async def test_config(self, on_kafka: Place) -> None:
        """A topic of ours keeps every record, as it came, and takes the largest one with its frame."""
        broker = open_broker(on_kafka.url, on_kafka.prefix)
        await broker.ensure_topics([TopicSpec(name="t", partitions=1)])
        await broker.close()
        admin = AIOKafkaAdminClient(bootstrap_servers=on_kafka.url.removeprefix("kafka://"))
        await admin.start()
        (found,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, f"{on_kafka.prefix}t")])
        await admin.close()
        config = {entry[0]: entry[1] for entry in found.resources[0][4]}

        assert config["cleanup.policy"] == "delete"
        assert config["retention.ms"] == config["retention.bytes"] == "-1"
        assert config["compression.type"] == "producer"
        assert int(config["max.message.bytes"]) >= (1 << 20) + 100

    async def test_asking_makes_no_topic(self, on_kafka: Place) -> None:
        """The brokers here make topics on demand, with a retention of a week: nothing of ours is made so."""
        broker = open_broker(on_kafka.url, on_kafka.prefix)
        with pytest.raises(StateferryError):
            await broker.bounds("t", 0)
        with pytest.raises(StateferryError):
            await broker.append("t", 0, [(None, b"x")])
        await broker.close()
        admin = AIOKafkaAdminClient(bootstrap_servers=on_kafka.url.removeprefix("kafka://"))
        await admin.start()
        names = await admin.list_topics()
        await admin.close()

        assert not [name for name in names if name.startswith(on_kafka.prefix)]


async def test_broker_restarts(own_kafka: Server, tmp_path: Path) -> None:
    """A kill -9 of the broker between calls, and during one: the same client goes on, nothing acknowledged is lost."""
    broker = open_broker(own_kafka.url)
    await broker.ensure_topics([TopicSpec(name="t", partitions=1)])
    acknowledged = await broker.append("t", 0, [(None, b"%d" % number) for number in range(50)])
    own_kafka.kill()
    waiting = asyncio.ensure_future(broker.append("t", 0, [(None, b"%d" % number) for number in range(50, 100)]))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(own_kafka.start)
    acknowledged += await waiting
    found = [record.value for record in await broker.read("t", 0, 0, bytes_max=ALL)]
    await broker.close()

    assert acknowledged == list(range(100))
    assert found == [b"%d" % number for number in range(100)]
