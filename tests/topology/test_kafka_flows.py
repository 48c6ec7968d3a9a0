"""Whole flows on Kafka that something cuts through: kill -9 of workers and of the broker.

Whoever is started again ends where an undisturbed run ends: the same frames by id, the same bytes in every store.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import BrokerUnavailable, OffsetOutOfRange
from tests.chains import block_files, expected
from tests.kafka.server import Server
from tests.topology.commands import Site, finish, same_state, wait_until

BLOCKS = block_files("regtest_kernel_206")
END = 206
MUHASH = expected("regtest_kernel_206")[END]["muhash"]


@pytest.fixture(scope="module")
def base(kafka_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All events are on the topic, and nobody has read them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "kafka_url", kafka_server)
        site = Site(tmp_path_factory.mktemp("base") / "site")
        site.ingest(*BLOCKS)
        yield site


@pytest.fixture(scope="module")
def whole(base: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The same after an undisturbed run."""
    site = base.copy(tmp_path_factory.mktemp("whole") / "site")
    site.follow_both()
    return site


@pytest.mark.parametrize(
    ("node", "point"), [("p", "propose.produced:100"), ("p", "store.before_write:3"), ("r", "store.after_write:2")]
)
def test_killed_at(node: str, point: str, whole: Site, base: Site, tmp_path: Path) -> None:
    """kill -9 at a fail point, and a start: every frame once, in order, the same state. More: `tests/torture`."""
    site = base.copy(tmp_path / "site")
    role = "primary" if node == "p" else "replica"
    if node == "r":
        site.follow("primary", "p")
    killed = site.command("run", "--role", role, "--until-idle", node=node, env={"STATEFERRY_FAILPOINT": point})
    assert killed.code == -signal.SIGKILL
    site.follow_both()

    assert site.frame_ids() == whole.frame_ids()
    assert site.content("r") == site.content("p") == whole.content("p")
    same_state(site, ["p", "r"])
    assert site.muhash("r")["muhash"] == MUHASH
    assert site.meta("p").tip == whole.meta("p").tip


@pytest.mark.usefixtures("kafka_only")
def test_snapshot_restore_follow(base: Site, tmp_path: Path) -> None:
    """A node restored from a snapshot follows the topic from there, and holds the same."""
    site = base.copy(tmp_path / "site")
    site.here("run", "--role", "primary", "--until-height", 170).ok()
    site.here("snapshot").ok()
    restored = site.here("restore", node="n").ok()
    assert restored["proof"] == "proven" and restored["height"] < 170
    site.follow("primary", "p")
    site.follow("replica", "n")

    same_state(site, ["p", "n"])
    assert site.muhash("n")["muhash"] == MUHASH


@pytest.mark.usefixtures("kafka_only")
def test_records_deleted_under_a_store(base: Site, tmp_path: Path) -> None:
    """A store whose next frames are deleted says so and how to go on; nothing is skipped."""
    site = base.copy(tmp_path / "site")
    site.follow("primary", "p")
    site.here("run", "--role", "replica", "--until-height", 50, node="r").ok()
    with site.opened_log() as log:
        log.delete_records("diffs", 0, 150)
    said = site.here("run", "--role", "replica", "--until-idle", node="r").failed(OffsetOutOfRange)

    assert "stateferry restore" in said
    assert site.meta("r").tip.height == 50


class TestBrokerIsKilled:
    def site(self, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
        monkeypatch.setattr(Site, "kafka_url", server.url)
        return Site(folder / "site")

    def test_in_the_middle(self, own_kafka: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """kill -9 of the broker under a source, a primary and a replica: all three go on when it is back."""
        site = self.site(own_kafka, tmp_path, monkeypatch)
        source = site.start(
            *("ingest", "synthetic", "--blocks", 300, "--changes", 50, "--interval-s", 0.02, "--seed", 3), node="s"
        )
        with site.running("primary", "p") as primary, site.running("replica", "r") as replica:
            wait_until(lambda: site.wait_for("r", replica)["height"] > 60, replica)
            own_kafka.kill()
            time.sleep(1.0)
            own_kafka.start()
            assert finish(source).ok()["height"] == 299
            site.wait_for("p", primary, height=299, in_flight=0)
            site.wait_for("r", replica, height=299)
        same_state(site, ["p", "r"])
        assert len(set(site.frame_ids())) == len(site.frame_ids()) == 300

        undisturbed = site.copy(tmp_path / "undisturbed")
        undisturbed.follow("replica", "new")
        assert undisturbed.content("new") == site.content("r")

    def test_stop_without_a_broker(self, own_kafka: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers whose broker is gone still end when they are told to; a start without it says what failed."""
        site = self.site(own_kafka, tmp_path, monkeypatch)
        site.ingest(*BLOCKS)
        workers = {
            "p": site.start("run", "--role", "primary", node="p"),
            "r": site.start("run", "--role", "replica", node="r"),
        }
        for node, worker in workers.items():
            site.wait_for(node, worker, height=END)
        own_kafka.kill()
        time.sleep(2.0)
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            finish(worker).ok()
        same_state(site, ["p", "r"])
        said = site.here("run", "--role", "replica", "--until-idle", node="r").failed(BrokerUnavailable)

        assert f"TCP: {own_kafka.bootstrap} refused the connection" in said
