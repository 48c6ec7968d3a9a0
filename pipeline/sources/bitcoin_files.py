"""Files that hold Bitcoin blocks or coins, read one at a time, each with the place it stands at.

Blocks come in one of three forms, told apart by their first bytes, compressed or not (`streams`):

* **blk files**, as Bitcoin Core and btcd write them: network magic (4 B), length (u32 LE), block, again and
again. The
  zeroes to which Core extends its newest file are its end. Core 28 and later mask their block files with
  the eight bytes of `xor.dat` in the same directory: `blk*.dat` beside one is unmasked;
* **hex lines**: a block a line, blank lines allowed;
* **one raw block**, and nothing else.

Every error names file and byte offset (of the decompressed bytes), and the line where there are lines.

**Base coins** are JSON lines: the coins a node holds, from which a chain can start in the middle.

    {"txid": hex as people see it, "vout": n, "height": n, "coinbase": bool, "value": satoshi, "script": hex}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.errors import BlockCorrupt, CoinsCorrupt
from pipeline.sources import coins
from pipeline.sources.bitcoin import BLOCK_BYTES_MAX
from pipeline.sources.streams import ByteStream, open_stream

NETWORK_MAGICS: Final = {
    bytes.fromhex("f9beb4d9"): "main",
    bytes.fromhex("0b110907"): "testnet3",
    bytes.fromhex("1c163f28"): "testnet4",
    bytes.fromhex("0a03cf40"): "signet",
    bytes.fromhex("fabfb5da"): "regtest",
}

_FRAME_BYTES = 8  # magic 4, length 4
_BLOCK_BYTES_MIN = 81
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_BLANKS = b" \t\r\n"
_HEX_LINE_BYTES_MAX = 2 * BLOCK_BYTES_MAX + 64
_COIN_LINE_BYTES_MAX = 2 * coins.SCRIPT_BYTES_MAX + 1024
_MASK_FILE = "xor.dat"
_MASK_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RawBlock:
    """A block's bytes, not looked into yet. ``offset``: of its first byte, or of its line, in the
    decompressed file. ``line``: 1 for the first; 0 where there are no lines. ``network``: by the file's
    magic; empty if it has none."""

    path: Path
    offset: int
    line: int
    network: str
    data: bytes

    @property
    def where(self) -> str:
        """The block's place, for errors."""
        return _where(self.path, self.offset, self.line)


def read_blocks(path: Path) -> Iterator[RawBlock]:
    """All blocks of a file, in its order. Raises BlockCorrupt, also in the middle, and OSError."""

    def corrupt(why: str, offset: int, line: int = 0) -> BlockCorrupt:
        return BlockCorrupt(f"not a file of blocks: {why}", where=_where(path, offset, line))

    with open_stream(path, corrupt, mask=_mask_beside(path, corrupt)) as stream:
        head = stream.peek(4)
        if not head:
            raise corrupt("it is empty", 0)
        if head in NETWORK_MAGICS or head == bytes(4):
            yield from _read_frames(path, stream, corrupt)
        elif not stream.peek(2 * _BLOCK_BYTES_MIN).strip(_HEX_DIGITS + _BLANKS):
            yield from _read_hex_lines(path, stream, corrupt)
        else:
            data = stream.take(BLOCK_BYTES_MAX + 1)
            if not _BLOCK_BYTES_MIN <= len(data) <= BLOCK_BYTES_MAX:
                raise corrupt(f"it begins with {head.hex()}, no known magic, and is no single block", 0)
            yield RawBlock(path=path, offset=0, line=0, network="", data=data)


def read_base_coins(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """All coins of a file as (whole key, value) of the `utxo` table, in its order.

    Raises CoinsCorrupt, also in the middle, and OSError. Does not see coins that stand twice: the importer
    does.
    """

    def corrupt(why: str, offset: int, line: int = 0) -> CoinsCorrupt:
        return CoinsCorrupt(f"not a file of coins: {why}", where=_where(path, offset, line))

    with open_stream(path, corrupt) as stream:
        for line, offset, text in _lines(stream, _COIN_LINE_BYTES_MAX, corrupt):
            try:
                yield _coin(json.loads(text))
            except (_CoinInvalid, ValueError, RecursionError) as error:
                raise corrupt(str(error), offset, line) from None


def _read_frames(path: Path, stream: ByteStream, corrupt: Callable[..., Exception]) -> Iterator[RawBlock]:
    expected = b""
    while frame := stream.peek(_FRAME_BYTES):
        offset, magic = stream.offset, frame[:4]
        if not any(frame):
            while padding := stream.take(1 << 16):
                if any(padding):
                    raise corrupt("something follows the zeroes that end it", stream.offset - len(padding))
            return
        if magic not in NETWORK_MAGICS or (expected and magic != expected):
            raise corrupt(f"{magic.hex()} where a block's magic {expected.hex()} should be", offset)
        expected, length = magic, int.from_bytes(frame[4:], "little")
        if len(frame) < _FRAME_BYTES:
            raise corrupt("it is cut short in the length of a block", offset)
        if not _BLOCK_BYTES_MIN <= length <= BLOCK_BYTES_MAX:
            raise corrupt(f"a block of {length} bytes, not within {_BLOCK_BYTES_MIN}..{BLOCK_BYTES_MAX}", offset)
        stream.take(_FRAME_BYTES)
        data = stream.take(length)
        if len(data) < length:
            raise corrupt(f"it is cut short: {len(data)} of the {length} bytes of a block", offset)
        yield RawBlock(path=path, offset=offset + _FRAME_BYTES, line=0, network=NETWORK_MAGICS[magic], data=data)


def _read_hex_lines(path: Path, stream: ByteStream, corrupt: Callable[..., Exception]) -> Iterator[RawBlock]:
    for line, offset, text in _lines(stream, _HEX_LINE_BYTES_MAX, corrupt):
        try:
            data = bytes.fromhex(text.decode("ascii"))
        except ValueError:
            raise corrupt("a line that is not hexadecimal", offset, line) from None
        yield RawBlock(path=path, offset=offset, line=line, network="", data=data)


def _lines(stream: ByteStream, bytes_max: int, corrupt: Callable[..., Exception]) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and stripped bytes of all lines that are not blank."""
    line, offset = 0, stream.offset
    while (text := stream.take_line(bytes_max)) is not None:
        line += 1
        if len(text) > bytes_max and not text.endswith(b"\n"):
            raise corrupt(f"a line of more than {bytes_max} bytes", offset, line)
        stripped = text.strip(_BLANKS)
        if stripped:
            yield line, offset, stripped
        offset = stream.offset


class _CoinInvalid(Exception):
    pass


_COIN_FIELDS: dict[str, type] = {
    "txid": str,
    "vout": int,
    "height": int,
    "coinbase": bool,
    "value": int,
    "script": str,
}


def _coin(fields: Any) -> tuple[bytes, bytes]:
    if not isinstance(fields, dict) or set(fields) != set(_COIN_FIELDS):
        raise _CoinInvalid(f"a line is not a map of {', '.join(_COIN_FIELDS)}")
    for name, kind in _COIN_FIELDS.items():
        if type(fields[name]) is not kind:
            raise _CoinInvalid(f"{name} is not of type {kind.__name__}")
    for name, maximum in (
        ("vout", 0xFFFF_FFFF),
        ("height", coins.HEIGHT_MAX),
        ("value", coins.MONEY_MAX_SAT),
    ):
        if not 0 <= fields[name] <= maximum:
            raise _CoinInvalid(f"{name} is {fields[name]}, not within 0..{maximum}")
    txid, script = bytes.fromhex(fields["txid"]), bytes.fromhex(fields["script"])
    if len(txid) != 32:
        raise _CoinInvalid(f"txid has {len(txid)} bytes, not 32")
    if not coins.is_spendable(script):
        raise _CoinInvalid("script can never be spent: such a coin is not in the set")
    value = coins.encode(coins.Coin(fields["height"], fields["coinbase"], fields["value"], script))
    return txid[::-1] + fields["vout"].to_bytes(4, "big"), value


def _mask_beside(path: Path, corrupt: Callable[..., Exception]) -> bytes:
    """The mask of Core's block files, or nothing."""
    mask_file = path.with_name(_MASK_FILE)
    if not (path.name.startswith("blk") and path.suffix == ".dat" and mask_file.is_file()):
        return b""
    mask = mask_file.read_bytes()
    if len(mask) != _MASK_BYTES:
        raise corrupt(f"{mask_file.name} beside it has {len(mask)} bytes, not {_MASK_BYTES}", 0)
    return mask


def _where(path: Path, offset: int, line: int) -> str:
    return f"{path}, line {line}, byte {offset}" if line else f"{path}, byte {offset}"
