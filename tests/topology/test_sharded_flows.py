"""States in several shards, by commands: the same state as in one, whoever owns which shard and whatever is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline.anchors import SLOTS
from tests.chains import block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, check, wait_until
from tests.topology.sharded import MAINNET, MAINNET_END, ROOT_599, Sharded, leading, more, same


class TestChains:
    """On every broker: what Bitcoin Core would hold, and the root of a run with one shard."""

    pytestmark = pytest.mark.usefixtures("each_broker")

    def test_mainnet(self, tmp_path: Path) -> None:
        """At a height on the way and at the end, by every command that reads."""
        site = Sharded(tmp_path).begin(2)
        site.ingest(*MAINNET)
        for role, node in (("primary", "p"), ("replica", "r")):
            assert site.here("run", "--role", role, "--until-height", 170, node=node).ok()["height"] == 170
        entry = next(entry for entry in expected("mainnet_0_599") if entry["height"] == 170)
        assert check(site, "p", entry) == check(site, "r", entry)
        done = site.follow_both()
        assert [one["root"] for one in done] == [ROOT_599] * 2 == [check(site, node, MAINNET_END) for node in "pr"]
        same(site, ["p", "r"])

        status = site.here("status", node="r").ok()
        assert (status["root"], status["coins"], status["height"]) == (ROOT_599, 601, 599)
        assert [(one["shard"], one["height"], one["lag"]["blocks"]) for one in status["shards"]] == [
            (shard, 599, 0) for shard in range(2)
        ]
        scanned = site.here("scan", "--limit", 1000, node="r").ok()
        assert (len(scanned["found"]), scanned["position"]["root"]) == (601, ROOT_599)
        asked = [scanned["found"][at]["key"] for at in (600, 0, 300)]
        assert [one["key"] for one in site.here("get", *asked, node="p").ok()["found"]] == asked
        verified = site.here("verify", node="r").ok()
        assert (verified["verified_root"], verified["keys"]) == (ROOT_599, 601)
        assert site.anchored()[599] == ROOT_599

    @pytest.mark.parametrize(("name", "shards"), [("signet_0_120", 4), ("regtest_kernel_206", 8)])
    def test_chain(self, name: str, shards: int, tmp_path: Path) -> None:
        alone = Site(tmp_path / "alone")
        site = Sharded(tmp_path / "site").begin(shards)
        files = block_files(name) or [write_hex_lines(tmp_path / "blocks.hex", load_blocks(name))]
        roots = []
        for each in (alone, site):
            each.ingest(*files)
            roots.append(each.follow("primary", "p")["root"])
        site.follow("replica", "r")

        assert roots == [check(site, node, expected(name)[-1]) for node in "pr"]
        same(site, ["p", "r"])

    def test_reorgs(self, tmp_path: Path) -> None:
        """A, then B from a fork, then A again."""
        site = Sharded(tmp_path).begin(4)
        steps = expected("reorg_floresta")
        parts = {name: load_blocks("reorg_floresta", name) for name in "AB"}
        files = {name: write_hex_lines(tmp_path / f"{name}.hex", raws) for name, raws in parts.items()}
        site.ingest(*block_files("reorg_floresta", "genesis"), files["A"])
        site.follow_both()
        assert check(site, "p", steps[1]) == check(site, "r", steps[1])
        for step, name in zip(steps[2:], "BA", strict=True):
            site.here("ingest", "bitcoin", files[name], "--again").ok()
            site.follow_both()

            assert check(site, "p", step) == check(site, "r", step)
            same(site, ["p", "r"])

    def test_workers_share_the_shards(self, tmp_path: Path) -> None:
        """A second primary takes half of the shards, restores them while the other half goes on, and lays them down
        again when it ends; kill -9 of one gives all shards to the other."""
        quick = {"STATEFERRY_SESSION_TIMEOUT_S": "6"}  # no broker allows less
        site = Sharded(tmp_path).begin(4)
        site.here("ingest", "synthetic", "--blocks", 60, "--changes", 60).ok()
        with site.running("primary", "p", env=quick) as first, site.running("replica", "r") as replica:
            site.wait_for("p", first, height=59, state="leading", in_flight=0)
            with site.running("primary", "q", env=quick) as second:
                wait_until(lambda: len(leading(site, "p")) == len(leading(site, "q")) == 2, second)
                assert not set(leading(site, "p")) & set(leading(site, "q"))
                more(site, 59, 20)
                found = site.wait_for("r", replica, height=79)
                wait_until(lambda: site.here("root", node="r").ok()["root"] == found["root"])
                # Neither has all shards: what they say of the whole is what all shards say of themselves.
                wait_until(lambda: site.here("status", node="p").ok()["root"] == found["root"])
                assert site.here("status", node="p").ok()["position_of"] == "anchors"
                first.send_signal(signal.SIGKILL)
                first.wait()
                wait_until(lambda: len(leading(site, "q")) == 4, second)
                more(site, 79, 20)
                site.wait_for("q", second, height=99, in_flight=0)
            site.wait_for("r", replica, height=99)
        same(site, ["q", "r"])

        assert all(len(ids) == len(set(ids)) == 100 for ids in site.valid_ids())
        site.follow("replica", "late")
        same(site, ["late", "r"])


# Killed


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


def test_anchors_stay_bounded(tmp_path: Path) -> None:
    """The topic of anchors does not grow with the chain, also where the broker does not compact."""
    site = Sharded(tmp_path).begin(2)
    site.here("ingest", "synthetic", "--blocks", 1500, "--changes", 2).ok()
    done = site.follow("primary", "p")
    with site.opened_log() as log:
        first, end = log.bounds("anchors")

    assert site.anchored()[1499] == done["root"]
    assert end - first <= 5 * 2 * SLOTS < end
