"""One Apache Kafka broker of a given version, in a process of its own on loopback.

The jars come from Maven once, into a cache outside of the work tree; a broker's ports, data and log belong to the
folder that it was given. `python -m tests.kafka.server` runs one in the foreground, to play with.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

VERSIONS: Final = ("3.9.1", "4.3.1")
VERSION_DEFAULT: Final = "4.3.1"
START_TIMEOUT_S: Final = 90.0
JAVA: Final = ("-Xmx512m",)
JAVA_QUICK: Final = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""Starts with half of the work, and is slower in the long run: for brokers that live for minutes."""
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stateferry-tests"

_LOGGING: Final = {
    "3": (("ch.qos.reload4j", "reload4j", "1.2.25"), ("org.slf4j", "slf4j-reload4j", "1.7.36")),
    "4": (
        ("org.apache.logging.log4j", "log4j-core", "2.25.1"),
        ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.1"),
    ),
}
"""The broker's own POM brings no backend."""


def missing_tools() -> list[str]:
    """What has to be installed before a broker can run here."""
    return [tool for tool in ("java", "mvn") if shutil.which(tool) is None]


def jars(version: str) -> Path:
    """The folder of a version's jars, filled if need be: 45 MB, seconds."""
    folder = CACHE / f"kafka-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "DONE"
        if not done.exists():
            (folder / "pom.xml").write_text(_pom(version))
            subprocess.run(
                ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=libs"],
                cwd=folder,
                check=True,
                stdout=sys.stderr,
            )
            done.touch()
    return folder / "libs"


def _pom(version: str) -> str:
    wanted = (("org.apache.kafka", "kafka_2.13", version), *_LOGGING[version.partition(".")[0]])
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{number}</version>"
        "</dependency>"
        for group, artifact, number in wanted
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>stateferry.tests</groupId><artifactId>kafka</artifactId><version>1</version>"
        f"<packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>\n"
    )


def new_cluster() -> str:
    """A cluster's id: it never begins with a dash."""
    return base64.urlsafe_b64encode(bytes(1) + uuid.uuid4().bytes[1:]).decode().rstrip("=")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Behind(NamedTuple):
    """A listener that clients reach through a proxy: it is advertised by the port that the proxy listens on."""

    proxy_port: int
    port: int


class Server:
    """A broker and controller in one process. `start` formats the data once; `kill` and `start` is a crash.

    ``behind``: further listeners. ``peers``: the controllers of a cluster by node id, this one included, and the
    cluster's id; without them it is alone. It ends with the process that started it, however that ends, unless
    ``outlives``.
    """

    def __init__(
        self,
        folder: Path,
        version: str = VERSION_DEFAULT,
        *,
        port: int | None = None,
        behind: Sequence[Behind] = (),
        node_id: int = 1,
        peers: Mapping[int, int] | None = None,
        cluster: str = "",
        java: Sequence[str] = JAVA,
        outlives: bool = False,
    ) -> None:
        self.folder = folder
        self.version = version
        self.port = port or free_port()
        self.behind = behind
        self.node_id = node_id
        self.process: subprocess.Popen[bytes] | None = None
        self._peers = peers or {node_id: free_port()}
        self._cluster = cluster or new_cluster()
        self._java_options = java
        self._outlives = outlives
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> int:
        """Start, and wait until it takes connections. Returns its process id; raises RuntimeError with the end of its
        log."""
        properties = self.folder / "server.properties"
        if not properties.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            properties.write_text("".join(f"{name}={value}\n" for name, value in self._properties().items()))
            arguments = ("format", "-t", self._cluster, "-c", str(properties), *self._format_arguments())
            self._java("kafka.tools.StorageTool", *arguments).wait()
        self.process = self._java("kafka.Kafka", str(properties))
        if not self._outlives:
            guard = ["sh", "-c", 'read _; kill -9 "$0"', str(self.process.pid)]  # reads to the end of this process
            self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._takes_connections():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise RuntimeError(f"Kafka {self.version} did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        return self.process.pid

    def _properties(self) -> dict[str, object]:
        copies = len(self._peers)
        here = {"PLAINTEXT": self.port} | {f"PROXIED{at}": one.port for at, one in enumerate(self.behind)}
        shown = here | {f"PROXIED{at}": one.proxy_port for at, one in enumerate(self.behind)}
        own = here | {"CONTROLLER": self._peers[self.node_id]}
        return {
            "process.roles": "broker,controller",
            "node.id": self.node_id,
            "controller.quorum.voters": ",".join(f"{node}@127.0.0.1:{port}" for node, port in self._peers.items()),
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in own.items()),
            "advertised.listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in shown.items()),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in own),
            "num.network.threads": 1 if self.behind else 3,  # of each listener
            "log.dirs": self.folder / "data",
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": 1,
            "default.replication.factor": copies,
            "broker.session.timeout.ms": 3000,  # of a broker: its partitions have other leaders then
            "broker.heartbeat.interval.ms": 500,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            "auto.create.topics.enable": "true",  # as most clusters have it: nothing of ours may depend on it
            "log.cleaner.dedupe.buffer.size": 8 << 20,
        }

    def _format_arguments(self) -> list[str]:
        return []

    def _java(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["java", *self._java_options, "-cp", f"{jars(self.version)}/*", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )

    def _open_ports(self) -> list[int]:
        """Of its listeners, which do not begin all at once."""
        return [self.port, *(one.port for one in self.behind)]

    def _takes_connections(self) -> bool:
        try:
            for port in self._open_ports():
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.communicate()
        process, self.process = self.process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one Kafka broker on loopback until Ctrl-C.")
    parser.add_argument("--version", choices=VERSIONS, default=VERSION_DEFAULT)
    parser.add_argument("--port", type=int, default=9092)
    arguments = parser.parse_args()
    lacking = missing_tools()
    if lacking:
        sys.exit(f"Kafka needs {' and '.join(lacking)}: on Debian, apt-get install default-jre-headless maven")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="stateferry-kafka-") as folder:
        server = Server(Path(folder), arguments.version, port=arguments.port)
        try:
            server.start()
            print(f"Kafka {server.version} listens on {server.url}; its data goes when it ends. In another shell:\n")
            print(f"  make demo BROKER={server.url}\n", flush=True)
            assert server.process is not None
            server.process.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.stop()


if __name__ == "__main__":
    main()
