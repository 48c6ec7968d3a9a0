"""A broker that asks who one is: listeners of every kind, users with passwords, and ACLs.

One listener each for what a client may meet; ``PLAINTEXT`` is the administrator's, who may do everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.kafka.certificates import Authority
from tests.kafka.server import VERSION_DEFAULT, Server, free_port

LISTENERS: Final = {
    "SSL": "SSL",  # a broker's certificate, and none of the client's
    "MUTUAL": "SSL",  # wants a client's certificate
    "SASL_SSL": "SASL_SSL",  # wants a name and a password, by SCRAM-SHA-512 or PLAIN
    "SCRAM_ONLY": "SASL_SSL",
    "EXPIRED": "SSL",  # shows a certificate that is no longer valid
    "ELSEWHERE": "SSL",  # shows a certificate of another host
}
"""Names of listeners, and the protocol that each speaks."""
USERS: Final = ("source", "primary", "replica", "operator")


def password_of(user: str) -> str:
    """A word that stands nowhere else, so that a test may look for it everywhere."""
    return f"Zq7-{user}-pw9fX"


class SecuredServer(Server):
    """A broker with all `LISTENERS`, and an authorizer that allows nothing but what ACLs say."""

    def __init__(self, folder: Path, version: str = VERSION_DEFAULT) -> None:
        super().__init__(folder, version)
        self.ports = {name: free_port() for name in LISTENERS}
        self.authority = Authority(folder / "authority", "tests")
        self.stranger = Authority(folder / "stranger", "a stranger")

    def _properties(self) -> dict[str, object]:
        here = ("127.0.0.1", "localhost")
        good = self.authority.server("server.pem", hosts=here)
        keys = {
            "EXPIRED": self.authority.server("expired.pem", hosts=here, days=(-2, -1)),
            "ELSEWHERE": self.authority.server("elsewhere.pem", hosts=("elsewhere.example",)),
        }
        plain = super()._properties()
        secured = "".join(f",{name}://127.0.0.1:{port}" for name, port in self.ports.items())
        protocols = "".join(f",{name}:{protocol}" for name, protocol in LISTENERS.items())
        more: dict[str, object] = {
            "listeners": f"{plain['listeners']}{secured}",
            "advertised.listeners": f"{plain['advertised.listeners']}{secured}",
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

    def _format_arguments(self) -> list[str]:
        return [
            word
            for user in USERS
            for word in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password_of(user)}]")
        ]
