"""`stateferry verify` at every level: what is right passes, each fault is named with its object, results are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.archive import LAYOUT, Section
from pipeline.audits import Level
from pipeline.errors import (
    ManifestCorrupt,
    NotFound,
    PartCorrupt,
    SegmentCorrupt,
    StateferryError,
    StoreCorrupt,
)
from tests.chains import block_files, expected
from tests.topology.commands import Done, Site

STEPS = expected("mainnet_0_599")
FINAL = 199
LEVELS = [level.value for level in Level]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A primary at height 299, with snapshots of heights 150 and 199."""
    site = Site(tmp_path_factory.mktemp("audits") / "site")
    site.ingest(*block_files("mainnet_0_599"))
    site.here("run", "--role", "primary", "--until-height", 250).ok()
    site.here("snapshot").ok()
    site.here("run", "--role", "primary", "--until-height", 299).ok()
    site.here("snapshot").ok()
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def objects(site: Site, ending: str) -> list[Path]:
    return sorted(path for path in site.objects.rglob(f"*{ending}"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def audited(site: Site, level: str, node: str = "p") -> Done:
    return site.here("verify", "--level", level, node=node)


def faults(done: Done) -> list[tuple[str, str]]:
    """The errors that an audit named, each with its object; the exit code is that of the first."""
    found = done.document["faults"]

    assert done.code == done.document["exit_code"] == found[0]["exit_code"] != 0
    assert not done.document["verified"]
    assert all(f"{fault['error']}: {fault['message']}" in done.stderr for fault in found)

    return [(fault["error"], fault["where"]) for fault in found]


def test_all_is_right(site: Site) -> None:
    """Every level passes, says what it looked at, and is in `status` with its date."""
    found = {level: audited(site, level).ok() for level in LEVELS}
    kept = site.here("status").ok()["audits"]

    assert [found[level]["verified"] for level in LEVELS] == [True] * 5
    assert found["quick"]["objects"] | {"bytes": 0} == {
        "manifests": 2,
        "segments": 5,
        "range_diffs": 0,
        "parts": 0,
        "bytes": 0,
    }
    assert found["quick"]["store"] == {"journal_frames": 100}
    assert found["stored"]["objects"]["parts"] == 2
    assert found["stored"]["store"]["entries"] > STEPS[299]["coins"]
    assert found["content"]["objects"]["keys"] == STEPS[150]["coins"] + STEPS[FINAL]["coins"]
    assert found["full"]["keys"] == STEPS[299]["coins"]
    assert found["replay"]["objects"]["frames"] == FINAL + 1
    assert found["replay"]["objects"]["snapshots_met"] == 2
    assert found["replay"]["objects"]["points_met"] == 1
    assert sorted(kept) == sorted(LEVELS)
    assert all(one["verified"] and one["at"][:2] == "20" for one in kept.values())


def test_without_a_store(site: Site) -> None:
    """The object store alone can be audited; nothing at all is an error."""
    assert audited(site, "stored", node="nobody").ok()["store"] is None
    audited(Site(site.folder / "elsewhere"), "quick").failed(NotFound)


def test_beside_a_worker(site: Site) -> None:
    """A running worker is asked for a copy."""
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=299)
        found = [audited(site, level, "r").ok() for level in ("quick", "stored", "full")]
        assert [one["verified"] for one in found] == [True] * 3
        assert [one["height"] for one in found] == [299] * 3


def manifest_of(site: Site) -> Path:
    return objects(site, "manifest.json")[-1]


def part_of(site: Site) -> Path:
    return next(path for path in objects(site, ".sst") if path.parent == manifest_of(site).parent)


def segment_of(site: Site) -> Path:
    return objects(site, ".seg")[3]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def other_part(path: Path) -> None:
    """The part of the other snapshot in the place of this one's, as long as it was."""
    (other,) = [one for one in path.parents[2].rglob("*.sst") if one != path]
    size = path.stat().st_size
    path.write_bytes(other.read_bytes()[:size].ljust(size, b"\0"))


FAULTS: list[tuple[str, Callable[[Site], Path], Callable[[Path], Any], str, type[StateferryError]]] = [
    ("missing part", part_of, Path.unlink, "quick", NotFound),
    ("truncated part", part_of, cut, "quick", PartCorrupt),
    ("foreign part", part_of, other_part, "stored", PartCorrupt),
    ("flipped bit in a part", part_of, lambda path: flip(path, 500), "stored", PartCorrupt),
    ("truncated segment", segment_of, cut, "quick", SegmentCorrupt),
    ("swapped segments", segment_of, lambda path: swap(path, objects_beside(path)[0]), "quick", SegmentCorrupt),
    ("flipped bit in a frame", segment_of, lambda path: flip(path, frames_at(path) + 5000), "stored", SegmentCorrupt),
    ("flipped bit in an index", segment_of, lambda path: flip(path, index_at(path)), "quick", SegmentCorrupt),
    ("truncated manifest", manifest_of, cut, "quick", ManifestCorrupt),
    ("flipped bit in a manifest", manifest_of, lambda path: flip(path, 700), "quick", ManifestCorrupt),
    (
        "foreign manifest",
        manifest_of,
        lambda path: path.write_bytes(older(path).read_bytes()),
        "quick",
        ManifestCorrupt,
    ),
]


def index_at(path: Path) -> int:
    """Where a segment's index says the height of its third block."""
    start, _ = LAYOUT.split(path.read_bytes())[Section.INDEX]
    return start + 2 * 120


def frames_at(path: Path) -> int:
    start, _ = LAYOUT.split(path.read_bytes())[Section.FRAMES]
    return start


def objects_beside(path: Path) -> list[Path]:
    return [one for one in sorted(path.parent.iterdir()) if one != path]


def older(manifest: Path) -> Path:
    return sorted(manifest.parents[1].rglob("manifest.json"))[0]


@pytest.mark.parametrize(
    ("pick", "harm", "level", "error"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_faults_of_objects(
    site: Site,
    pick: Callable[[Site], Path],
    harm: Callable[[Path], Any],
    level: str,
    error: type[StateferryError],
) -> None:
    """The lowest level that can see it names it; the result is kept. Quick does not see what needs all bytes."""
    path = pick(site)
    name = path.relative_to(site.objects).as_posix()
    harm(path)
    if level == "stored":
        audited(site, "quick").ok()
    found = faults(audited(site, level))

    assert (error.__name__, name) in found
    assert site.here("status").ok()["audits"][level]["faults"] == len(found)


def test_all_faults_are_said(site: Site) -> None:
    """One audit names each of three damaged objects."""
    for path in (part_of(site), segment_of(site)):
        flip(path, 600)
    cut(older(manifest_of(site)))

    assert sorted(name for name, _ in faults(audited(site, "stored"))) == [
        "ManifestCorrupt",
        "PartCorrupt",
        "SegmentCorrupt",
    ]


def test_a_bit_of_the_store(site: Site) -> None:
    """A bit of a file that the store reads its entries from."""
    site.here("restore", "--claimed", node="c").ok()
    files = sorted((site.dir("c") / "store").glob("*.sst"))
    flip(max(files, key=lambda file: file.stat().st_size), 900)

    assert [name for name, _ in faults(audited(site, "stored", "c"))] == [StoreCorrupt.__name__]
    assert audited(site, "quick", "c").ok()["verified"]
