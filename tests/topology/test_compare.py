"""`stateferry compare`: between nodes, snapshots and object stores, before and behind the height where they part."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from pipeline.errors import Different, NotFound
from pipeline.state import UTXO
from pipeline.stores.base import Batch
from tests.topology.commands import Done, Site, here
from tests.topology.sharded import Sharded

PARTING = 80
"""Both have this block; above it each has its own."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, Site, Site]:
    """A chain at height 79, and two copies of it that went on: each with a snapshot of height 73 and of 143."""
    folder = tmp_path_factory.mktemp("compare")
    base = Site(folder / "base")
    base.here("ingest", "synthetic", "--blocks", PARTING + 1, "--changes", 20).ok()
    base.follow("primary", "p", "--finality", 6)
    base.here("snapshot").ok()
    sites = [base.copy(folder / name) for name in ("a", "b")]
    for seed, site in enumerate(sites, 2):
        words = ("--from-height", PARTING, "--blocks", 69, "--changes", 20, "--seed", seed)
        site.here("ingest", "synthetic", *words).ok()
        site.follow("primary", "p")
        site.here("snapshot").ok()
    return base, *sites


@pytest.fixture
def base_site(base: tuple[Site, Site, Site]) -> Site:
    return base[0]


@pytest.fixture
def a(base: tuple[Site, Site, Site]) -> Site:
    return base[1]


@pytest.fixture
def b(base: tuple[Site, Site, Site]) -> Site:
    return base[2]


def compared(one: object, other: object, *args: object) -> Done:
    return here("compare", one, other, *args, "--json")


def different(done: Done) -> Any:
    """The document of a comparison that found a difference."""
    assert (done.code, done.document["error"], done.document["exit_code"]) == (17, Different.__name__, 17)

    return done.document


def url(site: Site) -> str:
    return f"file://{site.objects}"


def values(site: Site, found: Any) -> list[tuple[str | None, ...]]:
    """What frames of the archive say of the keys that a comparison names."""
    return [(one["a"], one["b"]) for one in found["keys"]]


def held(site: Site) -> dict[bytes, bytes]:
    return {
        key: value
        for storage_key, stored in site.content("p").items()
        for key, value in UTXO.items(storage_key, stored)
    }


def test_object_stores(a: Site, b: Site) -> None:
    """The first block that differs, by its frames: two frames and few indexes are read, and no part."""
    found = different(compared(url(a), url(b), "--limit", 1000))

    assert (found["first_height"], found["is_first"], found["by"]) == (PARTING + 1, True, "history")
    assert found["a"]["root"] != found["b"]["root"]
    assert len(found["keys"]) == 40 and not found["more_keys"]
    assert all(one["a"] != one["b"] for one in found["keys"])
    for side in ("a", "b"):
        assert found["read"][side]["frames"] == 1
        assert found["read"][side]["indexes"] <= 4
        assert "parts" not in found["read"][side]


def test_equal_as_far_as_both_go(base_site: Site, a: Site) -> None:
    """What one has not yet is no difference."""
    for one, other in ((url(base_site), url(a)), (url(a), url(a)), (base_site.dir("p"), url(a))):
        found = compared(one, other).ok()
        assert found["equal"]
    assert compared(url(base_site), url(a)).ok()["height"] == PARTING - 6


def test_snapshots(a: Site, b: Site, base_site: Site) -> None:
    """By their parts: the keys are those that the stores differ in, at that height."""
    height = PARTING + 69 - 6
    found = different(compared(f"{url(a)}@{height}", f"{url(b)}@{height}", "--limit", 100_000))

    assert (found["first_height"], found["is_first"], found["by"]) == (height, False, "state")
    assert found["read"]["a"]["parts"] == found["read"]["b"]["parts"] == 1
    assert compared(f"{url(a)}@{PARTING - 6}", f"{url(base_site)}@{PARTING - 6}").ok()["equal"]
    compared(f"{url(a)}@{PARTING - 6}", f"{url(b)}@{height}").failed(NotFound)
    compared(f"{url(a)}@12", url(b)).failed(NotFound)


def test_nodes(a: Site, b: Site) -> None:
    """Whose journals no longer reach the block where they parted: by content, where they stand."""
    found = different(compared(a.dir("p"), b.dir("p"), "--limit", 100_000))
    one, other = held(a), held(b)
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))

    assert (found["by"], found["first_height"]) == ("state", PARTING + 69)
    assert values(a, found) == [
        tuple(value if value is None else value.hex() for value in (one.get(key), other.get(key))) for key in keys
    ]


def test_a_node_and_a_snapshot(a: Site, b: Site, tmp_path: Path) -> None:
    """The node's content is hashed against the parts, once its position claims another root than the snapshot's."""
    site = a.copy(tmp_path / "site")
    site.here("restore", "--claimed", node="c").ok()
    height = PARTING + 69 - 6
    snapshot = f"{url(a)}@{height}"
    assert compared(site.dir("c"), snapshot).ok()["equal"]
    with site.store("c") as store:
        storage_key, stored = list(store.scan())[40]
        ((_, value),) = UTXO.items(storage_key, stored)
        store.write(Batch(state={storage_key: bytes([*stored[:-1], stored[-1] ^ 1])}))
    # Roots are what positions say: only a state of another root is looked at.
    assert compared(site.dir("c"), snapshot).ok()["equal"]
    found = different(compared(site.dir("c"), f"{url(b)}@{height}", "--limit", 100_000))

    assert [one["a"] for one in found["keys"]].count(bytes([*value[:-1], value[-1] ^ 1]).hex()) == 1


def test_a_history_and_a_snapshot(a: Site, b: Site) -> None:
    """A node whose journal goes back to a snapshot's height: by the root, and no key is named."""
    height = PARTING + 69 - 6
    found = different(compared(a.dir("p"), f"{url(b)}@{height}"))

    assert (found["first_height"], found["by"]) == (height, "root")
    assert "keys" not in found
    assert compared(f"{url(a)}@{height}", a.dir("p")).ok() | {"read": {}} == {
        "equal": True,
        "height": height,
        "by": "root",
        "read": {},
    }


@pytest.fixture(scope="module")
def four(base: tuple[Site, Site, Site], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The chain of ``a`` in four shards."""
    site = Sharded(tmp_path_factory.mktemp("four") / "site").begin(4)
    site.here("ingest", "synthetic", "--blocks", PARTING + 1, "--changes", 20).ok()
    words = ("--from-height", PARTING, "--blocks", 69, "--changes", 20, "--seed", 2)
    site.here("ingest", "synthetic", *words).ok()
    site.follow("primary", "p", "--finality", 6)
    site.here("snapshot").ok()
    return site


def test_histories_of_other_shards(a: Site, b: Site, base_site: Site, four: Site) -> None:
    """By global roots: the same height and keys as between histories of one shard, whichever comes first; no part is
    read, and of frames those of one segment of each shard at most."""
    found = different(compared(url(four), url(b), "--limit", 1000))
    known = different(compared(url(a), url(b), "--limit", 1000))
    back = different(compared(url(b), url(four), "--limit", 1000))

    assert (found["first_height"], found["is_first"], found["by"]) == (PARTING + 1, True, "history")
    assert found["keys"] == known["keys"]
    assert [(one["b"], one["a"]) for one in back["keys"]] == values(a, known)
    assert found["a"] | {"frame_id": known["a"]["frame_id"]} == known["a"]  # a frame is of one shard
    assert found["b"] == known["b"]
    assert "parts" not in found["read"]["a"].keys() | found["read"]["b"].keys()
    assert found["read"]["a"]["frames"] <= 4 * 64 and found["read"]["b"]["frames"] <= 64
    height = PARTING + 69 - 6
    assert compared(url(four), url(a)).ok() == {
        "equal": True,
        "height": height,
        "by": "state",  # whose root is in the name
        "read": {"a": {"indexes": 5, "bytes": ANY}, "b": {"indexes": 2, "bytes": ANY}},
    }
    assert compared(url(base_site), url(four)).ok()["height"] == PARTING - 6
    assert compared(four.dir("p"), a.dir("p")).ok()["height"] == PARTING + 69
    assert compared(four.dir("p"), url(a)).ok()["height"] == height


def test_states_of_other_shards(a: Site, b: Site, four: Site) -> None:
    """Snapshots, and nodes whose journals no longer reach the parting: the same keys as with one shard."""
    height = PARTING + 69 - 6
    found = different(compared(f"{url(four)}@{height}", f"{url(b)}@{height}", "--limit", 100_000))
    known = different(compared(f"{url(a)}@{height}", f"{url(b)}@{height}", "--limit", 100_000))
    nodes = different(compared(b.dir("p"), four.dir("p"), "--limit", 100_000))

    assert (found["by"], found["first_height"], found["keys"]) == ("state", height, known["keys"])
    assert compared(f"{url(four)}@{height}", f"{url(a)}@{height}").ok()["equal"]
    assert (nodes["by"], nodes["first_height"]) == ("state", PARTING + 69)
    assert nodes["keys"] == different(compared(b.dir("p"), a.dir("p"), "--limit", 100_000))["keys"]
    assert different(compared(four.dir("p"), f"{url(b)}@{height}"))["by"] == "root"
    assert compared(f"{url(a)}@{height}", four.dir("p")).ok()["by"] == "root"


def test_limit(a: Site, b: Site) -> None:
    """So many keys and no more."""
    found = different(compared(url(a), url(b), "--limit", 3))

    assert (len(found["keys"]), found["more_keys"]) == (3, True)


def test_beside_a_worker(a: Site, tmp_path: Path) -> None:
    """A running node is compared in a copy."""
    site = a.copy(tmp_path / "site")
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=PARTING + 69)
        assert compared(site.dir("r"), url(a)).ok()["height"] == PARTING + 69 - 6


def test_what_cannot_be_compared(a: Site, tmp_path: Path) -> None:
    """Places without anything."""
    compared(a.dir("nobody"), url(a)).failed(NotFound)
    compared(f"file://{tmp_path}/empty", url(a)).failed(NotFound)
