"""The embedded log as a Faust transport: ``broker="embedded:///absolute/path/log.sqlite"``.

Faust finds it by the entry point ``faust.transports`` and asks it for a consumer and a producer; both share
the process's one ``SqliteLog`` of the file. What Faust's settings mean here:

* ``id``: the consumer group; ``consumer_group_instance_id``: the member's name over restarts.
* ``broker_session_timeout``: the lease of a member, after which a dead one's partitions go to the others;
  ``broker_heartbeat_interval``: how often it is renewed.
* ``broker_max_poll_records``: records per fetch, over all partitions; ``consumer_max_fetch_size``: bytes per
  fetch and partition.
* ``broker_commit_interval``: how often acked offsets are committed.
* Whatever tells a network of brokers from a file (TLS, request timeouts, acks, compression) means nothing
  here.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, ClassVar

from faust.transport import base

from pipeline.errors import BrokerUrlError
from topology.transports import embedded_consumer, embedded_producer
from topology.transports.base import log_path


class Transport(base.Transport):  # type: ignore[misc]
    """Makes the consumer and the producer of one file's log."""

    Consumer: ClassVar[type[embedded_consumer.Consumer]] = embedded_consumer.Consumer
    Producer: ClassVar[type[embedded_producer.Producer]] = embedded_producer.Producer

    driver_version = f"sqlite={sqlite3.sqlite_version}"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the URL apart. Raises ``BrokerUrlError`` unless it names one file."""
        super().__init__(*args, **kwargs)
        urls = [str(url) for url in self.url]
        if len(urls) != 1:
            raise BrokerUrlError("the embedded log is one file", where=";".join(urls), way_out="name one URL")
        self.path: Path = log_path(urls[0])
