"""Brokers for tests: the embedded log, and Apache Kafka in every version that is asked for.

`KAFKA_VERSIONS` names versions (default: the newest; with CI=true all of them), `KAFKA_BOOTSTRAP` a broker that runs
already. A broker is started once for all processes of a test run, and ended by the last of them. Without Java or Maven
its tests are skipped, except with CI=true, where they fail.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.proxy import Proxy
from tests.kafka.server import JAVA_QUICK, VERSION_DEFAULT, VERSIONS, Behind, Server, free_port, missing_tools

IN_CI = os.environ.get("CI") == "true"
EMBEDDED = "embedded"
PROXIES = 8
"""Listeners of a shared broker that only clients behind a proxy use."""


def kafka_versions() -> list[str]:
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return ["bootstrap"]
    asked = os.environ.get("KAFKA_VERSIONS", "")
    return asked.split(",") if asked else list(VERSIONS if IN_CI else [VERSION_DEFAULT])


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


@contextmanager
def shared_server(folder: Path, version: str) -> Iterator[Shared]:
    """A broker that all processes of a test run share.

    Every user holds a shared lock; the last one, which gets it alone, ends the broker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "server.json"
    with (folder / "USERS").open("w") as users, (folder / "STARTING").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        if not state.exists():
            behind = [Behind(free_port(), free_port()) for _ in range(PROXIES)]
            server = Server(folder / secrets.token_hex(4), version, behind=behind, java=JAVA_QUICK)
            server.start()
            assert server.process is not None
            facts = {"bootstrap": server.bootstrap, "behind": behind, "pid": server.process.pid}
            state.write_text(json.dumps(facts))
        found = json.loads(state.read_text())
        fcntl.flock(starting, fcntl.LOCK_UN)
        try:
            yield Shared(found["bootstrap"], [Behind(*each) for each in found["behind"]])
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            with suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                state.unlink(missing_ok=True)
                os.kill(found["pid"], signal.SIGKILL)  # its data goes with the folder


def server_folder(factory: pytest.TempPathFactory, version: str) -> Path:
    base = factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / f"kafka-{version}"


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
            server = shared_server(server_folder(self._factory, version), version)
            self._found[name] = self._running.enter_context(server)
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


@pytest.fixture(scope="session")
def three_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Cluster]]:
    """Gives a cluster of this process alone: started when it is first asked for, and whole whenever it is."""
    made: list[Cluster] = []

    def get() -> Cluster:
        need_tools()
        if not made:
            made.append(Cluster(tmp_path_factory.mktemp("cluster"), VERSION_DEFAULT))
        made[0].start()
        return made[0]

    yield get
    for each in made:
        each.kill()


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
