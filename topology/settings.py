"""What a user can set, and where it comes from: the command line, then `STATEFERRY_...` in the environment, then a
`stateferry.toml` in the working directory (or the file that `STATEFERRY_CONFIG` names). The core knows none of it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from pipeline import failpoints
from pipeline.block import CHAIN_ID_BYTES_MAX
from pipeline.errors import UsageError
from pipeline.retention import ENDED_DAYS

CONFIG_VARIABLE = "STATEFERRY_CONFIG"
CHAIN_DEFAULT = "bitcoin"


class Settings(BaseSettings):
    """One process's settings. Every buffer's bound stands here, in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="STATEFERRY_",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # somebody may have written a password where the path of its file belongs
    )

    broker: str = ""
    """URL of the broker; empty: the embedded log in the data directory."""
    topic_prefix: str = ""
    """What the names of all topics begin with: several chains may share a broker."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_SSL"] = "PLAINTEXT"
    """Kafka's `security.protocol`. What the others need lies in files, whose paths the next ones are."""
    kafka_ca_file: Path | None = None
    """Certificates of the authorities that brokers are trusted by; None: the system's."""
    kafka_certificate_file: Path | None = None
    """This client's certificate, with its chain, for brokers that want one."""
    kafka_key_file: Path | None = None
    """Its private key; None: it is in the certificate's file."""
    kafka_key_password_file: Path | None = None
    """What the key is encrypted with; None: it is not."""
    kafka_sasl_mechanism: Literal["SCRAM-SHA-512", "PLAIN"] = "SCRAM-SHA-512"
    kafka_username: str = ""
    kafka_password_file: Path | None = None
    data_dir: Path = Path("stateferry-data")
    objects: str = ""
    """URL of the object store; empty: the folder `objects` in the data directory."""
    chain: str = ""
    """Chain id; empty: the one that the data directory or the broker has, else `bitcoin`."""
    finality: int | None = Field(default=None, ge=0, le=100_000)
    """Blocks below the highest tip that can be undone; fixed by the first primary of a generation (100)."""
    sign_key_file: Path | None = None
    """An Ed25519 private key in PEM, with which published snapshots are signed; None: they are not."""
    require_signature: str = ""
    """The public key, in hex or the path of a PEM file, that must have signed whatever snapshot a state is restored
    from; empty: none is asked for."""
    serve: Literal["proven", "claimed"] = "proven"
    """Whether reads are answered from a state that this node has not proven yet."""
    codec: Literal["zstd", "snappy", "none"] = "zstd"
    snapshot_blocks: int = Field(default=0, ge=0)
    """A running worker takes a snapshot after so many final blocks. This and the next two are triggers; none is set by
    default, because every worker of a chain would take one, and one is enough. 0: no such trigger."""
    snapshot_archived_bytes: int = Field(default=0, ge=0)
    """After so many archived bytes."""
    snapshot_seconds: float = Field(default=0, ge=0)
    """After so many seconds."""
    snapshot_share: float = Field(default=0.25, ge=0)
    """Not before what was archived since the last snapshot is this share of it: until then a restore gains less than a
    quarter of what a snapshot costs."""
    snapshot_timeout_s: float = Field(default=3600.0, gt=0)
    """A snapshot that takes longer is ended: an hour is some 100 GB on one disk."""
    keep_last: int = Field(default=0, ge=0)
    """Of each generation, `gc` keeps so many of the newest snapshots. Rules add up; without any, all are kept: nobody
    loses a restore point without having said so. 0: no such rule."""
    keep_days: float = Field(default=0, ge=0)
    """Those put within so many days, by the object store's clock."""
    keep_heights: list[int] = []
    """Those of these heights."""
    keep_every: int = Field(default=0, ge=0)
    """One, the lowest, of each run of so many blocks."""
    keep_ended_days: float = Field(default=ENDED_DAYS, ge=0)
    """The newest snapshot and the base state of a generation, whatever the rules, until another one took over so many
    days ago."""
    trim_keep_blocks: int | None = Field(default=None, ge=0)
    """Records of blocks that are archived are deleted from the topics, but for those of so many: who is away for longer
    restores. A primary does it by itself if this is set; 1,008 are a week of Bitcoin. None: topics keep everything."""
    group_bytes_max: int = Field(default=16 << 20, ge=1 << 16)
    """Frames read back and not yet written, with what they change: written at the latest when there are this many."""
    ahead_bytes_max: int = Field(default=24 << 20, ge=1 << 16)
    """Blocks computed and not yet read back: the applier waits above this."""
    prefetch_above_bytes: int | None = Field(default=None, ge=0)
    """A primary whose state has so many bytes in files reads ahead, in processes beside it, what the next blocks spend.
    None: half of this machine's memory."""
    session_timeout_s: float = Field(default=10.0, ge=1, le=300)
    """A worker that the broker has not heard of for so long is dead: its partitions go to others. Brokers may allow no
    less than 6 s (`group.min.session.timeout.ms`)."""
    failpoint: str = ""
    """`name:hit`, for tests: kill this process there; `name:hit:stop` only stops it. See `pipeline.failpoints`."""
    config: str = ""

    @field_validator("chain")
    @classmethod
    def _chain_is_short_ascii(cls, chain: str) -> str:
        if (
            not chain.isascii()
            or len(chain) > CHAIN_ID_BYTES_MAX
            or not chain.replace("-", "").replace("_", "").isalnum()
        ):
            if chain == "":
                return chain
            raise ValueError(f"a chain id is up to {CHAIN_ID_BYTES_MAX} letters, digits, '-' and '_'")
        return chain

    @field_validator("kafka_security_protocol", mode="before")
    @classmethod
    def _no_password_without_tls(cls, protocol: Any) -> Any:
        if protocol == "SASL_PLAINTEXT":
            raise ValueError("SASL without TLS lets everybody on the way read or take over the session; use SASL_SSL")
        return protocol

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = Path(os.environ.get(CONFIG_VARIABLE, "stateferry.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)

    @property
    def broker_url(self) -> str:
        return self.broker or f"embedded://{self.data_dir.absolute()}/log.sqlite"

    @property
    def objects_url(self) -> str:
        return self.objects or f"file://{self.data_dir.absolute()}/objects"


def load(**given: Any) -> Settings:
    """The settings with what the command line gave (None: not given). Raises UsageError, naming the field."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named and not Path(named).exists():
        raise UsageError("the file of settings is not there", where=named, way_out=f"check {CONFIG_VARIABLE}")
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"setting {name!r}: {first['msg']}", way_out="see the command's --help, STATEFERRY_... and stateferry.toml"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"stateferry.toml cannot be read: {error}") from error
    arm_failpoint(settings.failpoint)
    return settings


def arm_failpoint(spec: str) -> None:
    """Arm `name:hit`: the process kills itself there, as a power cut of the process would. With `:stop` behind it, the
    process stops there until somebody lets it go on. Raises UsageError."""
    if not spec:
        return
    name, hit, action, *_ = [*spec.split(":"), "", ""]
    try:
        number = {"": signal.SIGKILL, "stop": signal.SIGSTOP}[action]
        failpoints.arm(name, int(hit or 1), lambda _: os.kill(os.getpid(), number))
    except (KeyError, ValueError) as error:
        raise UsageError(f"no fail point {spec!r}", way_out=f"names are: {', '.join(failpoints.NAMES)}") from error
