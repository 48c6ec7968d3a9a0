"""The two hashes of the coin set that Bitcoin Core prints, so that anyone can compare a replica with a node.

**MuHash3072** (`gettxoutsetinfo muhash`) is a hash of a set: each element becomes a number below the prime
2^3072 - 1103717, the set's number is the product of its elements. Adding multiplies, taking away divides;
divisions are collected in a denominator, because one modular inverse costs as much as a thousand products.

    element -> SHA-256 -> ChaCha20 key, zero nonce -> 384 bytes of key stream, a little-endian number
    digest = SHA-256(numerator / denominator mod p, 384 bytes little-endian)

**hash_serialized_3** (`gettxoutsetinfo hash_serialized_3`) is double SHA-256 over the same elements in
ascending order of (transaction hash, output index). It commits to a snapshot; it cannot follow a change.

Both take a coin as Core's `TxOutSer` writes it: `pipeline.sources.coins.element` makes those bytes. Both
return hashing order; people see it reversed, as everything that Core prints. Sources: Bitcoin Core
`src/crypto/muhash.{h,cpp}` and `src/kernel/coinstats.cpp`; vectors: its `crypto_tests.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

NUMBER_BYTES: Final = 384
STATE_BYTES: Final = 2 * NUMBER_BYTES

_BITS = 8 * NUMBER_BYTES
_SHORTFALL = 1_103_717
_PRIME = (1 << _BITS) - _SHORTFALL
_LOW = (1 << _BITS) - 1
_NONCE = bytes(16)
_BLANK = bytes(NUMBER_BYTES)


class MuHash:
    """A running set hash.

    - Order does not matter; what was inserted and removed leaves nothing behind.
    - Numbers are kept below 2^3073, not below the prime: the last reduction waits until somebody looks.
    """

    __slots__ = ("_denominator", "_numerator")

    def __init__(self) -> None:
        self._numerator = 1
        self._denominator = 1

    def insert(self, element: bytes) -> None:
        self._numerator = _fold(self._numerator * _number(element))

    def remove(self, element: bytes) -> None:
        self._denominator = _fold(self._denominator * _number(element))

    def insert_all(self, elements: Iterable[bytes]) -> None:
        self._numerator = _fold(self._numerator * _product(elements))

    def remove_all(self, elements: Iterable[bytes]) -> None:
        self._denominator = _fold(self._denominator * _product(elements))

    def combine(self, other: MuHash) -> None:
        """Add a disjoint set."""
        self._numerator = _fold(self._numerator * other._numerator)
        self._denominator = _fold(self._denominator * other._denominator)

    def digest(self) -> bytes:
        """32 bytes in hashing order; Core shows ``digest()[::-1].hex()``. The set may go on changing."""
        self._numerator = self._numerator * pow(self._denominator, -1, _PRIME) % _PRIME
        self._denominator = 1
        return sha256(self._numerator.to_bytes(NUMBER_BYTES, "little")).digest()

    def to_bytes(self) -> bytes:
        """The running state, 768 bytes: numerator, then denominator, little-endian, as Core stores it."""
        numbers = (self._numerator % _PRIME, self._denominator % _PRIME)
        return b"".join(number.to_bytes(NUMBER_BYTES, "little") for number in numbers)

    @classmethod
    def from_bytes(cls, data: bytes) -> MuHash:
        """The inverse of `to_bytes`. Raises ValueError for another length, or a number that is zero."""
        if len(data) != STATE_BYTES:
            raise ValueError(f"a MuHash state has {STATE_BYTES} bytes, not {len(data)}")
        muhash = cls()
        muhash._numerator = int.from_bytes(data[:NUMBER_BYTES], "little") % _PRIME
        muhash._denominator = int.from_bytes(data[NUMBER_BYTES:], "little") % _PRIME
        if not (muhash._numerator and muhash._denominator):
            raise ValueError("a MuHash state holds a number that is zero")
        return muhash


def hash_serialized_3(elements: Iterable[bytes]) -> bytes:
    """Double SHA-256 over all coins, ascending by whole key (which is Core's order). Hashing order, 32
    bytes."""
    hasher = sha256()
    for element in elements:
        hasher.update(element)
    return sha256(hasher.digest()).digest()


def _number(element: bytes) -> int:
    stream = Cipher(ChaCha20(sha256(element).digest(), _NONCE), mode=None).encryptor().update(_BLANK)
    return int.from_bytes(stream, "little")


def _product(elements: Iterable[bytes]) -> int:
    product = 1
    for element in elements:
        product = _fold(product * _number(element))
    return product


def _fold(product: int) -> int:
    """Reduce a product to 3,073 bits: 2^3072 is congruent to 1103717, a small factor, so this is linear in
    length.

    Twice, because the first pass leaves a carry of some 21 bits above 2^3072, which would grow with every
    product.
    """
    product = (product & _LOW) + (product >> _BITS) * _SHORTFALL
    return (product & _LOW) + (product >> _BITS) * _SHORTFALL
