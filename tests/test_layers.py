"""Layers over a store against a list of dicts: what is read, what is held, what going back shows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.layers import Layers
from pipeline.stores.base import Batch
from pipeline.stores.memory import MemoryStore

KEYS = [bytes([number]) for number in range(6)]

writes = st.dictionaries(st.sampled_from(KEYS), st.none() | st.binary(max_size=3))


class LayersMachine(RuleBasedStateMachine):
    """Push, settle, revert at will: what is read is the store with all layers on top."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.layers = Layers(self.store)
        self.model: list[tuple[int, dict[bytes, bytes | None]]] = []
        self.number = 0

    @initialize(held=writes)
    def fill(self, held: dict[bytes, bytes | None]) -> None:
        self.store.write(Batch(state=held))

    @rule(layer=writes, skipped=st.integers(1, 3))
    def push(self, layer: dict[bytes, bytes | None], skipped: int) -> None:
        self.number += skipped
        self.layers.push(self.number, layer)
        self.model.append((self.number, layer))

    @precondition(lambda self: self.model)
    @rule()
    def settle(self) -> None:
        number, layer = self.model.pop(0)
        self.store.write(Batch(state=layer))
        self.layers.settle(number)

    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from([0, *(number for number, _ in self.model)]))
        self.layers.revert(to)
        self.model = [(number, layer) for number, layer in self.model if number <= to]

    @invariant()
    def reads_the_top(self) -> None:
        expected: dict[bytes, bytes | None] = dict(self.store.state)
        for _, layer in self.model:
            expected |= layer
        wanted = [*KEYS, KEYS[0], b"never"]

        assert self.layers.read(wanted) == [expected.get(key) for key in wanted]
        assert self.layers.checkpoint() == (self.model[-1][0] if self.model else 0)

    @invariant()
    def counts_what_it_holds(self) -> None:
        entries = [entry for _, layer in self.model for entry in layer.items()]

        assert self.layers.dirty_bytes == sum(160 + len(key) + len(value or b"") for key, value in entries)


TestLayers = LayersMachine.TestCase


@given(st.lists(writes, max_size=5))
def test_nothing_is_left_when_all_is_settled_or_reverted(stack: list[dict[bytes, bytes | None]]) -> None:
    """The view is empty again, also for keys that several layers wrote."""
    for finish in ("settle", "revert"):
        store = MemoryStore()
        layers = Layers(store)
        for number, layer in enumerate(stack, 1):
            layers.push(number, layer)
        if finish == "revert":
            layers.revert(0)
        else:
            for number in range(1, len(stack) + 1):
                layers.settle(number)

        assert layers.dirty_bytes == 0
        assert layers.read(KEYS) == [None] * len(KEYS)
