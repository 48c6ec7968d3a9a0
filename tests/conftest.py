"""For all tests: the brokers; and properties judged by what they find, not by how long a busy machine takes."""

from __future__ import annotations

from hypothesis import settings

from tests.kafka.fixtures import broker_server, kafka_server, kafka_servers, on_kafka, own_kafka, place  # noqa: F401

settings.register_profile("stateferry", deadline=None)
settings.load_profile("stateferry")
