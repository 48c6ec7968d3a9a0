"""Files of keys, certificates and passwords: read once, refused by name, and never shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.errors import SecretUnusable

_OPEN_TO_OTHERS = stat.S_IRWXO | stat.S_IWGRP


def read(path: Path, setting: str, bytes_max: int, *, secret: bool = False) -> bytes:
    """What a file holds. ``secret``: nobody else may read or write it. Raises SecretUnusable."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe must not hold the start
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise unusable(path, setting, "is not a file")
            if secret and mode & _OPEN_TO_OTHERS:
                who = "others may read or write it" if mode & stat.S_IRWXO else "its group may write it"
                raise unusable(path, setting, f"has mode {mode & 0o777:04o}: {who}", f"chmod o-rwx,g-w {path}")
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise unusable(path, setting, f"cannot be read: {error.strerror}") from error
    if not data:
        raise unusable(path, setting, "is empty")
    if len(data) > bytes_max:
        raise unusable(path, setting, f"has more than {bytes_max} bytes")
    return data


def unusable(path: Path | None, setting: str, what: str, way_out: str = "") -> SecretUnusable:
    return SecretUnusable(f"the file of {setting} {what}", where=str(path), way_out=way_out or f"check {setting}")
