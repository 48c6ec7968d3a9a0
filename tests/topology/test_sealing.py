"""The process beside a primary that seals its blocks: there when blocks are worth it, and gone with its worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import topology.sealing_process
from pipeline.codec import Codec
from pipeline.diff import Diff
from pipeline.errors import StateferryError
from pipeline.seal import Shared, seal
from pipeline.state import UTXO, Change
from pipeline.table_diff import table_diff
from tests.topology.commands import Site, finish, same_state, wait_until
from topology.sealing import Sealing

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")


def sealing_processes(worker_id: int) -> list[int]:
    """The spawned processes below a worker, but for the tracker of their semaphores."""
    children = Path(f"/proc/{worker_id}/task/{worker_id}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def sealing() -> Iterator[Sealing]:
    one = Sealing()
    yield one
    one.close()


def coin(txid: int, index: int) -> bytes:
    return txid.to_bytes(32, "big") + index.to_bytes(4, "big")


def diffs(*sizes: int) -> list[Diff]:
    """Coins that come into being, so many a diff; some are spent in the next one."""
    found: list[Diff] = []
    for number, size in enumerate(sizes):
        new = [Change(coin(at, number + 1), None, bytes([at % 251]) * (at % 70)) for at in range(size)]
        old = [Change(coin(at, number), b"spent", None) for at in range(size // 2)]
        changes = sorted(new + old)
        found.append(Diff(tables={UTXO.table_id: table_diff(UTXO, changes)}))
    return found


NOTHING_SHARED: Shared = {UTXO.table_id: frozenset()}


@pytest.mark.parametrize("portions_here", [0, 1, 3, 1000])
def test_seals_are_the_same_wherever_they_are_made(sealing: Sealing, portions_here: int) -> None:
    """However many portions of the gains the worker makes while it waits; more blocks than are shared out at a time."""
    blocks = diffs(*[180, 200, 201, 3000] * 6)
    pending = [sealing.submit(diff, NOTHING_SHARED, Codec.ZSTD) for diff in blocks]
    helped = sum(sealing.help() for _ in range(portions_here))

    for diff, one in zip(blocks, pending, strict=True):
        assert one.result() == seal(diff, NOTHING_SHARED, Codec.ZSTD)
        assert one.done()
    assert not sealing.help()
    assert helped == portions_here or (portions_here == 1000 and helped > 12)


def test_memory_of_large_blocks_is_given_back(sealing: Sealing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once no block is with the process, what lay there for it is gone, and the next ones are sealed as ever."""
    monkeypatch.setattr(topology.sealing_process, "_BOARD_BYTES_KEPT", 0)
    for diff in diffs(20_000, 300, 300):
        assert sealing.submit(diff, NOTHING_SHARED, Codec.ZSTD).result() == seal(diff, NOTHING_SHARED, Codec.ZSTD)

    assert sealing._process is not None
    assert os.fstat(sealing._process.board._fd).st_blocks * 512 < 200_000


def test_waiting_leaves_the_loop_its_turns(sealing: Sealing) -> None:
    """Whoever waits for a seal in a loop helps with it, a portion a turn, and others have theirs."""
    (diff,) = diffs(20_000)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        counting = asyncio.create_task(count_turns())
        pending = sealing.submit(diff, NOTHING_SHARED, Codec.NONE)
        while not pending.done():
            await sealing.advance(pending)
        counting.cancel()
        assert pending.result() == seal(diff, NOTHING_SHARED, Codec.NONE)

    asyncio.run(main())
    assert turns > 10


def test_sealing_process_is_killed(tmp_path: Path) -> None:
    """The worker ends with an error that names it; the next one goes on, and nothing is lost or twice there."""
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 400).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        (sealing,) = sealing_processes(primary.pid)
        os.kill(sealing, signal.SIGKILL)
        site.here("ingest", "synthetic", "--from-height", 4, "--blocks", 5, "--changes", 400, node="source").ok()
        assert "seals blocks" in finish(primary).failed(StateferryError)

    site.follow_both()
    assert site.meta("p").tip.height == 9
    same_state(site, ("p", "r"))


def test_sealing_process_ends_with_its_worker(tmp_path: Path) -> None:
    """Also if the worker had no time to say good-bye."""
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 400).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        (sealing,) = sealing_processes(primary.pid)
        primary.kill()
        primary.wait()
        wait_until(lambda: not is_running(sealing))


def test_small_blocks_need_no_process(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.here("ingest", "synthetic", "--blocks", 5, "--changes", 40).ok()
    with site.running("primary", "p") as primary:
        site.wait_for("p", primary, height=4)
        assert not sealing_processes(primary.pid)
