"""Sites on a secured broker, and their commands as one of its users."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kafka.fixtures import kafka_place
from tests.kafka.secured import Secured
from tests.topology.commands import Site


def site_on(server: Secured, folder: Path) -> Site:
    """A site whose commands come as the administrator, who may do everything."""
    site = Site(folder)
    site.place = kafka_place(server.admin_url)
    return site


@contextmanager
def coming_as(site: Site, settings: dict[str, str]) -> Iterator[Site]:
    """The same site by these settings, whose commands run in this process."""
    other = copy.copy(site)
    other.place = replace(site.place, url=settings["STATEFERRY_BROKER"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield other
