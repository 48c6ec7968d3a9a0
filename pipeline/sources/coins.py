"""A coin as the `utxo` table holds it: Bitcoin Core's own compressed form, so that a coin takes few bytes.

    varint(height * 2 + coinbase) || varint(compressed amount) || compressed script

* A **varint** is Core's: base 128, most significant group first, and every continuation subtracts one, so
  that each number has exactly one encoding (`serialize.h`, "Variable-length integers").
* An **amount** loses its trailing decimal zeroes to an exponent (`compressor.cpp`, `CompressAmount`).
* A **script** of one of six special forms shrinks to a type byte and a hash or an x coordinate; any other one
  is varint(length + 6) and its bytes. Types: 0 pay to public key hash, 1 pay to script hash, 2 and 3 pay to a
  compressed public key, 4 and 5 pay to an uncompressed one, whose y coordinate is recovered on the way back.
  As in Core an uncompressed key is special only if it lies on the curve: otherwise y could not be recovered.

`decode` gives back the exact script, which `element` needs: the bytes that Core's `gettxoutsetinfo` hashes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pipeline.errors import CoinsCorrupt

MONEY_MAX_SAT: Final = 21_000_000 * 100_000_000
SCRIPT_BYTES_MAX: Final = 10_000
"""A longer script can never be spent; such outputs are not in the set."""
HEIGHT_MAX: Final = (1 << 31) - 1
"""Core keeps a coin's height in 31 bits."""

_VARINT_MAX = (1 << 64) - 1
_SPECIAL_TYPES = 6
_SPECIAL_BYTES = (20, 20, 32, 32, 32, 32)
_POWERS: list[int] = [10**exponent for exponent in range(9)]
_FIELD_PRIME = (1 << 256) - (1 << 32) - 977
_OP_RETURN = 0x6A

_VARINTS = [bytes([n]) for n in range(0x80)]
"""One-byte varints made once: script lengths nearly always are."""


class Coin(NamedTuple):
    """An unspent output. ``amount_sat`` in satoshi; ``height`` of the block that made it."""

    height: int
    is_coinbase: bool
    amount_sat: int
    script: bytes


def encode(coin: Coin) -> bytes:
    """A coin as a value of the `utxo` table. Its fields must be within the bounds above."""
    assert 0 <= coin.height <= HEIGHT_MAX, coin
    assert 0 <= coin.amount_sat <= MONEY_MAX_SAT, coin
    assert len(coin.script) <= SCRIPT_BYTES_MAX, len(coin.script)
    return encode_origin(coin.height, coin.is_coinbase) + encode_output(coin.amount_sat, coin.script)


def encode_origin(height: int, is_coinbase: bool) -> bytes:
    """The first part of a value. It differs only between the coinbase and the rest of a block."""
    return encode_varint(height * 2 + is_coinbase)


def encode_output(amount_sat: int, script: bytes) -> bytes:
    """The rest of a value."""
    return encode_varint(compress_amount(amount_sat)) + compress_script(script)


def decode(value: bytes) -> Coin:
    """The inverse of `encode`. Raises CoinsCorrupt for anything that `encode` does not make."""
    origin, at = decode_varint(value, 0)
    compressed, at = decode_varint(value, at)
    amount_sat = decompress_amount(compressed)
    if origin >> 1 > HEIGHT_MAX or amount_sat > MONEY_MAX_SAT:
        raise _corrupt(value, "its height or amount is out of bounds")
    return Coin(origin >> 1, bool(origin & 1), amount_sat, decompress_script(value[at:]))


def element(key: bytes, value: bytes) -> bytes:
    """What MuHash and `hash_serialized_3` take for one coin, from its whole key and value. Core's `TxOutSer`:

    txid || index (u32 LE) || height * 2 + coinbase (u32 LE) || amount (i64 LE) || compact size || script
    """
    coin = decode(value)
    length = len(coin.script)
    return b"".join(
        (
            key[:32],
            key[35:31:-1],
            (coin.height * 2 + coin.is_coinbase).to_bytes(4, "little"),
            coin.amount_sat.to_bytes(8, "little"),
            bytes([length]) if length < 0xFD else b"\xfd" + length.to_bytes(2, "little"),
            coin.script,
        )
    )


def is_spendable(script: bytes) -> bool:
    """False for outputs that can never be spent and that Core therefore keeps out of the set."""
    return len(script) <= SCRIPT_BYTES_MAX and not (script and script[0] == _OP_RETURN)


def encode_varint(number: int) -> bytes:
    """Core's varint. ``number``: 0 .. 2^64 - 1."""
    if number < 0x80:
        return _VARINTS[number]
    assert number <= _VARINT_MAX, number
    groups = [number & 0x7F]
    while number > 0x7F:
        number = (number >> 7) - 1
        groups.append((number & 0x7F) | 0x80)
    return bytes(groups[::-1])


def decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at ``at`` and the offset behind it. Raises CoinsCorrupt: cut short, or over 64 bits."""
    number = 0
    while at < len(data):
        byte = data[at]
        at += 1
        number = (number << 7) | (byte & 0x7F)
        if number > _VARINT_MAX:
            break
        if byte < 0x80:
            return number, at
        number += 1
    raise _corrupt(data, "a varint is cut short or longer than 64 bits")


def compress_amount(amount_sat: int) -> int:
    """Amounts are mostly round: trailing zeroes become an exponent of 0..9."""
    if amount_sat == 0:
        return 0
    exponent = 0
    while exponent < 9 and amount_sat % 10 == 0:
        amount_sat //= 10
        exponent += 1
    if exponent == 9:
        return (amount_sat - 1) * 10 + 10
    leading, digit = divmod(amount_sat, 10)
    return (leading * 9 + digit - 1) * 10 + exponent + 1


def decompress_amount(compressed: int) -> int:
    """The inverse of `compress_amount`; for any number, also for those it never makes."""
    if compressed == 0:
        return 0
    rest, exponent = divmod(compressed - 1, 10)
    if exponent == 9:
        return (rest + 1) * 1_000_000_000
    leading, digit = divmod(rest, 9)
    return (leading * 10 + digit + 1) * _POWERS[exponent]


def compress_script(script: bytes) -> bytes:
    """One of the six special forms, or length and bytes."""
    match len(script):
        case 25 if script.startswith(b"\x76\xa9\x14") and script.endswith(b"\x88\xac"):
            return b"\x00" + script[3:23]
        case 23 if script.startswith(b"\xa9\x14") and script[22] == 0x87:
            return b"\x01" + script[2:22]
        case 35 if script[0] == 33 and script[34] == 0xAC and script[1] in (2, 3):
            return script[1:34]
        case 67 if script[0] == 65 and script[66] == 0xAC and script[1] == 4 and _is_on_curve(script[2:66]):
            return bytes([4 | (script[65] & 1)]) + script[2:34]
        case length:
            return encode_varint(length + _SPECIAL_TYPES) + script


def decompress_script(compressed: bytes) -> bytes:
    """The exact script. Raises CoinsCorrupt: a wrong length, a shorter form exists, x not on the curve."""
    kind, at = decode_varint(compressed, 0)
    body = compressed[at:]
    if kind >= _SPECIAL_TYPES:
        length = kind - _SPECIAL_TYPES
        if length > SCRIPT_BYTES_MAX or len(body) != length:
            raise _corrupt(compressed, "its script is not as long as it says")
        if compress_script(body) != compressed:
            raise _corrupt(compressed, "its script has a shorter form")
        return body
    if len(body) != _SPECIAL_BYTES[kind]:
        raise _corrupt(compressed, f"a script of special type {kind} has {len(body)} bytes")
    match kind:
        case 0:
            return b"\x76\xa9\x14" + body + b"\x88\xac"
        case 1:
            return b"\xa9\x14" + body + b"\x87"
        case 2 | 3:
            return b"\x21" + compressed + b"\xac"
        case _:
            return b"\x41\x04" + body + _recover_y(body, odd=kind == 5) + b"\xac"


def _is_on_curve(point: bytes) -> bool:
    """Whether x || y satisfies y^2 = x^3 + 7 over the field of secp256k1."""
    x, y = int.from_bytes(point[:32], "big"), int.from_bytes(point[32:], "big")
    return x < _FIELD_PRIME and y < _FIELD_PRIME and (y * y - x * x * x - 7) % _FIELD_PRIME == 0


def _recover_y(body: bytes, *, odd: bool) -> bytes:
    x = int.from_bytes(body, "big")
    square = (x * x * x + 7) % _FIELD_PRIME
    # The prime is 3 modulo 4, so this power is a square root wherever there is one.
    y = pow(square, (_FIELD_PRIME + 1) // 4, _FIELD_PRIME)
    if x >= _FIELD_PRIME or y * y % _FIELD_PRIME != square:
        raise _corrupt(body, "the x coordinate of its public key is not on the curve")
    return (y if bool(y & 1) == odd else _FIELD_PRIME - y).to_bytes(32, "big")


def _corrupt(data: bytes, why: str) -> CoinsCorrupt:
    return CoinsCorrupt(f"a coin cannot be decoded: {why}", where=f"{len(data)} bytes, first {data[:8].hex()}")
