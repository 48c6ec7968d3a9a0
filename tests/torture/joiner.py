"""Another worker of a group, which takes what it is given and does nothing with it: it joins, says so, and leaves.

Arguments: broker URL, group, a directory of its own, topics.
"""

from __future__ import annotations

import sys
from typing import Any

import faust
from mode.supervisors import CrashingSupervisor

from topology.transports.factory import faust_urls

URL, GROUP, DATA_DIR, *TOPICS = sys.argv[1:]

app = faust.App(
    GROUP,
    broker=faust_urls(URL),
    datadir=DATA_DIR,
    agent_supervisor=CrashingSupervisor,
    stream_wait_empty=False,
    broker_session_timeout=3.0,
    broker_heartbeat_interval=0.3,
    topic_disable_leader=True,
    topic_allow_declare=False,
    topic_partitions=1,
    web_enabled=False,
    value_serializer="raw",
    key_serializer="raw",
)


async def swallow(stream: Any) -> None:
    async for _ in stream:
        pass


async def stored_offsets(assignment: set[Any]) -> dict[Any, int]:
    return dict.fromkeys(assignment, 0)


async def on_rebalance_complete(*args: Any, **kwargs: Any) -> None:
    print(f"owned {len(app.consumer.assignment())}", flush=True)


app.stored_offsets = stored_offsets
app.on_rebalance_complete.connect(on_rebalance_complete)
for topic in TOPICS:
    app.agent(app.topic(topic, value_type=bytes, value_serializer="raw"), name=topic)(swallow)

if __name__ == "__main__":
    worker = app.Worker(loglevel="WARNING", logfile=sys.stderr, quiet=True, redirect_stdouts=False)
    worker.execute_from_commandline()
