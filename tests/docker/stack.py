"""The stack of `docker/` as a user drives it: by `make up`, `make down`, and docker's own commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.docker.standins import ROOT
from tests.kafka.server import free_port

WORKERS: Final = ("primary", "replica-1", "replica-2")
SERVICES: Final = ("kafka", "source", *WORKERS)
"""All that run; `topics` ends when it is done."""
WAIT_S: Final = 300.0
"""A condition that does not come true within this has failed. Mostly these are seconds; but Docker waits twice as long
before each start of what ended at once, so that after a crash of all, workers come a while after Kafka does."""


def compose_command() -> list[str] | None:
    """Compose as this machine has it: v2, else the older program; None if there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        found = shutil.which(command[0]) is not None
        if found and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def on_loopback(file: Path) -> Path:
    """An override of the compose file for a daemon without networks: the host's, on 127.0.0.1 and free ports."""
    broker, controller = (f"127.0.0.1:{free_port()}" for _ in range(2))
    host, port = broker.split(":")
    of_all: dict[str, Any] = {"network_mode": "host"}
    ours = of_all | {"environment": {"STATEFERRY_BROKER": f"kafka://{broker}"}}
    kafka = of_all | {
        "environment": {
            "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@{controller}",
            "KAFKA_LISTENERS": f"PLAINTEXT://{broker},CONTROLLER://{controller}",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{broker}",
        },
        "healthcheck": {"test": ["CMD", "bash", "-c", f"< /dev/tcp/{host}/{port}"]},
    }
    services = {"kafka": kafka, "topics": ours | {"build": {"network": "host"}}}
    file.write_text(json.dumps({"services": services | {name: ours for name in SERVICES if name != "kafka"}}))
    return file


class Stack:
    """One project of the compose file on one daemon."""

    def __init__(self, project: str, *, host: str = "", override: Path | None = None) -> None:
        """``host``: the daemon's address; empty: the one that this user's docker talks to."""
        found = compose_command()
        assert found is not None
        self._compose = found
        files = [ROOT / "docker" / "compose.yaml", *([override] if override else [])]
        self._project = project
        self._env = os.environ | {
            "COMPOSE_PROJECT_NAME": project,
            "COMPOSE_FILE": os.pathsep.join(map(str, files)),
            **({"DOCKER_HOST": host} if host else {}),
        }

    # What a user types

    def make(self, target: str, *variables: str) -> str:
        return self._run(["make", "--no-print-directory", target, *variables])

    def compose(self, *args: str) -> str:
        return self._run([*self._compose, *args])

    def docker(self, *args: str) -> str:
        return self._run(["docker", *args])

    def exec(self, service: str, *command: str) -> str:
        return self.docker("exec", self.container(service), *command)

    def ask(self, service: str, *command: str) -> Any:
        """The document of one of our commands in a service's container."""
        return json.loads(self.exec(service, "stateferry", *command, "--json"))

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, check=False, text=True)
        assert done.returncode == 0, (command, done.returncode, done.stdout[-4000:], done.stderr[-4000:])

        return done.stdout

    # What docker knows

    def container(self, service: str) -> str:
        """By the labels that every compose puts on what it starts: asking the older program takes a second."""
        labels = (f"project={self._project}", f"service={service}")
        filters = [word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}")]
        return self.docker("ps", "--all", "--quiet", *filters).strip()

    def state(self, service: str) -> Any:
        """`Running`, `Health`, `ExitCode` and so on, and `RestartCount`."""
        (found,) = json.loads(self.docker("inspect", self.container(service)))
        return found["State"] | {"RestartCount": found["RestartCount"]}

    def volumes(self) -> set[str]:
        listed = self.docker("volume", "ls", "--quiet", "--filter", f"name={self._project}_").split()
        return {name.removeprefix(f"{self._project}_") for name in listed}

    def wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        """Until a condition is true; while a container restarts, asking it fails."""
        deadline_s, said = time.monotonic() + WAIT_S, ""
        while True:
            try:
                if holds():
                    return
            except AssertionError as error:
                said = str(error)
            assert time.monotonic() < deadline_s, (what, said, self.compose("logs", "--tail", "20"))

            time.sleep(0.5)

    # What is to be true

    @contextmanager
    def settled(self) -> Iterator[dict[str, Any]]:
        """The primary's status, once all workers followed all that the source published; meanwhile it is stopped."""
        self.compose("stop", "source")
        ends: list[int] = []
        found: dict[str, Any] = {}

        def all_followed() -> bool:
            if not ends:
                topics = {topic["topic"]: topic["end"] for topic in self.ask("primary", "topics", "describe")}
                ends.append(topics["blocks"])
            found.update({name: self.ask(name, "status") for name in WORKERS})
            return found["primary"]["offsets"]["blocks"] == ends[0] and len(set(map(_place, found.values()))) == 1

        self.wait_until("all workers stand at the end of the topic", all_followed)
        try:
            yield found["primary"]
        finally:
            self.compose("start", "source")

    def height(self, service: str) -> int:
        return int(self.ask(service, "status")["height"])


def _place(status: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(status[name] for name in ("generation", "walk", "height", "block_hash", "root", "proof"))
