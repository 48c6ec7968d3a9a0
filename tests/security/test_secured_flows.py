"""A chain over every kind of secured listener, with real workers; and no password in anything that they show."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from pipeline.errors import AccessDenied, LoginRefused
from tests.chains import block_files
from tests.kafka.secured import USERS, Secured, grant, password_of
from tests.processes import ROOT
from tests.security.users import coming_as, site_on
from tests.topology.commands import Done, Site, command, environment, finish, same_state
from topology import settings
from topology.acls import grants_of
from topology.commands.common import ask_broker
from topology.topics import current_generation

BLOCKS = block_files("reorg_btcd", "main")


def granted(server: Secured, site: Site) -> None:
    """Whoever comes by a certificate may do what all roles may."""
    for role in ("source", "primary", "replica"):
        grant(server, "User:CN=primary", grants_of(role, site.place.prefix))
        grant(server, f"User:{role}", grants_of(role, site.place.prefix))


@pytest.mark.parametrize(("listener", "mechanism"), [("MUTUAL", ""), ("SASL_SSL", "SCRAM-SHA-512")])
def test_chain(listener: str, mechanism: str, each_secured: Secured, tmp_path: Path) -> None:
    """Ingested, led and followed by one kind of connection, a user for each."""
    ferry(each_secured, listener, mechanism, tmp_path)


@pytest.mark.parametrize(("listener", "mechanism"), [("SSL", ""), ("SASL_SSL", "PLAIN")])
def test_chain_on_the_newest(listener: str, mechanism: str, secured: Secured, tmp_path: Path) -> None:
    """The same by the other kinds."""
    ferry(secured, listener, mechanism, tmp_path)


def ferry(server: Secured, listener: str, mechanism: str, folder: Path) -> None:
    site = site_on(server, folder)
    site.here("topics", "create").ok()
    granted(server, site)
    with coming_as(site, server.settings(listener, "source", mechanism)) as user:
        user.ingest(*BLOCKS)
    for role in ("primary", "replica"):
        with coming_as(site, server.settings(listener, role, mechanism)) as user:
            user.follow(role, role)

    same_state(site, ["primary", "replica"])


def test_no_secret_is_shown(secured: Secured, tmp_path: Path) -> None:
    """All that workers and commands print, log, write down, answer, and have in their command lines."""
    site = site_on(secured, tmp_path / "site")
    site.here("topics", "create").ok()
    granted(secured, site)
    secrets = [password_of(user) for user in USERS]
    shown: list[str] = []

    def run(words: list[object], environment: dict[str, str]) -> Done:
        options = ["--topic-prefix", site.place.prefix, "--objects", f"file://{site.objects}", "--json", "-v"]
        done = command(*words, *options, env=environment)
        shown.extend([done.stderr, json.dumps(done.document)])
        return done

    run(["ingest", "bitcoin", *BLOCKS], secured.settings("SASL_SSL", "source", "PLAIN")).ok()
    lead = ["run", "--role", "primary", "--until-idle", "--data-dir", site.dir("p")]
    run(lead, secured.settings("SASL_SSL", "primary", "PLAIN")).ok()
    refused = secured.settings("SASL_SSL", "source") | {"STATEFERRY_KAFKA_PASSWORD_FILE": f"{tmp_path}/wrong"}
    (tmp_path / "wrong").write_text(password_of("replica"))
    (tmp_path / "wrong").chmod(0o600)
    run(["topics", "describe"], refused).failed(LoginRefused)
    settings_of_replica = secured.settings("SASL_SSL", "replica")
    with coming_as(site, settings_of_replica) as user:
        running = subprocess.Popen(  # a new program, not a fork of one: its command line and environment are looked at
            [sys.executable, "-m", "topology", "run", "--role", "replica", *user.options("r")],
            cwd=ROOT,
            env=environment(**settings_of_replica),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    site.wait_for("r", running)
    shown.append(Path(f"/proc/{running.pid}/cmdline").read_text())
    shown.append(Path(f"/proc/{running.pid}/environ").read_text())
    shown.append(json.dumps(site.here("status", node="r").ok()))
    running.terminate()
    shown.append(finish(running).stderr)
    written = [path.read_bytes() for path in site.folder.rglob("*") if path.is_file()]

    assert [text for text in shown if any(secret in text for secret in secrets)] == []
    assert not any(secret.encode() in data for data in written for secret in secrets)
    assert len(written) > 10


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
@pytest.mark.parametrize("user", ["source", "nobody"])
def test_no_secret_in_logs_and_tracebacks(mechanism: str, user: str, secured: Secured, tmp_path: Path) -> None:
    """With every library at its debug level, which shows requests byte by byte; and in errors with all their causes."""
    environment = secured.settings("SASL_SSL", "source", mechanism) | {"STATEFERRY_KAFKA_USERNAME": user}
    text = io.StringIO()
    loggers = [logging.getLogger(name) for name in (None, "aiokafka", "faust", "asyncio")]
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)r"))
    loggers[0].addHandler(handler)
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        with coming_as(site_on(secured, tmp_path), environment):
            ask_broker(settings.load(topic_prefix="nowhere."), current_generation)
    except AccessDenied as error:
        text.write("".join(traceback.format_exception(error)))
        text.write(repr([error, error.__cause__, error.__context__]))
    finally:
        loggers[0].removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    assert "ApiVersionRequest" in text.getvalue() and "AccessDenied" not in text.getvalue()
    assert ("NotAuthorized" if user == "source" else "LoginRefused") in text.getvalue()
    assert password_of("source") not in text.getvalue()
