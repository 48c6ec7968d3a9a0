"""Permissions: those that are documented are enough for each role, and each of them is needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.errors import NotAuthorized, NotFound
from tests.chains import block_files
from tests.kafka.secured import Secured, grant, kafka_acls
from tests.security.users import coming_as, site_on
from tests.topology.commands import Site, same_state, start
from topology.acls import Grant, grants_of

BLOCKS = block_files("reorg_btcd", "main")
RUN = {
    "operator": [("topics", "create"), ("topics", "check")],
    "source": [("ingest", "bitcoin", *BLOCKS)],
    "primary": [("run", "--role", "primary", "--until-idle")],
    "replica": [("run", "--role", "replica", "--until-idle")],
}


def run_as(site: Site, server: Secured, role: str) -> None:
    with coming_as(site, server.settings("SASL_SSL", role)) as user:
        for words in RUN[role]:
            user.here(*words, node=role).ok()


def without(grants: Sequence[Grant], name: str, operation: str) -> list[Grant]:
    """The same less one operation on one thing, which may still be looked at."""
    left = {each: set(each.operations) - {operation} for each in grants if each.name == name}
    seen = set() if operation == "DESCRIBE" else {"DESCRIBE"}
    return [each._replace(operations=tuple(left[each] | seen)) if each in left else each for each in grants]


def test_each_role_with_its_grants(each_secured: Secured, tmp_path: Path) -> None:
    """An operator makes the topics; a source, a primary and a replica work with just what they are granted."""
    site = site_on(each_secured, tmp_path)
    for role in RUN:
        grant(each_secured, f"User:{role}", grants_of(role, site.place.prefix))
        run_as(site, each_secured, role)

    same_state(site, ["primary", "replica"])


def test_several_shards(secured: Secured, tmp_path: Path) -> None:
    """A primary of several shards is a splitter, too: without that role it says what it lacks, with it all goes on."""
    site = site_on(secured, tmp_path)
    site.here("topics", "create", "--shards", 2).ok()
    site.ingest(*BLOCKS)
    prefix = site.place.prefix
    for role in ("primary", "replica"):
        grant(secured, f"User:{role}", grants_of(role, prefix))
    with coming_as(site, secured.settings("SASL_SSL", "primary")) as user:
        said = user.here(*RUN["primary"][0], node="primary").failed(NotAuthorized)
    assert f"user primary lacks WRITE on topic {prefix}shard-blocks" in said
    grant(secured, "User:primary", grants_of("splitter", prefix))
    for role in ("primary", "replica"):
        run_as(site, secured, role)
    primary, replica = (site.here("root", node=role).ok() for role in ("primary", "replica"))

    assert primary == replica


def test_trimming(secured: Secured, tmp_path: Path) -> None:
    """A primary that trims has another role for it. Without all of that it says what it lacks; with it, it deletes the
    rest."""
    site = site_on(secured, tmp_path)
    site.ingest(*BLOCKS)
    site.follow("primary", "p", "--finality", 1)
    site.here("snapshot").ok()
    prefix, trim = site.place.prefix, ("topics", "trim", "--keep-blocks", 0)
    grants = grants_of("trimmer", prefix)
    grant(secured, "User:primary", without(grants, f"{prefix}blocks", "DELETE"))
    with coming_as(site, secured.settings("SASL_SSL", "primary")) as user:
        said = user.here(*trim, node="primary").failed(NotAuthorized)
        assert f"user primary lacks DELETE on topic {prefix}blocks" in said
        grant(secured, "User:primary", grants)
        gone = user.here(*trim, node="primary").ok()["trimmed"]

    assert [one["topic"] for one in gone] == [f"{prefix}blocks"]


@pytest.mark.parametrize(
    ("role", "kind", "name", "operation"),
    [
        ("operator", "topic", "generations", "CREATE"),
        ("operator", "topic", "blocks", "CREATE"),
        ("operator", "topic", "blocks", "DESCRIBE"),
        ("operator", "topic", "diffs", "DESCRIBE_CONFIGS"),
        ("source", "topic", "generations", "READ"),
        ("source", "topic", "generations", "WRITE"),
        ("source", "topic", "blocks", "WRITE"),
        ("source", "topic", "diffs", "DESCRIBE"),
        ("primary", "topic", "generations", "READ"),
        ("primary", "topic", "blocks", "READ"),
        ("primary", "topic", "diffs", "READ"),
        ("primary", "topic", "diffs", "WRITE"),
        ("primary", "topic", "diffs", "DESCRIBE_CONFIGS"),
        ("primary", "group", "stateferry-", "READ"),
        ("replica", "topic", "generations", "READ"),
        ("replica", "topic", "blocks", "DESCRIBE"),
        ("replica", "topic", "diffs", "READ"),
        ("replica", "group", "stateferry-", "READ"),
    ],
)
def test_one_less(role: str, kind: str, name: str, operation: str, secured: Secured, tmp_path: Path) -> None:
    """Without one of them the error says which permission on what is missing."""
    site = site_on(secured, tmp_path)
    prefix = site.place.prefix
    grant(secured, f"User:{role}", without(grants_of(role, prefix), prefix + name, operation))
    if role != "operator":
        site.here("topics", "create").ok()
    if role in {"primary", "replica"}:
        site.ingest(*BLOCKS)
    if role == "replica":
        site.follow("primary", "p")
    with coming_as(site, secured.settings("SASL_SSL", role)) as user:
        done = [user.here(*words, node="n") for words in RUN[role]]
    said = next(each for each in done if each.code).failed(NotAuthorized)

    assert f"user {role} lacks {operation} on {kind} {prefix}{name}" in said
    assert "stateferry topics acls" in said


def test_lines_for_the_tool(secured: Secured, tmp_path: Path) -> None:
    """What the command prints is what Kafka's own tool takes; and then the permission is there."""
    site = site_on(secured, tmp_path)
    site.here("topics", "create").ok()
    asked = start("topics", "acls", "--role", "replica", "--principal", "User:replica", *site.place.options)
    lines = [shlex.split(line) for line in asked.communicate()[0].splitlines()]
    assert [line[0] for line in lines] == ["kafka-acls.sh"] * 6
    with coming_as(site, secured.settings("SASL_SSL", "replica")) as user:
        user.here("generation", "show").failed(NotAuthorized)
        kafka_acls(*lines[0][1:])
        user.here("generation", "show").failed(NotFound)
