"""Every benchmark runs at tiny sizes; rows have their shape; what does not depend on the clock holds."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.position import decode_meta
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from tests.kafka.fixtures import Place
from topology.bench import apply as apply_bench
from topology.bench import large, loads, pareto, processes, report
from topology.bench.cli import bench
from topology.bench.report import Row, stages_of
from topology.bench.topic_bytes import appended_bytes
from topology.bench.workers import Worker


def bench_rows(*arguments: str) -> dict[str, dict[str, Any]]:
    """What a benchmark prints as JSON, by name; the shape that all have is checked."""
    result = CliRunner().invoke(bench, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    for row in rows.values():
        measures = row.keys() - {"name", "baseline", "ratio", "peak_rss_mb", "stages"}
        assert measures, row
        assert all(row[measure] >= 0 for measure in measures), row
        assert (row["baseline"] is None) == (row["ratio"] is None), row
        assert row["baseline"] is None or (row["baseline"] in rows and row["ratio"] > 0), row
        assert row["peak_rss_mb"] is None or row["peak_rss_mb"] > 1, row
    return rows


@pytest.fixture(scope="module")
def wire() -> dict[str, dict[str, Any]]:
    return bench_rows("wire", "--quick")


@pytest.mark.parametrize("height", [367_891, 300_025])
def test_frames_of_real_blocks_are_small(wire: dict[str, dict[str, Any]], height: int) -> None:
    """With references, 1.8 times below JSON with zstd-3; nothing that names keys whole comes near."""
    assert wire[f"block-{height}/frame"]["ratio"] >= 1.8
    assert wire[f"block-{height}/grouped-whole-keys+zstd-3"]["ratio"] < 1.3
    assert wire[f"block-{height}/archived"]["bytes_per_change"] > wire[f"block-{height}/hash-bytes"]["bytes_per_change"]


def test_wire_compares_with_json(wire: dict[str, dict[str, Any]]) -> None:
    """All rows of a load have its JSON row as baseline; the frame also says what making it costs."""
    for name, row in wire.items():
        load, encoding = name.split("/")
        assert row["baseline"] == (None if encoding == "json+zstd-3" else f"{load}/json+zstd-3")
        assert ("encode_share" in row) == (encoding == "frame")
        if encoding == "frame":
            assert 0 < row["encode_share"] < 0.5


def test_frames_on_a_broker_cost_little_more(wire: dict[str, dict[str, Any]]) -> None:
    """Records, batches and pages are a few percent of a frame."""
    loads = {name.partition("/")[0] for name in wire}
    frames = {load: wire[f"{load}/frame"]["bytes_per_change"] for load in loads}

    assert all(1 < wire[f"{load}/on-embedded-log"]["bytes_per_change"] / frames[load] < 1.05 for load in loads)


def test_bytes_on_kafka(on_kafka: Place) -> None:
    """A record of 1,000 bytes has 9 bytes of lengths, and its batch a head of 61."""
    place = processes.Place(on_kafka.url, on_kafka.prefix)

    assert appended_bytes(place, [bytes(1000)] * 3) == 3 * (1000 + 9 + 61)


def test_apply_has_stages_that_sum_up() -> None:
    """Each load has its bare baselines, and stages that are all of its time."""
    rows = bench_rows("apply", "--blocks", "3", "--changes", "300", "--quick")

    assert list(rows) == [
        f"{row}{load}{more}"
        for load in ("block-367891", "synthetic-300")
        for row, more in (("writebatch-", ""), ("writebatch-", "-sorted"), ("", ""), ("", "-alone"))
    ]
    for name in ("block-367891", "block-367891-alone", "synthetic-300", "synthetic-300-alone"):
        stages = rows[name]["stages"]
        assert [stage["name"] for stage in stages] == [*apply_bench.STAGES, "rest"]
        assert sum(stage["share"] for stage in stages) == pytest.approx(1)
        assert sum(stage["us_per_change"] for stage in stages) == pytest.approx(1e6 / rows[name]["changes_per_s"])


def test_apply_prunes_and_archives(tmp_path: Path) -> None:
    """Behind finality the journal is pruned, and whole segments stand in the archive: a row does all the work."""
    events = [loads.event_of(block, walk) for walk, block in enumerate(loads.synthetic_blocks(170, 9), 1)]
    with Worker(apply_bench.Applier, tmp_path, None) as applier:
        applier.ask(events)
    store = RocksStore(tmp_path / "store")
    held = store.get_meta(META_KEY)
    store.close()

    assert held is not None
    meta = decode_meta(held)
    assert (meta.tip.height, meta.final_height, meta.archived_to) == (169, 69, 64)
    assert meta.journal_first_height == 64
    assert len(list((tmp_path / "objects").rglob("*.seg"))) == 1


def test_without_real_blocks_only_synthetic_rows_run(tmp_path: Path) -> None:
    """A package installed without the repository says so."""
    result = CliRunner().invoke(
        bench, ["apply", "--blocks", "1", "--changes", "50", "--data", str(tmp_path), "--json"], catch_exceptions=False
    )

    assert [row["name"] for row in json.loads(result.stdout)][-1] == "synthetic-50-alone"
    assert len(json.loads(result.stdout)) == 4
    assert loads.WITHOUT_DATA.split(":", maxsplit=1)[0][:40] in result.stderr.replace("\n", " ")


def test_snapshot() -> None:
    """A snapshot of a small state, and a primary that went on beside it."""
    rows = bench_rows("snapshot", "--quick")

    assert list(rows) == ["apply-alone-20000", "apply-beside-20000", "snapshot-20000"]
    assert rows["snapshot-20000"]["keys_per_s"] > 0 and rows["snapshot-20000"]["megabytes"] > 1
    assert rows["apply-beside-20000"]["ratio"] > 0


def test_apply_where_keys_live() -> None:
    """Warm, cold, and cold with processes that read ahead; the last beside the one without."""
    names = [f"keys-{large.KEYS_MIN}{kind}" for kind in ("", "-cold", "-cold-prefetch")]
    rows = bench_rows("apply", "--keys", str(large.KEYS_MIN), "--quick")

    assert list(rows) == names
    assert [row["baseline"] for row in rows.values()] == [None, None, names[1]]


def test_pareto(tmp_path: Path) -> None:
    """Every choice at every interval, in the table, in the file and in the picture."""
    rows = bench_rows("pareto", "--quick", "--out", str(tmp_path))

    assert len(rows) == 6 * len(pareto.INTERVALS)
    with (tmp_path / "pareto.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["restore_s"]) for line in lines] == pytest.approx(
        [row["restore_s"] for row in rows.values()], 1e-4
    )
    assert [int(line["is_best"]) for line in lines] == [row["is_best"] for row in rows.values()]
    for name in ("none", "zstd3"):
        costs = [rows[f"{name}-every-{interval}"] for interval in pareto.INTERVALS]
        assert [row["bytes_per_block"] for row in costs] == sorted(
            (row["bytes_per_block"] for row in costs), reverse=True
        )
        assert [row["restore_s"] for row in costs] == sorted(row["restore_s"] for row in costs)
    assert (tmp_path / "pareto.png").read_bytes()[1:4] == b"PNG"


def test_the_front_is_what_nothing_beats() -> None:
    def point(*costs: float) -> pareto.Point:
        size, snapshot_ms, restore_s = costs
        return pareto.Point(
            codec="zstd",
            level=1,
            interval_blocks=64,
            bytes_per_block=size,
            snapshot_ms_per_block=snapshot_ms,
            restore_s=restore_s,
        )

    cheap, fast, equal, worse, mixed = point(1, 1, 9), point(2, 2, 1), point(2, 2, 1), point(2, 3, 1), point(3, 1, 2)
    assert pareto.front([cheap, fast, equal, worse, mixed]) == [cheap, fast, equal, mixed]


def test_reads() -> None:
    """Hits are found, misses are not (the benchmark asserts it); every row has its bare one."""
    rows = bench_rows("reads", "--keys", "3000", "--lookups", "2000")

    kinds = ("hit-1", "hit-100", "miss-1", "miss-100")
    assert set(rows) == {*kinds, *(f"rocksdict-{kind}" for kind in kinds)}


def test_restore() -> None:
    """Each way leads to the same number of keys (the benchmark asserts it)."""
    rows = bench_rows("restore", "--keys", "9000")

    assert list(rows) == [f"{way}-9000" for way in ("replay", "copy", "restore-claimed", "restore-proven")]


def test_pipeline() -> None:
    """Real processes: all changes arrive, and lags are positive."""
    rows = bench_rows("pipeline", "--blocks", "12", "--changes", "100", "--tip-blocks", "5", "--quick")

    assert list(rows) == ["apply-100", "ingest-100", "primary-100", "replica-100", "tip-500"]
    assert all(rows[name]["topic_bytes_per_change"] > 20 for name in ("ingest-100", "primary-100"))
    tip = rows["tip-500"]
    assert 0 < tip["primary_p50_ms"] <= tip["primary_p99_ms"]
    assert 0 < tip["replica_p50_ms"] <= tip["replica_p99_ms"]


def test_backlog() -> None:
    """All blocks are applied, then followed (the benchmark asserts it); memory is known in every quarter."""
    rows = bench_rows("backlog", "--blocks", "300", "--changes", "2")

    assert list(rows) == ["ingest-300", "primary-300", "replica-300"]
    if sys.platform == "linux":
        for name in ("primary-300", "replica-300"):
            quarters = [rows[name][f"rss_mb_q{quarter}"] for quarter in range(1, 5)]
            assert 10 < min(quarters) <= max(quarters) <= rows[name]["peak_rss_mb"]


def test_stages_are_shown_under_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people has a line per stage, and a rest."""
    row = Row(name="some", measures={"changes_per_s": 1e6}, stages=stages_of({"one": 1.0}, 4.0), changes=2_000_000)

    report.show("title", [row], as_json=False, notes=["a note"])

    shown = capsys.readouterr().out
    assert "1,000,000" in shown
    assert "0.50 us" in shown and "25%" in shown
    assert "1.50 us" in shown and "75%" in shown
    assert "a note" in shown


def test_archive() -> None:
    """Both ways lead to the same keys, by range diffs in fewer bytes; the parts of the archive add up."""
    rows = bench_rows("archive", "--blocks", "150", "--changes", "40", "--keys", "300")

    segments, ranges = rows["segments-40"]["bytes"], rows["ranges-40"]["bytes"]
    assert rows["segments-and-ranges-40"]["bytes"] == segments + ranges
    assert rows["restore-ranges-40"]["bytes"] < rows["replay-40"]["bytes"] == segments
    assert rows["full-snapshots-40"]["bytes"] == pytest.approx(
        2 * rows["full-snapshots-40"]["bytes_per_point"], rel=0.01
    )
