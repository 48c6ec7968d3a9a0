"""Rescaling, from every number of shards to every other: the same state, cut elsewhere."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.block import BlockRef
from pipeline.errors import NotFound, PartCorrupt
from pipeline.generation import Generation
from pipeline.objects import MemoryObjects
from pipeline.shards import groups_of
from pipeline.snapshot import Manifest, decode_manifest
from pipeline.stores.rocksdb import RocksStore
from topology.base_state import publish_base
from topology.rescaling import rescale

COINS = [(random.Random(at).randbytes(32) + at.to_bytes(4, "big"), b"coin %d" % at) for at in range(3000)]
FIRST = Generation(generation=b"1" * 16, chain_id="main", base=BlockRef(700, b"b" * 32))


def content(objects: MemoryObjects, manifest: Manifest, folder: Path) -> dict[bytes, bytes]:
    """What the parts hold, put into a store in their order."""
    folder.mkdir()
    store = RocksStore(folder / "store")
    for part in manifest.parts:
        objects.fetch_to(manifest.part_name(part), folder / part.name)
        store.ingest([folder / part.name])
    found = dict(store.scan())
    store.close()
    return found


@pytest.mark.parametrize("before", [1, 2, 4, 8])
def test_the_same_state(before: int, tmp_path: Path) -> None:
    """Parts of each new shard hold its key groups and no other, and sum up to its position."""
    objects = MemoryObjects()
    one = publish_base(objects, tmp_path / "made", replace(FIRST, shards=before), 7, COINS, part_raw_bytes_max=40_000)
    whole = content(objects, one, tmp_path / "before")
    assert len(whole) == len(COINS)
    for after in {1, 2, 4, 8} - {before}:
        wanted = replace(FIRST, generation=bytes([after]) * 16, number=2, previous=FIRST.generation, shards=after)
        made = rescale(objects, one, wanted, tmp_path / "scratch")

        assert decode_manifest(objects.get(made.name)) == made
        assert (made.root, made.keys, made.shards, made.finality) == (one.root, len(COINS), after, 7)
        assert (made.tip.ref, made.generation) == (FIRST.base, wanted.generation)
        for shard in range(after):
            for part in made.parts_of(shard):
                assert {part.first_group, part.last_group} <= {*groups_of(shard, after)}
        assert content(objects, made, tmp_path / f"after-{after}") == whole
        assert not (tmp_path / "scratch").exists()


def test_what_is_not_as_its_manifest_says(tmp_path: Path) -> None:
    """A part that is gone, or another: nothing is published."""
    objects = MemoryObjects()
    one = publish_base(objects, tmp_path / "made", FIRST, 7, COINS, part_raw_bytes_max=40_000)
    wanted = replace(FIRST, generation=b"2" * 16, number=2, previous=FIRST.generation, shards=4)
    name = one.part_name(one.parts[2])
    held = objects.get(name)
    for damaged, error in ((None, NotFound), (held[:-1] + b"!", PartCorrupt), (held[:900], PartCorrupt)):
        objects.delete(name)
        if damaged is not None:
            objects.put_new(name, damaged)
        before = [info.name for info in objects.list()]
        with pytest.raises(error, match=one.parts[2].name):
            rescale(objects, one, wanted, tmp_path / "scratch")
        assert [info.name for info in objects.list()] == before
