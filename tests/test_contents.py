"""Whole states compared where they are cut at other keys: what is found, and how much of either side is read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.block import BlockRef
from pipeline.comparison import Difference
from pipeline.errors import PartCorrupt
from pipeline.generation import Generation
from pipeline.objects import MemoryObjects
from pipeline.snapshot import Manifest
from pipeline.stores.memory import MemoryStore
from topology.base_state import publish_base
from topology.contents import PartReader, SnapshotState, State, StoreState, differing_keys

Held = Mapping[bytes, bytes]

COINS: Held = {random.Random(at).randbytes(32) + at.to_bytes(4, "big"): b"coin %d" % at for at in range(3000)}
KEYS = sorted(COINS)
OTHER: Held = {key: value for key, value in COINS.items() if key != KEYS[700]} | {
    KEYS[2100]: b"other",
    bytes(36): b"new",
}
EXPECTED = [
    Difference("utxo", bytes(36), None, b"new"),
    Difference("utxo", KEYS[700], COINS[KEYS[700]], None),
    Difference("utxo", KEYS[2100], COINS[KEYS[2100]], b"other"),
]
BASE = Generation(generation=b"1" * 16, chain_id="main", base=BlockRef(700, b"b" * 32))


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


def published(objects: MemoryObjects, folder: Path, held: Held, *, shards: int, part_raw_bytes: int) -> Manifest:
    of = replace(BASE, generation=random.Random(f"{shards} {part_raw_bytes}").randbytes(16), shards=shards)
    return publish_base(objects, folder / "made", of, 7, held.items(), part_raw_bytes_max=part_raw_bytes)


def opened(objects: MemoryObjects, manifest: Manifest, folder: Path) -> tuple[SnapshotState, PartReader]:
    folder.mkdir()
    reader = PartReader(objects, folder, Counter())
    return SnapshotState(manifest, reader), reader


def turned(found: list[Difference]) -> list[Difference]:
    return [one._replace(a=one.b, b=one.a) for one in found]


@pytest.mark.parametrize(
    ("shards", "part_raw_bytes"), [((1, 1), (9000, 9000)), ((1, 4), (9000, 9000)), ((4, 2), (7000, 30_000))]
)
def test_snapshots_cut_elsewhere(
    objects: MemoryObjects, tmp_path: Path, shards: tuple[int, int], part_raw_bytes: tuple[int, int]
) -> None:
    """Of each stretch between common cuts one side is read, and of the other the parts with keys that differ."""
    one, two = (
        published(objects, tmp_path, held, shards=count, part_raw_bytes=size)
        for held, count, size in zip((COINS, OTHER), shards, part_raw_bytes, strict=True)
    )
    a, reading_a = opened(objects, one, tmp_path / "a")
    b, reading_b = opened(objects, two, tmp_path / "b")
    try:
        assert list(differing_keys(a, b)) == EXPECTED
        assert reading_a.read["parts"] + reading_b.read["parts"] <= max(len(one.parts), len(two.parts)) + 3
        assert min(len(one.parts), len(two.parts)) > 5 and len(list((tmp_path / "a").iterdir())) <= 4
        assert list(differing_keys(b, a)) == turned(EXPECTED)
    finally:
        reading_a.close()
        reading_b.close()

    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def test_the_same_state_cut_elsewhere(objects: MemoryObjects, tmp_path: Path) -> None:
    """The sums say so: no part is read."""
    one = published(objects, tmp_path, COINS, shards=1, part_raw_bytes=9000)
    two = published(objects, tmp_path, COINS, shards=4, part_raw_bytes=5000)
    a, reading_a = opened(objects, one, tmp_path / "a")
    b, reading_b = opened(objects, two, tmp_path / "b")

    assert list(differing_keys(a, b)) == []
    assert reading_a.read == reading_b.read == Counter()


def test_a_store_and_a_snapshot(objects: MemoryObjects, tmp_path: Path) -> None:
    """The store is hashed, and three parts are fetched at most."""
    one = published(objects, tmp_path, OTHER, shards=4, part_raw_bytes=9000)
    two = published(objects, tmp_path, COINS, shards=1, part_raw_bytes=9000)
    snapshot, reading = opened(objects, one, tmp_path / "a")
    whole, reading_whole = opened(objects, two, tmp_path / "b")
    store = MemoryStore()
    store.state.update(whole.scan())
    reading_whole.close()
    held: State = StoreState(store, two.root)

    assert list(differing_keys(held, snapshot)) == EXPECTED
    assert list(differing_keys(snapshot, held)) == turned(EXPECTED)
    assert reading.read["parts"] <= 3
    reading.close()


def test_a_part_that_is_damaged(objects: MemoryObjects, tmp_path: Path) -> None:
    """It is named, and leaves nothing open."""
    one = published(objects, tmp_path, COINS, shards=1, part_raw_bytes=9000)
    name = one.part_name(one.parts[3])
    held = objects.get(name)
    objects.delete(name)
    objects.put_new(name, held[:-1] + bytes([held[-1] ^ 1]))
    state, reading = opened(objects, one, tmp_path / "a")
    with pytest.raises(PartCorrupt) as caught:
        list(state.scan())
    reading.close()

    assert caught.value.where == name
    assert not list((tmp_path / "a").glob("*.sst"))
