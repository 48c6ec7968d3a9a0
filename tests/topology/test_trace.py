"""`stateferry trace`: every archived change of a key, and what a block did, by filters and indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.archive import LAYOUT, Section
from pipeline.block import Connect, decode_event
from pipeline.errors import NotFound, SegmentCorrupt, UsageError
from tests.chains import block_files
from tests.topology.commands import Site

SPENT = "0437cd7f8525ceed2324359c2d0ba26006d92d856a9c20fa0241106ee5a597c9:0"
"""The coinbase of block 9, which the first payment, in block 170, spent."""
PAID = "f4184fc596403b9d638783cf57adfe4c75c605f6356fbc91338530e9831e9e16:0"
FINAL = 199


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Mainnet to block 299, with snapshots of heights 100 and 199."""
    site = Site(tmp_path_factory.mktemp("trace") / "site")
    site.ingest(*block_files("mainnet_0_599"))
    site.here("run", "--role", "primary", "--until-height", 200).ok()
    site.here("snapshot", "--height", 100).ok()
    site.here("run", "--role", "primary", "--until-height", 299).ok()
    site.here("snapshot").ok()
    return site


def traced(site: Site, what: object) -> Any:
    return site.here("trace", what).ok()


def test_a_coin_that_was_spent(site: Site) -> None:
    """Created in block 9, spent in block 170: the events that said so, and the one snapshot in between."""
    found = traced(site, SPENT)
    events = [decode_event(record) for record in site.records("blocks")]

    assert [(one["height"], one["change"]) for one in found["changes"]] == [(9, "created"), (170, "deleted")]
    assert [one["height"] for one in found["snapshots"]] == [100]
    assert found["snapshots"][0]["holds"] is True
    created, spent = found["changes"]
    assert created["after"] == spent["before"] and spent["after"] is None
    for one in found["changes"]:
        event = events[one["event_offset"]]
        assert isinstance(event, Connect)
        assert event.block.ref.block_hash[::-1].hex() == one["block_hash"]
        assert event.walk == one["walk"]
        assert one["frame_id"] == site.frame_ids()[one["seq"] - 1]
        assert (site.objects / one["segment"]).exists()


def test_a_coin_that_is_there(site: Site) -> None:
    """The value is the one that `get` has; the snapshot that holds it names the part."""
    found = traced(site, PAID)
    (change,), (holder,) = found["changes"], found["snapshots"]

    assert (change["height"], change["change"], holder["height"], holder["holds"]) == (170, "created", FINAL, True)
    assert change["after"] == site.here("get", PAID).ok()["found"][0]["value"]
    assert list((site.objects / holder["manifest"]).parent.glob(holder["part"]))


def test_little_is_read(site: Site) -> None:
    """One frame for each change and few more; of blocks as small as these, whose index is most of it, half at most."""
    read = traced(site, PAID)["read"]
    archive = sum(path.stat().st_size for path in site.objects.rglob("*.seg"))

    assert read["frames"] <= 4
    assert read["requests"] == read["indexes"] + read["frames"] + read["manifests"]
    assert read["bytes"] < archive / 2


def test_a_key_that_never_was(site: Site) -> None:
    """The archive begins with the first block, so it can tell."""
    site.here("trace", f"{'ab' * 32}:0").failed(NotFound)
    site.here("trace", "no key").failed(UsageError)


def test_a_height(site: Site) -> None:
    """The first payment's block: three coins made, one spent, and the snapshot that it is part of."""
    (block,) = traced(site, 170)["blocks"]

    assert (block["height"], block["op_count"], block["seq"]) == (170, 4, 171)
    assert {one["key"]: one["change"] for one in block["keys"]}[SPENT] == "deleted"
    assert sorted(one["change"] for one in block["keys"]) == ["created"] * 3 + ["deleted"]
    assert [one["height"] for one in block["snapshots"]] == [FINAL]
    assert block["event_offset"] == 171
    site.here("trace", FINAL + 1).failed(NotFound)


def test_heights(site: Site) -> None:
    """A line for each block, by indexes alone; snapshots among them."""
    found = traced(site, "60-130")

    assert [one["height"] for one in found["blocks"]] == list(range(60, 131))
    assert found["blocks"][40]["root"] == site.here("trace", "100-100").ok()["blocks"][0]["root"]
    assert [one["height"] for one in found["snapshots"]] == [100]
    assert found["read"]["frames"] == 0
    site.here("trace", "130-60").failed(UsageError)
    site.here("trace", "900-950").failed(NotFound)


def segments(site: Site) -> list[Path]:
    return sorted(site.objects.rglob("*.seg"))


def strip(path: Path) -> None:
    """A segment as it was written before there were filters."""
    data = path.read_bytes()
    places = LAYOUT.split(data)
    kept = sorted(kind for kind in places if kind != Section.FILTERS)
    path.write_bytes(LAYOUT.join({kind: data[slice(*places[kind])] for kind in kept}))


def test_segments_without_filters(site: Site, tmp_path: Path) -> None:
    """The same answers, by reading every frame of those segments."""
    old = site.copy(tmp_path / "old")
    for path in segments(old):
        strip(path)
    found, before = traced(old, SPENT), traced(site, SPENT)

    assert (found["changes"], found["snapshots"]) == (before["changes"], before["snapshots"])
    assert found["read"]["frames"] > FINAL > 20 * before["read"]["frames"]


def test_a_hole_in_the_archive(site: Site, tmp_path: Path) -> None:
    """Without the segment of the spend, nobody can say whether the later snapshot holds the coin."""
    holed = site.copy(tmp_path / "holed")
    for path in segments(holed):
        if path.name.startswith("000000000128-"):
            path.unlink()
    found = traced(holed, SPENT)

    assert [one["height"] for one in found["changes"]] == [9]
    assert [(one["height"], one["holds"]) for one in found["snapshots"]] == [(100, True), (FINAL, None)]


def test_a_damaged_segment(site: Site, tmp_path: Path) -> None:
    """It is named."""
    harmed = site.copy(tmp_path / "harmed")
    path = segments(harmed)[2]
    path.write_bytes(path.read_bytes()[:-50])

    assert path.name in harmed.here("trace", SPENT).failed(SegmentCorrupt)
