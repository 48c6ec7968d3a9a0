"""What each role may have to do with a chain's topics on a Kafka that allows nothing by itself, and not more.

A chain's later generations have topics of their own, `blocks-...` beside `blocks`: all but the first grant are for
every name that begins so. READ and WRITE allow DESCRIBE, too; CREATE does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Final, NamedTuple

from pipeline.generation import GENERATIONS_TOPIC

_LOOK: Final = ("DESCRIBE", "DESCRIBE_CONFIGS")
"""A worker looks at all topics before it starts: whether they keep every record in order."""
ROLES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "operator": {
        GENERATIONS_TOPIC: ("CREATE", "DESCRIBE_CONFIGS", "READ", "WRITE"),
        "blocks": ("CREATE", *_LOOK),
        "diffs": ("CREATE", "DESCRIBE_CONFIGS", "READ", "WRITE"),
        "shard-blocks": ("CREATE", *_LOOK),
        "anchors": ("CREATE", *_LOOK),
    },
    "source": {
        GENERATIONS_TOPIC: ("DESCRIBE_CONFIGS", "READ", "WRITE"),
        "blocks": ("DESCRIBE_CONFIGS", "READ", "WRITE"),
        "diffs": _LOOK,
        "shard-blocks": _LOOK,
        "anchors": _LOOK,
    },
    "primary": {
        GENERATIONS_TOPIC: ("DESCRIBE_CONFIGS", "READ"),
        "blocks": ("DESCRIBE_CONFIGS", "READ"),
        "diffs": ("DESCRIBE_CONFIGS", "READ", "WRITE"),
        "shard-blocks": ("DESCRIBE_CONFIGS", "READ"),
        "anchors": ("DESCRIBE_CONFIGS", "READ", "WRITE"),
    },
    "splitter": {
        "blocks": ("DESCRIBE_CONFIGS", "READ"),
        "shard-blocks": ("DESCRIBE_CONFIGS", "READ", "WRITE"),
    },
    "trimmer": {
        GENERATIONS_TOPIC: ("READ", "WRITE"),
        "blocks": ("DELETE", "READ"),
        "diffs": ("DELETE", "READ"),
        "shard-blocks": ("DELETE", "READ"),
    },
    "replica": {
        GENERATIONS_TOPIC: ("DESCRIBE_CONFIGS", "READ"),
        "blocks": _LOOK,
        "diffs": ("DESCRIBE_CONFIGS", "READ"),
        "shard-blocks": _LOOK,
        "anchors": _LOOK,
    },
}
"""Operations on topics. The operator runs `topics create` and `generation new`; nobody else makes topics. Of several
shards every primary may come to split events, and is a splitter, too. Who trims topics is a trimmer: DELETE is for
records and for whole topics, so no other role has it."""
_IN_GROUPS: Final = ("primary", "replica")
GROUPS: Final = "stateferry-"
"""Every worker is a consumer group of its own, whose name begins so."""


class Grant(NamedTuple):
    """Operations that one ACL line allows."""

    kind: str  # 'topic' or 'group'
    name: str
    is_prefix: bool
    operations: tuple[str, ...]

    def command(self, principal: str, bootstrap: str) -> str:
        """The line that adds it, for `kafka-acls.sh`."""
        words = ["kafka-acls.sh", "--bootstrap-server", bootstrap, "--add", "--allow-principal", principal]
        for operation in self.operations:
            words += ["--operation", operation.title().replace("_", "")]  # the tool writes DescribeConfigs
        words += [f"--{self.kind}", self.name, "--resource-pattern-type", "prefixed" if self.is_prefix else "literal"]
        return shlex.join(words)


def grants_of(role: str, topic_prefix: str) -> list[Grant]:
    """All that a role needs."""
    grants = [
        Grant("topic", topic_prefix + topic, topic != GENERATIONS_TOPIC, operations)
        for topic, operations in ROLES[role].items()
    ]
    if role in _IN_GROUPS:
        grants.append(Grant("group", topic_prefix + GROUPS, True, ("READ",)))
    return grants
