"""Documents with one encoding only, and their digest inside: manifests and leases.

Canonical JSON: UTF-8, one object, keys sorted, no spaces. Its field ``digest`` is BLAKE3-256, in hex, of the same
object without that field, and without those that stand **beside** it: a signature is no part of what it signs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from blake3 import blake3


def canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(fields: Mapping[str, Any]) -> bytes:
    return blake3(canonical(fields)).digest()


def sealed(fields: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> bytes:
    """The document of these fields, its digest inside."""
    return canonical({**fields, **(beside or {}), "digest": digest_of(fields).hex()})


def unsealed(data: bytes, beside: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a document, those with the names ``beside`` among them. Raises ValueError for any other byte."""
    try:
        fields = json.loads(data.decode())
        if not isinstance(fields, dict) or canonical(fields) != data:
            raise ValueError("is not canonical JSON")
    except RecursionError:
        raise ValueError("is not JSON: it nests too deep") from None
    digest = fields.pop("digest", None)
    sealed_fields = {name: value for name, value in fields.items() if name not in beside}
    if digest != digest_of(sealed_fields).hex():
        raise ValueError("does not match its digest")
    return fields
