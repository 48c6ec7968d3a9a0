"""Topics whose archived records are deleted: everybody goes on from what is left, or from the object store."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LogLost, OffsetOutOfRange, UsageError, WalkGap
from pipeline.leases import Kind
from pipeline.objects import open_objects
from tests.chains import load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state
from topology.commands import common
from topology.holding import held
from topology.transports.factory import open_broker
from topology.transports.prefixed import PrefixedBroker

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = load_blocks("mainnet_0_599")
SOME, MORE = 160, 180
FINALITY = 20
CUT = 127
"""Where the last whole segment ends, and everything is deleted by a trim that keeps nothing behind it."""
LONG, LONG_CUT = 215, 191
"""The same later on."""


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Some blocks, at a primary and a replica; those that are final are archived in two segments."""
    folder = tmp_path_factory.mktemp("base")
    site = Site(folder / "site")
    write_hex_lines(site.folder / "all.hex", BLOCKS[:MORE])
    site.ingest(write_hex_lines(folder / "some.hex", BLOCKS[:SOME]))
    site.follow_both("--finality", FINALITY)
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


@pytest.fixture
def quickly_replaced(each_broker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that ended is replaced after as little as its broker allows."""
    monkeypatch.setenv("STATEFERRY_SESSION_TIMEOUT_S", "6" if Site.kafka_url else "1")


def bounds(site: Site, topic: str) -> tuple[int, int]:
    with site.opened_log() as log:
        first, end = log.bounds(topic)
    return first, end


def trim(site: Site, *args: object) -> Any:
    return site.here("topics", "trim", *args, node="ops").ok()


def go_on(site: Site) -> Any:
    said = site.ingest(site.folder / "all.hex")
    site.follow("primary", "p")
    return said


def test_trim(site: Site) -> None:
    """It deletes what is archived and says why not more; doing it again finds nothing to do."""
    site.here("topics", "trim", node="ops").failed(UsageError)
    would = trim(site, "--keep-blocks", 0, "--dry-run")
    assert (would["height"], would["walk"]) == (CUT, CUT + 1)
    assert would["why"] == [f"archived to {CUT} in every shard, and a restore leads to {CUT}"]
    assert bounds(site, "blocks")[0] == bounds(site, "diffs")[0] == 0

    done = trim(site, "--keep-blocks", 0)
    assert {**done, "dry_run": True} == would
    firsts = {cut["topic"]: cut["before"] for cut in done["trimmed"]}
    for topic in ("blocks", "diffs"):
        assert bounds(site, topic)[0] == firsts[site.place.prefix + topic] > CUT
    again = trim(site, "--keep-blocks", 0)
    assert (again["records"], again["trimmed"]) == (0, [])


def test_what_stays(site: Site) -> None:
    """What is kept, and what a restore under way reads on from; and all of it, where the topic is not what was
    archived."""
    assert trim(site, "--keep-blocks", 64, "--dry-run")["height"] == 63
    kept = trim(site, "--keep-blocks", 65)
    assert (kept["height"], kept["records"]) == (None, 0)
    objects = open_objects(f"file://{site.objects}")
    (segment,) = [info.name for info in objects.list() if info.name.endswith(f"{CUT:012d}.seg")]
    with held(objects, "bitcoin", Kind.PIN, [segment]):
        pinned = trim(site, "--keep-blocks", 0, "--dry-run")
    assert pinned["height"] == 63 and "pin-" in pinned["why"][-1]

    cut = {one["topic"]: one for one in trim(site, "--keep-blocks", 0, "--dry-run")["trimmed"]}
    before = cut[site.place.prefix + "diffs"]["before"]
    site.replace("diffs", before - 1, b"another record")
    said = site.here("topics", "trim", "--keep-blocks", 0, node="ops").failed(LogLost)
    assert "diffs[0]" in said and "nothing was deleted" in said
    assert bounds(site, "blocks")[0] == bounds(site, "diffs")[0] == 0


class Cut(BaseException):
    """A crash."""


def test_trim_that_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the floor, and again behind the first topic: everybody goes on, and the next trim does the rest."""

    class Cutting(PrefixedBroker):
        left = 0

        async def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
            if Cutting.left == 0:
                raise Cut
            Cutting.left -= 1
            await super().delete_records(topic, partition, before_offset)

    for Cutting.left in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(common, "open_broker", lambda *given: Cutting(open_broker(*given), ""))
            trim(site, "--keep-blocks", 0)
        assert (len(site.records("generations")), bounds(site, "blocks")[0]) == (2, 0)
    assert bounds(site, "diffs")[0] > CUT
    assert go_on(site)["connected"] == MORE - SOME
    site.follow("replica", "new")
    same_state(site, ["p", "new"])

    assert trim(site, "--keep-blocks", 0)["height"] == CUT
    assert (len(site.records("generations")), bounds(site, "blocks")[0] > CUT) == (2, True)


def test_a_primary_trims(site: Site) -> None:
    """By itself, once more is archived; `status` says how far, or why not."""
    env = {"STATEFERRY_TRIM_KEEP_BLOCKS": "64"}
    with site.running("primary", "p", env=env) as worker:
        status = site.wait_for("p", worker, trimming={"keep_blocks": 64, "height": 63, "trouble": None})
        assert (status["height"], bounds(site, "blocks")[0]) == (SOME - 1, bounds(site, "diffs")[0] - 1)


def test_ingest_goes_on(site: Site) -> None:
    """From the walk number, the source and the branch that are left: the same files again say nothing again."""
    walk = site.meta("p").walk
    trim(site, "--keep-blocks", 0)
    said = go_on(site)
    assert (said["connected"], said["skipped"], said["walk"]) == (MORE - SOME, SOME, walk + MORE - SOME)
    said = site.ingest(site.folder / "all.hex")
    assert (said["connected"], said["rewinds"]) == (0, 0)

    site.follow("replica", "r")
    same_state(site, ["p", "r"])
    low = site.here("ingest", "bitcoin", write_hex_lines(site.folder / "low.hex", BLOCKS[:CUT]), node="source")
    assert low.code == 5 and f"known from {CUT}:" in low.document["way_out"]


def test_a_new_replica(site: Site, quickly_replaced: None) -> None:
    """It begins in an empty directory with what is archived, and follows the topic from there; a primary too."""
    trim(site, "--keep-blocks", 0)
    go_on(site)
    site.follow("replica", "new")
    same_state(site, ["p", "new"])
    assert not (site.dir("new") / "renewing").exists()
    site.here("verify", node="new").ok()

    assert "--height 60" in site.here("run", "--role", "replica", "--until-height", 60, node="low").failed(
        OffsetOutOfRange
    )
    epoch = site.meta("p").epoch
    assert site.follow("primary", "other")["epoch"] == epoch + 1


def test_a_restore_that_is_killed(site: Site) -> None:
    """By the time it is started again the topics begin above where its plan leads: it makes another."""
    trim(site, "--keep-blocks", 0)
    env = {"STATEFERRY_FAILPOINT": "restore.planned:1"}
    assert site.command("run", "--role", "replica", node="new", env=env).code == -signal.SIGKILL
    objects = open_objects(f"file://{site.objects}")
    (pin,) = [info.name for info in objects.list("bitcoin/leases/")]
    assert pin in str(trim(site, "--keep-blocks", 0)["why"])  # until it expires
    objects.delete(pin)
    site.ingest(write_hex_lines(site.folder / "long.hex", BLOCKS[:LONG]))
    site.follow("primary", "p")
    assert trim(site, "--keep-blocks", 0)["height"] == LONG_CUT
    site.follow("replica", "new")

    same_state(site, ["p", "new"])
    assert site.meta("new").base_height == LONG_CUT


def test_a_replica_that_was_away(site: Site, tmp_path: Path) -> None:
    """For longer than records are kept: it restores by itself. Without the object store it says so and stays."""
    site.here("restore", "--height", 60, node="away").ok()
    site.follow("replica", "away", "--until-height", 70)
    trim(site, "--keep-blocks", 0)
    objects, site.objects = site.objects, tmp_path / "none"
    before, said = site.meta("away"), site.here("run", "--role", "replica", "--until-idle", node="away")
    assert "--objects" in said.failed(OffsetOutOfRange)
    assert site.meta("away") == before
    site.objects = objects

    site.follow("replica", "away")
    same_state(site, ["p", "away"])
    assert site.meta("away").tip.height == SOME - 1


def test_deleted_under_a_running_replica(site: Site) -> None:
    """It is asleep while what it would read next goes: it restores, in the same process, and follows on."""
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=SOME - 1)
        site.put_to_sleep(worker)
        site.ingest(write_hex_lines(site.folder / "long.hex", BLOCKS[:LONG]))
        site.follow("primary", "p")
        assert trim(site, "--keep-blocks", 0)["height"] == LONG_CUT
        worker.send_signal(signal.SIGCONT)
        site.wait_for("r", worker, height=LONG - 1, proof="proven")

    same_state(site, ["p", "r"])


def test_reorg_within_finality(site: Site) -> None:
    """Down to the block of the floor, which is the lowest that a source knows."""
    trim(site, "--keep-blocks", 0)
    synthetic = ("ingest", "synthetic", "--blocks", 25, "--changes", 20, "--from-height")
    assert "no block at height" in str(site.here(*synthetic, CUT - 1).document)
    said = site.here(*synthetic, SOME - 1 - FINALITY).ok()
    assert said["rewinds"] == 1
    site.follow_both()

    same_state(site, ["p", "r"])
    assert site.meta("r").tip.height == SOME - 1 - FINALITY + 25


def test_a_generation_behind_a_trim(site: Site) -> None:
    """The epoch in force is known, so the old partition is ended; source and replica go on in the new one."""
    trim(site, "--keep-blocks", 0)
    site.here("snapshot").ok()
    begun = site.here("generation", "new").ok()
    said = site.ingest(site.folder / "all.hex")
    assert said["height"] == MORE - 1
    site.follow("primary", "p2")
    for node in ("r", "new"):
        site.follow("replica", node)
        same_state(site, ["p2", node])
    assert site.here("status", node="r").ok()["generation"] == begun["generation"]


def test_resume_from(site: Site) -> None:
    """A source may say again what has not taken effect, and nothing below."""
    trim(site, "--keep-blocks", 0)
    walk = site.meta("p").walk
    resumed = ("ingest", "bitcoin", "--resume-from")
    site.here(*resumed, walk, site.folder / "all.hex").failed(UsageError)
    site.here(*resumed, walk + 2, site.folder / "all.hex").failed(WalkGap)
    said = site.here(*resumed, walk + 1, site.folder / "all.hex").ok()
    assert said["walk"] == walk + MORE - SOME
    site.follow_both()

    same_state(site, ["p", "r"])
