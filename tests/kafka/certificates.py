"""Certificates for tests: an authority, and what it signed; and the same of another authority, which nobody trusts."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY: Final = datetime.timedelta(days=1)


class Authority:
    """Signs certificates into PEM files of a folder; `ca` is what trusts it."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        made = self._begun(self._name, self._key, days=(-2, 3650))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        made = made.add_extension(_usage(signs=True), critical=True)
        self._certificate = made.sign(self._key, hashes.SHA256())
        self.ca.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, file: str, *, hosts: tuple[str, ...], days: tuple[int, int] = (-1, 30)) -> Path:
        """A broker's key and certificate in one file, as Kafka's PEM key store wants them."""
        return self._issue(file, "broker", hosts, ExtendedKeyUsageOID.SERVER_AUTH, days, b"")

    def client(self, file: str | Path, *, name: str, password: bytes = b"") -> Path:
        """A client's key, encrypted if there is a password, and certificate in one file; Kafka's principal is
        ``User:CN=name``."""
        return self._issue(file, name, (), ExtendedKeyUsageOID.CLIENT_AUTH, (-1, 30), password)

    def _issue(
        self,
        file: str | Path,
        name: str,
        hosts: tuple[str, ...],
        purpose: x509.ObjectIdentifier,
        days: tuple[int, int],
        password: bytes,
    ) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._begun(_named(name), key, days=days)
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = made.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        made = made.add_extension(_usage(signs=False), critical=True)
        if hosts:
            made = made.add_extension(x509.SubjectAlternativeName(list(map(_alternative, hosts))), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = made.add_extension(authority, critical=False)
        certificate = made.sign(self._key, hashes.SHA256())
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        path = self.folder / file
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
            + certificate.public_bytes(serialization.Encoding.PEM)
            + self._certificate.public_bytes(serialization.Encoding.PEM)
        )
        return path

    def _begun(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: tuple[int, int]
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        begun = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
        begun = begun.serial_number(x509.random_serial_number())
        begun = begun.not_valid_before(now + days[0] * _DAY).not_valid_after(now + days[1] * _DAY)
        return begun.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
