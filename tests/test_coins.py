"""Compressed coins: Core's own vectors, exact scripts on the way back, one encoding each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CoinsCorrupt
from pipeline.sources import coins
from pipeline.sources.coins import Coin

COIN_SAT = 100_000_000

# The generator point of secp256k1 and its negative: one even, one odd y coordinate.
X = bytes.fromhex("79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")
Y = bytes.fromhex("483ada7726a3c4655da4fbfc0e1108a8fd17b448a68554199c47d08ffb10d4b8")
Y_ODD = ((1 << 256) - (1 << 32) - 977 - int.from_bytes(Y, "big")).to_bytes(32, "big")
HASH = bytes(range(20))

SCRIPTS = [
    ("pay to public key hash", b"\x76\xa9\x14" + HASH + b"\x88\xac", b"\x00" + HASH),
    ("pay to script hash", b"\xa9\x14" + HASH + b"\x87", b"\x01" + HASH),
    ("compressed key, even", b"\x21\x02" + X + b"\xac", b"\x02" + X),
    ("compressed key, odd", b"\x21\x03" + X + b"\xac", b"\x03" + X),
    ("uncompressed key, even", b"\x41\x04" + X + Y + b"\xac", b"\x04" + X),
    ("uncompressed key, odd", b"\x41\x04" + X + Y_ODD + b"\xac", b"\x05" + X),
    ("uncompressed key off the curve", b"\x41\x04" + X + X + b"\xac", b"\x49\x41\x04" + X + X + b"\xac"),
    ("hybrid key", b"\x41\x06" + X + Y + b"\xac", b"\x49\x41\x06" + X + Y + b"\xac"),
    ("key of an unknown form", b"\x21\x05" + X + b"\xac", b"\x29\x21\x05" + X + b"\xac"),
    ("nothing", b"", b"\x06"),
    ("witness program", b"\x00\x14" + HASH, b"\x1c\x00\x14" + HASH),
    ("122 bytes", b"\x51" * 122, b"\x80\x00" + b"\x51" * 122),
]


@pytest.mark.parametrize(
    ("amount_sat", "compressed"),
    [
        # compress_tests.cpp
        (0, 0x0),
        (1, 0x1),
        (1_000_000, 0x7),
        (COIN_SAT, 0x9),
        (50 * COIN_SAT, 0x32),
        (21_000_000 * COIN_SAT, 0x1406F40),
    ],
)
def test_amounts_match_core(amount_sat: int, compressed: int) -> None:
    """Published pairs hold both ways."""
    assert coins.compress_amount(amount_sat) == compressed
    assert coins.decompress_amount(compressed) == amount_sat


@given(st.integers(0, coins.MONEY_MAX_SAT))
def test_every_amount_comes_back(amount_sat: int) -> None:
    """Compression loses nothing."""
    assert coins.decompress_amount(coins.compress_amount(amount_sat)) == amount_sat


@given(st.integers(0, 1 << 40))
def test_every_compressed_amount_is_the_only_one(compressed: int) -> None:
    """No amount has two compressed forms: equal coins have equal bytes."""
    assert coins.compress_amount(coins.decompress_amount(compressed)) == compressed


@pytest.mark.parametrize(
    ("number", "encoded"),
    [
        # serialize.h, "Variable-length integers", and serialize_tests.cpp
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8000"),
        (255, "807f"),
        (256, "8100"),
        (0x1234, "a334"),
        (16383, "fe7f"),
        (16384, "ff00"),
        (16511, "ff7f"),
        (0xFFFF, "82fe7f"),
        (65535, "82fe7f"),
        (0x123456, "c7e756"),
        (0x80123456, "86ffc7e756"),
        (1 << 32, "8efefeff00"),
        (0xFFFFFFFF, "8efefefe7f"),
        (0x7FFFFFFFFFFFFFFF, "fefefefefefefefe7f"),
        (0xFFFFFFFFFFFFFFFF, "80fefefefefefefefe7f"),
    ],
)
def test_varints_match_core(number: int, encoded: str) -> None:
    """Published pairs hold both ways."""
    assert coins.encode_varint(number).hex() == encoded
    assert coins.decode_varint(bytes.fromhex(encoded), 0) == (number, len(encoded) // 2)


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=3))
def test_every_varint_comes_back(number: int, behind: bytes) -> None:
    """A varint ends where it ends, whatever stands behind it."""
    encoded = coins.encode_varint(number)

    assert coins.decode_varint(encoded + behind, 0) == (number, len(encoded))


@pytest.mark.parametrize("data", ["", "80", "ffff", "80fefefefefefefeff00", "ff" * 12])
def test_malformed_varints_are_refused(data: str) -> None:
    """A varint cut short or over 64 bits is an error, not a number."""
    with pytest.raises(CoinsCorrupt, match="varint"):
        coins.decode_varint(bytes.fromhex(data), 0)


@pytest.mark.parametrize(("script", "compressed"), [row[1:] for row in SCRIPTS], ids=[row[0] for row in SCRIPTS])
def test_scripts_compress_and_come_back(script: bytes, compressed: bytes) -> None:
    """Each form has its one compressed form."""
    assert coins.compress_script(script) == compressed
    assert coins.decompress_script(compressed) == script


@given(st.binary(max_size=300))
def test_every_script_comes_back(script: bytes) -> None:
    """Compression loses nothing."""
    assert coins.decompress_script(coins.compress_script(script)) == script


@pytest.mark.parametrize(
    ("compressed", "why"),
    [
        ("", "varint"),
        ("00" + "11" * 19, "special type 0"),
        ("01" + "11" * 21, "special type 1"),
        ("02" + "11" * 31, "special type 2"),
        ("04" + "00" * 31 + "05", "not on the curve"),
        ("05" + "ff" * 32, "not on the curve"),
        ("0751" + "51", "as long as it says"),
        ("08", "as long as it says"),
        ("1f76a914" + "11" * 20 + "88ac", "shorter form"),
    ],
)
def test_malformed_scripts_are_refused(compressed: str, why: str) -> None:
    """Bytes that `compress_script` never makes are an error."""
    with pytest.raises(CoinsCorrupt, match=why):
        coins.decompress_script(bytes.fromhex(compressed))


def test_a_script_over_the_bound_is_refused() -> None:
    """10,000 bytes pass, 10,001 do not."""
    longest = b"\x51" * coins.SCRIPT_BYTES_MAX
    assert coins.decompress_script(coins.compress_script(longest)) == longest

    with pytest.raises(CoinsCorrupt):
        coins.decompress_script(coins.compress_script(longest + b"\x51"))


COINS = st.builds(
    Coin,
    st.integers(0, coins.HEIGHT_MAX),
    st.booleans(),
    st.integers(0, coins.MONEY_MAX_SAT),
    st.one_of(st.binary(max_size=200), st.sampled_from([row[1] for row in SCRIPTS])),
)


@given(COINS)
def test_every_coin_comes_back(coin: Coin) -> None:
    """A value holds the whole coin."""
    assert coins.decode(coins.encode(coin)) == coin


@given(st.binary(max_size=80))
def test_what_decodes_is_what_encode_makes(value: bytes) -> None:
    """Any bytes either are the one encoding of a coin or raise CoinsCorrupt."""
    try:
        coin = coins.decode(value)
    except CoinsCorrupt:
        return

    assert coins.encode(coin) == value


def to_key_hash(key_hash: str) -> bytes:
    return b"\x76\xa9\x14" + bytes.fromhex(key_hash) + b"\x88\xac"


@pytest.mark.parametrize(
    ("value", "coin"),
    [
        # coins_tests.cpp, coin_serialization
        (
            "97f23c835800816115944e077fe7c803cfa57f29b36bf87c1d35",
            Coin(203_998, False, 60_000_000_000, to_key_hash("816115944e077fe7c803cfa57f29b36bf87c1d35")),
        ),
        (
            "8ddf77bbd123008c988f1a4a4de2161e0f50aac7f17e7f9555caa4",
            Coin(120_891, True, 110_397, to_key_hash("8c988f1a4a4de2161e0f50aac7f17e7f9555caa4")),
        ),
        ("000006", Coin(0, False, 0, b"")),
    ],
)
def test_coins_match_core(value: str, coin: Coin) -> None:
    """Core's own serialized coins hold both ways."""
    assert coins.encode(coin).hex() == value
    assert coins.decode(bytes.fromhex(value)) == coin


@pytest.mark.parametrize(
    "value", ["", "00", "0000", "000007", "00008a95c0bb0000", "fefefefe7f0006", "00a0c8adb1d183ff0106"]
)
def test_malformed_coins_are_refused(value: str) -> None:
    """Cut short, a script of three billion bytes, a height or an amount out of bounds."""
    with pytest.raises(CoinsCorrupt):
        coins.decode(bytes.fromhex(value))


def test_element_is_core_s_txout_serialization() -> None:
    """Outpoint, height and coinbase, amount, script: little-endian, compact size."""
    txid = bytes(range(32))
    key = txid + (258).to_bytes(4, "big")
    short = Coin(7, True, 5, b"\x51")
    long = Coin(7, False, 5, b"\x51" * 300)
    head = txid + b"\x02\x01\x00\x00"
    amount = b"\x05" + bytes(7)

    assert coins.element(key, coins.encode(short)) == head + b"\x0f\x00\x00\x00" + amount + b"\x01\x51"
    assert coins.element(key, coins.encode(long)) == head + b"\x0e\x00\x00\x00" + amount + b"\xfd\x2c\x01" + long.script


@pytest.mark.parametrize(
    ("script", "spendable"),
    [
        (b"", True),
        (b"\x51", True),
        (b"\x51\x6a", True),
        (b"\x6a", False),
        (b"\x6a\x01x", False),
        (b"\x51" * 10_000, True),
        (b"\x51" * 10_001, False),
    ],
)
def test_unspendable_outputs(script: bytes, spendable: bool) -> None:
    """OP_RETURN first, or over 10,000 bytes: not in the set."""
    assert coins.is_spendable(script) is spendable
