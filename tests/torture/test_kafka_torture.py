"""Real workers on real Kafka, disturbed in the middle of what they do: all ends as on an embedded log in peace.

Every point of the matrix (`matrix.py`) plays a scene on a topic prefix of its own and compares what is left (state,
position, journal, events, the frames in force by seq and id, archive and snapshots) with the same scene, undisturbed,
on an embedded log.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from pipeline.errors import BrokerUnavailable, Fenced
from pipeline.generation import GENERATIONS_TOPIC
from tests.kafka.cluster import Cluster
from tests.kafka.fixtures import Place, Servers, kafka_names
from tests.kafka.proxy import Proxy
from topology import topics
from topology.transports.base import Broker, Record, TopicSpec

from .matrix import PHASES, Action, Strike, make_strikes
from .sites import FINALITY, GENERATION, HEIGHT, Site, Templates, differences
from .test_torture import EARLY, TEMPLATES
from .workers import STARTS_MAX, Joiner, Worker, primary, replica, wait_until

ARCHIVED_TO = (HEIGHT - FINALITY + 1) // 64 * 64
"""Whole segments of final blocks: what a primary archives by itself."""
_ANSWER_S = 60.0
"""A broker answers within this."""
ASK_S = 0.2
"""Between two questions that cost a worker or a broker something."""


def lead_early(site: Site) -> None:
    site.run("p", "primary", "--until-height", str(EARLY))
    site.step("snapshot", node="p")


def follow_early(site: Site) -> None:
    site.run("r", "replica", "--until-height", str(EARLY))


STARTED: dict[str, tuple[str, Callable[[Site], None]]] = TEMPLATES | {
    "early": ("published", lead_early),
    "followed early": ("early", follow_early),
}


class Stage:
    """A scene's workers, and what happens to them at the one place where something does."""

    def __init__(self, site: Site, strike: Strike | None, act: Callable[[Stage], None]) -> None:
        self.site = site
        self.strike = strike
        self.workers: dict[str, Worker] = {}
        self.tolerated: set[int] = set()
        """Exit codes that a worker may end with because of what happened; it is started again then."""
        self._act = act

    def stop_at(self, node: str) -> str:
        """Where a node's process is to stop, if it is this one."""
        if self.strike is None or self.strike.spot.node != node:
            return ""
        return f"{self.strike.spot.failpoint}:{self.strike.hit}"

    def start(self, make: Callable[..., Worker], node: str) -> Worker:
        self.workers[node] = make(self.site, node, stop_at=self.stop_at(node))
        return self.workers[node]

    def disturb(self, victim: Worker) -> None:
        """Once it stands at its fail point, let it happen, and let it go on."""
        if self.strike is not None:
            victim.wait_until_stopped()
            self._act(self)
            victim.go_on()

    @property
    def victim(self) -> Worker:
        assert self.strike is not None
        return self.workers[self.strike.spot.node]

    def kill(self, *nodes: str) -> None:
        for node in nodes:
            self.workers[node].kill()

    def keep(self) -> None:
        """Start again whoever ended as it may."""
        for worker in self.workers.values():
            code = worker.process.returncode
            if code is not None:
                assert worker.was_killed or code in self.tolerated, worker.told()
                assert worker.starts < STARTS_MAX, worker.told()
                worker.start()

    def finish(self, **wanted: dict[str, Any]) -> None:
        """Until every node's status is as wanted; then they end."""

        def stand_there() -> bool:
            self.keep()
            for node, fields in wanted.items():
                status = self.workers[node].status()
                if any(status.get(name) != value for name, value in fields.items()):
                    return False
            return True

        wait_until(stand_there, f"the workers do not come to {wanted}", ASK_S)
        for worker in self.workers.values():
            worker.end()


LED = {"height": HEIGHT, "in_flight": 0, "archived_to": ARCHIVED_TO}
FOLLOWED = {"height": HEIGHT}

# Scenes


def pair(stage: Stage) -> None:
    """A primary and a replica, from the first block on."""
    stage.start(primary, "p")
    stage.start(replica, "r")
    if stage.strike is not None:
        stage.disturb(stage.victim)
    stage.finish(p=LED, r=FOLLOWED)


def restored(stage: Stage) -> None:
    """A node is restored, and follows, while the primary goes on."""
    stage.start(primary, "p")
    if stage.strike is not None:
        command = Worker(stage.site, "s", "restore", stop_at=stage.stop_at("s"))
        stage.workers["s"] = command
        stage.disturb(command)
        if command.was_killed:
            Worker(stage.site, "s", "restore").finish()
        else:
            command.finish()
    else:
        Worker(stage.site, "s", "restore").finish()
    stage.workers["s"] = replica(stage.site, "s")
    stage.finish(p=LED, s=FOLLOWED)


def tailing(stage: Stage) -> None:
    """The same; what happens comes where the restored node meets the topic."""
    stage.start(primary, "p")
    Worker(stage.site, "s", "restore").finish()
    stage.start(replica, "s")
    if stage.strike is not None:
        stage.disturb(stage.victim)
    stage.finish(p=LED, s=FOLLOWED)


def promoted(stage: Stage) -> None:
    """A replica becomes the primary while the old one lives, which ends as fenced and follows then."""
    old = stage.start(primary, "p")
    wait_until(lambda: old.status().get("state") == "leading", "the old primary leads", ASK_S)
    stage.start(primary, "r")
    if stage.strike is not None:
        stage.disturb(stage.victim)

    def fenced() -> bool:
        stage.tolerated.add(Fenced.exit_code)
        ended = old.process.returncode == Fenced.exit_code
        if not ended:
            stage.keep()
        return ended

    wait_until(fenced, "the old primary says that it is fenced")
    stage.workers["p"] = replica(stage.site, "p")
    stage.finish(r=LED, p=FOLLOWED)


SCENES: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "pair": ("published", pair),
    "restored": ("early", restored),
    "tailing": ("early", tailing),
    "promoted": ("followed early", promoted),
}

# What happens


class Kafka:
    """Where a point's topics are, and what can be done to it there."""

    def __init__(self, strike: Strike, place: Place, records: dict[str, list[Record]]) -> None:
        self.strike = strike
        self.place = place  # as the test reaches it
        self.workers_place = place
        self.proxy: Proxy | None = None
        self.cluster: Cluster | None = None
        self.records = records
        self.random = Random(strike.draw)
        self._mending = ThreadPoolExecutor(1)
        self._withheld: list[Record] = []
        self._with_broker(self._load)

    def _with_broker(self, use: Callable[[Broker], Any]) -> Any:
        return Site(Path(), self.place).with_broker(use)

    async def _load(self, broker: Broker) -> None:
        """The template's records, at the offsets that they have there; but the last events, if some are to come
        twice."""
        blocks = self.records[GENERATION.blocks_topic]
        if self.strike.action is Action.DUPLICATE:
            at = len(blocks) * 3 // 4
            self.records[GENERATION.blocks_topic], self._withheld = blocks[:at], blocks[at:]
        await broker.ensure_topics([TopicSpec(name=name, partitions=1) for name in self.records])
        for name, records in self.records.items():
            await broker.append(name, 0, [(record.key, record.value) for record in records])

    def act(self, stage: Stage) -> None:
        match self.strike.action:
            case Action.KILL_PRIMARY:
                stage.kill("p")
            case Action.KILL_REPLICA:
                stage.kill(*stage.workers.keys() - {"p"})
            case Action.KILL_BOTH:
                stage.kill(*stage.workers)
            case Action.FREEZE:
                self._freeze(stage)
            case Action.CUT:
                self._cut(stage)
            case Action.KILL_BROKER | Action.MOVE_LEADER:
                self._lose_leader(stage)
            case Action.DUPLICATE:
                self._with_broker(self._duplicate)
            case Action.REBALANCE:
                self._rebalance(stage)

    def _group(self, worker: Worker) -> str:
        """The group that a worker has joined, once it has. Points that begin with one template share the name of a
        node, but no prefix."""
        node = worker.site.path / worker.node / "NODE"
        wait_until(node.exists, f"{worker.node} does not run")
        found: list[str] = []

        def has_joined() -> bool:
            assert worker.process.returncode is None, worker.told()

            groups = self._ask(_groups)
            found[:] = [name for name in groups if name.startswith(self.place.prefix) and node.read_text() in name]
            # One that stands at its fail point may have been there for so long that it counts as dead.
            return bool(found) and (worker.process.is_stopped or self._described(found[0]) == ("Stable", 1))

        wait_until(has_joined, f"{worker.node} is in no group", ASK_S)
        (group,) = found
        return group

    def _described(self, group: str) -> tuple[str, int]:
        return self._ask(lambda admin: _described(admin, group))

    def _ask(self, what: Callable[[AIOKafkaAdminClient], Any]) -> Any:
        async def main() -> Any:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.place.url.removeprefix("kafka://"))
            await admin.start()
            try:
                async with asyncio.timeout(_ANSWER_S):
                    while True:
                        try:
                            return await what(admin)
                        except KafkaError as error:  # a broker that was just started still reads its groups
                            if not error.retriable:
                                raise
                        await asyncio.sleep(ASK_S)
            finally:
                await admin.close()

        return asyncio.run(main())

    def _member(self, stage: Stage) -> Worker:
        """A worker of a group: a command that restores is of none."""
        return stage.workers["p"] if self.strike.phase == "restore" else stage.victim

    def _freeze(self, stage: Stage) -> None:
        worker = self._member(stage)
        group = self._group(worker)
        worker.freeze()
        wait_until(lambda: self._described(group) == ("Empty", 0), f"{worker.node} is not dead", ASK_S)
        worker.go_on()

    def _cut(self, stage: Stage) -> None:
        assert self.proxy is not None
        stage.tolerated.add(BrokerUnavailable.exit_code)
        way = self.random.choice(["cut", "stall", "stall, cut", "delay"])
        if way.startswith("stall"):
            self.proxy.stall()
        elif way == "cut":
            self.proxy.cut()
        else:
            self.proxy.delay(0.2)
        stage.victim.go_on()
        time.sleep(self.random.uniform(0.2, 3.0))  # how long the network is away is a part of the point
        if way == "stall, cut":
            self.proxy.cut()
        self.proxy.mend()

    def _lose_leader(self, stage: Stage) -> None:
        assert self.cluster is not None
        stage.tolerated.add(BrokerUnavailable.exit_code)
        cluster, topic = self.cluster, self.place.prefix + GENERATION.diffs_topic
        leader = cluster.leader(topic)
        if self.strike.action is Action.KILL_BROKER:
            leader.kill()
        else:
            leader.stop()
        stage.victim.go_on()
        wait_until(lambda: cluster.leader(topic) is not leader, "nobody else leads", ASK_S)
        self._mending.submit(cluster.start)

    async def _duplicate(self, broker: Broker) -> None:
        """A few events once more, the rest of them, and a few frames once more."""
        for name, rest in ((GENERATION.blocks_topic, self._withheld), (GENERATION.diffs_topic, [])):
            there = [record async for record in topics.records(broker, name)]
            first = self.random.randrange(len(there))
            again = there[first : first + self.random.randint(1, 12)]
            await broker.append(name, 0, [(record.key, record.value) for record in again + rest])

    def _rebalance(self, stage: Stage) -> None:
        worker = self._member(stage)
        names = [GENERATION.diffs_topic]
        if "primary" in worker.words:
            names.append(GENERATION.blocks_topic)
        group = self._group(worker)
        other = Joiner(stage.site, group, *(self.place.prefix + name for name in names))
        worker.go_on()  # who is stopped takes part in no rebalance
        wait_until(other.has_joined, "the other worker has joined", ASK_S)

        def are_two() -> bool:
            assert worker.process.returncode is None, worker.told()

            return self._described(group) == ("Stable", 2)

        wait_until(are_two, f"{worker.node} and the other worker are in one group", ASK_S)
        other.leave(self.random.choice([signal.SIGTERM, signal.SIGKILL]))

    def close(self) -> None:
        self._mending.shutdown()
        if self.proxy is not None:
            self.proxy.close()


async def _groups(admin: AIOKafkaAdminClient) -> list[str]:
    return [name for name, _ in await admin.list_consumer_groups()]


async def _described(admin: AIOKafkaAdminClient, group: str) -> tuple[str, int]:
    """A group's state, and how many members it has."""
    (found,) = await admin.describe_consumer_groups([group])
    _, _, state, _, _, members, *_ = found.groups[0]
    return str(state), len(members)


# Points


def play(site: Site, scene: str, stage: Stage) -> dict[str, Any]:
    try:
        SCENES[scene][1](stage)
        found = site.look()
    finally:
        for worker in stage.workers.values():
            worker.kill()
    if scene == "promoted":
        # Who archived how far, and keeps what for it, depends on when the one took over from the other.
        for node in "pr":
            del found[f"{node} journal"]
            found[f"{node} position"] = found[f"{node} position"].tip
    return found


def undisturbed(templates: Templates, scene: str, path: Path) -> dict[str, Any]:
    templates.copy(SCENES[scene][0], path, STARTED)
    site = Site(path)
    return play(site, scene, Stage(site, None, lambda stage: None))


def taken_out(site: Site) -> dict[str, list[Record]]:
    """The records of a site's embedded log, which is gone then."""

    async def read(broker: Broker) -> dict[str, list[Record]]:
        return {
            name: [record async for record in topics.records(broker, name)]
            for name in (GENERATIONS_TOPIC, GENERATION.blocks_topic, GENERATION.diffs_topic)
        }

    found: dict[str, list[Record]] = site.with_broker(read)
    for file in site.path.glob("log.sqlite*"):
        file.unlink()
    return found


@pytest.mark.torture
def test_disturbed(
    strike: Strike,
    templates: Templates,
    kafka_servers: Servers,
    three_brokers: Callable[[], Cluster],
    tmp_path: Path,
) -> None:
    """What was disturbed leaves what an undisturbed run leaves, on the embedded log."""
    scene = strike.spot.scene
    expected = templates.outcome(f"kafka-{scene}", lambda: undisturbed(templates, scene, tmp_path / "undisturbed"))
    path = tmp_path / "site"
    templates.copy(SCENES[scene][0], path, STARTED)
    records = taken_out(Site(path))
    names = kafka_names()
    name = names[strike.number % len(names)]
    cluster = three_brokers() if strike.action.needs_cluster else None
    place = Place(url=cluster.url if cluster else kafka_servers(name), prefix=f"torture{secrets.token_hex(4)}.")
    kafka = Kafka(strike, place, records)
    try:
        kafka.cluster = cluster
        if strike.action is Action.CUT:
            kafka.proxy = kafka_servers.proxy(name)
            kafka.workers_place = replace(place, url=kafka.proxy.url)
        site = Site(path, kafka.workers_place)
        found = play(site, scene, Stage(site, strike, kafka.act))
    finally:
        kafka.close()
    shutil.rmtree(path)

    assert not differences(found, expected), f"again: {strike.command}"


def test_matrix_is_whole() -> None:
    """Nine points in a row have every action, fifty-four every action in every phase, and a number its point."""
    for seed in range(3):
        strikes = make_strikes(seed, 108)
        for at in range(0, 108, 9):
            assert {strike.action for strike in strikes[at : at + 9]} == set(Action)
        cells = {(strike.action, strike.phase) for strike in strikes[:54]}
        assert cells == {(action, phase) for action in Action for phase in PHASES}
        assert list(map(str, make_strikes(seed, 20))) == list(map(str, strikes[:20]))
