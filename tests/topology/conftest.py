"""For tests by commands: a broker of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.topology.commands import Site


@pytest.fixture(scope="module")
def each_broker(broker_server: str) -> Iterator[None]:
    """Sites of this module have their topics on the embedded log, then on every Kafka."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "kafka_url", broker_server)
        yield


@pytest.fixture(autouse=True)
def _nothing_left_of_each_broker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for no broker has its own log, also behind one of its module that asked for Kafka."""
    if not {"each_broker", "kafka_only"} & {*request.fixturenames}:
        monkeypatch.setattr(Site, "kafka_url", "")


@pytest.fixture
def kafka_only(kafka_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of this test have their topics on Kafka."""
    monkeypatch.setattr(Site, "kafka_url", kafka_server)
