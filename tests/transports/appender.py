"""A process that appends until it is ended, and prints each offset once it is acknowledged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from topology.transports.sqlite_log import SqliteLog

path, name, count = sys.argv[1:]
log = SqliteLog(Path(path))
for number in range(int(count)):
    value = f"{name}:{number}".encode()
    (offset,) = log.append("a", 0, [(None, value * (1 + number % 50))])
    print(json.dumps({"offset": offset, "value": value.decode()}), flush=True)
log.close()
