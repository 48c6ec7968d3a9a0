"""Processes that read ahead: what they read, what they get past, and that nothing depends on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from pipeline import chunk
from pipeline.block import Block, Op, decode_event
from pipeline.stores.rocksdb import RocksStore
from tests.topology.commands import Site, finish, same_state, wait_until
from topology.bench import loads
from topology.prefetching import FOLDER, Prefetcher


@pytest.fixture
def prefetcher(tmp_path: Path) -> Iterator[Prefetcher]:
    """Two processes on an empty store: what matters is which keys they ask for."""
    store = RocksStore(tmp_path / "store")
    one = Prefetcher(store.checkpoint, tmp_path / FOLDER, processes=2)
    yield one
    one.close()
    store.close()
    assert not (tmp_path / FOLDER).exists()


def made(count: int) -> list[Block]:
    return list(islice(loads.synthetic_blocks(count, 90), count))


def spends(block: Block) -> int:
    return sum(ops.codes.count(Op.DELETE) for ops in block.tables.values())


def test_what_is_spent_is_read(prefetcher: Prefetcher) -> None:
    blocks = made(6)
    for walk, block in enumerate(blocks, 1):
        prefetcher.submit(loads.event_of(block, walk))

    wait_until(lambda: prefetcher.keys_read == 5 * 40)
    assert [spends(block) for block in blocks] == [0, *[40] * 5]


def test_chunks_of_an_event_meet_in_one_process(prefetcher: Prefetcher) -> None:
    blocks = made(4)
    for walk, block in enumerate(blocks, 1):
        event = loads.event_of(block, walk)
        stamp = decode_event(event).stamp
        records = chunk.cut(
            event,
            generation=stamp.generation,
            epoch=stamp.epoch,
            writer=stamp.writer,
            number=walk,
            record_bytes_max=1000,
        )
        assert len(records) > 3
        for record in records:
            prefetcher.submit(record)

    wait_until(lambda: prefetcher.keys_read == 3 * 40)


def test_what_is_no_event_is_passed_by_and_counted(prefetcher: Prefetcher) -> None:
    first, second, third = (loads.event_of(block, walk) for walk, block in enumerate(made(3), 1))
    for record in (first, b"", b"SFck and no chunk", second[:-9], os.urandom(500), second, third):
        prefetcher.submit(record)

    wait_until(lambda: prefetcher.keys_read == 2 * 40)
    assert prefetcher.missed == {"bad event": 4}


def test_a_process_that_was_killed_is_not_missed(prefetcher: Prefetcher) -> None:
    """Its events are not read ahead, and counted; those of the other are."""
    killed, _ = spawned(os.getpid())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in spawned(os.getpid()))
    for walk, block in enumerate(made(9), 1):
        prefetcher.submit(loads.event_of(block, walk))

    wait_until(lambda: prefetcher.keys_read >= 3 * 40)
    assert prefetcher.missed.keys() == {"process gone"}


def test_a_worker_that_reads_ahead(tmp_path: Path) -> None:
    """The same state, and no copies left; also if all that read ahead are killed meanwhile."""
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 90).ok()
    with site.running("primary", "p", "--verbose", env={"STATEFERRY_PREFETCH_ABOVE_BYTES": "0"}) as primary:
        site.wait_for("p", primary, height=4)
        assert (site.dir("p") / FOLDER).exists()
        for reader in spawned(primary.pid):
            os.kill(reader, signal.SIGKILL)
        site.here("ingest", "synthetic", "--from-height", 4, "--blocks", 5, "--changes", 90, node="source").ok()
        site.wait_for("p", primary, height=9)
        primary.terminate()
        said = finish(primary).stderr
        assert "prefetch_started" in said
        (ended,) = [line for line in said.splitlines() if "prefetch_ended" in line]
        assert "process gone" in ended

    assert not (site.dir("p") / FOLDER).exists()
    site.follow_both()
    same_state(site, ("p", "r"))


def spawned(worker_id: int) -> list[int]:
    children = Path(f"/proc/{worker_id}/task/{worker_id}/children").read_text().split()
    readers = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert readers

    return readers
