"""Signatures: who published a snapshot, by Ed25519.

What is signed is a tag and the digest of the manifest, so a signature vouches for all that the manifest names:
position, root, parts and their digests. It stands beside the digest and is no part of it: a signed manifest has the
name and digest of the same one unsigned. `cryptography` is imported by who signs or checks, and by nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import SignatureMissing, SignatureWrong, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_BYTES = 64
_TAG = b"stateferry/manifest/1"
_KEY_BYTES = 32


class Signature(NamedTuple):
    """``signer``: the public key, 32 bytes, of the pair that made it."""

    signer: bytes
    value: bytes


class SigningKey:
    """A private key. It is never shown: not in a message, not in `repr`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def of_pem(cls, data: bytes) -> SigningKey:
        """Raises ValueError for anything but an Ed25519 private key in PEM, not encrypted."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError):
            raise ValueError("holds no private key in PEM without a password") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("holds a private key that is not of Ed25519")
        return cls(key)

    @property
    def signer(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def sign(self, digest: bytes) -> Signature:
        return Signature(self.signer, self._key.sign(_TAG + digest))


def public_key(text: str) -> bytes:
    """A public key, as 64 hex digits or in PEM, to its 32 bytes. Raises UsageError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    way_out = "give 64 hex digits, or a file of what `openssl pkey -pubout` prints"
    try:
        if "-----BEGIN" in text:
            key = load_pem_public_key(text.encode())
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError("it is not of Ed25519")
            return key.public_bytes_raw()
        raw = bytes.fromhex(text)
        if len(raw) != _KEY_BYTES:
            raise ValueError(f"it has {len(raw)} bytes")
    except ValueError as error:
        raise UsageError(f"the public key to require cannot be read: {error}", way_out=way_out) from None
    return raw


def check_signature(signature: Signature | None, digest: bytes, signer: bytes | None, where: str) -> None:
    """That a digest is signed, by the one who is wanted; None: by whoever says so, if anybody does.

    Raises SignatureMissing, SignatureWrong.
    """
    way_out = "restore a snapshot that is signed, with --height, or ask whoever published this one"
    if signature is None:
        if signer is None:
            return
        raise SignatureMissing(f"a manifest is not signed; {signer.hex()} is required", where=where, way_out=way_out)
    if signer is not None and signature.signer != signer:
        raise SignatureWrong(
            f"a manifest is signed by {signature.signer.hex()}; {signer.hex()} is required",
            where=where,
            way_out=way_out,
        )
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(signature.signer).verify(signature.value, _TAG + digest)
    except (InvalidSignature, ValueError):
        raise SignatureWrong(
            f"the signature of a manifest is not one of {signature.signer.hex()}", where=where, way_out=way_out
        ) from None
