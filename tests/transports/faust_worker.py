"""A worker over any broker, as a process of its own: two chained agents, facts printed one per line.

``a`` is copied to ``b`` by the first agent, partition by partition; the second prints what arrives. Options come as
one JSON object, so that a test reads like its settings.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
from typing import Any

import faust
from faust.types import TP
from mode.supervisors import CrashingSupervisor

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
PREFIX: str = OPTIONS.get("prefix", "")
SETTINGS: dict[str, Any] = {
    "broker_session_timeout": 2.0,
    "broker_heartbeat_interval": 0.3,
    "broker_max_poll_records": 6,
    "stream_buffer_maxsize": 32,
    "broker_commit_interval": 0.2,
    "consumer_group_instance_id": OPTIONS.get("instance"),
} | OPTIONS.get("settings", {})


def named(tp: Any) -> tuple[str, int]:
    """A topic without its prefix, and the partition."""
    return tp.topic.removeprefix(PREFIX), tp.partition


def say(**facts: Any) -> None:
    """Print one fact where the test reads it, on a line of its own: Faust prints too."""
    print("\n" + json.dumps(facts), flush=True)


app = faust.App(
    OPTIONS.get("id", "worker"),
    broker=OPTIONS["broker"].split(";"),
    agent_supervisor=CrashingSupervisor,
    stream_wait_empty=False,
    topic_disable_leader=True,
    topic_partitions=OPTIONS.get("partitions", 1),
    web_enabled=False,
    datadir=OPTIONS["datadir"],
    value_serializer="raw",
    key_serializer="raw",
    **SETTINGS,
)
first = app.topic(PREFIX + "a", value_type=bytes, value_serializer="raw")
second = app.topic(PREFIX + "b", value_type=bytes, value_serializer="raw")

if "stored_offsets" in OPTIONS:

    async def stored_offsets(assignment: set[Any]) -> dict[Any, int]:
        """Answer with what the test wants the stores to hold."""
        say(asked=sorted(map(named, assignment)))
        if OPTIONS.get("hook_fails"):
            raise RuntimeError("the store cannot be opened")
        stored = OPTIONS["stored_offsets"]
        return {tp: stored[named(tp)[0]] for tp in assignment if named(tp)[0] in stored}

    app.stored_offsets = stored_offsets


done: set[str] = set()


async def interfere(message: Any) -> None:
    """Once, at the offset of partition 1 that the test named: pause the partition for a while, or seek."""
    tp = TP(PREFIX + "a", 1)
    if message.tp == tp and message.offset == OPTIONS.get("pause_at") and "pause" not in done:
        done.add("pause")
        app.consumer.pause_partitions({tp})
        asyncio.get_running_loop().call_later(0.5, app.consumer.resume_partitions, {tp})
    if message.tp == tp and message.offset == OPTIONS.get("seek_at") and "seek" not in done:
        done.add("seek")
        await app.consumer.seek(tp, OPTIONS["seek_to"])


@app.agent(first, isolated_partitions=OPTIONS.get("isolated", False))
async def copy(stream: Any) -> None:
    """Copy a record to the same partition of the second topic, and wait until it is there."""
    async for event in stream.events():
        message = event.message
        if OPTIONS.get("slow_s"):
            await asyncio.sleep(OPTIONS["slow_s"])
        if "file_bytes_max" in OPTIONS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (OPTIONS["file_bytes_max"],) * 2)
        value = message.value + b" " * OPTIONS.get("value_bytes", 0)
        sent = await (await second.send(key=message.key, value=value, partition=message.partition))
        say(copied=message.offset, partition=message.partition, at=sent.offset)
        await interfere(message)


@app.agent(second, isolated_partitions=OPTIONS.get("isolated", False))
async def tell(stream: Any) -> None:
    """Print what arrives."""
    async for event in stream.events():
        message = event.message
        say(arrived=message.offset, partition=message.partition, value=message.value.decode())


@app.on_rebalance_complete.connect
async def on_rebalance_complete(*args: Any, **kwargs: Any) -> None:
    """Print what this worker owns now."""
    say(owned=sorted(map(named, app.consumer.assignment())), generation=app.consumer_generation_id)


if __name__ == "__main__":
    worker = app.Worker(
        loglevel=OPTIONS.get("loglevel", logging.WARNING),
        logfile=sys.stderr,
        quiet=True,
        redirect_stdouts=False,
    )
    worker.execute_from_commandline()
