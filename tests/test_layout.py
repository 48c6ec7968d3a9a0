"""The walk points one way, and the core knows no clock, no environment, no chance."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "pipeline").rglob("*.py"))

SHELL_MODULES = {
    *("topology", "faust", "mode", "aiokafka", "asyncio", "aiohttp", "structlog", "logging", "click", "rich"),
    *("time", "datetime", "random", "secrets", "uuid", "socket", "subprocess", "sqlite3", "pydantic_settings"),
}
SHELL_NAMES = {
    *("os.environ", "os.getenv", "os.urandom", "os.getpid", "sys.argv", "sys.exit"),
    *("print", "input", "open"),
}
ALLOWED = {
    "pipeline/objects/files.py": ["secrets"],  # names of drafts, which nobody ever sees
    "pipeline/objects/s3.py": ["time", "datetime.timedelta"],  # pauses before a request is made again
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def shell_uses(source: str) -> list[str]:
    """What a module of the core must not use, by name."""
    tree = ast.parse(source)
    found = [name for name in imported(tree) if name.split(".")[0] in SHELL_MODULES or name in SHELL_NAMES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in SHELL_NAMES:
            found.append(ast.unparse(node))
    return found


def test_imports_keep_their_contracts() -> None:
    """Every contract in pyproject.toml holds, layers of both packages included."""
    # In a process of its own: it sets up logging, and so turns off every logger of the process that there was before.
    words = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", CORE, ids=lambda file: str(file.relative_to(ROOT)))
def test_core_knows_no_shell(file: Path) -> None:
    """Time, chance, settings and output come to the core as arguments, or not at all."""
    assert shell_uses(file.read_text()) == ALLOWED.get(str(file.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time", ["time"]),
        ("from os import environ", ["os.environ"]),
        ("import os\nos.environ['x']", ["os.environ"]),
        ("def late():\n    from topology import app", ["topology.app"]),
        ("print(1)", ["print"]),
        ("import os\nos.fsync(1)\nself.open(2)", []),
    ],
)
def test_shell_is_seen(source: str, found: list[str]) -> None:
    """The check above sees what it looks for."""
    assert shell_uses(source) == found
