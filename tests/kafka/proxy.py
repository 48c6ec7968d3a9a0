"""A network between worker and broker that can be cut: a proxy on loopback, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from tests.kafka.server import Behind

CALL_TIMEOUT_S = 30.0
_CHUNK_BYTES = 64 * 1024


class Proxy:
    """Forwards every connection to ``behind.proxy_port`` to the listener behind it, until told otherwise."""

    def __init__(self, behind: Behind) -> None:
        self.connections = 0
        """Taken so far."""
        self._behind = behind
        self._delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._passes = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.mend()

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self._behind.proxy_port}"

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._call(self._cut())

    def stall(self) -> None:
        """Let nothing pass and tell nobody: connections stand, and new ones are taken."""
        self._call(self._stall())

    def delay(self, seconds: float) -> None:
        """Hold everything for a while."""
        self._delay_s = seconds

    def mend(self) -> None:
        """Let everything pass, also what was stalled."""
        self._delay_s = 0.0
        self._call(self._mend())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _mend(self) -> None:
        self._passes.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._behind.proxy_port)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _stall(self) -> None:
        self._passes.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._behind.port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, there_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))
        finally:
            for each in both:
                each.transport.abort()
            self._writers -= both

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._passes.wait()
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()
