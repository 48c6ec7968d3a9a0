"""An S3 server for tests: moto's, in a thread of this process; or the one that AWS_ENDPOINT_URL names, with a bucket of
ours in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer

_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "a secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def _bucket() -> Iterator[str]:
    """A server with an empty bucket: its name. Processes started meanwhile find it through the environment."""
    with pytest.MonkeyPatch.context() as patch:
        server = None
        if "AWS_ENDPOINT_URL" not in os.environ:
            server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            for name, value in (_SETTINGS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
                patch.setenv(name, value)
        bucket = f"test-{secrets.token_hex(6)}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        try:
            yield bucket
        finally:
            if server is not None:
                server.stop()


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    with _bucket() as bucket:
        yield bucket


@pytest.fixture
def s3_url(s3_bucket: str) -> str:
    """An empty object store."""
    return f"s3://{s3_bucket}/{secrets.token_hex(6)}"
