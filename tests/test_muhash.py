"""MuHash3072 and hash_serialized_3: Core's published vectors, and the algebra of sets."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commitment.muhash import NUMBER_BYTES, STATE_BYTES, MuHash, hash_serialized_3

CORE = json.loads((Path(__file__).parent / "data/hash_vectors/muhash3072_core.json").read_text())
ELEMENTS = st.lists(st.binary(max_size=8), max_size=6)


def number(first: int) -> bytes:
    """The vectors' elements: one byte and 31 zeroes."""
    return bytes([first]) + bytes(31)


def shown(muhash: MuHash) -> str:
    return muhash.digest()[::-1].hex()


def test_insert_and_remove_match_core() -> None:
    """Two insertions and a removal give the digest of Core's test."""
    muhash = MuHash()
    muhash.insert(number(0))
    muhash.insert(number(1))
    muhash.remove(number(2))

    assert shown(muhash) == CORE["vectors"][0]["digest_uint256_display"]


def test_running_state_is_serialized_as_core_does() -> None:
    """Numerator and denominator stand as Core writes them, and come back."""
    muhash = MuHash()
    muhash.insert_all([number(1), number(2)])
    expected = bytes.fromhex(CORE["vectors"][1]["serialized_numerator_then_denominator_le"])

    assert muhash.to_bytes() == expected
    assert shown(MuHash.from_bytes(expected)) == shown(muhash)


def test_an_overflowing_numerator_is_reduced() -> None:
    """A numerator of 2^3072 - 1 counts modulo the prime, as in Core."""
    muhash = MuHash.from_bytes(bytes.fromhex(CORE["vectors"][2]["deserialize"]))

    assert muhash.digest().hex() == CORE["vectors"][2]["digest_raw_hex"]


def test_empty_set_matches_core() -> None:
    """The digest of nothing is the published one."""
    assert shown(MuHash()) == CORE["empty_set_digest_uint256_display"]


def test_hash_serialized_3_of_nothing() -> None:
    """No coins: double SHA-256 of the empty string."""
    expected = "56944c5d3f98413ef45cf54545538103cc9f298e0575820ad3591376e2e0f65d"

    assert hash_serialized_3([])[::-1].hex() == expected


@pytest.mark.parametrize("data", [b"", bytes(STATE_BYTES - 1), bytes(STATE_BYTES + 1), bytes(STATE_BYTES)])
def test_a_malformed_state_is_refused(data: bytes) -> None:
    """A state of another length, or of zeroes, is nothing MuHash could have written."""
    with pytest.raises(ValueError, match="MuHash"):
        MuHash.from_bytes(data)


@settings(max_examples=40, deadline=None)
@given(ELEMENTS, ELEMENTS, st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_matter(kept: list[bytes], gone: list[bytes], random: Random) -> None:
    """Insertions, removals, batches, combinations and saved states of one set meet in one digest."""
    expected = MuHash()
    expected.insert_all(kept)
    shuffled = kept + gone
    random.shuffle(shuffled)
    first, second = MuHash(), MuHash()
    first.remove_all(gone)
    for element in shuffled[::2]:
        first.insert(element)
    first.digest()
    second.insert_all(shuffled[1::2])
    first.combine(MuHash.from_bytes(second.to_bytes()))

    assert first.digest() == expected.digest()


def test_numbers_stay_small() -> None:
    """A thousand products later the running numbers have not grown."""
    muhash = MuHash()
    muhash.insert_all(number(index % 256) for index in range(1000))

    assert muhash._numerator.bit_length() <= 8 * NUMBER_BYTES + 1
