"""Where a Kafka broker is, and why it cannot be reached.

`kafka://host:port[,host:port]` names any brokers of one cluster; 9092 is the port of one that names none. aiokafka
reports every failure as 'Unable to bootstrap from ...', so whoever connects looks first at what is there: a name that
does not resolve, a connection that is refused and one that is never answered each have another way out.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

from aiokafka.errors import (
    KafkaConnectionError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from pipeline.errors import BrokerUnavailable, BrokerUrlError, NotFound, StateferryError, UsageError

PORT_DEFAULT: Final = 9092
CONNECT_TIMEOUT_S: Final = 5.0
_SCHEME: Final = "kafka://"
_HINT: Final = "write kafka://host:port, with more of the cluster's brokers behind commas"
_SERVER: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
_WAY_OUT: Final = "start the broker, or check --broker and STATEFERRY_BROKER"


class Address(NamedTuple):
    """One broker of a cluster."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def addresses(url: str) -> list[Address]:
    """The brokers that a ``kafka://`` URL names. Raises ``BrokerUrlError`` for any other URL."""
    # What stands before an @ may be a password, and errors end up in logs.
    shown = f"{_SCHEME}...@{url.rpartition('@')[2]}" if "@" in url else url
    found = []
    for server in url.removeprefix(_SCHEME).removesuffix("/").split(","):
        match = _SERVER.fullmatch(server)
        port = PORT_DEFAULT if match is None or match["port"] is None else int(match["port"])
        if not url.startswith(_SCHEME) or match is None or not 0 < port < 1 << 16:
            raise BrokerUrlError("the URL does not name brokers by host and port", where=shown, way_out=_HINT)
        found.append(Address(match["host"].strip("[]"), port))
    return found


async def check_reachable(brokers: Sequence[Address], *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Raises ``BrokerUnavailable``, saying of each broker what failed, unless one of them takes a connection."""
    failures = []
    for broker in brokers:
        failure = await _why_unreachable(broker, timeout_s)
        if failure is None:
            return
        failures.append(failure)
    raise BrokerUnavailable("no broker can be reached", where="; ".join(failures), way_out=_WAY_OUT)


async def _why_unreachable(broker: Address, timeout_s: float) -> str | None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            try:
                await loop.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                return f"DNS: the name {broker.host} does not resolve: {error.strerror}"
            _, writer = await asyncio.open_connection(broker.host, broker.port)
    except TimeoutError:
        return f"timeout: {broker} did not take a TCP connection within {timeout_s:g} s"
    except ConnectionRefusedError:
        return f"TCP: {broker} refused the connection"
    except OSError as error:
        return f"TCP: {broker}: {error.strerror or error}"
    writer.close()
    return None


def not_spoken_to(brokers: Sequence[Address]) -> BrokerUnavailable:
    """What it means when somebody took the connection, and no conversation came of it."""
    return BrokerUnavailable(
        "a broker took the connection and did not answer as Kafka without TLS does",
        where=shown(brokers),
        way_out="check that the port is the one of a plaintext listener",
    )


def shown(brokers: Sequence[Address]) -> str:
    """All of them, as aiokafka and people read them."""
    return ",".join(map(str, brokers))


async def why_failed(error: BaseException, what: str, brokers: Sequence[Address]) -> StateferryError:
    """An error of the client as one of ours: first whether the broker is there at all, then what it said."""
    if isinstance(error, StateferryError):
        return error
    if isinstance(error, UnknownTopicOrPartitionError):
        return NotFound(f"there is no {what}", where=shown(brokers), way_out="create the topic first")
    if isinstance(error, MessageSizeTooLargeError):
        return UsageError(
            f"{what}: the broker takes no record of this size",
            where=shown(brokers),
            way_out="raise the topic's max.message.bytes",
        )
    if isinstance(error, TopicAuthorizationFailedError):
        return UsageError(f"{what}: not authorized", where=shown(brokers), way_out="check the ACLs of this user")
    if isinstance(error, KafkaConnectionError | KafkaTimeoutError | TimeoutError):
        try:
            await check_reachable(brokers)
        except BrokerUnavailable as unavailable:
            return unavailable
    said = str(error) or type(error).__name__
    return BrokerUnavailable(f"{what}: the broker did not do it: {said}", where=shown(brokers), way_out=_WAY_OUT)
