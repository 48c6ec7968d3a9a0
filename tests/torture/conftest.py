"""How many points, from which seed; what they cost."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from .matrix import Strike, make_strikes
from .points import Point, make_points
from .sites import Templates

SHARE = 42
"""Points of a run that did not ask for more: every fail point once and some, and on Kafka every action."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--points", type=int, default=SHARE, help="how many seeded points to disturb processes at")
    parser.addoption("--seed", type=int, default=1, help="of the points")
    parser.addoption("--point", type=int, default=None, help="this one point of the embedded log alone")
    parser.addoption("--kafka-point", type=int, default=None, help="this one point of the matrix on Kafka alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Two in five points are on Kafka."""
    config = metafunc.config
    seed = config.getoption("--seed", 1)
    count = config.getoption("--points", SHARE)
    one, one_on_kafka = config.getoption("--point", None), config.getoption("--kafka-point", None)
    on_kafka = count * 2 // 5
    if "point" in metafunc.fixturenames:
        points = make_points(seed, count - on_kafka if one is None else one + 1)
        if one_on_kafka is not None:
            points = []
        metafunc.parametrize("point", points if one is None else points[one:], ids=Point.__str__)
    if "strike" in metafunc.fixturenames:
        strikes = make_strikes(seed, on_kafka if one_on_kafka is None else one_on_kafka + 1)
        if one is not None:
            strikes = []
        chosen = strikes if one_on_kafka is None else strikes[one_on_kafka:]
        metafunc.parametrize("strike", chosen, ids=Strike.__str__)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Templates:
    """Shared by all test processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder: Path = (base if worker_id == "master" else base.parent) / "torture-templates"
    folder.mkdir(exist_ok=True)
    return Templates(folder)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a point costs, by scene."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            _, _, name = report.nodeid.partition("test_torture.py::test_killed[")
            if name and report.when == "call":
                seconds[name.split("-")[1]].append(report.duration)
            _, _, name = report.nodeid.partition("test_kafka_torture.py::test_disturbed[")
            if name and report.when == "call":
                action = "-".join(name.split("-")[1:3]).replace("-compute", "")
                seconds[f"kafka {action}"].append(report.duration)
    if seconds:
        terminalreporter.section("torture: seconds a point")
    for scene, spent in sorted(seconds.items()):
        terminalreporter.line(
            f"{scene:<14} {len(spent):4} points  mean {sum(spent) / len(spent):5.1f}  {max(spent):5.1f} max"
        )
