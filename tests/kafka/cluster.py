"""Three brokers: what losing one of them, or two, means; and who leads a partition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from tests.kafka.server import JAVA_QUICK, VERSION_DEFAULT, Server, free_port, new_cluster

WAIT_S: Final = 60.0


class Cluster:
    """Three brokers and controllers, each a process of its own. Topics have three copies."""

    def __init__(self, folder: Path, version: str = VERSION_DEFAULT) -> None:
        peers = {node: free_port() for node in (1, 2, 3)}
        cluster = new_cluster()
        self.servers = {
            node: Server(folder / f"broker{node}", version, node_id=node, peers=peers, cluster=cluster, java=JAVA_QUICK)
            for node in peers
        }

    @property
    def url(self) -> str:
        return "kafka://" + ",".join(server.bootstrap for server in self.servers.values())

    def start(self) -> None:
        """Start whoever does not run, and wait until all are there and know each other."""
        down = [server for server in self.servers.values() if server.process is None]
        with ThreadPoolExecutor(len(down) or 1) as threads:
            list(threads.map(Server.start, down))
        wait_until(lambda: len(self.ask(_brokers)) == len(self.servers))

    def kill(self) -> None:
        for server in self.servers.values():
            server.kill()

    def leader(self, topic: str) -> Server:
        """The broker that leads the topic's first partition."""
        return patiently(lambda: self.servers[self.partition(topic)["leader"]])

    def wait_for_copies(self, topic: str) -> None:
        """Until every broker has all there is of a topic."""
        wait_until(lambda: len(self.partition(topic)["isr"]) == len(self.servers))

    def partition(self, topic: str) -> Any:
        """What is known of a topic's first partition."""

        async def look(admin: AIOKafkaAdminClient) -> Any:
            (described,) = await admin.describe_topics([topic])
            return described["partitions"][0]

        return self.ask(look)

    def configure(self, topic: str, config: dict[str, str]) -> None:
        """Set what a topic has instead of the brokers' defaults: this, and nothing else."""
        self.ask(lambda admin: admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, config)]))

    def ask(self, what: Callable[[AIOKafkaAdminClient], Any]) -> Any:
        """What an admin client is told, by whoever runs."""
        alive = [server.bootstrap for server in self.servers.values() if server.process is not None]

        async def main() -> Any:
            admin = AIOKafkaAdminClient(bootstrap_servers=alive)
            try:
                await admin.start()
                return await what(admin)
            finally:
                await admin.close()

        return patiently(lambda: asyncio.run(main()))


async def _brokers(admin: AIOKafkaAdminClient) -> list[Any]:
    return list((await admin.describe_cluster())["brokers"])


def patiently(ask: Callable[[], Any]) -> Any:
    """An answer, from brokers that may not have one yet."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            return ask()
        except (KafkaError, TimeoutError, LookupError):
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.1)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, "the condition did not come true"

        time.sleep(0.1)
