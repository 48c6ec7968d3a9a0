"""What plans of restores are weighed by, measured in passing."""

from __future__ import annotations

from pathlib import Path

from pipeline.objects import LocalObjects, open_objects
from pipeline.plans import RATES
from topology.rates import measured_rates


def test_here(tmp_path: Path) -> None:
    """This machine's hashing and start of a process; requests of a local folder are not measured, nor is anything read:
    there is no such object."""
    rates = measured_rates(LocalObjects(tmp_path), "walk/nothing")

    assert (rates.request, rates.byte) == (RATES.request, RATES.byte)
    assert 0 < rates.start <= 3
    assert 1e-8 < rates.key < 1e-3
    assert measured_rates(LocalObjects(tmp_path), None) == rates


def test_a_bucket(s3_url: str) -> None:
    """Requests and bytes as they came, however little there is to read; what is not there is not measured."""
    objects = open_objects(s3_url)
    objects.put_new("walk/large", bytes(1 << 20))
    objects.put_new("walk/small", b"two bytes"[:2])
    for name in ("walk/large", "walk/small"):
        rates = measured_rates(objects, name)

        assert rates.request > 0 and rates.request != RATES.request
        assert rates.byte >= 0 and rates.byte != RATES.byte
    assert measured_rates(objects, "walk/gone").request == RATES.request
