"""kill -9 of real processes: whoever is started again ends where an undisturbed run ends.

A scene is a site and a few commands. Every point kills the processes of one or more of them at named fail points,
starts the same command again, and compares all there is with the same scene without a kill: state, position, journal,
the frames in force by seq and id, archive and snapshots.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import failpoints

from .points import Point, make_points, targets
from .sites import GENERATION, HEIGHT, ROOT, SHARDED, Site, Templates, differences, make_blocks

EARLY = 60
"""Height of the first snapshot's tip: what is restored above it needs archived frames too."""
REACHED = 110
"""An archived height that no snapshot has."""
RANGED = 127
"""The last height of a range diff."""
BASE = ROOT / "tests" / "data" / "bitcoin" / "block300025_undo"
BASE_HEIGHT = 300025

# Templates


def open_log(site: Site) -> None:
    site.publish([])


def publish(site: Site) -> None:
    site.publish(make_blocks())


def publish_for_shards(site: Site) -> None:
    site.publish(make_blocks(), SHARDED)


def lead(site: Site) -> None:
    site.run("p", "primary", "--until-height", str(EARLY))
    site.step("snapshot", node="p")
    site.run("p", "primary")


def follow(site: Site) -> None:
    site.run("r", "replica")


def snapshot(site: Site) -> None:
    site.step("snapshot", node="p")


def squash_archive(site: Site) -> None:
    site.step("archive", "squash", node="p")


TEMPLATES: dict[str, tuple[str, Callable[[Site], None]]] = {
    "empty": ("", lambda site: None),
    "opened": ("", open_log),
    "published": ("", publish),
    "sharded": ("", publish_for_shards),
    "led": ("published", lead),
    "shardled": ("sharded", lead),
    "followed": ("led", follow),
    "snapped": ("led", snapshot),
    "squashed": ("snapped", squash_archive),
}

# Scenes


def primary(site: Site, point: Point) -> None:
    site.run("p", "primary")
    site.step("snapshot", node="p")


def takeover(site: Site, point: Point) -> None:
    site.run("q", "primary")
    site.step("snapshot", node="q")


def replica(site: Site, point: Point) -> None:
    site.run("r", "replica")


def both(site: Site, point: Point) -> None:
    site.run_both()
    site.step("snapshot", node="p")


def restore(site: Site, point: Point) -> None:
    site.step("restore", node="s")
    site.run("s", "replica")
    site.step("verify", node="s")


def reach(site: Site, point: Point) -> None:
    site.step("restore", "--height", str(REACHED), node="s")
    site.run("s", "replica")
    site.step("verify", node="s")


def claimed(site: Site, point: Point) -> None:
    site.step("restore", "--claimed", node="s")
    site.run("s", "replica")
    site.step("verify", node="s")


def lost(site: Site, point: Point) -> None:
    """The end of the frames is lost; the primary comes first."""
    site.cut(GENERATION.diffs_topic, point.cut)
    site.run("p", "primary", "--until-idle")
    site.run("r", "replica", "--until-idle")
    site.step("snapshot", node="p")


def lost2(site: Site, point: Point) -> None:
    """The end of the frames is lost; the replica comes first."""
    site.cut(GENERATION.diffs_topic, point.cut)
    site.run("r", "replica", "--until-idle")
    site.run("p", "primary", "--until-idle")
    site.run("r", "replica", "--until-idle")
    site.step("snapshot", node="p")


def lostblocks(site: Site, point: Point) -> None:
    """The end of the events is lost, and published again."""
    site.cut(GENERATION.blocks_topic, point.cut)
    site.run("p", "primary", "--until-idle")
    site.publish(make_blocks())
    site.step_number += 1
    site.run("p", "primary", "--until-idle")
    site.run("r", "replica", "--until-idle")
    site.step("snapshot", node="p")


def shards(site: Site, point: Point) -> None:
    """A primary and a replica of all shards: the splitter, a store each, anchors; one snapshot of all. Only a primary
    that leads says the last anchor: it does not while it follows up to a height."""
    site.run("p", "primary", "--until-idle")
    site.run("r", "replica")
    site.step("snapshot", node="p")


def shardrestore(site: Site, point: Point) -> None:
    """All shards from parts and segments, then from the log."""
    site.step("restore", node="s")
    site.run("s", "replica")
    site.step("verify", node="s")


def squash(site: Site, point: Point) -> None:
    """Range diffs of what is archived."""
    squash_archive(site)


def ranged(site: Site, point: Point) -> None:
    """To the end of a range diff."""
    site.step("restore", "--height", str(RANGED), node="s")
    site.run("s", "replica")
    site.step("verify", node="s")


def ingest(site: Site, point: Point) -> None:
    words = ["--blocks", "60", "--changes", "12", "--seed", "3", "--reorg-every", "15", "--interval-s", "0.00001"]
    site.step("ingest", "synthetic", *words, node="p")
    site.run("p", "primary", "--until-idle")


def base(site: Site, point: Point) -> None:
    """A chain that begins with imported coins."""
    coins = ("--base-coins", str(BASE / "snapshot_before.jsonl.gz"))
    site.step("ingest", "bitcoin", str(BASE / "block300025.raw"), *coins, node="p")
    site.run("p", "primary", "--until-height", str(BASE_HEIGHT))


def whole(site: Site, point: Point) -> None:
    words = ["--blocks", "60", "--changes", "12", "--seed", "3", "--reorg-every", "15", "--interval-s", "0.00001"]
    site.step("ingest", "synthetic", *words, node="p")
    site.run("p", "primary", "--until-idle")
    site.run("r", "replica", "--until-idle")
    site.step("snapshot", node="p")
    site.step("restore", node="s")
    site.run("s", "replica", "--until-idle")
    site.step("verify", node="s")


SCENES: dict[str, tuple[str, Callable[[Site, Point], None]]] = {
    "primary": ("published", primary),
    "takeover": ("led", takeover),
    "replica": ("led", replica),
    "both": ("published", both),
    "restore": ("snapped", restore),
    "reach": ("snapped", reach),
    "claimed": ("snapped", claimed),
    "lost": ("followed", lost),
    "lost2": ("followed", lost2),
    "lostblocks": ("followed", lostblocks),
    "shards": ("sharded", shards),
    "shardrestore": ("shardled", shardrestore),
    "squash": ("led", squash),
    "ranged": ("squashed", ranged),
    "ingest": ("opened", ingest),
    "base": ("empty", base),
    "whole": ("opened", whole),
}


def play(templates: Templates, point: Point, path: Path) -> dict[str, Any]:
    """A scene on a copy of its template, and what it left."""
    template, scene = SCENES[point.scene]
    templates.copy(template, path, TEMPLATES)
    scene(Site(path, kills=point.kills, torn=point.torn), point)
    found = Site(path).look()
    shutil.rmtree(path)
    if point.scene == "base":
        # Its generation is made by the command, and ids depend on it.
        found = {"state": found["p state"], "tip": found["p position"].tip, "counts": found["p position"].tip.counts}
    return found


@pytest.mark.torture
def test_killed(point: Point, templates: Templates, tmp_path: Path) -> None:
    """A run that was killed and started again leaves what an undisturbed one leaves."""
    undisturbed = Point(seed=0, number=0, scene=point.scene)
    expected = templates.outcome(point.scene, lambda: play(templates, undisturbed, tmp_path / "undisturbed"))

    found = play(templates, point, tmp_path / "site")

    assert not differences(found, expected), f"again: {point.command}"


def test_every_fail_point_has_a_target() -> None:
    """The first points of any seed kill at every name there is, and the same number gives the same point."""
    assert {target.failpoint for target in targets()} == set(failpoints.NAMES)
    for seed in range(3):
        points = make_points(seed, len(failpoints.NAMES))
        assert {kill.failpoint for point in points for kills in point.kills.values() for kill in kills} >= set(
            failpoints.NAMES
        )
        assert list(map(str, make_points(seed, 300)[: len(points)])) == list(map(str, points))


def test_chain_is_worth_it() -> None:
    """The chain archives whole segments, forks, and takes blocks of both branches off."""
    blocks = make_blocks()

    assert HEIGHT >= 150
    assert len({block.ref.height for block in blocks}) <= len(blocks) - 15
