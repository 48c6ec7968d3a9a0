"""A proxy in front of an S3 server that spoils every so many-th request, in one of the ways in which networks do."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("busy", "refused", "lost", "cut")
"""Answered with 503 · dropped before it is forwarded · its answer dropped · the answer ends half-way."""


@contextmanager
def faulty(endpoint: str, fault: str, every: int, *, port: int = 0) -> Iterator[str]:
    """An endpoint that forwards to another. The first request is sound, the ``every``-th is not."""
    target = urlsplit(endpoint)
    counter = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            spoilt = fault if next(counter) % every == 0 else ""
            if spoilt == "busy":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if spoilt == "refused":
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(str(target.hostname), target.port or 80)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if spoilt == "lost":
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", size or str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if spoilt == "cut" else data)
            self.close_connection = spoilt == "cut"

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
