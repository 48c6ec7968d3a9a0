"""Whose signature a snapshot gets, and whose it must have: what the settings say, as keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.signature import SigningKey, public_key
from topology import secret_files

if TYPE_CHECKING:  # a fourth of a helper's start, which asks for a file's name only
    from topology.settings import Settings

_KEY_BYTES_MAX = 4096


def signing_key(file: Path | None) -> SigningKey | None:
    """The key that snapshots are signed with; None: they are not. Raises SecretUnusable."""
    if file is None:
        return None
    data = secret_files.read(file, "sign_key_file", _KEY_BYTES_MAX, secret=True)
    try:
        return SigningKey.of_pem(data)
    except ValueError as error:
        raise secret_files.unusable(
            file, "sign_key_file", str(error), "make one: openssl genpkey -algorithm ed25519"
        ) from None


def required_signer(settings: Settings) -> bytes | None:
    """The public key whose signature every snapshot must have that state is taken from; None: none is asked for.

    Raises UsageError, SecretUnusable.
    """
    said = settings.require_signature
    if not said:
        return None
    if Path(said).suffix or "/" in said:
        said = secret_files.read(Path(said), "require_signature", _KEY_BYTES_MAX).decode(errors="replace")
    return public_key(said)
