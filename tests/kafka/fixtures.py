"""Brokers for tests: the embedded log, and Apache Kafka in every version that is asked for.

`KAFKA_VERSIONS` names versions (default: the newest; with CI=true all of them, which take turns in most tests, and
`KAFKA_TURNS=left` runs those turns that were left out: see `tests/conftest.py`), `KAFKA_BOOTSTRAP` a broker that runs
already. A broker is started once for all processes of a test run, and ended by the last of them. Without Java or Maven
its tests are skipped, except with CI=true, where they fail.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.proxy import Proxy
from tests.kafka.server import JAVA_QUICK, VERSION_DEFAULT, VERSIONS, Behind, Server, free_port, missing_tools
from tests.kafka.shared import run_folder, shared

IN_CI = os.environ.get("CI") == "true"
KAFKA_TURNS_LEFT = os.environ.get("KAFKA_TURNS") == "left"
"""Whether tests run on the versions whose turn it was not."""
EMBEDDED = "embedded"
PROXIES = 8
"""Listeners of a shared broker that only clients behind a proxy use."""


def kafka_versions() -> list[str]:
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return ["bootstrap"]
    asked = os.environ.get("KAFKA_VERSIONS", "")
    return asked.split(",") if asked else list(VERSIONS if IN_CI or KAFKA_TURNS_LEFT else [VERSION_DEFAULT])


def kafka_names() -> list[str]:
    return [f"kafka-{version}" for version in kafka_versions()]


def need_tools() -> None:
    """Skip, or fail where nothing may be skipped, if no broker can be started here."""
    lacking = missing_tools()
    if lacking and not os.environ.get("KAFKA_BOOTSTRAP"):
        why = f"Kafka needs {' and '.join(lacking)}"
        pytest.fail(why) if IN_CI else pytest.skip(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A part of a broker that no other test uses."""

    url: str
    prefix: str = ""

    @property
    def is_kafka(self) -> bool:
        return self.url.startswith("kafka://")

    @property
    def options(self) -> list[str]:
        return ["--broker", self.url, *(["--topic-prefix", self.prefix] if self.prefix else [])]


class Shared(NamedTuple):
    """A broker of many tests, and its listeners behind proxies: one for each process of a test run."""

    bootstrap: str
    behind: list[Behind]


def _start(version: str, folder: Path) -> tuple[int, Any]:
    behind = [Behind(free_port(), free_port()) for _ in range(PROXIES)]
    server = Server(folder, version, behind=behind, java=JAVA_QUICK, outlives=True)
    return server.start(), (server.bootstrap, behind)


class Servers:
    """The brokers of a test run by name, each started when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory, running: ExitStack) -> None:
        self._factory = factory
        self._running = running
        self._found: dict[str, Shared] = {}

    def __call__(self, name: str) -> str:
        """Its URL."""
        if os.environ.get("KAFKA_BOOTSTRAP"):
            return f"kafka://{os.environ['KAFKA_BOOTSTRAP']}"
        return f"kafka://{self._shared(name).bootstrap}"

    def proxy(self, name: str) -> Proxy:
        """A proxy in front of it that belongs to this process."""
        if os.environ.get("KAFKA_BOOTSTRAP"):
            pytest.skip("a broker that runs already has no listener behind a proxy")
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
        return Proxy(self._shared(name).behind[int(worker.removeprefix("gw")) % PROXIES])

    def _shared(self, name: str) -> Shared:
        if name not in self._found:
            need_tools()
            version = name.removeprefix("kafka-")
            server = shared(run_folder(self._factory) / name, partial(_start, version))
            bootstrap, behind = self._running.enter_context(server)
            self._found[name] = Shared(bootstrap, [Behind(*each) for each in behind])
        return self._found[name]


@pytest.fixture(scope="session")
def kafka_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as running:
        yield Servers(tmp_path_factory, running)


@pytest.fixture(scope="session", params=[EMBEDDED, *kafka_names()])
def broker_server(request: pytest.FixtureRequest, kafka_servers: Servers) -> str:
    """URL of a broker that takes any number of prefixes; empty for the embedded log, which is a file of each test."""
    return "" if request.param == EMBEDDED else kafka_servers(request.param)


@pytest.fixture(scope="session", params=kafka_names())
def kafka_server(request: pytest.FixtureRequest, kafka_servers: Servers) -> str:
    """URL of a Kafka broker."""
    return kafka_servers(request.param)


@pytest.fixture
def place(broker_server: str, tmp_path: Path) -> Place:
    """Where this test's topics are: on the embedded log, then on every Kafka."""
    return kafka_place(broker_server) if broker_server else Place(url=f"embedded://{tmp_path}/log.sqlite")


@pytest.fixture
def on_kafka(kafka_server: str) -> Place:
    """Where this test's topics are on Kafka."""
    return kafka_place(kafka_server)


def kafka_place(url: str) -> Place:
    return Place(url=url, prefix=f"t{secrets.token_hex(4)}.")


class ThreeBrokers:
    """A cluster of this process alone: started when it is first asked for, and whole whenever it is."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._made: Cluster | None = None

    def __call__(self) -> Cluster:
        need_tools()
        if self._made is None:
            self._made = Cluster(self._factory.mktemp("cluster"), VERSION_DEFAULT)
        self._made.start()
        return self._made

    def end(self) -> None:
        if self._made is not None:
            self._made.kill()


@pytest.fixture(scope="session")
def three_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeBrokers]:
    brokers = ThreeBrokers(tmp_path_factory)
    yield brokers
    brokers.end()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Three brokers end with the last test in a row that uses them: idle ones take a tenth of a core."""
    wanted = [*getattr(nextitem, "fixturenames", ())]
    brokers = getattr(item, "funcargs", {}).get("three_brokers")
    if brokers is not None and "three_brokers" not in wanted:
        brokers.end()


@pytest.fixture(params=kafka_versions())
def own_kafka(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A broker of this test alone, which it may kill and start again."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        pytest.skip("a broker that runs already is not killed")
    need_tools()
    server = Server(tmp_path / "kafka", request.param, java=JAVA_QUICK)
    server.start()
    yield server
    server.kill()
