"""Checks of a whole store: what an audit sums up, what it finds, and the record of a proof."""

from __future__ import annotations

from dataclasses import replace

import pytest
from walks import coin, content, drive, make_walk

from pipeline.block import BlockRef
from pipeline.commitment import lthash
from pipeline.errors import AuditFailed, StoreCorrupt
from pipeline.state import UTXO
from pipeline.stores.memory import MemoryStore
from pipeline.verify import Proof, audit, check_audit, combine, decode_proof, encode_proof

DRIVEN = drive(make_walk(5, 40), seed=5)
NODE = DRIVEN.writer
assert isinstance(NODE.store, MemoryStore)
ENTRIES = list(NODE.store.scan())
assert any(stored[0] > 1 for _, stored in ENTRIES), "no bucket among the entries"


def test_audit_sums_up_to_the_vectors() -> None:
    """Hashing every key leads to the vectors that were kept block by block; so do disjoint parts together."""
    found = audit(iter(ENTRIES))
    parts = [audit(iter(ENTRIES[:3])), audit(iter(ENTRIES[3:])), audit(iter(()))]

    assert found.vectors == NODE.meta.tip.vectors
    assert found.keys == len(content(NODE.store))
    assert combine(parts) == found
    check_audit(found, NODE.meta.tip)


def test_audit_of_many_keys_is_one_sum() -> None:
    """More keys than are hashed at a time: none is left out or counted twice."""
    keys = sorted(coin(group, index) for group in range(3) for index in range(3000))
    entries = list(zip(UTXO.storage_keys(keys), [b"\x01" + key[8:32] + b"v" for key in keys], strict=True))
    accumulator = lthash.Accumulator()
    accumulator.add(lthash.elements(1, keys, [b"v"] * len(keys)))

    found = audit(iter(entries))

    assert found.keys == 9000
    assert found.vectors == {1: accumulator.vector()}

    other = keys[4500][:8] + b"\xff" * 24 + keys[4500][32:]  # meets another key under its short key
    entries[4500] = (entries[4500][0], UTXO.with_value(other, entries[4500][1], b"w") or b"")
    accumulator.add(lthash.elements(1, [other], [b"w"]))

    found = audit(iter(entries))

    assert found.keys == 9001
    assert found.vectors == {1: accumulator.vector()}


def test_every_flipped_bit_is_found() -> None:
    """A bit that rotted anywhere in a stored value or key is found, also where nobody reads."""
    for number, (storage_key, stored) in enumerate(ENTRIES):
        for data, is_key in ((storage_key, True), (stored, False)):
            for at in range(len(data)):
                flipped = data[:at] + bytes([data[at] ^ 1 << (at + number) % 8]) + data[at + 1 :]
                entries = ENTRIES[:]
                entries[number] = (flipped, stored) if is_key else (storage_key, flipped)
                with pytest.raises((AuditFailed, StoreCorrupt)):
                    check_audit(audit(iter(sorted(entries))), NODE.meta.tip)


def test_lost_and_added_entries_are_found() -> None:
    """An entry that is gone, there twice, or new does not go unnoticed."""
    extra = (UTXO.storage_keys([coin(200)])[0], b"\x01" + bytes(24) + b"v")

    for entries in (ENTRIES[1:], [*ENTRIES, extra]):
        with pytest.raises(AuditFailed, match="table utxo does not hold what its vector says"):
            check_audit(audit(iter(entries)), NODE.meta.tip)
    for entries in (ENTRIES + ENTRIES[-1:], ENTRIES[::-1]):
        with pytest.raises(StoreCorrupt, match="does not ascend"):
            audit(iter(entries))


def test_audit_failure_names_block_and_roots() -> None:
    """Both roots and the position are there to compare with another node's."""
    with pytest.raises(AuditFailed) as caught:
        check_audit(audit(iter(ENTRIES[1:])), NODE.meta.tip)

    assert NODE.meta.tip.table_roots[1].hex() in str(caught.value)
    assert str(NODE.meta.tip.ref) in str(caught.value)


@pytest.mark.parametrize(
    "proof",
    [Proof(proven=False), Proof(proven=True, at=BlockRef(7, b"b" * 32), root=b"r" * 32), Proof(proven=True)],
)
def test_proof_round_trip(proof: Proof) -> None:
    """A proof is read back as it was written."""
    assert decode_proof(encode_proof(proof)) == proof


def test_no_proof_means_claimed() -> None:
    """Nothing written means not proven, and neither does anything but the truth value itself."""
    assert decode_proof(None) == Proof(proven=False)
    assert replace(decode_proof(encode_proof(Proof(proven=True))), proven=False) == Proof(proven=False)
    for data in (b"", b"\xc1", b"\x90", b"\x80"):
        with pytest.raises(StoreCorrupt):
            decode_proof(data)
