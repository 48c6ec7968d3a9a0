"""What these tests share: a broker with every kind of listener, and sites whose commands come as one of its users."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.kafka.fixtures import kafka_versions, need_tools
from tests.kafka.secured import Secured, start_secured
from tests.kafka.server import VERSION_DEFAULT
from tests.kafka.shared import run_folder, shared


@pytest.fixture(scope="package")
def secured_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Secured]]:
    """Gives the broker of a version, started when it is first asked for."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        pytest.skip("a broker that runs already has none of these listeners")
    need_tools()
    found: dict[str, Secured] = {}
    with ExitStack() as running:

        def server(version: str) -> Secured:
            if version not in found:
                folder = run_folder(tmp_path_factory) / f"secured-{version}"
                at, *rest = running.enter_context(shared(folder, partial(start_secured, version)))
                found[version] = Secured(Path(at), *rest)
            return found[version]

        yield server


@pytest.fixture(scope="package")
def secured(secured_servers: Callable[[str], Secured]) -> Secured:
    """A broker of the newest version."""
    return secured_servers(VERSION_DEFAULT)


@pytest.fixture(scope="package", params=kafka_versions())
def each_secured(request: pytest.FixtureRequest, secured_servers: Callable[[str], Secured]) -> Secured:
    """Brokers of every version that is asked for."""
    return secured_servers(request.param)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those of the test."""
    for name in [name for name in os.environ if name.startswith("STATEFERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
