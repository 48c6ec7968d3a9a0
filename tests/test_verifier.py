import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import AuditFailed, NotFound, StateferryError
from pipeline.position import encode_meta
from pipeline.state import KEY_GROUPS
from pipeline.stores.base import META_KEY, PROOF_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import audit, decode_proof
from tests.ferries import Ferry, make_ferry
from topology.verifier import COPY_FOLDER, audit_position, audit_store, group_ranges, prove


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"), events=60, snapshots=0)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("groups", [range(KEY_GROUPS), range(64), range(1024, 2048)], ids=str)
def test_ranges_cover_every_group_once(workers: int, groups: range) -> None:
    """Runs are contiguous, from the first key group to the last, and the groups of a shard are shared evenly."""
    ranges = group_ranges(workers, groups)
    shares = [len(range(max(start, groups.start), min(stop, groups.stop))) for start, stop in ranges]

    assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges[:-1]]]
    assert ranges[-1][1] == KEY_GROUPS
    assert set(shares) <= {len(groups) // workers, len(groups) // workers + 1}


@pytest.mark.parametrize("workers", [1, 3])
async def test_audit_by_ranges(ferry: Ferry, workers: int) -> None:
    """However the groups are split, the partials sum up to the same."""
    assert await audit_store(ferry.copy(), groups=range(KEY_GROUPS), workers=workers) == audit(ferry.store.scan())


async def test_prove_while_the_node_goes_on(tmp_path: Path) -> None:
    """The proof is of the block at which the copy was made; the node may be ahead by then."""
    ferry = make_ferry(tmp_path, events=60, snapshots=0)
    at, root = ferry.node.meta.tip.ref, ferry.node.meta.tip.root
    proving = asyncio.create_task(prove(ferry.store, tmp_path, workers=2))
    await asyncio.sleep(0.01)
    ferry.store.write(Batch(state={bytes([0, 0, 1]) + bytes(12): b"\1" + bytes(24)}))
    proof, found = await proving

    assert (proof.proven, proof.at, proof.root) == (True, at, root)
    assert found.keys == sum(ferry.node.meta.tip.counts.values())
    assert decode_proof(ferry.store.get_meta(PROOF_KEY)) == proof
    assert not (tmp_path / COPY_FOLDER).exists()


async def test_what_the_vectors_do_not_say(tmp_path: Path) -> None:
    """A value changed, a key more, a key less, a count: each is found; the store stays as unproven as it was."""
    ferry = make_ferry(tmp_path, events=60, snapshots=0)
    key, stored = next(iter(ferry.store.scan()))
    meta = ferry.node.meta
    counts = {1: meta.tip.counts[1] + 1}
    wrongs = [
        Batch(state={key: stored[:-1] + bytes([stored[-1] ^ 1])}),
        Batch(state={key: None}),
        Batch(state={key: stored, bytes([0, 0, 1]) + bytes(12): b"\1" + bytes(24)}),
        Batch(
            state={bytes([0, 0, 1]) + bytes(12): None},
            meta={META_KEY: encode_meta(replace(meta, tip=replace(meta.tip, counts=counts)))},
        ),
    ]
    for wrong in wrongs:
        ferry.store.write(wrong)
        with pytest.raises(StateferryError) as caught:
            await prove(ferry.store, tmp_path, workers=1)
        assert isinstance(caught.value, AuditFailed) or caught.value.name == "StoreCorrupt"
        assert ferry.store.get_meta(PROOF_KEY) is None
        assert not (tmp_path / COPY_FOLDER).exists()


async def test_two_at_once(ferry: Ferry, tmp_path: Path) -> None:
    """They take turns, and neither removes the other's copy."""
    (one, _), (other, _) = await asyncio.gather(*(prove(ferry.store, tmp_path, workers=1) for _ in range(2)))

    assert one == other


async def test_cancelled(ferry: Ferry, tmp_path: Path) -> None:
    """Cancelled, it ends its processes and removes its copy."""
    task = asyncio.create_task(prove(ferry.store, tmp_path, workers=2))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / COPY_FOLDER).exists()


async def test_a_store_without_position(tmp_path: Path) -> None:
    """There is nothing to compare with."""
    RocksStore(tmp_path / "store").close()
    with pytest.raises(NotFound):
        await audit_position(tmp_path / "store")
