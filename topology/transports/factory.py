"""From a broker URL to a broker: the one place that knows every kind there is."""

from __future__ import annotations

from topology.transports.base import Broker, log_path
from topology.transports.embedded_broker import EmbeddedBroker


def open_broker(url: str) -> Broker:
    """Open the broker that ``url`` names; ``close()`` it when done.

    ``embedded:///absolute/path/log.sqlite`` is the embedded log; the file is created if it is not there, its
    directory is not. Raises ``BrokerUrlError`` for any other scheme, and what ``SqliteLog`` raises on
    opening.
    """
    return EmbeddedBroker(log_path(url))
