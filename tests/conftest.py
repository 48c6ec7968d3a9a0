"""For all tests: properties are judged by what they find, not by how long a busy machine takes."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("stateferry", deadline=None)
settings.load_profile("stateferry")
