"""Where processes are killed: points, drawn from a seed.

A `Target` is a fail point in one step of one scene, with how many hits of it are sure to come. The first points of a
seed name every fail point once, the next ones every target once; then all is drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple


class Kill(NamedTuple):
    """``helper``: a process that the command started is killed, not the command itself."""

    failpoint: str
    hit: int
    helper: bool = False


class Target(NamedTuple):
    scene: str
    step: int
    failpoint: str
    helper: bool
    hits: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One test. ``cut``: records that the log loses; ``torn``: per mille of what the store wrote last and lost."""

    seed: int
    number: int
    scene: str
    kills: dict[int, list[Kill]] = field(default_factory=dict)  # by step, in order
    cut: int = 0
    torn: int = 0

    def __str__(self) -> str:
        kills = "+".join(f"{step}.{kill.failpoint}:{kill.hit}" for step, all_ in self.kills.items() for kill in all_)
        extra = (f"-cut{self.cut}" if self.cut else "") + (f"-torn{self.torn}" if self.torn else "")
        return f"{self.number:03}-{self.scene}-{kills}{extra}"

    @property
    def command(self) -> str:
        return f"python -m pytest tests/torture -m torture --seed {self.seed} --point {self.number}"


SCENES = {
    "primary": [
        [
            ("propose.computed", 120),
            ("propose.produced", 120),
            ("propose.epoch", 1),
            ("follow.read", 120),
            ("store.before_write", 12),
            ("store.after_write", 12),
            ("archive.before_put", 2),
            ("archive.after_put", 2),
        ],
        [
            ("archive.before_put", 1),
            ("archive.after_put", 1),
            ("store.before_write", 1),
            ("store.after_write", 1),
            ("snapshot.checkpointed", 1),
            ("store.taken_back helper", 8),
            ("snapshot.rolled_back helper", 1),
            ("snapshot.part_put helper", 1),
            ("snapshot.before_manifest helper", 1),
            ("snapshot.after_manifest helper", 1),
        ],
    ],
    "takeover": [
        [
            ("follow.read", 120),
            ("follow.stepped", 120),
            ("store.before_write", 12),
            ("store.after_write", 12),
            ("propose.epoch", 1),
            ("archive.before_put", 1),
            ("archive.after_put", 1),
        ],
    ],
    "replica": [
        [
            ("follow.read", 120),
            ("follow.stepped", 120),
            ("store.before_write", 12),
            ("store.after_write", 12),
        ],
    ],
    "both": [
        [
            ("propose.computed", 120),
            ("propose.produced", 120),
            ("propose.epoch", 1),
            ("follow.read", 120),
            ("store.before_write", 12),
            ("store.after_write", 12),
        ],
        [
            ("follow.read", 120),
            ("follow.stepped", 120),
            ("store.before_write", 12),
            ("store.after_write", 12),
        ],
    ],
    "restore": [
        [
            ("restore.planned", 1),
            ("restore.part_fetched", 1),
            ("restore.before_ingest", 1),
            ("restore.after_ingest", 1),
            ("prove.range_hashed helper", 1),
            ("prove.hashed", 1),
        ],
        [
            ("follow.read", 6),
            ("follow.stepped", 6),
            ("store.before_write", 1),
            ("store.after_write", 1),
        ],
        [
            ("prove.range_hashed helper", 1),
            ("prove.hashed", 1),
        ],
    ],
    "reach": [
        [
            ("restore.planned", 1),
            ("restore.after_ingest", 1),
            ("restore.frame_applied", 40),
            ("prove.hashed", 1),
        ],
        [
            ("follow.read", 40),
            ("store.after_write", 1),
        ],
    ],
    "claimed": [
        [
            ("restore.planned", 1),
            ("restore.part_fetched", 1),
        ],
        [
            ("prove.range_hashed helper", 1),
            ("prove.hashed", 1),
        ],
    ],
    "lost": [
        [
            ("store.taken_back", 1),
            ("propose.epoch", 1),
            ("propose.computed", 1),
            ("propose.produced", 1),
            ("store.before_write", 1),
        ],
        [
            ("store.taken_back", 1),
            ("follow.stepped", 1),
            ("store.before_write", 1),
        ],
    ],
    "lost2": [
        [
            ("store.taken_back", 1),
        ],
        [
            ("propose.epoch", 1),
            ("store.after_write", 1),
        ],
    ],
    "lostblocks": [
        [
            ("propose.epoch", 1),
        ],
        [],
        [
            ("propose.epoch", 1),
            ("follow.read", 1),
        ],
    ],
    "shards": [
        [
            ("split.sent", 190),
            ("propose.computed", 240),
            ("propose.produced", 240),
            ("propose.epoch", 2),
            ("follow.read", 240),
            ("store.before_write", 12),
            ("store.after_write", 12),
            ("archive.before_put", 4),
            ("archive.after_put", 4),
        ],
        [
            ("follow.read", 240),
            ("follow.stepped", 240),
            ("store.before_write", 12),
            ("store.after_write", 12),
        ],
        [
            ("archive.before_put", 2),
            ("archive.after_put", 2),
            ("snapshot.checkpointed", 1),
            ("store.taken_back helper", 16),
            ("snapshot.rolled_back helper", 1),
            ("snapshot.part_put helper", 2),
            ("snapshot.before_manifest helper", 1),
            ("snapshot.after_manifest helper", 1),
        ],
    ],
    "shardrestore": [
        [
            ("restore.planned", 1),
            ("restore.part_fetched", 2),
            ("restore.before_ingest", 1),
            ("restore.after_ingest", 2),
            ("restore.frame_applied", 20),
            ("prove.range_hashed helper", 1),
            ("prove.hashed", 2),
        ],
        [
            ("follow.read", 40),
            ("follow.stepped", 40),
            ("store.before_write", 2),
            ("store.after_write", 2),
        ],
    ],
    "squash": [
        [
            ("squash.before_put", 2),
            ("squash.after_put", 2),
        ],
    ],
    "ranged": [
        [
            ("restore.planned", 1),
            ("restore.piece_fetched", 1),
            ("restore.after_ingest", 1),
            ("restore.chunk_applied", 1),
        ],
        [
            ("follow.read", 6),
        ],
    ],
    "ingest": [
        [
            ("ingest.published", 50),
        ],
    ],
    "base": [
        [
            ("snapshot.part_put", 1),
            ("snapshot.before_manifest", 1),
            ("snapshot.after_manifest", 1),
            ("ingest.published", 1),
        ],
        [
            ("restore.planned", 1),
            ("restore.part_fetched", 1),
            ("restore.before_ingest", 1),
            ("restore.after_ingest", 1),
            ("propose.epoch", 1),
            ("propose.computed", 1),
        ],
    ],
    "whole": [
        [("ingest.published", 50)],
        [("propose.computed", 30), ("propose.produced", 30), ("store.after_write", 1)],
        [("follow.stepped", 30), ("store.before_write", 1)],
        [("snapshot.checkpointed", 1), ("snapshot.before_manifest helper", 1)],
        [("restore.part_fetched", 1), ("restore.after_ingest", 1), ("prove.hashed", 1)],
        [("follow.read", 3), ("store.before_write", 1)],
        [("prove.hashed", 1)],
    ],
}
"""By scene and step: fail points and how many hits of each are sure to come there."""

AGAIN = {
    "primary": [("propose.epoch", 1), ("follow.read", 1), ("store.before_write", 1)],
    "takeover": [("follow.read", 1), ("store.before_write", 1)],
    "replica": [("follow.read", 1), ("store.before_write", 1)],
    "shards": [("propose.epoch", 1), ("follow.read", 1), ("store.before_write", 1)],
}
"""What is sure to be passed again by a process that was killed half way."""


def targets() -> list[Target]:
    return [
        Target(scene, step, *_split(name), hits)
        for scene, steps in SCENES.items()
        for step, names in enumerate(steps)
        for name, hits in names
    ]


def _split(name: str) -> tuple[str, bool]:
    failpoint, _, helper = name.partition(" ")
    return failpoint, bool(helper)


def make_points(seed: int, count: int) -> list[Point]:
    """The first ``count`` points of a seed: the same ones, however many are asked for."""
    random = Random(seed)
    points: list[Point] = []
    while len(points) < count:
        drawn = targets()
        random.shuffle(drawn)
        first = list({target.failpoint: target for target in drawn}.values())
        rest = [target for target in drawn if target not in first]
        points += [_point(random, seed, len(points) + at, target) for at, target in enumerate(first + rest)]
    return points[:count]


def _point(random: Random, seed: int, number: int, target: Target) -> Point:
    scene, step, failpoint, helper, hits = target
    kills = {step: [Kill(failpoint, random.randint(1, hits), helper)]}
    cut = torn = 0
    if scene == "whole":
        for at, names in enumerate(SCENES[scene]):
            if at != step and random.random() < 0.6:
                name, most = random.choice(names)
                failpoint, helper = _split(name)
                kills[at] = [Kill(failpoint, random.randint(1, most), helper)]
    elif scene == "both":
        if random.random() < 0.5:
            name, most = random.choice(SCENES[scene][1 - step])
            kills[1 - step] = [Kill(name, random.randint(1, most))]
    elif scene in ("lost", "lost2", "lostblocks"):
        cut = random.randint(1, 7)
        if failpoint == "store.taken_back":
            kills = {step: [Kill(failpoint, random.randint(1, cut))]}
    elif scene in AGAIN and step == 0:
        if random.random() < 0.4:
            name, most = random.choice(AGAIN[scene])
            kills[step].append(Kill(name, most))
        if random.random() < 0.4:
            torn = random.randint(1, 400)
    return Point(seed=seed, number=number, scene=scene, kills=dict(sorted(kills.items())), cut=cut, torn=torn)
