"""States in several shards, by commands: the same state as in one, whoever owns which shard and whatever is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline import anchors
from tests.topology.commands import wait_until
from tests.topology.sharded import Sharded, leading, same
from topology import anchors as anchoring


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """All events are on the topic, with reorgs among them, and nobody has read them."""
    site = Sharded(tmp_path_factory.mktemp("base") / "site").begin(2)
    site.here("ingest", "synthetic", "--blocks", 120, "--changes", 40, "--reorg-every", 25).ok()
    return site


@pytest.fixture(scope="module")
def whole(base: Sharded, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """The same after an undisturbed run."""
    site = copied(base, tmp_path_factory.mktemp("whole") / "site")
    site.follow_both()
    return site


def copied(site: Sharded, folder: Path) -> Sharded:
    copy = site.copy(folder)
    return Sharded(copy.folder)


@pytest.mark.parametrize(
    ("node", "point"),
    [
        *(("p", point) for point in ("split.sent:3", "split.sent:60", "propose.epoch:2", "propose.computed:90")),
        *(("p", point) for point in ("follow.read:150", "store.before_write:5", "store.after_write:6")),
        *(("r", point) for point in ("follow.read:150", "store.before_write:4", "store.after_write:3")),
    ],
)
def test_killed_at(node: str, point: str, whole: Sharded, base: Sharded, tmp_path: Path) -> None:
    """kill -9 at a fail point, and a start: every frame once, in order, and the same state in every shard."""
    site = copied(base, tmp_path / "site")
    role = "primary" if node == "p" else "replica"
    if node == "r":
        site.follow("primary", "p")
    killed = site.command("run", "--role", role, "--until-idle", node=node, env={"STATEFERRY_FAILPOINT": point})
    assert killed.code == -signal.SIGKILL
    site.follow_both()

    assert site.valid_ids() == whole.valid_ids()
    assert site.content("r") == site.content("p") == whole.content("p")
    assert site.meta("p").tip == site.meta("r").tip == whole.meta("p").tip


def test_stores_cut_off_apart_are_read_at_one_position(base: Sharded, tmp_path: Path) -> None:
    """A replica killed between the writes of two shards: what is read is a position of all of them, with its root."""
    site = copied(base, tmp_path / "site")
    site.follow("primary", "p")
    roots = site.anchored()
    found = 0
    for hit in (3, 4, 5):
        point = {"STATEFERRY_FAILPOINT": f"store.after_write:{hit}", "STATEFERRY_GROUP_BYTES_MAX": "65536"}
        site.command("run", "--role", "replica", "--until-idle", node="r", env=point)
        apart = {meta.seq for meta in site.metas("r")}
        found += len(apart) > 1
        read = site.here("root", node="r").ok()
        assert roots[read["height"]] == read["root"]
        assert {meta.seq for meta in site.metas("r")} == apart  # reading changes nothing

    assert found


@pytest.mark.usefixtures("kafka_only")
def test_sleeping_splitter(tmp_path: Path) -> None:
    """A worker that slept while another took over splits on when it wakes: what it writes is what is there."""
    site = Sharded(tmp_path / "site").begin(2)
    site.here("ingest", "synthetic", "--blocks", 120, "--changes", 40, "--reorg-every", 25).ok()
    quick = {"STATEFERRY_SESSION_TIMEOUT_S": "6"}
    with site.running("primary", "p", env=quick | {"STATEFERRY_FAILPOINT": "split.sent:40:stop"}) as sleeper:
        with site.running("primary", "q", env=quick) as successor:
            found = site.wait_for("q", successor, height=107, in_flight=0, splits=True)
            sleeper.send_signal(signal.SIGCONT)
            wait_until(lambda: sleeper.poll() is not None or len(leading(site, "p")) > 0)
            site.wait_for("q", successor, root=found["root"])
        sleeper.kill()
        sleeper.wait()
    site.follow("replica", "r")
    events = [set(map(bytes, records)) for records in site.partitions("shard-blocks")]

    assert site.here("root", node="r").ok()["root"] == found["root"]
    assert all(len(ids) == len(set(ids)) for ids in site.valid_ids())
    assert all(len(one) == len(site.records("blocks")) for one in events)  # whoever wrote, wrote the same


def test_replica_becomes_the_primary(base: Sharded, whole: Sharded, tmp_path: Path) -> None:
    """A promotion is a start: on a replica's directory, with all of its shards."""
    site = copied(base, tmp_path / "site")
    site.here("run", "--role", "primary", "--until-height", 60).ok()
    site.follow("replica", "r")
    promoted = site.follow("primary", "r")
    assert promoted["role"] == "primary" and promoted["epoch"] == 2
    site.follow("replica", "late")

    same(site, ["r", "late"])
    assert site.valid_ids() == whole.valid_ids()


def test_lost_anchors_are_said_again(whole: Sharded, tmp_path: Path) -> None:
    """A worker that takes shards over says where they stand, also where nothing follows and whoever led before did not
    come to say it."""
    site = copied(whole, tmp_path / "site")
    root = site.here("root", node="p").ok()["root"]
    site.cut("anchors", len(site.records("anchors")))
    site.follow("primary", "q")

    assert list(site.anchored().values()) == [root]


def test_anchors_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The topic of anchors does not grow with the chain, also where the broker does not compact."""
    slots = 32  # not 256, or it takes eight times as many blocks to fill them five times
    monkeypatch.setattr(anchors, "SLOTS", slots)
    monkeypatch.setattr(anchoring, "SLOTS", slots)
    site = Sharded(tmp_path).begin(2)
    site.here("ingest", "synthetic", "--blocks", 190, "--changes", 2).ok()
    done = site.follow("primary", "p")
    with site.opened_log() as log:
        first, end = log.bounds("anchors")

    assert site.anchored()[189] == done["root"]
    assert end - first <= 5 * 2 * slots < end
