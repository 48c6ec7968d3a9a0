"""`stateferry drill`: the state and the topics come back from the object store alone, to the same root."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import NotFound
from pipeline.objects import LocalObjects
from tests.chains import block_files, expected
from tests.topology.commands import Site

STEPS = expected("mainnet_0_599")
ARCHIVED = 447
"""The last block of a whole segment below the final height, 499."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A primary at height 599, with a snapshot of 400 and an archive up to 447."""
    site = Site(tmp_path / "site")
    site.ingest(*block_files("mainnet_0_599"))
    site.follow("primary", "p", "--until-height", "500")
    assert site.here("snapshot").ok()["height"] == 400
    site.follow("primary", "p")
    return site


def test_everything_else_is_lost(site: Site, tmp_path: Path) -> None:
    """From a snapshot and the frames above it: root and coins are those of the chain, and what was there before is as
    it was."""
    objects, scratch = LocalObjects(site.objects), tmp_path / "scratch"
    scratch.mkdir()
    before = list(objects.list())
    done = site.here("drill", "--scratch", scratch).ok()

    assert (done["restored_height"], done["tip_height"], done["rpo_blocks"]) == (ARCHIVED, 599, 599 - ARCHIVED)
    assert (done["topics_from"], done["topics_blocks"]) == (400, 47)
    assert (done["keys"], done["replica_proof"]) == (STEPS[ARCHIVED]["coins"], "proven")
    assert 0 < done["rto_claimed_s"] <= done["rto_proven_s"] <= done["rto_topics_s"]
    assert list(objects.list()) == before
    assert list(scratch.iterdir()) == []


def test_nothing_to_restore(tmp_path: Path) -> None:
    """An empty object store is said to be one, and leaves no scratch."""
    site = Site(tmp_path / "site")
    site.here("drill", "--scratch", tmp_path).failed(NotFound)

    assert [path.name for path in tmp_path.iterdir()] == ["site"]
