"""Bitcoin blocks: real chains replayed against an independent program, and every malformed byte refused."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import chains
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.block import Op
from pipeline.errors import BlockCorrupt, CoinsCorrupt
from pipeline.sources import bitcoin, coins
from pipeline.sources.bitcoin import BLOCK_BYTES_MAX, bip34_height, merkle_root, parse_block, parse_header
from pipeline.sources.bitcoin_files import NETWORK_MAGICS, RawBlock, read_base_coins, read_blocks
from pipeline.state import UTXO

MAGIC = bytes.fromhex("f9beb4d9")
MAINNET = chains.load_blocks("mainnet_0_599")
SIGNET = chains.load_blocks("signet_0_120")


def double_hash(data: bytes) -> bytes:
    return sha256(sha256(data).digest()).digest()


def framed(*raws: bytes, magic: bytes = MAGIC) -> bytes:
    return b"".join(magic + len(raw).to_bytes(4, "little") + raw for raw in raws)


def transaction(inputs: list[bytes], outputs: list[tuple[int, bytes]]) -> bytes:
    """A transaction of before segwit: outpoints in, (amount, script) out."""
    parts = [b"\x01\x00\x00\x00", bytes([len(inputs)])]
    parts += [outpoint + b"\x00" + b"\xff" * 4 for outpoint in inputs]
    parts.append(bytes([len(outputs)]))
    for amount_sat, script in outputs:
        length = bytes([len(script)]) if len(script) < 0xFD else b"\xfd" + len(script).to_bytes(2, "little")
        parts += [amount_sat.to_bytes(8, "little"), length, script]
    return b"".join([*parts, bytes(4)])


def block_of(*transactions: bytes, parent: bytes = b"\x11" * 32) -> bytes:
    root, _ = merkle_root([double_hash(raw) for raw in transactions])
    header = b"\x01\x00\x00\x00" + parent + root + (1_234_567_890).to_bytes(4, "little") + bytes(8)
    return header + bytes([len(transactions)]) + b"".join(transactions)


NO_OUTPOINT = bytes(32) + b"\xff" * 4
COINBASE = transaction([NO_OUTPOINT], [(50, b"\x51")])


# Whole chains


@pytest.mark.parametrize("name", chains.EVERY_BLOCK)
def test_chain_matches_after_every_block(name: str) -> None:
    """Count, amount and MuHash agree with an independent program after each block."""
    model, entries = chains.CoinModel(), chains.expected(name)
    blocks = chains.parse_chain(chains.load_blocks(name))
    assert len(blocks) == len(entries)

    for block, entry in zip(blocks, entries, strict=True):
        model.connect(block)
        model.check(entry)
        assert block.ref.block_hash[::-1].hex() == entry["hash"]


@pytest.mark.parametrize("name", ["mainnet_0_599", "signet_0_120", "regtest_kernel_206"])
def test_chain_matches_at_its_end(name: str) -> None:
    """hash_serialized_3 agrees as well, and undoing every block leaves nothing."""
    model = chains.CoinModel()
    blocks = chains.parse_chain(chains.load_blocks(name))
    for block in blocks:
        model.connect(block)
    model.check(json.loads((chains.DATA / name / "expected_final.json").read_text()))
    for _ in blocks:
        model.disconnect()

    assert not model.coins


def test_core_statistics_agree() -> None:
    """Core's own count of coins made and spent per block, and the set at the end."""
    name = "regtest_core_getblockstats"
    stats = json.loads((chains.DATA / name / "rpc_getblockstats.json").read_text())["stats"]
    increase = {entry["height"]: entry["utxo_increase_actual"] for entry in stats}
    model = chains.CoinModel()
    for block in chains.parse_chain(chains.load_blocks(name)):
        before = len(model.coins)
        model.connect(block)
        if block.ref.height in increase:
            assert len(model.coins) - before == increase[block.ref.height]

    assert increase
    model.check(chains.expected(name)[0])


@pytest.mark.parametrize("name", chains.ON_BASE_COINS)
def test_block_on_base_coins_matches(name: str) -> None:
    """A full block of 2014 or 2015 spends the coins it must, out of those imported."""
    model, (before, after) = chains.CoinModel(), chains.expected(name)
    for key, value in read_base_coins(chains.base_coins_path(name)):
        model.set(key, value)
    model.check(before)
    (block,) = chains.parse_chain(chains.load_blocks(name), chains.ON_BASE_COINS[name])
    model.connect(block)
    model.check(after)
    model.disconnect()
    model.check(before)

    assert block.parent_hash == chains.base_ref(name).block_hash


def test_btcd_reorg_matches() -> None:
    """Depth 2: the set after the main chain, and after its side chain took over."""
    genesis, main, side = chains.expected("reorg_btcd")
    model = chains.CoinModel()
    for block in chains.parse_chain(chains.load_blocks("reorg_btcd", "main")):
        model.connect(block)
        if block.ref.height == 0:
            model.check(genesis)
    model.check(main)
    model.disconnect()
    model.disconnect()
    for block in chains.parse_chain(chains.load_blocks("reorg_btcd", "side"), 3):
        model.connect(block)
    model.check(side)


def test_floresta_reorg_matches_there_and_back() -> None:
    """A, then B from height 5 on, then A again: the set of A is the set of A."""
    genesis, after_a, after_b, back = chains.expected("reorg_floresta")
    model = chains.CoinModel()
    for block in chains.parse_chain(chains.load_blocks("reorg_floresta", "genesis")):
        model.connect(block)
    model.check(genesis)
    blocks_a = chains.parse_chain(chains.load_blocks("reorg_floresta", "A"), 1)
    for block in blocks_a:
        model.connect(block)
    model.check(after_a)
    for _ in range(5):
        model.disconnect()
    blocks_b = chains.parse_chain(chains.load_blocks("reorg_floresta", "B"), 6)
    for block in blocks_b:
        model.connect(block)
    model.check(after_b)
    for _ in blocks_b:
        model.disconnect()
    for block in blocks_a[5:]:
        model.connect(block)
    model.check(back)


@pytest.mark.parametrize("height", [0, 1, 2])
def test_published_muhash_of_early_blocks(height: int) -> None:
    """MuHash values that others published for mainnet's first blocks."""
    known = json.loads((chains.DATA / "known_utxo_hashes.json").read_text())["gettxoutsetinfo_muhash"]
    (entry,) = [entry for entry in known if (entry["network"], entry["height"]) == ("main", height)]
    model = chains.CoinModel()
    for block in chains.parse_chain(MAINNET[: height + 1]):
        model.connect(block)

    assert model.muhash.digest()[::-1].hex() == entry["muhash"]


# The rules of single blocks


def test_header_of_the_genesis_block() -> None:
    """Hash, parent and time of the block everyone knows; its coinbase is not in the set."""
    header = parse_header(MAINNET[0])
    block = parse_block(MAINNET[0], 0)

    assert header.block_hash[::-1].hex() == "000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f"
    assert header.parent_hash == bitcoin.NO_PARENT
    assert block.time_s == header.time_s == 1_231_006_505
    assert block.op_count == 0


def test_ops_stand_in_transaction_order() -> None:
    """Deletes of inputs, then creates of outputs, transaction by transaction; spends inside the block too."""
    first = double_hash(COINBASE)
    second = transaction([first + bytes(4)], [(20, b"\x52"), (30, b"\x53")])
    third = transaction([double_hash(second) + b"\x01\x00\x00\x00"], [(30, b"\x54")])
    block = parse_block(block_of(COINBASE, second, third), 7)
    ops = block.tables[UTXO.name]

    assert list(ops.codes) == [Op.CREATE, Op.DELETE, Op.CREATE, Op.CREATE, Op.DELETE, Op.CREATE]
    assert ops.keys == [
        first + bytes(4),
        first + bytes(4),
        double_hash(second) + bytes(4),
        double_hash(second) + b"\x00\x00\x00\x01",
        double_hash(second) + b"\x00\x00\x00\x01",
        double_hash(third) + bytes(4),
    ]
    assert [coins.decode(value) for value in ops.values] == [
        coins.Coin(7, True, 50, b"\x51"),
        coins.Coin(7, False, 20, b"\x52"),
        coins.Coin(7, False, 30, b"\x53"),
        coins.Coin(7, False, 30, b"\x54"),
    ]


def test_unspendable_outputs_are_left_out() -> None:
    """OP_RETURN and scripts over 10,000 bytes make no coin; other outputs keep their index."""
    scripts = [b"\x6a\x01x", b"\x51" * 10_000, b"\x51" * 10_001, b""]
    raw = block_of(transaction([NO_OUTPOINT], [(1, script) for script in scripts]))
    ops = parse_block(raw, 1).tables[UTXO.name]

    assert [key[32:] for key in ops.keys] == [b"\x00\x00\x00\x01", b"\x00\x00\x00\x03"]
    assert [coins.decode(value).script for value in ops.values] == [scripts[1], scripts[3]]


@pytest.mark.parametrize("offset", [0, 1])
def test_bip30_coinbases_are_put(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """The coinbase of a repeating block overwrites, at its height and hash only; other outputs create."""
    spend = transaction([b"\x22" * 36], [(20, b"\x52")])
    raw = block_of(COINBASE, spend)
    shown = parse_header(raw).block_hash[::-1].hex()
    monkeypatch.setattr(bitcoin, "_REPEATED_COINBASES", {(91_842, shown)})
    codes = parse_block(raw, 91_842 + offset).tables[UTXO.name].codes

    assert list(codes) == [Op.CREATE if offset else Op.PUT, Op.DELETE, Op.CREATE]


def test_bip30_blocks_are_the_two_of_mainnet() -> None:
    """Heights and hashes as in Core's `IsBIP30Repeat`."""
    assert {height for height, _ in bitcoin._REPEATED_COINBASES} == {91_842, 91_880}
    assert all(len(bytes.fromhex(shown)) == 32 for _, shown in bitcoin._REPEATED_COINBASES)


@pytest.mark.parametrize(
    ("raw", "height"),
    [
        (MAINNET[0], None),
        (MAINNET[599], None),
        (SIGNET[1], 1),
        (SIGNET[17], 17),
        (SIGNET[120], 120),
        (chains.load_blocks("mainnet_block_367891")[0], 367_891),
        (chains.load_blocks("block300025_undo")[0], 300_025),
    ],
)
def test_bip34_height(raw: bytes, height: int | None) -> None:
    """From version 2 on the coinbase names the height, also as OP_1 .. OP_16."""
    assert bip34_height(raw) == height


def test_merkle_root_shows_repetition() -> None:
    """A list that ends in a real repetition has the root of the shorter one, and is marked."""
    row = [bytes([number]) * 32 for number in range(3)]

    assert merkle_root(row)[0] == merkle_root([*row, row[-1]])[0]
    assert not merkle_root(row)[1]
    assert merkle_root([*row, row[-1]])[1]


# What is refused

SPEND = transaction([b"\x22" * 36], [(20, b"\x52")])


THIRD = transaction([b"\x33" * 36], [(1, b"")])
THREE = block_of(COINBASE, SPEND, THIRD)
REPEATING = THREE[:80] + b"\x04" + THREE[81:] + THIRD


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "bytes, not within"),
        (MAINNET[1][:80], "bytes, not within"),
        (bytes(BLOCK_BYTES_MAX + 1), "bytes, not within"),
        (MAINNET[1][:-1], "cut short"),
        (MAINNET[1][:90], "transactions in"),
        (MAINNET[1] + b"\x00", "1 bytes follow"),
        (MAINNET[1][:80] + b"\x00" + MAINNET[1][81:], "0 transactions"),
        (MAINNET[1][:80] + b"\xff" * 9 + MAINNET[1][81:], "transactions in"),
        (MAINNET[1][:80] + b"\xfd\x01\x00" + MAINNET[1][81:], "longer form"),
        (MAINNET[1][:36] + bytes(32) + MAINNET[1][68:], "Merkle root"),
        (block_of(SPEND), "coinbase"),
        (block_of(COINBASE, COINBASE), "coinbase"),
        (block_of(transaction([NO_OUTPOINT, b"\x22" * 36], [(1, b"")])), "coinbase"),
        (block_of(transaction([NO_OUTPOINT], [(coins.MONEY_MAX_SAT + 1, b"")])), "satoshi"),
        (block_of(transaction([NO_OUTPOINT], []) + bytes(40)), "outputs"),
        (block_of(COINBASE, transaction([], [(1, b"")] * 9)), "without inputs"),
        (REPEATING, "repeats transactions"),
    ],
)
def test_malformed_block_is_refused(raw: bytes, why: str) -> None:
    """BlockCorrupt, saying why and naming the place it was given."""
    with pytest.raises(BlockCorrupt, match=why) as caught:
        parse_block(raw, 1, where="some.dat, byte 8")

    assert caught.value.where.startswith("some.dat, byte 8")


MUTABLE = [MAINNET[1], MAINNET[170], SIGNET[100], block_of(COINBASE, SPEND)]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MUTABLE), st.data())
def test_mutated_blocks_raise_only_block_corrupt(raw: bytes, data: st.DataObject) -> None:
    """Bytes changed, cut or inserted anywhere: a block or BlockCorrupt, nothing else."""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 4))
        raw = raw[:at] + data.draw(st.binary(max_size=6)) + raw[at + cut :]
    for read in (lambda: parse_block(raw, 5), lambda: bip34_height(raw)):
        try:
            read()
        except BlockCorrupt:
            continue


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MUTABLE), st.data())
def test_truncated_blocks_are_refused(raw: bytes, data: st.DataObject) -> None:
    """No proper prefix of a block is a block."""
    cut = data.draw(st.integers(0, len(raw) - 1))

    with pytest.raises(BlockCorrupt):
        parse_block(raw[:cut], 5)


# Files

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
FORMS: dict[str, Callable[[list[bytes]], bytes]] = {
    "dat": lambda raws: framed(*raws),
    "padded": lambda raws: framed(*raws) + bytes(1 << 20),
    "hex": lambda raws: b"\n".join(raw.hex().encode() for raw in raws),
    "blank lines": lambda raws: b"\n\n" + b"\r\n \n".join(raw.hex().upper().encode() for raw in raws) + b"\n\n",
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_come_back_from_every_form(tmp_path: Path, form: str, packer: str) -> None:
    """Framed, hex lines, compressed or not, whatever the name."""
    raws = MAINNET[:40]
    path = write(tmp_path / "blocks.data", PACKERS[packer](FORMS[form](raws)))

    assert [raw.data for raw in read_blocks(path)] == raws


@pytest.mark.parametrize("packer", PACKERS)
def test_one_raw_block_comes_back(tmp_path: Path, packer: str) -> None:
    """A file that is one block."""
    path = write(tmp_path / "block", PACKERS[packer](SIGNET[5]))
    (raw,) = read_blocks(path)

    assert raw == RawBlock(path=path, offset=0, line=0, network="", data=SIGNET[5])


@pytest.mark.parametrize("packer", [".gz", ".bz2", ".zst"])
def test_members_follow_each_other(tmp_path: Path, packer: str) -> None:
    """Compressed files may be concatenated, also inside a block."""
    whole = framed(*MAINNET[:40])
    path = write(tmp_path / "blocks", PACKERS[packer](whole[:1000]) + PACKERS[packer](whole[1000:]))

    assert [raw.data for raw in read_blocks(path)] == MAINNET[:40]


def test_places_are_named(tmp_path: Path) -> None:
    """Offsets and lines count from the file's start."""
    framed_path = write(tmp_path / "a", framed(*MAINNET[:3]))
    lines_path = write(tmp_path / "b", b"\n" + MAINNET[0].hex().encode() + b"\n" + MAINNET[1].hex().encode())
    second = 2 * len(MAINNET[0]) + 2

    assert [raw.offset for raw in read_blocks(framed_path)][:2] == [8, len(MAINNET[0]) + 16]
    assert [raw.network for raw in read_blocks(framed_path)] == ["main"] * 3
    assert [(raw.line, raw.offset) for raw in read_blocks(lines_path)] == [(2, 1), (3, second)]
    assert [raw.where for raw in read_blocks(lines_path)][1] == f"{lines_path}, line 3, byte {second}"


@pytest.mark.parametrize("magic", NETWORK_MAGICS)
def test_every_network_s_magic_is_known(tmp_path: Path, magic: bytes) -> None:
    """Main, both testnets, signet, regtest."""
    path = write(tmp_path / "blocks", framed(MAINNET[0], magic=magic))

    assert [raw.network for raw in read_blocks(path)] == [NETWORK_MAGICS[magic]]


def test_core_s_mask_is_taken_off(tmp_path: Path) -> None:
    """blk files beside an xor.dat are unmasked; other files are not."""
    mask = bytes(range(1, 9))
    data = framed(*MAINNET[:5])
    masked = bytes(byte ^ mask[index % 8] for index, byte in enumerate(data))
    write(tmp_path / "xor.dat", mask)
    path = write(tmp_path / "blk00000.dat", masked)
    plain = write(tmp_path / "other.dat", data)

    assert [raw.data for raw in read_blocks(path)] == MAINNET[:5]
    assert [raw.data for raw in read_blocks(plain)] == MAINNET[:5]

    write(tmp_path / "xor.dat", mask[:7])
    with pytest.raises(BlockCorrupt, match="7 bytes"):
        list(read_blocks(path))


GOOD = framed(*MAINNET[:2])


@pytest.mark.parametrize(
    ("data", "why", "place"),
    [
        (b"", "empty", "byte 0"),
        (b"garbage that is no block" * 10, "transactions", "byte 81 of the block"),
        (b"short", "no known magic", "byte 0"),
        (b"\x01" * (BLOCK_BYTES_MAX + 1), "no known magic", "byte 0"),
        (GOOD[:-1], "cut short", f"byte {len(MAINNET[0]) + 8}"),
        (GOOD + MAGIC, "cut short", f"byte {len(GOOD)}"),
        (GOOD + b"junk" + framed(MAINNET[2]), "magic", f"byte {len(GOOD)}"),
        (GOOD + framed(MAINNET[2], magic=b"\xfa\xbf\xb5\xda"), "magic", f"byte {len(GOOD)}"),
        (GOOD + bytes(100) + framed(MAINNET[2]), "follows the zeroes", ""),
        (GOOD + MAGIC + b"\xff\xff\xff\xff", "4294967295 bytes", f"byte {len(GOOD)}"),
        (GOOD + MAGIC + b"\x50\x00\x00\x00" + bytes(80), "80 bytes", f"byte {len(GOOD)}"),
        (MAINNET[0].hex().encode() + b"\nabc\n", "hexadecimal", f"line 2, byte {2 * len(MAINNET[0]) + 1}"),
        (MAINNET[0].hex().encode() + b"\nxyz\xff\n", "hexadecimal", "line 2"),
        (MAINNET[0].hex().encode() + b"\n" + b"0" * (2 * BLOCK_BYTES_MAX + 100), "a line of more", "line 2"),
        (gzip.compress(GOOD)[:-9], "decompressed", ""),
        (bz2.compress(GOOD)[:-9], "decompressed", ""),
        (zstandard.ZstdCompressor().compress(GOOD)[:-9], "decompressed", ""),
        (gzip.compress(GOOD) + b"junk", "decompressed", ""),
        (b"BZh9 nothing", "decompressed", ""),
        (b"\x28\xb5\x2f\xfd\xff\xff", "decompressed", ""),
        (zstandard.ZstdCompressor().compress(GOOD + bytes(400 << 20)), "decompress to more", ""),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, data: bytes, why: str, place: str) -> None:
    """BlockCorrupt on the way, naming file and place."""
    path = write(tmp_path / "some.file", data)
    with pytest.raises(BlockCorrupt, match=why) as caught:
        for raw in read_blocks(path):
            parse_block(raw.data, 1, where=raw.where)

    assert str(path) in str(caught.value)
    assert place in caught.value.where


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*PACKERS]), st.sampled_from([*FORMS]), st.data())
def test_mutated_files_raise_only_block_corrupt(
    tmp_path_factory: pytest.TempPathFactory, packer: str, form: str, data: st.DataObject
) -> None:
    """Whatever bytes a file holds: blocks, or BlockCorrupt."""
    packed = PACKERS[packer](FORMS[form](MAINNET[:3]))[:5000]
    at = data.draw(st.integers(0, len(packed)))
    packed = packed[:at] + data.draw(st.binary(max_size=4)) + packed[at + data.draw(st.integers(0, 4)) :]
    path = write(tmp_path_factory.mktemp("mutated") / "file", packed)
    try:
        for raw in read_blocks(path):
            parse_block(raw.data, 1, where=raw.where)
    except BlockCorrupt as error:
        assert str(path) in error.where


# Base coins

COIN = {"txid": "ab" * 31 + "cd", "vout": 3, "height": 9, "coinbase": True, "value": 5, "script": "51"}


def test_base_coins_come_back(tmp_path: Path) -> None:
    """Key in hashing order, value as the table holds it; blank lines do not matter."""
    path = write(tmp_path / "coins", gzip.compress(b"\n" + json.dumps(COIN).encode() + b"\n\n"))
    key = b"\xcd" + b"\xab" * 31 + b"\x00\x00\x00\x03"

    assert list(read_base_coins(path)) == [(key, coins.encode(coins.Coin(9, True, 5, b"\x51")))]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "Expecting"),
        (b"[]", "not a map"),
        (b"\xff", "line 2"),
        (b"[" * 10_000, "line 2"),
        (json.dumps(COIN | {"more": 1}).encode(), "not a map"),
        (json.dumps({"txid": "ab" * 32}).encode(), "not a map"),
        (json.dumps(COIN | {"txid": "ab" * 31}).encode(), "31 bytes"),
        (json.dumps(COIN | {"txid": "xy" * 32}).encode(), "hexadecimal"),
        (json.dumps(COIN | {"vout": -1}).encode(), "vout is -1"),
        (json.dumps(COIN | {"vout": 1 << 32}).encode(), "vout is"),
        (json.dumps(COIN | {"vout": True}).encode(), "vout is not of type int"),
        (json.dumps(COIN | {"height": 1 << 31}).encode(), "height is"),
        (json.dumps(COIN | {"value": coins.MONEY_MAX_SAT + 1}).encode(), "value is"),
        (json.dumps(COIN | {"coinbase": 1}).encode(), "coinbase is not of type bool"),
        (json.dumps(COIN | {"script": "6a"}).encode(), "never be spent"),
        (json.dumps(COIN | {"script": "51" * 30_000}).encode(), "a line of more"),
    ],
)
def test_malformed_coins_are_refused(tmp_path: Path, line: bytes, why: str) -> None:
    """CoinsCorrupt, naming file and line."""
    path = write(tmp_path / "coins.jsonl", json.dumps(COIN).encode() + b"\n" + line)
    with pytest.raises(CoinsCorrupt, match=why) as caught:
        list(read_base_coins(path))

    assert caught.value.where.startswith(f"{path}, line 2, byte ")
