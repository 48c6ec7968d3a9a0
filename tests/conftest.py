"""For all tests: the brokers; and properties judged by what they find, not by how long a busy machine takes."""

from __future__ import annotations

from hypothesis import settings

from tests.kafka.fixtures import (  # noqa: F401
    broker_server,
    kafka_server,
    kafka_servers,
    on_kafka,
    own_kafka,
    place,
    three_brokers,
)

settings.register_profile("stateferry", deadline=None)
settings.load_profile("stateferry")
