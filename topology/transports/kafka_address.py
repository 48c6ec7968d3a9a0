"""Where a Kafka broker is: `kafka://host:port[,host:port]` names any brokers of one cluster; 9092 is the port of one
that names none. A URL never holds a name or a password.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from pipeline.errors import BrokerUrlError

PORT_DEFAULT: Final = 9092
_SCHEME: Final = "kafka://"
_HINT: Final = "write kafka://host:port, with more of the cluster's brokers behind commas"
_SERVER: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")


class Address(NamedTuple):
    """One broker of a cluster."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_kafka(url: str) -> bool:
    return url.startswith(_SCHEME)


def addresses(url: str) -> list[Address]:
    """The brokers that a ``kafka://`` URL names. Raises ``BrokerUrlError`` for any other URL."""
    # What stands before an @ may be a password, and errors end up in logs.
    shown = f"{_SCHEME}...@{url.rpartition('@')[2]}" if "@" in url else url
    found = []
    for server in url.removeprefix(_SCHEME).removesuffix("/").split(","):
        match = _SERVER.fullmatch(server)
        port = PORT_DEFAULT if match is None or match["port"] is None else int(match["port"])
        if not is_kafka(url) or match is None or not 0 < port < 1 << 16:
            raise BrokerUrlError("the URL does not name brokers by host and port", where=shown, way_out=_HINT)
        found.append(Address(match["host"].strip("[]"), port))
    return found


def shown(brokers: Sequence[Address]) -> str:
    """All of them, as aiokafka and people read them."""
    return ",".join(map(str, brokers))
