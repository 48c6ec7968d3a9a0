"""Restored nodes by commands: claimed until hashed, served only then or on demand, and only into empty directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import AuditFailed, NotEmpty, NotFound, NotProven, Quarantined
from pipeline.stores.base import Batch
from tests.chains import block_files, expected
from tests.topology.commands import Site, same_state

pytestmark = pytest.mark.usefixtures("each_broker")

STEPS = expected("mainnet_0_599")
FINAL = 499


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A primary at height 599 with a snapshot, and a claimed restore of it."""
    site = Site(tmp_path_factory.mktemp("base") / "site")
    site.ingest(*block_files("mainnet_0_599"))
    site.follow("primary", "p")
    site.here("snapshot").ok()
    restored = site.here("restore", "--claimed", node="c").ok()
    assert (restored["height"], restored["proof"], restored["proven"]) == (FINAL, "claimed", False)
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def a_coin(site: Site) -> str:
    key: str = site.here("scan", "--limit", 1, node="p").ok()["found"][0]["key"]
    return key


def test_claimed_is_refused_unless_allowed(site: Site) -> None:
    """Positions are told, as claimed; values are not, unless the reader says that claimed will do."""
    key = a_coin(site)
    for words in (("get", key), ("scan",)):
        site.here(*words, node="c").failed(NotProven)
        answer = site.here(*words, "--serve", "claimed", node="c").ok()
        assert (answer["position"]["proof"], answer["position"]["height"]) == ("claimed", FINAL)
        assert answer["found"]
    assert site.here("status", node="c").ok()["proven"] is False
    assert site.here("root", node="c").ok()["proof"] == "claimed"


def test_verify_proves(site: Site) -> None:
    """A full verification makes it proven, without a worker."""
    found = site.here("verify", "--level", "full", node="c").ok()
    assert (found["proof"], found["verified_height"], found["keys"]) == ("proven", FINAL, STEPS[FINAL]["coins"])

    assert site.here("get", a_coin(site), node="c").ok()["position"]["proof"] == "proven"


def test_worker_proves_in_the_background(site: Site) -> None:
    """A worker follows at once, and its reads are answered once every key was hashed."""
    with site.running("replica", "c") as worker:
        site.wait_for("c", worker, height=599, proven=True)
        assert site.here("get", a_coin(site), node="c").ok()["position"]["proof"] == "proven"

    same_state(site, ["p", "c"])
    assert site.muhash("c")["muhash"] == STEPS[599]["muhash"]


def test_changed_value_is_never_proven(site: Site) -> None:
    """One bit of one stored value: the proof in the background fails, and the node stops and stays stopped."""
    with site.store("c") as store:
        storage_key, stored = list(store.scan())[300]
        store.write(Batch(state={storage_key: bytes([*stored[:-1], stored[-1] ^ 0x40])}))
    site.here("run", "--role", "replica", "--until-height", 10_000, node="c").failed(AuditFailed)
    site.here("run", "--role", "replica", "--until-idle", node="c").failed(Quarantined)
    site.here("get", "--serve", "claimed", a_coin(site), node="c").failed(Quarantined)

    assert site.here("quarantine", "--restore", node="c").ok()["height"] == FINAL
    site.follow("replica", "c")
    same_state(site, ["p", "c"])


@pytest.mark.parametrize("height", [0, 63, 64, 200, 498])
def test_any_archived_height(height: int, site: Site) -> None:
    """From the archive alone, or the snapshot; the replica goes on from there to the end."""
    assert site.here("restore", "--height", height, node="h").ok()["height"] == height
    assert site.muhash("h")["muhash"] == STEPS[height]["muhash"]
    site.follow("replica", "h")

    same_state(site, ["p", "h"])


def test_not_into_a_directory_that_holds_something(site: Site) -> None:
    """A store is never overwritten."""
    content = site.content("p")
    for node in ("p", "c"):
        assert "empty directory" in site.here("restore", node=node).failed(NotEmpty)

    assert site.content("p") == content
    assert site.here("status", node="c").ok()["height"] == FINAL


def test_nothing_to_restore_from(site: Site) -> None:
    """Heights that are not final, and object stores that are empty."""
    for height in (FINAL + 1, 599, 700):
        site.here("restore", "--height", height, node="n").failed(NotFound)
    Site(site.folder / "elsewhere").here("restore", node="n").failed(NotFound)

    assert not (site.dir("n") / "store").exists()
    assert site.here("restore", node="n").ok()["height"] == FINAL


def test_promotion_of_a_restored_replica(site: Site) -> None:
    """A restored directory becomes the primary's once it has proven what it holds; the old one follows."""
    promoted = site.follow("primary", "c")
    site.follow("replica", "p")

    assert (promoted["height"], promoted["epoch"]) == (599, 2)
    assert site.here("verify", node="c").ok()["verified_height"] == 599
    same_state(site, ["p", "c"])
