"""A broker that asks who one is: listeners of every kind, users with passwords, and ACLs.

One listener each for what a client may meet; ``PLAINTEXT`` is the administrator's, who may do everything.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from tests.kafka.certificates import Authority
from tests.kafka.server import JAVA_QUICK, START_TIMEOUT_S, VERSION_DEFAULT, Server, free_port, jars
from topology.acls import Grant

LISTENERS: Final = {
    "SSL": "SSL",  # a broker's certificate, and none of the client's
    "MUTUAL": "SSL",  # wants a client's certificate
    "SASL_SSL": "SASL_SSL",  # wants a name and a password, by SCRAM-SHA-512 or PLAIN
    "SCRAM_ONLY": "SASL_SSL",
    "EXPIRED": "SSL",  # shows a certificate that is no longer valid
    "ELSEWHERE": "SSL",  # shows a certificate of another host
    "LOST": "PLAINTEXT",  # says that the broker is where nobody listens
}
"""Names of listeners, and the protocol that each speaks."""
USERS: Final = ("source", "primary", "replica", "operator")
_KINDS: Final = {"topic": 2, "group": 3}
_OPERATIONS: Final = {"READ": 3, "WRITE": 4, "CREATE": 5, "DELETE": 6, "DESCRIBE": 8, "DESCRIBE_CONFIGS": 10}
_LITERAL: Final = 3
_PREFIXED: Final = 4
_ALLOW: Final = 3
"""Kafka's numbers."""


def password_of(user: str) -> str:
    """A word that stands nowhere else, so that a test may look for it everywhere."""
    return f"Zq7-{user}-pw9fX"


class SecuredServer(Server):
    """A broker with all `LISTENERS`, and an authorizer that allows nothing but what ACLs say."""

    def __init__(self, folder: Path, version: str = VERSION_DEFAULT) -> None:
        super().__init__(folder, version, java=JAVA_QUICK, outlives=True)
        self.ports = {name: free_port() for name in LISTENERS}
        self.authority = Authority(folder / "authority", "tests")
        for user in USERS:
            path = folder / f"{user}.password"
            path.touch(mode=0o600)
            path.write_text(f"{password_of(user)}\n")
        self.authority.client(folder / "primary.pem", name="primary")
        Authority(folder / "stranger", "a stranger").client(folder / "stranger.pem", name="primary")

    def _properties(self) -> dict[str, object]:
        here = ("127.0.0.1", "localhost")
        good = self.authority.server("server.pem", hosts=here)
        keys = {
            "EXPIRED": self.authority.server("expired.pem", hosts=here, days=(-2, -1)),
            "ELSEWHERE": self.authority.server("elsewhere.pem", hosts=("elsewhere.example",)),
        }
        plain = super()._properties()
        own = "".join(f",{name}://127.0.0.1:{port}" for name, port in self.ports.items())
        shown = "".join(f",{name}://127.0.0.1:{port}" for name, port in (self.ports | {"LOST": 1}).items())
        protocols = "".join(f",{name}:{protocol}" for name, protocol in LISTENERS.items())
        more: dict[str, object] = {
            "listeners": f"{plain['listeners']}{own}",
            "advertised.listeners": f"{plain['advertised.listeners']}{shown}",
            "listener.security.protocol.map": f"{plain['listener.security.protocol.map']}{protocols}",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            "listener.name.scram_only.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        }
        for name, protocol in LISTENERS.items():
            listener = f"listener.name.{name.lower()}"
            more |= {
                f"{listener}.ssl.keystore.type": "PEM",
                f"{listener}.ssl.keystore.location": keys.get(name, good),
                f"{listener}.ssl.truststore.type": "PEM",
                f"{listener}.ssl.truststore.location": self.authority.ca,
                f"{listener}.ssl.client.auth": "required" if name == "MUTUAL" else "none",
            }
            if protocol == "SASL_SSL":
                module = "org.apache.kafka.common.security"
                known = " ".join(f'user_{user}="{password_of(user)}"' for user in USERS)
                more[f"{listener}.scram-sha-512.sasl.jaas.config"] = f"{module}.scram.ScramLoginModule required;"
                more[f"{listener}.plain.sasl.jaas.config"] = f"{module}.plain.PlainLoginModule required {known};"
        return plain | more

    def _open_ports(self) -> list[int]:
        return [*super()._open_ports(), *self.ports.values()]

    def _format_arguments(self) -> list[str]:
        return [
            word
            for user in USERS
            for word in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password_of(user)}]")
        ]


class Secured(NamedTuple):
    """A `SecuredServer` that runs: what its users have to know."""

    folder: Path
    port: int
    ports: dict[str, int]

    @property
    def admin_url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    def url(self, listener: str) -> str:
        return f"kafka://127.0.0.1:{self.ports[listener]}"

    @property
    def ca(self) -> Path:
        return self.folder / "authority" / "ca.pem"

    def client(self, name: str) -> Path:
        """A client's key and certificate: of `primary`, which the broker trusts, or of `stranger`."""
        return self.folder / f"{name}.pem"

    def password_file(self, user: str) -> Path:
        return self.folder / f"{user}.password"

    def settings(self, listener: str, user: str = "", mechanism: str = "SCRAM-SHA-512") -> dict[str, str]:
        """The environment of somebody who uses a listener as it wants to be used."""
        found = {
            "STATEFERRY_BROKER": self.url(listener),
            "STATEFERRY_KAFKA_SECURITY_PROTOCOL": LISTENERS[listener],
            "STATEFERRY_KAFKA_CA_FILE": str(self.ca),
        }
        if listener == "MUTUAL":
            found["STATEFERRY_KAFKA_CERTIFICATE_FILE"] = str(self.client("primary"))
        if LISTENERS[listener] == "SASL_SSL":
            found |= {
                "STATEFERRY_KAFKA_SASL_MECHANISM": mechanism,
                "STATEFERRY_KAFKA_USERNAME": user,
                "STATEFERRY_KAFKA_PASSWORD_FILE": str(self.password_file(user)),
            }
        return found


def start_secured(version: str, folder: Path) -> tuple[int, Any]:
    """For `shared`: a broker of a version, and what a `Secured` is made of."""
    server = SecuredServer(folder, version)
    return server.start(), (str(folder), server.port, server.ports)


def grant(server: Secured, principal: str, grants: Sequence[Grant]) -> None:
    """Add ACLs, and wait until the broker knows them."""

    async def main() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=server.admin_url.removeprefix("kafka://"))
        await admin.start()
        try:
            for kind, name, is_prefix, operations in grants:
                for operation in operations:
                    made = await admin._send_request(
                        CreateAclsRequest(
                            _KINDS[kind],
                            name,
                            _PREFIXED if is_prefix else _LITERAL,
                            principal,
                            "*",
                            _OPERATIONS[operation],
                            _ALLOW,
                        )
                    )
                    assert made.creation_responses[0][0] == 0, made
        finally:
            await admin.close()

    asyncio.run(main())


def kafka_acls(*arguments: str) -> None:
    """Kafka's `kafka-acls.sh`; only the older version's jars have it among them."""
    subprocess.run(
        ["java", "-Xmx128m", "-cp", f"{jars('3.9.1')}/*", "kafka.admin.AclCommand", *arguments],
        check=True,
        capture_output=True,
        timeout=START_TIMEOUT_S,
    )
