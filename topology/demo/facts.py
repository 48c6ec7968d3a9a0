"""What the demo found, and whether all of it agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from topology.demo.wire import NOTHING, Size

NODES = ("primary", "replica", "restored")


@dataclass(slots=True, kw_only=True)
class Node:
    """One node at the end: what `stateferry status` and `stateferry root --interop muhash` say of it."""

    height: int
    block_hash: str
    root: str
    proof: str
    coins: int
    muhash: str
    peak_memory_mb: float | None = None  # None: the system does not tell, or there is no worker

    @property
    def held(self) -> tuple[int, str, str, int, str]:
        """All that two nodes of the same state must agree on."""
        return self.height, self.block_hash, self.root, self.coins, self.muhash


@dataclass(slots=True, kw_only=True)
class Reorg:
    from_height: int
    to_height: int
    depth: int


@dataclass(slots=True, kw_only=True)
class Facts:
    """``muhash_expected`` is what Bitcoin Core's rules give after the last mainnet block; ``muhash_found`` what each
    node had there."""

    mainnet_height: int
    mainnet_hash_expected: str
    muhash_expected: str
    mainnet_hash_found: dict[str, str] = field(default_factory=dict)
    muhash_found: dict[str, str] = field(default_factory=dict)
    tip_height: int = -1
    tip_hash: str = ""
    nodes: dict[str, Node] = field(default_factory=dict)
    reorgs: list[Reorg] = field(default_factory=list)
    snapshot_height: int = -1
    snapshot_root: str = ""
    snapshot_at_heights: tuple[int, int] = (-1, -1)  # the primary's, before and after it was taken
    wire_mainnet: Size = NOTHING
    wire_synthetic: Size = NOTHING
    json_zstd_bytes_per_change: float | None = None
    changes_per_s: float = 0.0  # from the synthetic chain's first block to the replica's last
    restore_s: float = 0.0  # to a proven state at the highest archived height
    restore_height: int = -1
    restore_to_tip_s: float = 0.0  # frames from there to the tip
    replay_s: float = 0.0  # all frames from the first one to the tip
    total_s: float = 0.0

    def mismatches(self) -> Iterator[str]:
        """Everything that is not as it must be, in words."""
        for name, found in self.mainnet_hash_found.items():
            if found != self.mainnet_hash_expected:
                yield f"{name}: block {self.mainnet_height} is {found}, not {self.mainnet_hash_expected}"
        for name, found in self.muhash_found.items():
            if found != self.muhash_expected:
                yield f"{name}: MuHash at height {self.mainnet_height} is {found}, not {self.muhash_expected}"
        for name in NODES:
            node = self.nodes[name]
            if (node.height, node.block_hash) != (self.tip_height, self.tip_hash):
                yield f"{name}: stands at {node.height}:{node.block_hash}, not at {self.tip_height}:{self.tip_hash}"
            if node.held != self.nodes["primary"].held:
                yield f"{name}: holds {node.held}, the primary {self.nodes['primary'].held}"
            if node.proof != "proven":
                yield f"{name}: its state is {node.proof}"
        if not self.reorgs:
            yield "no reorg was seen on the diffs topic"

    def document(self) -> dict[str, Any]:
        """For --json."""
        found = asdict(self)
        for name in ("wire_mainnet", "wire_synthetic"):
            size: Size = getattr(self, name)
            per_change = size.size_bytes / size.changes if size.changes else None
            found[name] = size._asdict() | {"bytes_per_change": per_change}
        mismatches = list(self.mismatches())
        return {"agreed": not mismatches, "mismatches": mismatches} | found

    def rows(self) -> dict[str, list[str]]:
        """The table at the end: a cell for each of `NODES`."""
        nodes = [self.nodes[name] for name in NODES]
        expected = self.muhash_expected
        return {
            "height": [str(node.height) for node in nodes],
            "block hash": [_ends(node.block_hash) for node in nodes],
            "root": [_ends(node.root) for node in nodes],
            "state": [node.proof for node in nodes],
            "coins": [f"{node.coins:,}" for node in nodes],
            "MuHash": [_ends(node.muhash) for node in nodes],
            f"MuHash at {self.mainnet_height}": [
                _ends(self.muhash_found[name]) if name in self.muhash_found else "-" for name in NODES
            ],
            "as expected": [
                "-" if name not in self.muhash_found else "yes" if self.muhash_found[name] == expected else "NO"
                for name in NODES
            ],
            "peak memory": ["-" if node.peak_memory_mb is None else f"{node.peak_memory_mb:.0f} MB" for node in nodes],
        }


def _ends(digest: str) -> str:
    return f"{digest[:8]}..{digest[-8:]}"
