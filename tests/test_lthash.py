"""LtHash: published vectors, the algebra that the rest relies on, and elements that cannot be confused."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commitment import lthash, native
from pipeline.commitment.lthash import Accumulator

VECTORS = json.loads((Path(__file__).parent / "data/hash_vectors/lthash_solana_blake3.json").read_text())
PUBLISHED = [(vector["input"], vector["lthash"]) for vector in VECTORS["vectors"]]


def vector_of(elements: list[bytes]) -> bytes:
    accumulator = Accumulator()
    accumulator.add(elements)
    return accumulator.vector()


@pytest.fixture(params=["compiled", "library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements are expanded by the compiled loop, or by the `blake3` package alone."""
    if request.param == "library":
        monkeypatch.setattr(lthash, "NATIVE", None)
    elif lthash.NATIVE is None:
        pytest.skip("the compiled loop does not run on this machine")


def test_the_compiled_loop_is_there_where_it_can_run() -> None:
    """Whoever installs on Linux with AVX2 hashes by it: it is not lost in silence."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("only for Linux on x86-64 with AVX2")
    if not os.environ.get("CI") and not Path(native.__file__).with_name("lattice.so").exists():
        pytest.skip("installed where it could not be compiled")

    assert lthash.NATIVE is not None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("text", "expected"), PUBLISHED)
def test_single_element_matches_published_vector(text: str, expected: str) -> None:
    """One element's vector is the published one."""
    assert vector_of([text.encode()]).hex() == expected


@pytest.mark.skipif(lthash.NATIVE is None, reason="the compiled loop does not run on this machine")
@given(st.lists(st.integers(0, 1200), max_size=600), st.binary(min_size=1, max_size=64))
def test_the_compiled_loop_sums_what_the_library_does(sizes: list[int], content: bytes) -> None:
    """Elements of any length, and those too long for it among them."""
    elements = [(content * 1200)[at % 7 :][:size] for at, size in enumerate(sizes)]

    assert np.array_equal(lthash._sum(elements), lthash._sum_by_library(elements))


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(60)])
def test_what_is_no_library_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged installation says so, and names the file."""
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "lattice.so")
    monkeypatch.setattr(sys, "platform", "linux")
    assert native.load() is None

    (tmp_path / "lattice.so").write_bytes(content)
    with pytest.raises(ImportError, match=r"lattice\.so cannot be loaded.*install"):
        native.load()


def test_a_loop_that_computes_something_else_is_refused() -> None:
    """It is compared with the library before anything relies on it."""
    with pytest.raises(ImportError, match="does not compute what it must"):
        lthash._checked(lambda elements: lthash._sum_by_library(elements) + np.uint16(1))


def test_sum_and_checksum_match_published_vector() -> None:
    """Two elements sum lane by lane; the table root is BLAKE3 of the sum."""
    total = vector_of([text.encode() for text, _ in PUBLISHED])

    assert total.hex() == VECTORS["sum_hello_world"]
    assert lthash.table_root(total).hex() == VECTORS["checksum_hello_world"]


def test_nothing_sums_to_zero() -> None:
    """The vector of no elements is all zeroes."""
    assert vector_of([]) == lthash.ZERO == bytes(lthash.VECTOR_BYTES)


@given(
    st.lists(st.binary(max_size=40), max_size=130),
    st.lists(st.binary(max_size=40), max_size=60),
    st.randoms(),
)
def test_subtract_undoes_add_in_any_order(kept, gone, random) -> None:  # type: ignore[no-untyped-def]
    """What was added and subtracted leaves nothing, in whatever order and grouping."""
    shuffled = kept + gone
    random.shuffle(shuffled)
    accumulator = Accumulator()
    accumulator.subtract(gone)
    for start in range(0, len(shuffled), 7):
        accumulator.add(shuffled[start : start + 7])

    assert accumulator.vector() == vector_of(kept)


@given(st.lists(st.binary(max_size=40), max_size=100), st.integers(0, 100))
def test_partials_combine_to_the_whole(elements: list[bytes], cut: int) -> None:
    """Vectors of disjoint parts sum to the vector of the whole."""
    accumulator = Accumulator(vector_of(elements[:cut]))
    accumulator.combine(vector_of(elements[cut:]))

    assert accumulator.vector() == vector_of(elements)


def test_lanes_wrap() -> None:
    """A pair counted 65,536 times is as good as absent: why keys must be unique."""
    accumulator = Accumulator(vector_of([b"x"]))
    for _ in range(16):
        accumulator.combine(accumulator.vector())

    assert accumulator.vector() == lthash.ZERO


def test_accumulator_does_not_share_its_vector() -> None:
    """A vector handed in or out stays as it was."""
    start = vector_of([b"a"])
    accumulator = Accumulator(start)
    before = accumulator.vector()
    accumulator.add([b"b"])

    assert start == before == vector_of([b"a"]) != accumulator.vector()


def test_a_vector_of_another_length_is_refused() -> None:
    """Vectors are 2,048 bytes."""
    with pytest.raises(ValueError, match="2048"):
        Accumulator(bytes(2047))
    with pytest.raises(ValueError, match="2048"):
        Accumulator().combine(bytes(2050))


def element_by_hand(table_id: int, key: bytes, value: bytes) -> bytes:
    lengths = [len(part).to_bytes(4, "little") for part in (key, value)]
    return b"stateferry/element/1" + bytes([table_id]) + lengths[0] + key + lengths[1] + value


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ([], []),
        ([b"k" * 36], [b""]),
        ([b"k" * 36, b"l" * 36], [b"v" * 60, b"w" * 1023]),
        ([b"k" * 36, b"l" * 36], [b"v" * 60, b"w" * 1024]),
        ([b"k", b"kk"], [b"v", b"v"]),
        ([b""], [b"x" * 70_000]),
    ],
)
def test_elements_are_laid_out_as_documented(keys: list[bytes], values: list[bytes]) -> None:
    """Domain, table, length-prefixed key, length-prefixed value, whichever path made them."""
    expected = [element_by_hand(7, key, value) for key, value in zip(keys, values, strict=True)]

    assert lthash.elements(7, keys, values) == expected


def test_elements_refuse_columns_of_different_lengths() -> None:
    """A key without a value is our own mistake, never a silent cut."""
    with pytest.raises(ValueError, match="argument"):
        lthash.elements(1, [b"a", b"b"], [b"v"])


def test_state_root_is_over_table_roots_in_ascending_order() -> None:
    """The root is BLAKE3 over (table id, table root), whatever order the mapping has."""
    vectors = {3: vector_of([b"c"]), 1: vector_of([b"a"]), 2: lthash.ZERO}
    roots = {table_id: blake3(vector).digest() for table_id, vector in vectors.items()}
    expected = blake3(b"\x01" + roots[1] + b"\x02" + roots[2] + b"\x03" + roots[3]).digest()

    assert lthash.state_root(vectors) == lthash.state_root_of_table_roots(roots) == expected
