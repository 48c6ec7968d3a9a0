"""Three brokers of which one or two are lost: what is acknowledged stays, what cannot be waits or says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import BrokerUnavailable, SettingsConflict, UsageError
from tests.kafka.cluster import Cluster
from tests.topology.commands import Site, finish, same_state, wait_until


@pytest.fixture
def cluster(three_brokers: Callable[[], Cluster], monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Sites of this test have their topics on it."""
    found = three_brokers()
    monkeypatch.setattr(Site, "kafka_url", found.url)
    return found


@pytest.mark.usefixtures("cluster")
def test_copies(tmp_path: Path) -> None:
    """Topics have three copies of which two must have a record, by default and when asked for."""
    for name, words in (("asked", ["--replication", "3"]), ("default", [])):
        site = Site(tmp_path / name)
        made = site.here("topics", "create", *words).ok()
        assert {topic["copies"] for topic in made} == {3}
        assert {topic["config"]["min.insync.replicas"] for topic in made} == {"2"}
        site.here("topics", "check").ok()
    alone = Site(tmp_path / "alone")
    made = alone.here("topics", "create", "--replication", 1).ok()
    assert {(topic["copies"], topic["config"]["min.insync.replicas"]) for topic in made} == {(1, "1")}
    alone.here("topics", "check").ok()
    said = Site(tmp_path / "many").here("topics", "create", "--replication", 4).failed(UsageError)
    assert "there are 3 brokers" in said


def test_weak_copies_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Three copies of which one is enough: an acknowledged frame may be on one disk only."""
    site = Site(tmp_path / "site")
    site.here("topics", "create").ok()
    cluster.configure(f"{site.place.prefix}diffs", {"min.insync.replicas": "1", "retention.ms": "-1"})
    said = site.here("topics", "check").failed(SettingsConflict)

    assert "3 copies" in said and "--add-config min.insync.replicas=2" in said


def test_two_are_lost(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing is acknowledged by one broker of three: what runs waits, what starts says so, and all goes on when one
    comes back."""
    site = Site(tmp_path / "site")
    site.here("topics", "create").ok()
    source = site.start(
        *("ingest", "synthetic", "--blocks", 120, "--changes", 50, "--interval-s", 0.1, "--seed", 5), node="s"
    )
    with site.running("primary", "p") as primary, site.running("replica", "r") as replica:
        wait_until(lambda: site.wait_for("r", replica)["height"] > 20, replica)
        leader = cluster.leader(f"{site.place.prefix}diffs")
        other = next(server for server in cluster.servers.values() if server is not leader)
        leader.kill()
        other.kill()
        late = site.command("run", "--role", "replica", "--until-idle", node="late")
        late.failed(BrokerUnavailable)
        other.start()
        assert finish(source).ok()["height"] == 119
        site.wait_for("p", primary, height=119, in_flight=0)
        site.wait_for("r", replica, height=119)
    same_state(site, ["p", "r"])
    frame_ids = site.frame_ids()

    assert len(set(frame_ids)) == len(frame_ids) == 120
