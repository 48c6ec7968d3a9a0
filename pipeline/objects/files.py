"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT_PREFIX = ".new-"


@contextmanager
def temporary_in(folder: Path) -> Iterator[Path]:
    """A path nobody else uses; whatever stands there at the end goes. Made with the user's own file mode."""
    temporary = folder / f"{DRAFT_PREFIX}{secrets.token_hex(8)}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A draft, which takes the place of what stands at ``path`` once the block is through, and lasts."""
    with temporary_in(path.parent) as draft:
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or what was renamed or made in a folder, last.

    A failed sync is an error for good: a second one would succeed without having written anything."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
