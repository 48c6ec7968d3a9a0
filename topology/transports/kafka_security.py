"""How this node and a Kafka cluster prove to each other who they are: TLS, a certificate of ours, a name and password.

All of it comes from settings, and whatever is secret from files that nobody else may read. Files are read once, at the
start. A password is never part of a setting, an option, a log line or an error.
"""

from __future__ import annotations

import datetime
import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from pipeline.errors import SettingsConflict, UsageError
from topology import secret_files
from topology.settings import Settings
from topology.transports.kafka_address import is_kafka

PASSWORD_BYTES_MAX: Final = 4096
CERTIFICATES_BYTES_MAX: Final = 4 << 20
"""A system's bundle of authorities has 0.2 MB."""
_TLS_ONLY: Final = ("kafka_ca_file", "kafka_certificate_file", "kafka_key_file", "kafka_key_password_file")
_SASL_ONLY: Final = ("kafka_sasl_mechanism", "kafka_username", "kafka_password_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What every connection to a cluster is made with.

    * `context` is there unless `protocol` is PLAINTEXT; it always checks the broker's certificate and name.
    * `username` and `password` are there if `protocol` is SASL_SSL.
    """

    protocol: str = "PLAINTEXT"
    context: ssl.SSLContext | None = field(default=None, repr=False)
    has_certificate: bool = False
    mechanism: str = "SCRAM-SHA-512"
    username: str = ""
    password: SecretStr = field(default=SecretStr(""), repr=False)

    @property
    def uses_sasl(self) -> bool:
        return self.protocol == "SASL_SSL"

    @property
    def client_settings(self) -> dict[str, Any]:
        """The keyword arguments that every client of aiokafka takes for it."""
        settings: dict[str, Any] = {"security_protocol": self.protocol, "ssl_context": self.context}
        if self.uses_sasl:
            settings |= {
                "sasl_mechanism": self.mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password.get_secret_value(),
            }
        return settings


PLAINTEXT: Final = Security()


def security_of(settings: Settings) -> Security:
    """What the settings say, with what is in their files; without Kafka, nothing.

    Raises ``SecretUnusable``, ``SettingsConflict``, ``UsageError``.
    """
    return load(settings) if is_kafka(settings.broker_url) else PLAINTEXT


def load(settings: Settings) -> Security:
    """The same for any broker. Raises the same."""
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        _refuse(settings, _TLS_ONLY, "PLAINTEXT has no TLS")
    if protocol != "SASL_SSL":
        _refuse(settings, _SASL_ONLY, f"{protocol} has no login by name")
    if protocol == "PLAINTEXT":
        return PLAINTEXT
    context = _context(settings)
    if protocol == "SSL":
        return Security(protocol=protocol, context=context, has_certificate=bool(settings.kafka_certificate_file))
    if not settings.kafka_username or not settings.kafka_username.isprintable():
        raise UsageError("SASL_SSL needs a user's name", way_out="set kafka_username, or STATEFERRY_KAFKA_USERNAME")
    if settings.kafka_password_file is None:
        raise UsageError(
            "SASL_SSL needs the path of a file that holds the user's password",
            way_out="set kafka_password_file, or STATEFERRY_KAFKA_PASSWORD_FILE",
        )
    logging.getLogger("aiokafka.conn").addFilter(_without_tokens)
    return Security(
        protocol=protocol,
        context=context,
        has_certificate=bool(settings.kafka_certificate_file),
        mechanism=settings.kafka_sasl_mechanism,
        username=settings.kafka_username,
        password=_password(settings.kafka_password_file, "kafka_password_file"),
    )


def _refuse(settings: Settings, names: tuple[str, ...], why: str) -> None:
    """What is set and has no effect would be believed to have one."""
    for name in names:
        if name in settings.model_fields_set:
            raise SettingsConflict(
                f"{name} is set, and {why}",
                way_out="set kafka_security_protocol to SSL or SASL_SSL, or leave the other setting out",
            )


def _without_tokens(record: logging.LogRecord) -> bool:
    """aiokafka logs every request at its debug level, and a login by PLAIN is a request with a password in it."""
    return not any("SaslAuthenticate" in type(argument).__name__ for argument in record.args or ())


def _context(settings: Settings) -> ssl.SSLContext:
    ca_file, certificate_file = settings.kafka_ca_file, settings.kafka_certificate_file
    if ca_file is not None:
        secret_files.read(ca_file, "kafka_ca_file", CERTIFICATES_BYTES_MAX)
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise secret_files.unusable(ca_file, "kafka_ca_file", "holds no certificates in PEM") from error
    if certificate_file is None:
        for name in ("kafka_key_file", "kafka_key_password_file"):
            if name in settings.model_fields_set:
                raise SettingsConflict(f"{name} is set, and kafka_certificate_file is not", way_out="set it, too")
        return context
    own = secret_files.read(
        certificate_file, "kafka_certificate_file", CERTIFICATES_BYTES_MAX, secret=not settings.kafka_key_file
    )
    _check_certificate(own, certificate_file)
    if settings.kafka_key_file is not None:
        secret_files.read(settings.kafka_key_file, "kafka_key_file", CERTIFICATES_BYTES_MAX, secret=True)
    key_file = settings.kafka_key_file or certificate_file
    key_setting = "kafka_key_file" if settings.kafka_key_file else "kafka_certificate_file"
    encrypted = secret_files.unusable(key_file, key_setting, "holds an encrypted key", "set kafka_key_password_file")
    password = None
    if settings.kafka_key_password_file is not None:
        password = _password(settings.kafka_key_password_file, "kafka_key_password_file")

    def ask() -> str:
        if password is None:  # OpenSSL would ask at the terminal
            raise encrypted
        return password.get_secret_value()

    try:
        context.load_cert_chain(certificate_file, settings.kafka_key_file, ask)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            what = f"holds a key that is not the one of the certificate in {certificate_file}"
        elif password is None:
            what = "holds no private key in PEM"
        else:
            what = "holds no private key in PEM, or one of another password than kafka_key_password_file holds"
        raise secret_files.unusable(key_file, key_setting, what) from error
    return context


def _check_certificate(data: bytes, path: Path) -> None:
    """A broker only says that it does not like a certificate, and not why."""
    from cryptography import x509  # noqa: PLC0415 - most commands need none of it

    try:
        certificate = x509.load_pem_x509_certificates(data)[0]
    except ValueError as error:
        raise secret_files.unusable(path, "kafka_certificate_file", "holds no certificate in PEM") from error
    expires = certificate.not_valid_after_utc
    if expires < datetime.datetime.now(datetime.UTC):
        raise secret_files.unusable(
            path, "kafka_certificate_file", f"holds a certificate that expired on {expires:%Y-%m-%d}"
        )


def _password(path: Path, setting: str) -> SecretStr:
    """What a file holds, without the end of its line."""
    data = secret_files.read(path, setting, PASSWORD_BYTES_MAX, secret=True)
    try:
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise secret_files.unusable(path, setting, "is not text in UTF-8") from None
    if not text:
        raise secret_files.unusable(path, setting, "is empty")
    if not text.isprintable():
        raise secret_files.unusable(path, setting, "holds more than one line, or characters that no password has")
    return SecretStr(text)
