"""A log that changes under a running node, and one whose records were deleted: noticed, and either undone to what the
log still holds, or named with the way out. No offset is ever reset."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import OffsetOutOfRange
from tests.chains import load_blocks, write_hex_lines
from tests.processes import Command
from tests.topology.commands import Site, finish, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = load_blocks("regtest_core_getblockstats")
SOME, MORE = 12, 18
FINALITY = 6


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Some blocks, at both nodes, and a snapshot of the final ones."""
    folder = tmp_path_factory.mktemp("base")
    site = Site(folder / "site")
    write_hex_lines(site.folder / "more.hex", BLOCKS[:MORE])
    site.ingest(write_hex_lines(folder / "some.hex", BLOCKS[:SOME]))
    site.follow_both("--finality", FINALITY)
    site.here("snapshot").ok()
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


@contextmanager
def asleep(process: Command, site: Site) -> Iterator[None]:
    """A node that reads nothing meanwhile."""
    site.put_to_sleep(process)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def delete(site: Site, topic: str, left: int) -> int:
    """Delete a topic's records but for the last ones. Returns the first offset."""
    with site.opened_log() as log:
        _, end = log.bounds(topic)
        log.delete_records(topic, 0, end - left)
    return int(end - left)


def go_on(site: Site) -> None:
    site.ingest(site.folder / "more.hex")
    site.follow("primary", "p")


@pytest.mark.parametrize("lost", [1, 4])
def test_end_lost_and_made_again(lost: int, site: Site) -> None:
    """What a running replica read is gone, and other records stand in its place by the time it looks: they are of a
    writer whose EPOCH it never saw."""
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=SOME - 1)
        with asleep(worker, site):
            site.cut("diffs", lost)
            go_on(site)
        site.wait_for("r", worker, height=MORE - 1)

    same_state(site, ["p", "r"])


def test_end_lost(site: Site) -> None:
    """The log is shorter than what a running replica read: it goes back to where the log ends, and on from there."""
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=SOME - 1)
        with asleep(worker, site):
            site.cut("diffs", 3)
        site.wait_for("r", worker, height=SOME - 4)
        go_on(site)
        site.wait_for("r", worker, height=MORE - 1)

    same_state(site, ["p", "r"])


def test_deleted_under_a_running_replica(site: Site) -> None:
    """What it has not read yet is gone: it says so and ends; its store is as it was."""
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=SOME - 1)
        with asleep(worker, site):
            go_on(site)
            delete(site, "diffs", 2)
        assert "stateferry restore" in finish(worker).failed(OffsetOutOfRange)

    assert site.meta("r").tip.height == SOME - 1
    assert "stateferry restore" in site.here("run", "--role", "replica", "--until-idle", node="r").failed(
        OffsetOutOfRange
    )


def test_start_behind_deleted_records(site: Site) -> None:
    """Whoever has read them needs them no more: the opening too. Blocks, the same."""
    first = delete(site, "diffs", 0)
    assert first == site.meta("p").diffs.next_offset == site.meta("r").diffs.next_offset
    site.follow_both()
    delete(site, "diffs", 1)
    site.follow_both()
    go_on(site)
    site.follow("replica", "r")

    same_state(site, ["p", "r"])
    assert site.meta("r").tip.height == MORE - 1


def test_blocks_without_their_beginning(site: Site) -> None:
    """Whoever followed them goes on; where their walk stands is not known any more to a source, nor to a primary that
    finds their end lost as well."""
    delete(site, "blocks", 2)
    site.follow_both()
    refused = site.here("ingest", "bitcoin", site.folder / "more.hex", node="source").failed(OffsetOutOfRange)
    assert "blocks[0]" in refused and "generation new" in refused

    if not site.place.is_kafka:  # where a topic that is made anew begins at offset 0 again
        site.cut("blocks", 1)
        assert "generation new" in site.here("run", "--role", "primary", "--until-idle", node="p").failed(
            OffsetOutOfRange
        )


def test_new_replica_behind_deleted_records(site: Site) -> None:
    """There is nothing to begin from on the topic; from a snapshot there is, where it reaches what is left."""
    delete(site, "diffs", FINALITY + 1)
    assert site.here("restore", node="restored").ok()["height"] == SOME - 1 - FINALITY
    for node in ("restored", "new"):
        site.follow("replica", node)
    go_on(site)
    for node in ("restored", "new"):
        site.follow("replica", node)

    same_state(site, ["p", "restored", "new"])
    delete(site, "diffs", 1)
    refused = site.here("run", "--role", "replica", "--until-idle", node="late").failed(OffsetOutOfRange)
    assert "stateferry restore" in refused
    assert not site.dir("late").joinpath("store").exists()
