"""Every event that the code logs is in the vocabulary, with its fields; lines of libraries are said once in a while."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

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


MAKES_LOGGER = "\nlog = logs.get()\n"
LEVELS = {"debug", "info", "warning", "error", "critical"}
TOPOLOGY = Path(logs.__file__).parent


def logged() -> Iterator[tuple[str, str, list[str]]]:
    """Every call of a logger in the source: where, which event, which fields."""
    for path in sorted(TOPOLOGY.rglob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        for call in ast.walk(tree):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)) if MAKES_LOGGER in source:
                    where = f"{path.relative_to(TOPOLOGY)}:{call.lineno}"
                    assert level in LEVELS, where
                    assert len(call.args) == 1 and isinstance(call.args[0], ast.Constant), f"{where}: no constant name"
                    names = [name for each in call.keywords for name in fields_of(each, tree, where)]
                    yield where, call.args[0].value, [name for name in names if name != "exc_info"]


def fields_of(given: ast.keyword, tree: ast.Module, where: str) -> list[str]:
    """The field that a keyword names, or those of ``**self.method()``, whose last line returns them by name."""
    if given.arg is not None:
        return [given.arg]
    match given.value:
        case ast.Call(func=ast.Attribute(attr=method)):
            (function,) = (one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name == method)
            match function.body[-1]:
                case ast.Return(value=ast.Dict(keys=keys)):
                    return [key.value for key in keys if isinstance(key, ast.Constant)]
    raise AssertionError(f"{where}: fields that cannot be read off the source")


def test_events_are_those_of_the_vocabulary() -> None:
    """What is logged has a name and fields from there; what is there is logged."""
    found = list(logged())
    vocabulary = {event: set(fields.split(", ")) for event, fields in logs.EVENTS.items()}

    assert {event for _, event, _ in found} == set(vocabulary)
    wrong = [(where, event) for where, event, fields in found if set(fields) != vocabulary[event]]
    assert wrong == []
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", event) for event in vocabulary)


def test_only_one_module_knows_the_library() -> None:
    """Whatever logs does it through a module's own `log`, which the scan above finds."""
    sources = {path: path.read_text() for path in TOPOLOGY.rglob("*.py")}
    direct = [path.name for path, text in sources.items() if re.search(r"\bimport structlog\b", text)]

    assert direct == ["logs.py"]
    assert all(text.count("logs.get()") == text.count(MAKES_LOGGER) for text in sources.values())
