"""Topics of several shards whose archived records are deleted: splitter, source, replicas and primaries go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chains import load_blocks, write_hex_lines
from tests.topology.sharded import Sharded, same

pytestmark = pytest.mark.usefixtures("each_broker")

BLOCKS = load_blocks("mainnet_0_599")
SOME, MORE = 160, 180
FINALITY = 20
CUT = 127


def test_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each topic is cut where what is archived of its shard ends. A replica in an empty directory restores all
    of them; a primary whose stores stand below restores its shards one by one."""
    site = Sharded(tmp_path / "site").begin(2)
    monkeypatch.setenv("STATEFERRY_SESSION_TIMEOUT_S", "6" if site.place.is_kafka else "1")
    site.ingest(write_hex_lines(tmp_path / "some.hex", BLOCKS[:SOME]))
    site.follow("primary", "p", "--finality", FINALITY)
    site.here("restore", "--claimed", "--height", 60, node="away").ok()

    trimmed = site.here("topics", "trim", "--keep-blocks", 0, node="ops").ok()
    assert trimmed["height"] == CUT
    cut = {(one["topic"].removeprefix(site.place.prefix), one["partition"]) for one in trimmed["trimmed"]}
    assert cut == {("blocks", 0), ("diffs", 0), ("diffs", 1), ("shard-blocks", 0), ("shard-blocks", 1)}
    assert site.here("topics", "trim", "--keep-blocks", 0, node="ops").ok()["trimmed"] == []

    said = site.ingest(write_hex_lines(tmp_path / "more.hex", BLOCKS[:MORE]))
    assert (said["connected"], said["skipped"]) == (MORE - SOME, SOME)
    site.follow("primary", "p")
    site.follow("replica", "new")
    away = site.here("run", "--role", "primary", "--until-idle", "-v", node="away")
    assert (away.ok()["height"], away.stderr.count("shard_restored")) == (MORE - 1, 2)
    same(site, ["p", "new", "away"])
