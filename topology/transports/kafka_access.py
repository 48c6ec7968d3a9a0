"""Whether a cluster can be reached, trusted, and logged in to; and what a failure of its client means.

aiokafka reports every failure as 'Unable to bootstrap from ...', so whoever connects walks the way first, a step at a
time: the name resolves, the port takes a connection, the TLS handshake ends with a certificate to trust, the broker
takes our certificate or our password, and it answers a question. Where the walk ends each time has another way out.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Final

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from pipeline.errors import (
    AccessDenied,
    BrokerUnavailable,
    BrokerUntrusted,
    LoginRefused,
    NotAuthorized,
    NotFound,
    StateferryError,
    UsageError,
    WrongListener,
)
from topology.transports.kafka_address import Address, shown
from topology.transports.kafka_security import PLAINTEXT, Security

CONNECT_TIMEOUT_S: Final = 5.0
LOGIN_TIMEOUT_S: Final = 20.0
"""Of the handshake, the login and one answer together: a broker that just started is slow at its first ones."""
_ALERT_TIMEOUT_S: Final = 2.0
_START: Final = "start the broker, or check --broker and STATEFERRY_BROKER"
_PROTOCOL: Final = "check kafka_security_protocol and the port"
_TRUST: Final = {
    9: ("is not valid yet", "check this machine's clock"),
    10: ("has expired", "renew the broker's certificate"),
    62: ("is one of another name", "name the broker as its certificate does, or give it one of this name"),
    64: ("is one of another address", "name the broker as its certificate does, or give it one of this address"),
}
"""By OpenSSL's number of what is wrong with a broker's certificate: what it means, and the way out."""
_AUTHORITY: Final = ("is signed by nobody whom we trust", "name the file of its authority in kafka_ca_file")


async def check_access(
    brokers: Sequence[Address],
    security: Security = PLAINTEXT,
    *,
    all_named: bool = False,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> None:
    """Raise what stands in the way to the broker that one gets farthest with, unless one of them answers.

    ``all_named``: also look at the brokers that this one names, all of which have to answer. Raises
    ``BrokerUnavailable``, ``WrongListener``, ``BrokerUntrusted``, ``LoginRefused``.
    """
    # All at once: one that takes connections and never answers must not hold us up while another one would.
    walks = [asyncio.ensure_future(_walk(broker, security, timeout_s)) for broker in brokers]
    failures: list[StateferryError] = []
    try:
        await _first_done(walks)
        for broker, walk in zip(brokers, walks, strict=True):
            if not walk.done():
                continue
            try:
                named = walk.result()
            except (BrokerUnavailable, AccessDenied) as failure:
                failures.append(failure)
                continue
            for other in set(named) - set(brokers) if all_named else ():
                await _check_named(other, broker, security, timeout_s)
            return
    finally:
        for walk in walks:
            walk.cancel()
        await asyncio.gather(*walks, return_exceptions=True)
    worst = next((failure for failure in failures if isinstance(failure, AccessDenied)), None)
    if worst is not None:
        raise worst
    raise BrokerUnavailable(
        "no broker can be reached",
        where="; ".join(failure.what for failure in failures),
        way_out=next((failure.way_out for failure in failures if failure.way_out), _START),
    )


async def _first_done(walks: Sequence[asyncio.Future[list[Address]]]) -> None:
    """Until one of them got there, or all have failed."""
    waiting = set(walks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(walk.exception() is None for walk in done):
            return


async def _check_named(other: Address, by: Address, security: Security, timeout_s: float) -> None:
    try:
        await _walk(other, security, timeout_s)
    except (BrokerUnavailable, AccessDenied) as failure:
        raise type(failure)(
            f"{failure.what}; {by} named this broker",
            where=str(other),
            way_out=f"{failure.way_out or _START}; or check the broker's advertised.listeners",
        ) from failure


async def _walk(broker: Address, security: Security, timeout_s: float) -> list[Address]:
    """The brokers that this one names."""
    await _check_port(broker, timeout_s)
    try:
        connection = await _login(broker, security)
    except TimeoutError:
        raise BrokerUnavailable(
            f"timeout: {broker} took the connection and did not answer within {LOGIN_TIMEOUT_S:g} s"
        ) from None
    except (OSError, KafkaError, ValueError) as error:
        raise await _why_no_login(broker, security, error) from error
    try:
        found = await connection.send(MetadataRequest([]))
    except (KafkaError, TimeoutError) as error:
        raise await _why_no_answer(broker, security) from error
    finally:
        connection.close()
    return [Address(each[1], each[2]) for each in found.brokers]


async def _check_port(broker: Address, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            try:
                await loop.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                raise BrokerUnavailable(f"DNS: the name {broker.host} does not resolve: {error.strerror}") from error
            _, writer = await asyncio.open_connection(broker.host, broker.port)
    except TimeoutError:
        raise BrokerUnavailable(f"timeout: {broker} did not take a TCP connection within {timeout_s:g} s") from None
    except ConnectionRefusedError as error:
        raise BrokerUnavailable(f"TCP: {broker} refused the connection") from error
    except OSError as error:
        raise BrokerUnavailable(f"TCP: {broker}: {error.strerror or error}") from error
    writer.close()


async def _login(broker: Address, security: Security) -> AIOKafkaConnection:
    return await create_conn(
        broker.host,
        broker.port,
        client_id="stateferry",
        request_timeout_ms=int(LOGIN_TIMEOUT_S * 1000),
        **security.client_settings,
    )


async def _why_no_login(broker: Address, security: Security, error: BaseException) -> StateferryError:
    """What an error of ``_login`` means: it names the step that failed, or another attempt shows it."""
    cause = error.__cause__ if isinstance(error, KafkaConnectionError) and error.__cause__ else error
    match cause:
        case ssl.SSLCertVerificationError():
            what, way_out = _TRUST.get(cause.verify_code, _AUTHORITY)
            return BrokerUntrusted(
                f"TLS: the broker's certificate {what}: {cause.verify_message}", where=str(broker), way_out=way_out
            )
        case ssl.SSLError() if _is_about_certificates(cause):
            return _certificate_refused(broker, security, cause)
        case SaslAuthenticationFailed():
            return LoginRefused(
                f"SASL: the broker refuses the name {security.username!r} with its password",
                where=str(broker),
                way_out=f"check kafka_username, kafka_password_file, and the user's {security.mechanism} credentials",
            )
        case UnsupportedSaslMechanismError():
            return LoginRefused(
                f"SASL: the broker takes no login by {security.mechanism}",
                where=str(broker),
                way_out="check kafka_sasl_mechanism and the broker's sasl.enabled.mechanisms",
            )
        case IllegalSaslStateError():
            return WrongListener(
                "the broker wants TLS, and no login by name",
                where=str(broker),
                way_out="set kafka_security_protocol=SSL",
            )
        case ValueError():  # of the SCRAM exchange
            return BrokerUntrusted(
                f"SASL: the broker does not know the password of {security.username!r} itself",
                where=str(broker),
                way_out="this is not the broker that it should be: check --broker",
            )
    if security.context is None and await _speaks_tls(broker):
        return WrongListener(
            "the broker wants TLS, and kafka_security_protocol is PLAINTEXT", where=str(broker), way_out=_PROTOCOL
        )
    if security.context is not None:
        if await _speaks_plaintext(broker):
            return WrongListener(
                f"the broker speaks without TLS, and kafka_security_protocol is {security.protocol}",
                where=str(broker),
                way_out=_PROTOCOL,
            )
        alert = await _alert(broker, security.context)
        if alert is not None:
            return _certificate_refused(broker, security, alert)
    kafka = "Kafka with TLS" if security.context else "Kafka without TLS"
    said = str(cause) or type(cause).__name__
    return BrokerUnavailable(
        f"{broker} took the connection and did not answer as {kafka} does: {said}", way_out=_PROTOCOL
    )


def _is_about_certificates(error: ssl.SSLError) -> bool:
    reason = error.reason or ""
    return "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason)


def _certificate_refused(broker: Address, security: Security, alert: ssl.SSLError) -> LoginRefused:
    said = (alert.reason or "").rpartition("ALERT_")[2].replace("_", " ").lower()
    if not security.has_certificate:
        return LoginRefused(
            f"TLS: the broker wants a certificate of this client, and none is set: {said}",
            where=str(broker),
            way_out="set kafka_certificate_file and kafka_key_file",
        )
    return LoginRefused(
        f"TLS: the broker refuses the certificate of this client: {said}",
        where=str(broker),
        way_out="check kafka_certificate_file, and that the broker's trust store holds its authority",
    )


async def _why_no_answer(broker: Address, security: Security) -> StateferryError:
    """A connection was made and closed at the first question: so does a listener that waits for a login by name."""
    if not security.uses_sasl:
        sasl = Security(protocol="SASL_SSL" if security.context else "SASL_PLAINTEXT", context=security.context)
        try:
            (await _login(broker, sasl)).close()
        except (SaslAuthenticationFailed, UnsupportedSaslMechanismError):
            return WrongListener(
                "the broker wants a login by name and password",
                where=str(broker),
                way_out="set kafka_security_protocol=SASL_SSL, kafka_username and kafka_password_file",
            )
        except (OSError, KafkaError, ValueError, TimeoutError):
            pass
    return BrokerUnavailable(f"{broker} took the connection and did not answer")


async def _speaks_plaintext(broker: Address) -> bool:
    try:
        (await _login(broker, PLAINTEXT)).close()
    except (OSError, KafkaError, TimeoutError):
        return False
    return True


async def _speaks_tls(broker: Address) -> bool:
    """Whether a handshake gets somewhere; nobody is trusted by it, and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _alert(broker: Address, context: ssl.SSLContext) -> ssl.SSLError | None:
    """What a broker says that refuses our certificate: it may be lost if we send something meanwhile."""
    try:
        async with asyncio.timeout(_ALERT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except ssl.SSLError as error:
        return error if _is_about_certificates(error) else None
    except (OSError, TimeoutError):
        pass
    return None


async def why_failed(
    error: BaseException, what: str, brokers: Sequence[Address], security: Security = PLAINTEXT, *, needs: str = ""
) -> StateferryError:
    """An error of the client as one of ours: what the broker said; or, if it said nothing, how far one gets with it.

    ``needs``: the permission that the call takes, as 'WRITE on topic t'.
    """
    match error:
        case StateferryError():
            return error
        case UnknownTopicOrPartitionError():
            return NotFound(f"there is no {what}", where=shown(brokers), way_out="create the topic first")
        case MessageSizeTooLargeError():
            return UsageError(
                f"{what}: the broker takes no record of this size",
                where=shown(brokers),
                way_out="raise the topic's max.message.bytes",
            )
        case TopicAuthorizationFailedError() | GroupAuthorizationFailedError() | ClusterAuthorizationFailedError():
            return not_authorized(what, needs, brokers, security)
        case KafkaConnectionError() | KafkaTimeoutError() | NodeNotReadyError() | TimeoutError():
            try:
                await check_access(brokers, security, all_named=True)
            except StateferryError as denied:
                return denied
    said = str(error) or type(error).__name__
    return BrokerUnavailable(f"{what}: the broker did not do it: {said}", where=shown(brokers), way_out=_START)


def not_authorized(what: str, needs: str, brokers: Sequence[Address], security: Security) -> NotAuthorized:
    """The broker knows who this is, and does not let it."""
    who = f"user {security.username}" if security.uses_sasl else "this client"
    lacking = f"{who} lacks {needs}" if needs else f"{who} is not authorized"
    return NotAuthorized(
        f"{what}: {lacking}", where=shown(brokers), way_out="`stateferry topics acls` prints what each role needs"
    )
