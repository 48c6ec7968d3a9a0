"""Real chains for tests, by the name of their folder in `tests/data/bitcoin`, and a model of the coin set.

`load_blocks(name)` gives raw blocks in delivery order, `expected(name)` what an independent program found. Chains:

    mainnet_0_599, signet_0_120, regtest_kernel_206     expected after every block
    regtest_core_getblockstats                          expected at the end
    block300025_undo, mainnet_block_367891              one block on base coins (`base_coins_path`)
    reorg_btcd                                          parts "main" (0..4) and "side" (3A, 4A, 5A)
    reorg_floresta                                      parts "genesis", "A" (1..10), "B" (a fork above 5)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.block import Block, BlockRef, Op
from pipeline.commitment.muhash import MuHash, hash_serialized_3
from pipeline.sources import coins
from pipeline.sources.bitcoin import parse_block, parse_header
from pipeline.sources.bitcoin_files import read_blocks

DATA = Path(__file__).parent / "data/bitcoin"
NO_PARENT = bytes(32)

EVERY_BLOCK = ("mainnet_0_599", "signet_0_120", "regtest_kernel_206")
ON_BASE_COINS = {"block300025_undo": 300_025, "mainnet_block_367891": 367_891}
PARTS = {
    "reorg_btcd": {
        "main": ["blk_0_to_4.dat.bz2"],
        "side": ["blk_3A.dat.bz2", "blk_4A.dat.bz2", "blk_5A.dat.bz2"],
    }
}


def block_files(name: str, part: str = "") -> list[Path]:
    """The files of a chain that `read_blocks` reads as they are, in order; none for chains kept as JSON."""
    folder = DATA / name
    if name in PARTS:
        return [folder / file for file in PARTS[name][part]]
    match name:
        case "mainnet_0_599":
            return [folder / "blk00000.dat", folder / "blk00001.dat"]
        case "regtest_kernel_206":
            return [folder / "genesis_regtest.hex", folder / "block_data.txt"]
        case "block300025_undo":
            return [folder / "block300025.raw"]
        case "mainnet_block_367891":
            return [folder / "raw.zst"]
    if (name, part) == ("reorg_floresta", "genesis"):
        return [folder / "genesis_regtest.hex"]
    return []


def load_blocks(name: str, part: str = "") -> list[bytes]:
    """Raw blocks of a chain (or of one part of a reorg chain), in delivery order."""
    folder = DATA / name
    match name, part:
        case "signet_0_120", _:
            listed = sorted(_json(folder / "blocks.json"), key=lambda entry: entry["height"])
            return [bytes.fromhex(entry["block"]) for entry in listed]
        case "regtest_core_getblockstats", _:
            return [bytes.fromhex(text) for text in _json(folder / "rpc_getblockstats.json")["blocks"]]
        case "reorg_floresta", "A" | "B":
            chains = _json(folder / "test_reorg.json")
            return [bytes.fromhex(text) for text in chains["AB".index(part)]]
    files = block_files(name, part)
    assert files, f"no chain {name!r} with a part {part!r}"
    return [raw.data for file in files for raw in read_blocks(file)]


def expected(name: str) -> list[dict[str, Any]]:
    """What must hold: one entry per block for EVERY_BLOCK chains, per step for reorgs, else one for the end.

    Every entry has coins, amount_sat and muhash (as people see it), most have height and tip or hash.
    """
    folder = DATA / name
    if (folder / "expected_scenario.json").exists():
        steps: list[dict[str, Any]] = _json(folder / "expected_scenario.json")["steps"]
        return steps
    for file in ("expected_every_block.jsonl.gz", "expected_every_block.jsonl"):
        if (folder / file).exists():
            data = (folder / file).read_bytes()
            text = gzip.decompress(data) if file.endswith(".gz") else data
            return [json.loads(line) for line in text.splitlines()]
    if (folder / "expected_final.json").exists():
        return [_json(folder / "expected_final.json")]
    found = _json(folder / "expected.json")
    return [found["snapshot"], *found["after_each_block"]]


def base_coins_path(name: str) -> Path:
    """The coins a chain of ON_BASE_COINS starts from."""
    return DATA / name / "snapshot_before.jsonl.gz"


def base_ref(name: str) -> BlockRef:
    """The block below the only block of a chain of ON_BASE_COINS."""
    (raw,) = load_blocks(name)
    return BlockRef(ON_BASE_COINS[name] - 1, parse_header(raw).parent_hash)


def parse_chain(raws: Iterable[bytes], first_height: int = 0) -> list[Block]:
    """Raw blocks of consecutive heights, parsed."""
    return [parse_block(raw, first_height + index) for index, raw in enumerate(raws)]


def write_hex_lines(path: Path, raws: Iterable[bytes]) -> Path:
    """A file of blocks, one a line."""
    path.write_text("".join(raw.hex() + "\n" for raw in raws))
    return path


@dataclass
class CoinModel:
    """The coin set as a dict, with undo: nothing to get wrong."""

    coins: dict[bytes, bytes] = field(default_factory=dict)
    amount_sat: int = 0
    muhash: MuHash = field(default_factory=MuHash)
    undo: list[list[tuple[bytes, bytes | None]]] = field(default_factory=list)

    def set(self, key: bytes, value: bytes | None) -> None:
        before = self.coins.pop(key, None)
        if before is not None:
            self.amount_sat -= coins.decode(before).amount_sat
            self.muhash.remove(coins.element(key, before))
        if value is not None:
            self.coins[key] = value
            self.amount_sat += coins.decode(value).amount_sat
            self.muhash.insert(coins.element(key, value))

    def connect(self, block: Block) -> None:
        """Apply every op in order. A create must find nothing, a delete something."""
        undo: list[tuple[bytes, bytes | None]] = []
        for ops in block.tables.values():
            values = iter(ops.values)
            for code, key in zip(ops.codes, ops.keys, strict=True):
                before = self.coins.get(key)
                assert code != Op.CREATE or before is None, f"created twice: {key.hex()}"
                assert code != Op.DELETE or before is not None, f"spends nothing: {key.hex()}"
                undo.append((key, before))
                self.set(key, None if code == Op.DELETE else next(values))
        self.undo.append(undo)

    def disconnect(self) -> None:
        """Take the last block off."""
        for key, before in reversed(self.undo.pop()):
            self.set(key, before)

    def check(self, entry: dict[str, Any]) -> None:
        """The set is what an entry of `expected` says."""
        assert len(self.coins) == entry["coins"], entry
        assert self.amount_sat == entry["amount_sat"], entry
        assert self.muhash.digest()[::-1].hex() == entry["muhash"], entry
        if "hash_serialized_3" in entry:
            elements = (coins.element(key, self.coins[key]) for key in sorted(self.coins))
            assert hash_serialized_3(elements)[::-1].hex() == entry["hash_serialized_3"], entry


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
