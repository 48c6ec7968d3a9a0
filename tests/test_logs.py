"""Lines of libraries: said once, and again after a while."""

from __future__ import annotations

import logging

import pytest

from topology import logs


def test_repeated_lines_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line of the same library passes once in a while; another one passes at once."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    sparse = logs.Sparse()

    def passes(name: str, message: str, *args: object) -> bool:
        return sparse.filter(logging.LogRecord(name, logging.ERROR, "", 0, message, args, None))

    assert passes("aiokafka", "node %s is away", 1)
    assert not passes("aiokafka", "node %s is away", 2)
    assert passes("aiokafka", "metadata is old") and passes("faust", "node %s is away", 1)
    clock[0] += logs.REPEAT_S

    assert passes("aiokafka", "node %s is away", 1)
    assert not passes("aiokafka", "node %s is away", 1)
