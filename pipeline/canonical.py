"""Documents with one encoding only, and their digest inside: manifests and leases.

Canonical JSON: UTF-8, one object, keys sorted, no spaces. Its field ``digest`` is BLAKE3-256, in hex, of the same
object without that field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3


def canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The document of these fields, its digest inside."""
    return canonical({**fields, "digest": blake3(canonical(fields)).hexdigest()})


def unsealed(data: bytes) -> dict[str, Any]:
    """The inverse of `sealed`. Raises ValueError for any other byte."""
    try:
        fields = json.loads(data.decode())
        if not isinstance(fields, dict) or canonical(fields) != data:
            raise ValueError("is not canonical JSON")
    except RecursionError:
        raise ValueError("is not JSON: it nests too deep") from None
    digest = fields.pop("digest", None)
    if digest != blake3(canonical(fields)).hexdigest():
        raise ValueError("does not match its digest")
    return fields
