"""From a broker URL to a broker: the one place that knows every kind there is."""

from __future__ import annotations

from typing import Any

from topology.transports.base import Broker, log_path
from topology.transports.embedded_broker import EmbeddedBroker
from topology.transports.kafka_address import addresses, is_kafka
from topology.transports.kafka_security import PLAINTEXT, Security
from topology.transports.prefixed import PrefixedBroker

KAFKA_SCHEME = "stateferry-kafka"
"""Our Kafka transport among Faust's: `kafka` is the name of Faust's own, which other applications may want."""


def open_broker(url: str, topic_prefix: str = "", security: Security = PLAINTEXT) -> Broker:
    """Open the broker that ``url`` names; ``close()`` it when done.

    ``embedded:///absolute/path/log.sqlite`` is the embedded log; the file is created if it is not there, its
    directory is not. ``kafka://host:port[,host:port]`` is a Kafka cluster; it is connected to by the first call.
    ``topic_prefix`` stands before the names of all topics; ``security`` is for Kafka. Raises ``BrokerUrlError`` for
    any other scheme, ``UsageError`` for a prefix that cannot be one, and what ``SqliteLog`` raises on opening.
    """
    broker: Broker
    if is_kafka(url):
        # Loads half of aiokafka: commands on the embedded log need none of it.
        from topology.transports.kafka_broker import KafkaBroker  # noqa: PLC0415

        broker = KafkaBroker(addresses(url), security)
    else:
        broker = EmbeddedBroker(log_path(url))
    return PrefixedBroker(broker, topic_prefix) if topic_prefix else broker


def faust_urls(url: str) -> list[str]:
    """The URLs by which Faust finds our transport for a broker. Raises ``BrokerUrlError``."""
    if is_kafka(url):
        return [f"{KAFKA_SCHEME}://{address}" for address in addresses(url)]
    log_path(url)
    return [url]


def faust_credentials(security: Security) -> Any:
    """The same security as Faust hands it to its driver; None for plaintext."""
    from faust.auth import SASLCredentials, SSLCredentials  # noqa: PLC0415

    if security.context is None:
        return None
    if not security.uses_sasl:
        return SSLCredentials(security.context)
    return SASLCredentials(
        username=security.username,
        password=security.password.get_secret_value(),
        mechanism=security.mechanism,
        ssl_context=security.context,
    )
