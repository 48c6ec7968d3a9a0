"""What happens to workers on Kafka, and in the middle of what: a matrix, from which points are drawn by a seed.

The process of one node stops itself at a fail point; something happens; it goes on, or is started again. A point's
number decides its cell: nine points in a row have all actions, and fifty-four the whole matrix.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple


class Action(enum.Enum):
    """What happens while a process stands at its fail point."""

    KILL_PRIMARY = "kill-primary"
    KILL_REPLICA = "kill-replica"
    KILL_BOTH = "kill-both"
    FREEZE = "freeze"  # it stays stopped until its group counts it as dead
    KILL_BROKER = "kill-broker"  # kill -9 of the one of three that leads
    MOVE_LEADER = "move-leader"  # that one ends in order
    CUT = "cut"  # the network, in one of several ways
    DUPLICATE = "duplicate"  # events and frames are in the log twice
    REBALANCE = "rebalance"  # another worker joins the group, and leaves it

    @property
    def needs_cluster(self) -> bool:
        return self in (Action.KILL_BROKER, Action.MOVE_LEADER)


class Spot(NamedTuple):
    """Whose process stops in which scene, and at one of how many hits, which are sure to come."""

    scene: str
    node: str
    failpoint: str
    hits: int = 1


PHASES: Final[dict[str, list[Spot]]] = {
    "compute": [Spot("pair", "p", "propose.computed", 120)],
    "produce": [Spot("pair", "p", "propose.produced", 120)],
    "read-back": [
        Spot("pair", "p", "follow.read", 120),
        Spot("pair", "r", "follow.read", 120),
        Spot("pair", "r", "follow.stepped", 120),
    ],
    "in-the-write": [
        Spot("pair", "p", "store.before_write", 12),
        Spot("pair", "p", "store.after_write", 12),
        Spot("pair", "r", "store.before_write", 12),
        Spot("pair", "r", "store.after_write", 12),
    ],
    "restore": [
        Spot("restored", "s", "restore.planned"),
        Spot("restored", "s", "restore.part_fetched"),
        Spot("restored", "s", "restore.before_ingest"),
        Spot("restored", "s", "restore.after_ingest"),
        Spot("restored", "s", "prove.hashed"),
    ],
    "hand-over": [
        Spot("tailing", "s", "follow.read", 6),
        Spot("tailing", "s", "store.before_write"),
        Spot("promoted", "r", "propose.epoch"),
        Spot("promoted", "r", "store.after_write"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One point of the matrix. ``draw``: what is left to chance in the action itself, and in nothing else."""

    seed: int
    number: int
    action: Action
    phase: str
    spot: Spot
    hit: int
    draw: int

    def __str__(self) -> str:
        return f"{self.number:03}-{self.action.value}-{self.phase}-{self.spot.node}.{self.spot.failpoint}:{self.hit}"

    @property
    def command(self) -> str:
        return f"python -m pytest tests/torture -m torture --seed {self.seed} --kafka-point {self.number}"


def make_strikes(seed: int, count: int) -> list[Strike]:
    """The first ``count`` points of a seed: the same ones, however many are asked for."""
    random = Random(seed)
    strikes: list[Strike] = []
    while len(strikes) < count:
        actions, phases = random.sample(list(Action), len(Action)), random.sample(list(PHASES), len(PHASES))
        for shift in range(len(phases)):
            for at, action in enumerate(actions):
                phase = phases[(at + shift) % len(phases)]
                spot = random.choice(PHASES[phase])
                strikes.append(
                    Strike(
                        seed=seed,
                        number=len(strikes),
                        action=action,
                        phase=phase,
                        spot=spot,
                        hit=random.randint(1, spot.hits),
                        draw=random.getrandbits(32),
                    )
                )
    return strikes[:count]
