"""How many points, from which seed; what they cost."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from .points import Point, make_points
from .sites import Templates

SHARE = 32
"""Points of a run that did not ask for more: every fail point once, and some."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--points", type=int, default=SHARE, help="how many seeded points to kill processes at")
    parser.addoption("--seed", type=int, default=1, help="of the points")
    parser.addoption("--point", type=int, default=None, help="this one point alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        config = metafunc.config
        one = config.getoption("--point", None)
        seed = config.getoption("--seed", 1)
        count = config.getoption("--points", SHARE)
        points = make_points(seed, count if one is None else one + 1)
        metafunc.parametrize("point", points if one is None else points[one:], ids=Point.__str__)


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
    if seconds:
        terminalreporter.section("torture: seconds a point")
    for scene, spent in sorted(seconds.items()):
        terminalreporter.line(
            f"{scene:<14} {len(spent):4} points  mean {sum(spent) / len(spent):5.1f}  {max(spent):5.1f} max"
        )
