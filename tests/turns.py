"""Actors that share an object store and take turns by a seed: every request of one is a place where others may go on.

An actor is a function in a thread of its own, with an object store and a clock. It runs alone until it asks the store
for something or sleeps; then the seed says who is next, and how far the clock has come. What it does in helper threads
counts as its own, as long as it waits for them: so one helper thread each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from pipeline.objects import ObjectStore
from tests.ferries import Killed
from topology.holding import Clock

_WAIT_S = 120.0


@dataclass(slots=True, eq=False)
class Actor:
    """``clock_off_s``: of its clock on the wall. ``dies_at``: the request at which it is killed; 0: none."""

    name: str
    clock_off_s: float = 0.0
    dies_at: int = 0
    speed: float = 1.0
    wakes_s: float | None = None
    requests: int = 0
    result: Any = None
    error: BaseException | None = None
    is_done: bool = False
    may_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    has_come: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def wait_for_turn(self) -> None:
        self.has_come.release()
        assert self.may_go.acquire(timeout=_WAIT_S), self.name

        if self.dies_at and self.requests >= self.dies_at:
            raise Killed(self.name)
        self.requests += 1


class Turns:
    """The seed's choices. Add actors, then `run` them to their ends."""

    def __init__(self, seed: int, objects: ObjectStore) -> None:
        self.random = Random(seed)
        self.now_s = 1_700_000_000.0
        self.actors: list[Actor] = []
        self._objects = objects
        self._sleepy = self.random.choice((0.5, 0.8, 0.95))  # how often those who sleep are passed over
        self._threads: list[threading.Thread] = []

    def add(
        self,
        name: str,
        act: Callable[[ObjectStore, Clock], object],
        *,
        clock_off_s: float = 0.0,
        dies_at: int = 0,
    ) -> Actor:
        actor = Actor(name, clock_off_s, dies_at, speed=self.random.choice((0.02, 0.1, 0.5, 1.0, 3.0)))

        def live() -> None:
            try:
                actor.wait_for_turn()
                actor.result = act(Scheduled(self._objects, actor), self.clock(actor))
            except BaseException as error:
                actor.error = error
            finally:
                actor.is_done = True
                actor.has_come.release()

        self.actors.append(actor)
        self._threads.append(threading.Thread(target=live, name=name, daemon=True))
        return actor

    def clock(self, actor: Actor) -> Clock:
        def sleep(seconds: float) -> None:
            actor.wakes_s = self.now_s + seconds
            actor.wait_for_turn()

        return Clock(now_s=lambda: self.now_s + actor.clock_off_s, steady_s=lambda: self.now_s, sleep=sleep)

    def run(self) -> None:
        for thread, actor in zip(self._threads, self.actors, strict=True):
            thread.start()
            self._await(actor)
        while living := [actor for actor in self.actors if not actor.is_done]:
            awake = [actor for actor in living if actor.wakes_s is None or actor.wakes_s <= self.now_s]
            # Whoever sleeps may find that others have not moved at all.
            ready = awake if awake and self.random.random() < self._sleepy else living
            (actor,) = self.random.choices(ready, [one.speed for one in ready])
            self.now_s = max(self.now_s + self.random.choice((0.001, 0.1, 3.0)), actor.wakes_s or 0.0)
            actor.wakes_s = None
            actor.may_go.release()
            self._await(actor)
        for thread in self._threads:
            thread.join()

    def _await(self, actor: Actor) -> None:
        assert actor.has_come.acquire(timeout=_WAIT_S), actor.name


class Scheduled:
    """An object store for one actor."""

    def __init__(self, objects: ObjectStore, actor: Actor) -> None:
        self._objects = objects
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        request = getattr(self._objects, name)

        def in_turn(*given: object) -> Any:
            self._actor.wait_for_turn()
            return request(*given)

        return in_turn


def copy_objects(source: ObjectStore, target: ObjectStore, scratch: Path) -> None:
    for info in source.list():
        source.fetch_to(info.name, scratch / "copied")
        target.put_file_new(info.name, scratch / "copied")
