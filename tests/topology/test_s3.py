"""Snapshots, archive and restore on an S3 server, and a server that is away for a while."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipeline.archive_names import parse_segment_name
from pipeline.errors import ObjectsUnavailable
from pipeline.objects import ObjectStore, open_objects
from tests.chains import load_blocks, write_hex_lines
from tests.faulty_s3 import faulty
from tests.topology.commands import Site, same_state

BLOCKS = load_blocks("mainnet_0_599")[:200]
FINALITY = 6


@pytest.fixture
def site(tmp_path: Path, s3_url: str) -> Site:
    site = Site(tmp_path / "site")
    site.bucket_url = s3_url
    return site


def archived(objects: ObjectStore) -> int:
    """How many heights the archive has."""
    names = (parse_segment_name(info.name) for info in objects.list())
    return sum(name.last - name.first + 1 for name in names if name is not None)


@pytest.mark.parametrize(("fault", "every"), [("", 0), ("lost", 4)])
def test_restored_from_a_bucket(
    site: Site, fault: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archive, snapshot, restore at two heights, and on from there: the same as from a directory, whatever the line
    does to every so many-th request."""
    site.ingest(write_hex_lines(tmp_path / "some.hex", BLOCKS[:120]))
    endpoint, objects = os.environ["AWS_ENDPOINT_URL"], open_objects(site.bucket_url)
    with faulty(endpoint, fault, every or 1_000_000) as spoilt:
        monkeypatch.setenv("AWS_ENDPOINT_URL", spoilt)
        site.follow("primary", "p", "--finality", FINALITY)
        site.here("snapshot").ok()
        site.ingest(write_hex_lines(tmp_path / "all.hex", BLOCKS))
        site.follow_both()
        site.here("snapshot", "--height", 193).ok()
        site.here("restore", node="newest").ok()
        at_150 = site.here("restore", "--height", 150, node="earlier").ok()
        site.follow("replica", "newest")

    assert archived(objects) == 200 - FINALITY
    assert at_150["height"] == 150 and at_150["proven"]
    assert site.here("verify", "--level", "full", node="newest").ok()
    same_state(site, ["p", "r", "newest"])


def test_server_that_is_away(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary goes on without it, says so, and archives all of it once the server is back."""
    site.ingest(write_hex_lines(tmp_path / "all.hex", BLOCKS))
    endpoint, objects = os.environ["AWS_ENDPOINT_URL"], open_objects(site.bucket_url)
    with faulty(endpoint, "", 1_000_000) as spoilt:
        port = urlsplit(spoilt).port or 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", spoilt)
    with site.running("primary", "p", "--finality", FINALITY) as primary:
        site.wait_for_status("p", primary, lambda status: status["shards"][0]["archive_trouble"] is not None)
        site.wait_for("p", primary, height=199)
        assert "tcp connect error" in site.here("snapshot").failed(ObjectsUnavailable)
        with faulty(endpoint, "", 1_000_000, port=port):
            site.wait_for_status("p", primary, lambda status: status["shards"][0]["archive_trouble"] is None)
            assert site.here("snapshot").ok()["height"] == 199 - FINALITY
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            assert archived(objects) == 200 - FINALITY
