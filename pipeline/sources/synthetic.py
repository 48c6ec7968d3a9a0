"""Blocks made up on the spot: heavier than any fixture, the same for everybody who names the same seed.

The statistics are those of a busy coin set. A block of ``changes`` ops creates about 5/9 of them and spends
4/9 (0.8 spends per create), half of the spends among the coins of the last ten blocks, half among all that
live; the first block only creates. Keys are whole keys of `utxo`, values compressed coins of about 60 bytes
with scripts of about 50. So 500 blocks of 5,000 changes leave some 280,000 coins alive, and MuHash works on
them as on real ones.

Randomness is BLAKE3's extended output over the block hash: it does not depend on the version of any
generator. The block hash is BLAKE3 of parent, height, seed and **salt**; another salt makes another branch.

Live coins are numbered as they are created. Ascending numbers are ascending age, so "the coins of the last ten
blocks" is the end of one sorted array, and taking a block off is cutting that array and merging in what was spent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.sources import coins
from pipeline.state import UTXO

GENESIS_TIME_S: Final = 1_600_000_000
BLOCK_INTERVAL_S: Final = 600
FORK_DEPTH_MAX: Final = 100
"""Blocks whose spends are kept, so that a fork can go back: the default finality."""

_NO_PARENT = bytes(32)
_RECENT_BLOCKS = 10
_CREATES_SHARE = 1 / 1.8
_OUTPUTS_MAX = 8
_AMOUNTS = 4096
_LABEL_BYTES_MIN = 12

_Numbers = npt.NDArray[np.int64]


class _Undo(NamedTuple):
    """What takes one block off."""

    ref: BlockRef
    first_number: int
    spent: _Numbers
    spent_keys: list[bytes]


def blocks(
    count: int,
    *,
    changes: int,
    seed: int,
    first_height: int = 0,
    parent_hash: bytes = _NO_PARENT,
    time_s: int = GENESIS_TIME_S,
) -> Iterator[Block]:
    """``count`` blocks on top of each other: `SyntheticChain` for those who need no fork."""
    chain = SyntheticChain(
        seed=seed, changes=changes, first_height=first_height, parent_hash=parent_hash, time_s=time_s
    )
    return chain.extend(count)


class SyntheticChain:
    """A chain that grows and forks.

    - Equal arguments and calls give equal blocks.
    - No key is created twice, on any branch; none is created and deleted in one block.
    - Memory holds the live keys and the spends of the last 110 blocks.
    """

    def __init__(
        self,
        *,
        seed: int,
        changes: int,
        first_height: int = 0,
        parent_hash: bytes = _NO_PARENT,
        time_s: int = GENESIS_TIME_S,
    ) -> None:
        """``time_s``: the time of height 0, seconds since 1970; a block every 600. ``changes``: at least
        1."""
        assert changes >= 1, changes
        self._seed = seed.to_bytes(8, "little", signed=True)
        self._changes = changes
        self._first_height = first_height
        self._time_s = time_s
        self._salt = 0
        self._tip = BlockRef(first_height - 1, parent_hash)
        self._live: _Numbers = np.empty(0, np.int64)
        self._keys: dict[int, bytes] = {}
        self._next_number = 0
        self._undo: deque[_Undo] = deque(maxlen=FORK_DEPTH_MAX + _RECENT_BLOCKS)
        self._amounts = _encoded_amounts(self._seed)

    @property
    def tip(self) -> BlockRef:
        """The last block made; before the first one, the parent that was given."""
        return self._tip

    @property
    def live_count(self) -> int:
        """Coins that live at the tip."""
        return len(self._live)

    def extend(self, count: int) -> Iterator[Block]:
        """The next blocks, each made when it is asked for."""
        for _ in range(count):
            yield self._next()

    def fork(self, depth: int, salt: int) -> BlockRef:
        """Go back ``depth`` blocks, to continue on another branch; the new tip. Each ``salt`` is a branch.

        Raises ValueError if the undo of so many blocks is not kept (100, or as many as were made).
        """
        # The next block looks at the last ten: they must be there, unless the chain is that short.
        is_whole = self._tip.height - len(self._undo) < self._first_height
        depth_max = min(FORK_DEPTH_MAX, len(self._undo) - (0 if is_whole else _RECENT_BLOCKS))
        if not 0 <= depth <= depth_max:
            raise ValueError(f"a fork {depth} blocks deep, where {depth_max} can be taken off")
        for _ in range(depth):
            undo = self._undo.pop()
            kept = self._live[: int(np.searchsorted(self._live, undo.first_number))]
            for number in range(undo.first_number, self._next_number):
                self._keys.pop(number, None)
            self._keys.update(zip(undo.spent.tolist(), undo.spent_keys, strict=True))
            self._live = np.sort(np.concatenate((kept, undo.spent)))
            self._next_number = undo.first_number
        if depth:
            self._tip = undo.ref
        self._salt = salt
        return self._tip

    def _next(self) -> Block:
        parent, height = self._tip, self._tip.height + 1
        salt = self._salt.to_bytes(8, "little", signed=True)
        hashed = parent.block_hash + height.to_bytes(8, "little") + self._seed + salt
        ref = BlockRef(height, blake3(hashed).digest())
        random = _Random(ref.block_hash)
        create_count = self._changes
        if height > self._first_height:
            create_count = round(self._changes * _CREATES_SHARE)
        spent = self._pick_spent(random, min(self._changes - create_count, len(self._live)))
        spent_numbers = self._live[spent]
        spent_keys = [self._keys.pop(number) for number in spent_numbers.tolist()]
        keys, values = self._make_coins(random, height, create_count)

        first_number = self._next_number
        self._next_number += len(keys)
        self._keys.update(enumerate(keys, first_number))
        created = np.arange(first_number, self._next_number, dtype=np.int64)
        self._live = np.concatenate((np.delete(self._live, spent), created))
        self._undo.append(_Undo(parent, first_number, spent_numbers, spent_keys))
        self._tip = ref
        ops = Ops(
            codes=bytes([Op.DELETE]) * len(spent_keys) + bytes([Op.CREATE]) * len(keys),
            keys=spent_keys + keys,
            values=values,
        )
        time_s = self._time_s + height * BLOCK_INTERVAL_S
        return Block(ref=ref, parent_hash=parent.block_hash, time_s=time_s, tables={UTXO.name: ops})

    def _pick_spent(self, random: _Random, count: int) -> _Numbers:
        """Positions in the live array: half of any age, the rest among the coins of the last ten blocks."""
        live = len(self._live)
        any_age = random.distinct(count // 2, live)
        window_blocks = list(self._undo)[-_RECENT_BLOCKS:]
        window = int(np.searchsorted(self._live, window_blocks[0].first_number)) if window_blocks else 0
        is_free = np.ones(live - window, np.bool_)
        is_free[any_age[any_age >= window] - window] = False
        recent = np.flatnonzero(is_free) + window
        young = recent[random.distinct(min(count - len(any_age), len(recent)), len(recent))]
        return np.concatenate((any_age, young))

    def _make_coins(self, random: _Random, height: int, count: int) -> tuple[list[bytes], list[bytes]]:
        """New coins, one to eight per transaction, half of the transactions with one. The first is a
        coinbase."""
        origins = [coins.encode_origin(height, False)] * count
        origins[0] = coins.encode_origin(height, True)
        keys: list[bytes] = []
        # The lowest zero bit of a random byte: 1 with probability 1/2, 2 with 1/4, and so on.
        for byte, txid in zip(random.read(count), random.chunks(32, count), strict=True):
            outputs = min((~byte & (byte + 1)).bit_length() or _OUTPUTS_MAX, _OUTPUTS_MAX, count - len(keys))
            keys += [txid + index.to_bytes(4, "big") for index in range(outputs)]
            if len(keys) == count:
                break
        amounts = self._amounts
        picks = random.integers(count, _AMOUNTS).tolist()
        values = [
            origin + amounts[pick] + _compressed_script(pick, body)
            for origin, pick, body in zip(origins, picks, random.chunks(64, count), strict=True)
        ]
        return keys, values


def _compressed_script(pick: int, body: bytes) -> bytes:
    """Pay to a public key or its hash, behind a label of 12 to 27 bytes that is dropped: 49 bytes on
    average."""
    label_bytes = _LABEL_BYTES_MIN + (pick & 15)
    label = bytes([label_bytes]) + body[:label_bytes] + b"\x75"
    if pick & 16:
        script = label + b"\x21\x02" + body[32:] + b"\xac"
    else:
        script = label + b"\x76\xa9\x14" + body[32:52] + b"\x88\xac"
    return coins.encode_varint(len(script) + 6) + script


def _encoded_amounts(seed: bytes) -> list[bytes]:
    """A table of compressed amounts, from a few satoshi to thousands of coins, every eighth a round one."""
    random = _Random(blake3(b"amounts" + seed).digest())
    scales, digits = random.integers(_AMOUNTS, 11).tolist(), random.integers(_AMOUNTS, 90).tolist()
    details = random.integers(_AMOUNTS, 10**10).tolist()
    amounts = [
        (10 + digit) * 10**scale + (detail % 10**scale if index % 8 else 0)
        for index, (scale, digit, detail) in enumerate(zip(scales, digits, details, strict=True))
    ]
    return [coins.encode_varint(coins.compress_amount(amount_sat)) for amount_sat in amounts]


class _Random:
    """BLAKE3's extended output as a source of bytes and numbers: one stream per block."""

    __slots__ = ("_at", "_hasher")

    def __init__(self, seed: bytes) -> None:
        self._hasher = blake3(seed)
        self._at = 0

    def read(self, count: int) -> bytes:
        """The next bytes. The stream moves on by whole blocks of 64, which is where it can be sought."""
        taken = self._hasher.digest(count, seek=self._at)
        self._at += -(-count // 64) * 64
        return taken

    def chunks(self, size: int, count: int) -> list[bytes]:
        """``count`` byte strings of one size."""
        data = self.read(size * count)
        return [data[at : at + size] for at in range(0, len(data), size)]

    def integers(self, count: int, below: int) -> _Numbers:
        """Numbers in 0..below-1; the bias of the remainder is below 2^-24 for the bounds used here."""
        return (np.frombuffer(self.read(8 * count), "<u8") % below).astype(np.int64)

    def distinct(self, count: int, below: int) -> _Numbers:
        """``count`` different numbers in 0..below-1, in random order."""
        if 4 * count > below:
            order = np.argsort(np.frombuffer(self.read(8 * below), "<u8"), kind="stable")
            return order[:count].astype(np.int64)
        picked = np.empty(0, np.int64)
        while len(picked) < count:
            drawn = np.concatenate((picked, self.integers(count, below)))
            _, first = np.unique(drawn, return_index=True)
            picked = drawn[np.sort(first)]
        return picked[:count]
