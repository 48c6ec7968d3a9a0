"""Bitcoin blocks to what they do to the coin set.

`parse_header` reads the 80 bytes that say which block this is: enough to place it on the branch.
`parse_block` reads all of it, once its height is known, in one pass over offsets: no object per
transaction, input or output, because a block holds up to 20,000 of them. Every count and length is taken
for a claim: nothing is allocated by it, and reading past the end is an error. The transactions must hash to
the header's Merkle root.

What a block does to the `utxo` table, in transaction order: a DELETE per input (the coinbase has none that
counts), a CREATE per spendable output. An output spent in its own block is created and deleted. The
exceptions are Core's:

* the coinbase of the genesis block is not in the set;
* outputs whose script begins with OP_RETURN, or is longer than 10,000 bytes, are not in the set;
* two blocks of 2010 repeat the coinbase transaction of an earlier block whose output was still unspent, which
  BIP30 forbids since: their coinbases overwrite it (PUT).

Neither proof of work nor scripts nor signatures are checked here: blocks come from a node that has checked
them. Hashes are in hashing order throughout; a whole key is txid (32 B) || output index (u32 big-endian).
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final, NamedTuple

from pipeline.block import Block, BlockRef, Op, Ops
from pipeline.errors import BlockCorrupt
from pipeline.sources.coins import (
    HEIGHT_MAX,
    MONEY_MAX_SAT,
    encode_origin,
    encode_output,
    is_spendable,
)
from pipeline.state import UTXO

BLOCK_BYTES_MAX: Final = 4_000_000
"""A block weighs at most 4,000,000 units, and each of its bytes at least one."""
NO_PARENT: Final = bytes(32)
"""The parent hash that the first block of a chain names."""

_HEADER_BYTES = 80
_INPUT_BYTES_MIN = 41  # outpoint 36, script length 1, sequence 4
_OUTPUT_BYTES_MIN = 9  # amount 8, script length 1
_TRANSACTION_BYTES_MIN = 4 + 1 + _INPUT_BYTES_MIN + 1 + _OUTPUT_BYTES_MIN + 4
_NO_OUTPOINT = bytes(32) + b"\xff\xff\xff\xff"

_REPEATED_COINBASES = {
    (91_842, "00000000000a4d0a398161ffc163c503763b1f4360639393e0e4c8e300e0caec"),
    (91_880, "00000000000743f190a18c5577a3c2d2a1f610ae9601ac046a38084ccb7cd721"),
}

_CREATE, _DELETE, _PUT = int(Op.CREATE), int(Op.DELETE), int(Op.PUT)


class Header(NamedTuple):
    """Which block this is. Hashes in hashing order."""

    block_hash: bytes
    parent_hash: bytes
    merkle_root: bytes
    time_s: int


def parse_header(raw: bytes, *, where: str = "") -> Header:
    """The header of a raw block. Raises BlockCorrupt unless the block is long enough to have one."""
    if not _HEADER_BYTES < len(raw) <= BLOCK_BYTES_MAX:
        raise BlockCorrupt(f"a block of {len(raw)} bytes, not within 81..{BLOCK_BYTES_MAX}", where=where)
    return Header(
        block_hash=_hash(raw[:_HEADER_BYTES]),
        parent_hash=raw[4:36],
        merkle_root=raw[36:68],
        time_s=int.from_bytes(raw[68:72], "little"),
    )


def parse_block(raw: bytes, height: int, *, where: str = "") -> Block:
    """A raw block at a height to what it does. ``where`` names the block's place for errors.

    Raises BlockCorrupt: cut short, too long, malformed, or of another Merkle root than its header says.
    """
    assert 0 <= height <= HEIGHT_MAX, height
    header = parse_header(raw, where=where)
    ops = _Ops()
    try:
        txids = _read_transactions(raw, height, ops)
    except _Malformed as error:
        raise BlockCorrupt(f"a malformed block: {error.why}", where=_at(where, error.at)) from None
    except IndexError:
        raise BlockCorrupt("a block that is cut short", where=_at(where, len(raw))) from None
    root, is_mutated = merkle_root(txids)
    if root != header.merkle_root:
        raise BlockCorrupt(
            f"the transactions of block {header.block_hash[::-1].hex()} hash to {root[::-1].hex()}, "
            f"not to its Merkle root {header.merkle_root[::-1].hex()}",
            where=where,
        )
    if is_mutated:
        raise BlockCorrupt(
            f"block {header.block_hash[::-1].hex()} repeats transactions, which its Merkle root cannot show",
            where=where,
            way_out="take the block from another node",
        )
    ref = BlockRef(height, header.block_hash)
    tables = {UTXO.name: _block_ops(ops, ref, header.parent_hash)}
    return Block(ref=ref, parent_hash=header.parent_hash, time_s=header.time_s, tables=tables)


def bip34_height(raw: bytes) -> int | None:
    """The height that the coinbase of a block names, or None: most blocks below 227,931 name none.

    It is a claim: blocks of version 1 hold anything there. Raises BlockCorrupt if the coinbase cannot be
    read.
    """
    parse_header(raw)
    if int.from_bytes(raw[:4], "little", signed=True) < 2:
        return None
    try:
        _, at = _compact_size(raw, _HEADER_BYTES)
        at += 6 if raw[at + 4] == 0 else 4  # segwit's marker and flag
        _, at = _compact_size(raw, at)
        length, at = _compact_size(raw, at + 36)
        script = raw[at : at + length]
        size = script[0] if script else 0
    except (IndexError, _Malformed):
        raise BlockCorrupt("a block without a readable coinbase") from None
    if 0x51 <= size <= 0x60:
        return size - 0x50  # OP_1 .. OP_16: chains that begin with version 2
    if not 1 <= size <= 4 or len(script) <= size or script[size] & 0x80:
        return None
    return int.from_bytes(script[1 : 1 + size], "little")


def merkle_root(txids: list[bytes]) -> tuple[bytes, bool]:
    """The root over transaction hashes, and whether the list could be another one of the same root
    (CVE-2012-2459).

    An odd row repeats its last hash, so a list that ends in a real repetition has the root of the shorter
    list.
    """
    row, is_mutated = txids, False
    while len(row) > 1:
        is_mutated |= any(left == right for left, right in zip(row[::2], row[1::2], strict=False))
        if len(row) % 2:
            row = [*row, row[-1]]
        row = [_hash(left + right) for left, right in zip(row[::2], row[1::2], strict=True)]
    return row[0], is_mutated


class _Malformed(Exception):
    """What is wrong with the bytes at an offset; `parse_block` adds the place of the block."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(why, at)
        self.why = why
        self.at = at


class _Ops:
    """The columns of a block in the making."""

    __slots__ = ("codes", "coinbase_creates", "keys", "values")

    def __init__(self) -> None:
        self.codes = bytearray()
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.coinbase_creates = 0


def _block_ops(ops: _Ops, ref: BlockRef, parent_hash: bytes) -> Ops:
    first = ops.coinbase_creates
    if parent_hash == NO_PARENT:
        return Ops(codes=bytes(ops.codes[first:]), keys=ops.keys[first:], values=ops.values[first:])
    if (ref.height, ref.block_hash[::-1].hex()) in _REPEATED_COINBASES:
        ops.codes[:first] = bytes([_PUT]) * first
    return Ops(codes=bytes(ops.codes), keys=ops.keys, values=ops.values)


def _read_transactions(raw: bytes, height: int, ops: _Ops) -> list[bytes]:
    """Walk all transactions, appending to ``ops``; their hashes. Raises _Malformed, and IndexError past the
    end."""
    codes, keys, values = ops.codes, ops.keys, ops.values
    size = len(raw)
    count, at = _compact_size(raw, _HEADER_BYTES)
    if not 1 <= count <= (size - at) // _TRANSACTION_BYTES_MIN:
        raise _Malformed(f"{count} transactions in {size} bytes", at)
    txids: list[bytes] = []
    origin = encode_origin(height, True)
    for number in range(count):
        start = at
        has_witness = raw[at + 4] == 0
        if has_witness and raw[at + 5] != 1:
            raise _Malformed("a transaction without inputs", at)
        body = at = at + (6 if has_witness else 4)

        input_count, at = _compact_size(raw, at)
        if not 1 <= input_count <= (size - at) // _INPUT_BYTES_MIN:
            raise _Malformed(f"{input_count} inputs", at)
        if (raw[at : at + 36] == _NO_OUTPOINT) != (number == 0) or (number == 0 and input_count != 1):
            raise _Malformed("the first transaction, and no other, must be a coinbase", at)
        spent = len(keys)
        for _ in range(input_count):
            index = at + 32
            keys.append(raw[at:index] + raw[index + 3 : index - 1 : -1])
            at += 36
            length = raw[at]
            if length < 0xFD:
                at += length + 5
            else:
                length, at = _compact_size(raw, at)
                at += length + 4
        if number == 0:
            keys.pop()
        else:
            codes += bytes([_DELETE]) * (len(keys) - spent)

        output_count, at = _compact_size(raw, at)
        if not 1 <= output_count <= (size - at) // _OUTPUT_BYTES_MIN:
            raise _Malformed(f"{output_count} outputs", at)
        outputs: list[tuple[int, bytes]] = []
        for index in range(output_count):
            amount_sat = int.from_bytes(raw[at : at + 8], "little")
            if amount_sat > MONEY_MAX_SAT:
                raise _Malformed(f"an output of {amount_sat} satoshi", at)
            at += 8
            length = raw[at]
            if length < 0xFD:
                at += 1
            else:
                length, at = _compact_size(raw, at)
            script = raw[at : at + length]
            at += length
            if is_spendable(script):
                outputs.append((index, origin + encode_output(amount_sat, script)))

        tail = at
        if has_witness:
            at = _skip_witnesses(raw, at, input_count)
        lock_time = raw[at : at + 4]
        at += 4
        if at > size:
            raise _Malformed("it is cut short", size)
        if has_witness:
            txid = _hash(raw[start : start + 4] + raw[body:tail] + lock_time)
        else:
            txid = _hash(raw[start:at])
        txids.append(txid)
        for index, value in outputs:
            keys.append(txid + index.to_bytes(4, "big"))
            values.append(value)
        codes += bytes([_CREATE]) * len(outputs)
        if number == 0:
            ops.coinbase_creates = len(outputs)
            origin = encode_origin(height, False)
    if at != size:
        raise _Malformed(f"{size - at} bytes follow its last transaction", at)
    return txids


def _skip_witnesses(raw: bytes, at: int, input_count: int) -> int:
    """The offset behind one stack per input."""
    is_empty = True
    for _ in range(input_count):
        item_count, at = _compact_size(raw, at)
        is_empty &= item_count == 0
        for _ in range(item_count):  # ends at the end of the block at the latest: an item takes a byte
            length, at = _compact_size(raw, at)
            at += length
    if is_empty:
        raise _Malformed("a witness without items", at)
    return at


def _compact_size(raw: bytes, at: int) -> tuple[int, int]:
    """The number at an offset, and the offset behind it. Longer forms than needed are refused, as Core
    does."""
    first = raw[at]
    if first < 0xFD:
        return first, at + 1
    width = 2 << (first - 0xFD)
    at += 1
    raw[at + width - 1]  # IndexError if it is cut short
    number = int.from_bytes(raw[at : at + width], "little")
    if number < (0xFD, 0x1_0000, 0x1_0000_0000)[first - 0xFD]:
        raise _Malformed("a length in a longer form than needed", at - 1)
    return number, at + width


def _hash(data: bytes) -> bytes:
    return sha256(sha256(data).digest()).digest()


def _at(where: str, offset: int) -> str:
    place = f"byte {offset} of the block"
    return f"{where}, {place}" if where else place
