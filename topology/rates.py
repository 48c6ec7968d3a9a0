"""Rates of this machine and its line, measured in passing: what plans of restores are weighed by."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache

from pipeline.errors import StateferryError
from pipeline.objects import ObjectStore
from pipeline.objects.s3 import S3Objects
from pipeline.plans import RATES, Rates
from pipeline.state import UTXO
from pipeline.verify import audit

_START_S = time.process_time()
"""What this process took until here, most of it imports: a helper process takes as long. More was done before in a
process that is not a command of ours."""
_START_S_MAX = 3.0
_PROBE_KEYS = 4096
_PROBE_BYTES = 256 << 10
_AT_A_TIME = 8
"""Requests of a restore (`fetching`)."""


def measured_rates(objects: ObjectStore, probed: str | None) -> Rates:
    """``probed``: an object of some size; 256 KiB of it are read, in two requests, where the store is a bucket."""
    request, byte = RATES.request, RATES.byte
    if isinstance(objects, S3Objects) and probed is not None:
        with suppress(StateferryError):
            request, byte = _line(objects, probed)
    return Rates(request=request, byte=byte, start=min(_START_S, _START_S_MAX), key=_key_s())


def _line(objects: ObjectStore, probed: str) -> tuple[float, float]:
    """Seconds a request, of which several are under way at a time, and a byte: all of them share the line."""
    began_s = time.perf_counter()
    objects.get_range(probed, 0, 1)
    answered_s = time.perf_counter()
    got = objects.get_range(probed, 0, _PROBE_BYTES)
    ended_s = time.perf_counter()
    latency_s = answered_s - began_s
    return latency_s / _AT_A_TIME, max(ended_s - answered_s - latency_s, 0.0) / len(got)


@cache
def _key_s() -> float:
    """Of hashing made-up coins, some milliseconds in all."""
    keys = [at.to_bytes(8, "big") + bytes(28) for at in range(0, _PROBE_KEYS << 48, 1 << 48)]
    entries = [
        (at, UTXO.with_value(key, None, bytes(60))) for at, key in zip(UTXO.storage_keys(keys), keys, strict=True)
    ]
    took_s = []
    for _ in range(2):  # the first time it warms up
        began_s = time.thread_time()
        audit((at, stored) for at, stored in sorted(entries) if stored is not None)
        took_s.append(time.thread_time() - began_s)
    return min(took_s) / _PROBE_KEYS
