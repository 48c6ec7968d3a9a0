"""For all tests: the brokers, and which test runs where; and properties judged by what they find, not by how long a
busy machine takes."""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.kafka.fixtures import (  # noqa: F401
    KAFKA_TURNS_LEFT,
    broker_server,
    kafka_names,
    kafka_server,
    kafka_servers,
    on_kafka,
    own_kafka,
    place,
    pytest_runtest_teardown,
    three_brokers,
)
from tests.s3 import s3_bucket, s3_url  # noqa: F401

settings.register_profile("stateferry", deadline=None)
settings.load_profile("stateferry")


_PROCESSES = ("/topology/", "/torture/", "/transports/", "/security/", "test_demo.py", "test_bench.py")
"""Where tests start processes and wait for them: each takes as long as twenty others."""
_LONG = (
    "test_crash_model.py",
    "test_demo.py",
    "test_large_blocks.py",
    "test_full_buffers.py",
    "test_s3.py",
    "test_fencing.py",
)
"""Each as long as sixty."""


class _LongestFirst(OrderedDict[str, dict[str, bool]]):
    """Scopes, of which the one with most to do is taken first: no long one is left for the end."""

    def popitem(self, last: bool = True) -> tuple[str, dict[str, bool]]:
        scope = max(self, key=lambda scope: sum(_weight(test) for test in self[scope]))
        return scope, self.pop(scope)


def _weight(test: str) -> int:
    if any(word in test for word in _LONG):
        return 60
    return 20 if any(word in test for word in _PROCESSES) else 1


class _ByFile(LoadScopeScheduling):
    """What a file has for one broker goes to one process, because it is built on the same fixtures. But points of
    torture and crashes of the model stand alone, and whatever needs three brokers, or secured ones, uses the same,
    which then end: two cores do not carry two such clusters."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self.workqueue = _LongestFirst()

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        if any(word in nodeid for word in ("test_broker_loss.py", "kill-broker", "move-leader")):
            return "three brokers"
        if "/security/" in file and "test_secret_files.py" not in file:
            return "secured brokers"
        if "/torture/" in file or "test_crash_model.py" in file:
            return nodeid
        return f"{file} {next((name for name in kafka_names() if name in test), '')}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: twice the cores, because half of the time tests wait, for brokers, sessions and commands."""
    return 2 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test runs on the embedded log, and every second one of a file on Kafka too, whose versions take turns. On
    all of them run the suites of the transports, where they may differ, and everything if KAFKA_VERSIONS names them.
    With KAFKA_TURNS=left it is what this leaves out that runs, and what is marked for it, and nothing else."""
    if os.environ.get("KAFKA_VERSIONS"):
        return
    found: dict[tuple[str, Path], list[pytest.Item]] = defaultdict(list)
    longer = {item for item in items if item.get_closest_marker("parity")}
    for item in items:
        if item not in longer:
            found[_broker(item), item.path].append(item)
    versions = kafka_names()
    left = longer | {
        item
        for (broker, path), of_file in found.items()
        if broker in versions and path.parent.name != "transports"
        for at, item in enumerate(of_file)
        if at % (2 * len(versions)) != 2 * versions.index(broker)
    }
    config.hook.pytest_deselected(items=[item for item in items if (item in left) is not KAFKA_TURNS_LEFT])
    items[:] = [item for item in items if (item in left) is KAFKA_TURNS_LEFT]


def _broker(item: pytest.Item) -> str:
    """The broker that a test runs on, by its name; empty: none."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    own = f"kafka-{params['own_kafka']}" if "own_kafka" in params else ""
    return str(params.get("broker_server") or params.get("kafka_server") or own)
