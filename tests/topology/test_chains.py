"""Real chains through the whole walk: ingest, primary, diffs, replica. What both hold at the end was computed before,
by a program that is not this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chains import base_coins_path, block_files, expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, check, same_state

pytestmark = pytest.mark.usefixtures("each_broker")


def files_of(name: str, folder: Path, part: str = "") -> list[Path]:
    return block_files(name, part) or [write_hex_lines(folder / f"{name}{part}.hex", load_blocks(name, part))]


def check_both(site: Site, entry: dict[str, Any]) -> None:
    assert check(site, "p", entry) == check(site, "r", entry)

    same_state(site, ["p", "r"])


@pytest.mark.parametrize(
    ("name", "height"),
    [("mainnet_0_599", 170), ("signet_0_120", 60), ("regtest_kernel_206", 110), ("regtest_core_getblockstats", None)],
)
def test_chain(name: str, height: int | None, tmp_path: Path) -> None:
    """Primary and replica hold what Bitcoin Core would, at a height on the way and at the end."""
    site = Site(tmp_path)
    site.ingest(*files_of(name, tmp_path))
    steps = expected(name)
    if height is not None:
        for role, node in (("primary", "p"), ("replica", "r")):
            assert site.here("run", "--role", role, "--until-height", height, node=node).ok()["height"] == height
        check_both(site, next(step for step in steps if step.get("height") == height))
    site.follow_both()

    check_both(site, steps[-1])
    assert site.kinds()["APPLY"] == len(load_blocks(name)) and site.kinds()["UNDO"] == 0


@pytest.mark.parametrize("name", ["mainnet_block_367891", "block300025_undo"])
def test_late_block_on_base_coins(name: str, tmp_path: Path) -> None:
    """A block runs on the coins it spends: both nodes begin with the published base, and prove it themselves."""
    site = Site(tmp_path)
    before, after = expected(name)[0], expected(name)[-1]
    said = site.here("ingest", "bitcoin", *block_files(name), "--base-coins", base_coins_path(name)).ok()
    assert (said["connected"], said["height"]) == (1, after["height"])
    site.follow("primary", "p")
    site.follow("replica", "r")
    for node in ("p", "r"):
        assert site.here("verify", node=node).ok()["verified_height"] == after["height"]

    check_both(site, after)
    (base,) = site.here("status", node="r").ok()["snapshots"]
    assert base["height"] == after["height"] - 1
    assert site.here("restore", "--height", base["height"], node="base").ok()["coins"] == before["coins"]
    assert site.muhash("base")["muhash"] == before["muhash"]


def test_reorg_of_depth_two(tmp_path: Path) -> None:
    """A side branch takes over: one UNDO frame a block. Reading the files again publishes nothing; `--again` walks
    back."""
    site = Site(tmp_path)
    _, main_end, side_end = expected("reorg_btcd")
    main, side = (block_files("reorg_btcd", part) for part in ("main", "side"))
    site.ingest(*main)
    site.follow_both()
    check_both(site, main_end)

    said = site.ingest(*side)
    assert (said["connected"], said["rewinds"]) == (3, 1)
    site.follow_both()
    check_both(site, side_end)
    assert site.kinds() == {"GENERATION": 1, "EPOCH": 2, "APPLY": 8, "UNDO": 2}

    events = site.records("blocks")
    for files in (main, side, [*main, *side]):
        said = site.ingest(*files)
        assert (said["connected"], said["rewinds"]) == (0, 0)
    assert site.records("blocks") == events

    said = site.here("ingest", "bitcoin", *main, "--again").ok()
    assert (said["connected"], said["rewinds"]) == (2, 1)
    site.follow_both()
    check_both(site, main_end)
    assert site.kinds() == {"GENERATION": 1, "EPOCH": 3, "APPLY": 10, "UNDO": 5}


def test_reorg_there_and_back(tmp_path: Path) -> None:
    """A, then B from a fork, then A again: the set of A both times, and each node takes blocks off by itself."""
    site = Site(tmp_path)
    steps = expected("reorg_floresta")
    genesis, a, b = (files_of("reorg_floresta", tmp_path, part) for part in ("genesis", "A", "B"))
    site.ingest(*genesis, *a)
    site.follow_both()
    check_both(site, steps[1])
    undone = 0
    for step, files in zip(steps[2:], (b, a), strict=True):
        said = site.here("ingest", "bitcoin", *files, "--again").ok()
        assert (said["connected"], said["rewinds"]) == (step["connect"], 1)
        site.follow_both()
        check_both(site, step)
        undone += step["disconnect"]
        assert site.kinds()["UNDO"] == undone

    assert site.muhash("r")["muhash"] == steps[1]["muhash"]
