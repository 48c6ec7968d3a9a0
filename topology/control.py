"""The control socket: how commands ask a running worker, which owns its store.

A Unix socket in the data directory; one JSON object a line, request and answer. Errors travel by name, so that a
command ends with the same exit code as if it had opened the store itself.

`python -m topology.control SOCKET` asks nothing but whether a worker answers there, in a tenth of a second: what a
container's health check runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.errors import StateferryError

_LINE_BYTES_MAX = 64 << 20
"""Of one answer: `scan` answers in pages below it."""
_CONNECT_TIMEOUT_S = 2.0
ANSWER_S = 600.0
"""For an answer that may hash all of a state; a look at the worker itself takes less."""
ALIVE_S = 5.0
"""For a worker to say that it is there."""

Handler = Callable[[dict[str, Any]], Awaitable[Any]]


class ControlServer:
    """Answers on the socket until closed."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        # The directory is ours by its lock, so a socket that is there is a dead worker's.
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(self._path) as address:
            listener.bind(address)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=_LINE_BYTES_MAX)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return {"ok": await self._handler(request)}
        except StateferryError as error:
            return {"error": error.name, "what": error.what, "where": error.where, "way_out": error.way_out}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": "UsageError", "what": f"a request that cannot be read: {error!r}"}


def ask(path: Path, request: dict[str, Any], *, timeout_s: float = ANSWER_S) -> Any:
    """Ask the worker that owns a socket; None if there is none. Raises the error that it answers with."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(connection):
        connection.settimeout(_CONNECT_TIMEOUT_S)
        try:
            with _short(path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return None
        connection.settimeout(timeout_s)
        try:
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(request).encode() + b"\n")
                stream.flush()
                line = stream.readline(_LINE_BYTES_MAX)
        except OSError as error:
            raise StateferryError(f"the worker did not answer: {error}", where=str(path)) from error
    if not line:
        raise StateferryError("the worker ended before it answered", where=str(path))
    answer = json.loads(line)
    if "error" in answer:
        kind = getattr(errors, answer["error"], StateferryError)
        raise kind(answer["what"], where=answer.get("where", ""), way_out=answer.get("way_out", ""))
    return answer["ok"]


@contextlib.contextmanager
def _short(path: Path):  # type: ignore[no-untyped-def]
    """A name for a socket that fits the 107 bytes of its address, however deep the directory is."""
    if len(os.fsencode(path)) < 100 or not Path("/proc/self/fd").is_dir():
        yield str(path)
        return
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(0 if ask(Path(sys.argv[1]), {"what": "alive"}, timeout_s=ALIVE_S) else "no worker answers")
