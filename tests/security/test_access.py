"""What stands in the way to a broker is named: the step, the place, the way out, and an exit code of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import (
    BrokerUnavailable,
    BrokerUntrusted,
    LoginRefused,
    StateferryError,
    WrongListener,
)
from tests.kafka.secured import Secured
from tests.security.users import coming_as, site_on
from topology.settings import Settings
from topology.transports.kafka_access import LOGIN_TIMEOUT_S, check_access
from topology.transports.kafka_address import addresses
from topology.transports.kafka_broker import KafkaBroker
from topology.transports.kafka_security import security_of

PLAIN = {"kafka_sasl_mechanism": "PLAIN"}
NOBODY = {"kafka_security_protocol": None, "kafka_ca_file": None}
NO_LOGIN = {"kafka_sasl_mechanism": None, "kafka_username": None, "kafka_password_file": None}


def settings_of(server: Secured, listener: str, changes: dict[str, Any]) -> Settings:
    """Settings as the listener wants them, but for ``changes``; a value '@name' is a file of the server's."""
    environment = server.settings(listener, "source")
    found = {name.removeprefix("STATEFERRY_").lower(): value for name, value in environment.items()}
    for name, value in changes.items():
        found[name] = str(server.folder / value[1:]) if str(value).startswith("@") else value
    return Settings(**{name: value for name, value in found.items() if value is not None})


@pytest.mark.parametrize(
    ("listener", "changes", "error", "says"),
    [
        ("SSL", {"kafka_ca_file": None}, BrokerUntrusted, "signed by nobody whom we trust.*kafka_ca_file"),
        ("SSL", {"kafka_ca_file": "@stranger/ca.pem"}, BrokerUntrusted, "signed by nobody whom we trust"),
        ("EXPIRED", {}, BrokerUntrusted, "has expired.*renew the broker's"),
        ("ELSEWHERE", {}, BrokerUntrusted, "is one of another address.*name the broker as its certificate does"),
        ("MUTUAL", {"kafka_certificate_file": None}, LoginRefused, "wants a certificate.*set kafka_certificate_file"),
        ("MUTUAL", {"kafka_certificate_file": "@stranger.pem"}, LoginRefused, "refuses the certificate of this client"),
        ("SASL_SSL", {"kafka_username": "nobody"}, LoginRefused, "refuses the name 'nobody' with its password"),
        ("SASL_SSL", {"kafka_password_file": "@primary.password"}, LoginRefused, "refuses the name 'source'"),
        ("SASL_SSL", PLAIN | {"kafka_password_file": "@primary.password"}, LoginRefused, "PLAIN credentials"),
        ("SCRAM_ONLY", PLAIN, LoginRefused, "no login by PLAIN.*kafka_sasl_mechanism"),
        ("SASL_SSL", NO_LOGIN | {"kafka_security_protocol": "SSL"}, WrongListener, "wants a login by name"),
        ("SASL_SSL", NO_LOGIN | NOBODY, WrongListener, "wants TLS"),
        ("SSL", NOBODY, WrongListener, "wants TLS, and kafka_security_protocol is PLAINTEXT"),
        ("MUTUAL", NOBODY | {"kafka_certificate_file": None}, WrongListener, "wants TLS"),
        ("LOST", {"kafka_security_protocol": "SSL"}, WrongListener, "speaks without TLS"),
    ],
)
async def test_refusals(
    listener: str, changes: dict[str, Any], error: type[StateferryError], says: str, secured: Secured
) -> None:
    """Each step that may fail, on a broker where it does."""
    settings = settings_of(secured, listener, changes)
    broker = KafkaBroker(addresses(settings.broker), security_of(settings))
    with pytest.raises(error, match=says) as caught:
        await broker.bounds("t", 0)
    await broker.close()

    assert secured.url(listener).removeprefix("kafka://") in caught.value.where
    assert caught.value.exit_code == 15


@pytest.mark.parametrize("listener", ["SSL", "MUTUAL", "SASL_SSL", "SCRAM_ONLY"])
async def test_admitted(listener: str, each_secured: Secured) -> None:
    """The same settings without a mistake in them."""
    settings = settings_of(each_secured, listener, {})

    await check_access(addresses(settings.broker), security_of(settings), all_named=True)


async def test_one_of_several(secured: Secured) -> None:
    """One broker that answers is enough; of those that do not, the one that got farthest says why."""
    settings = settings_of(secured, "SASL_SSL", {})
    good, refusing = addresses(settings.broker), addresses("kafka://127.0.0.1:1")
    await check_access([*refusing, *good], security_of(settings))
    wrong = security_of(settings_of(secured, "SASL_SSL", {"kafka_username": "nobody"}))

    with pytest.raises(LoginRefused):
        await check_access([*refusing, *good], wrong)


async def test_a_silent_one_holds_nobody_up(secured: Secured) -> None:
    """One that takes the connection and says nothing is not waited for while another one answers."""
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    brokers = addresses(f"kafka://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
    settings = settings_of(secured, "SSL", {})
    async with asyncio.timeout(LOGIN_TIMEOUT_S):
        await check_access([*brokers, *addresses(settings.broker)], security_of(settings))
    silent.close()


async def test_named_by_another(secured: Secured) -> None:
    """A broker that answers and sends its clients to where nobody listens: both places are named."""
    there = addresses(secured.url("LOST"))
    broker = KafkaBroker(there, request_timeout_s=1.0)
    with pytest.raises(BrokerUnavailable, match=rf"127.0.0.1:1 refused.*{there[0]} named.*advertised.listeners"):
        await broker.bounds("t", 0)
    await broker.close()


def test_commands_end_with_it(secured: Secured, tmp_path: Path) -> None:
    """A worker and a command: the code, the document, the sentence."""
    settings = secured.settings("SASL_SSL", "source") | {"STATEFERRY_KAFKA_USERNAME": "nobody"}
    with coming_as(site_on(secured, tmp_path), settings) as user:
        for words in (("run", "--role", "replica"), ("topics", "describe"), ("ingest", "synthetic", "--blocks", 1)):
            assert "refuses the name 'nobody'" in user.here(*words).failed(LoginRefused)


async def test_no_answer_is_an_end(secured: Secured) -> None:
    """Whoever takes the connection and then says nothing does not hold us for ever."""
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    settings = settings_of(secured, "SSL", {"broker": f"kafka://127.0.0.1:{silent.sockets[0].getsockname()[1]}"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topology.transports.kafka_access.LOGIN_TIMEOUT_S", 0.5)
        with pytest.raises(BrokerUnavailable, match=r"did not answer within 0.5 s"):
            await check_access(addresses(settings.broker), security_of(settings))
    silent.close()
