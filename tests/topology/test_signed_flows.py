"""Signed snapshots by commands: what a node publishes with a key is what another takes that requires it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pipeline.errors import SecretUnusable, SignatureMissing, SignatureWrong, UsageError
from tests.topology.commands import Site, same_state

FINAL = 23
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2)]
SIGNER, OTHER = (key.public_key().public_bytes_raw().hex() for key in KEYS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A primary of finality 6 at height 29, and its snapshot, signed."""
    site = Site(tmp_path_factory.mktemp("signed") / "site")
    key_file(site.folder)
    site.here("ingest", "synthetic", "--blocks", 30, "--changes", 20).ok()
    site.follow("primary", "p", "--finality", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATEFERRY_SIGN_KEY_FILE", str(site.folder / "sign.pem"))
        taken = site.here("snapshot").ok()
    assert taken["signer"] == SIGNER
    return site


def key_file(folder: Path) -> Path:
    path = folder / "sign.pem"
    path.write_bytes(KEYS[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def test_restore(site: Site) -> None:
    """The key that signed is taken; another is not, whatever else is right; nonsense is no key."""
    site.here("restore", "--require-signature", OTHER, node="r").failed(SignatureWrong)
    site.here("restore", "--height", 10, "--require-signature", SIGNER, node="r").failed(SignatureMissing)
    site.here("restore", "--require-signature", "ab", node="r").failed(UsageError)
    assert not (site.dir("r") / "store").exists()

    assert site.here("restore", "--require-signature", SIGNER, node="r").ok()["height"] == FINAL
    site.follow("replica", "r")
    same_state(site, ["p", "r"])


def test_an_unsigned_snapshot(site: Site) -> None:
    """It is refused by who requires a signature, and taken by who does not."""
    for path in site.objects.rglob("manifest.json"):
        path.unlink()
    assert site.here("snapshot").ok()["signer"] is None

    site.here("restore", "--require-signature", SIGNER, node="r").failed(SignatureMissing)
    assert site.here("restore", node="r").ok()["height"] == FINAL


def test_a_new_generation(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base is signed anew; a replica that requires the signature renews itself, and one that requires another key
    does not."""
    site.follow("replica", "r")
    monkeypatch.setenv("STATEFERRY_REQUIRE_SIGNATURE", OTHER)
    site.here("generation", "new").failed(SignatureWrong)
    monkeypatch.setenv("STATEFERRY_REQUIRE_SIGNATURE", SIGNER)
    monkeypatch.setenv("STATEFERRY_SIGN_KEY_FILE", str(site.folder / "sign.pem"))
    begun = site.here("generation", "new").ok()["generation"]
    monkeypatch.delenv("STATEFERRY_SIGN_KEY_FILE")
    site.follow("primary", "new")
    monkeypatch.setenv("STATEFERRY_REQUIRE_SIGNATURE", OTHER)
    site.here("run", "--role", "replica", "--until-idle", node="r").failed(SignatureWrong)
    monkeypatch.setenv("STATEFERRY_REQUIRE_SIGNATURE", SIGNER)

    assert site.follow("replica", "r")["generation"] == begun
    same_state(site, ["new", "r"])


def test_a_key_that_others_may_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, without a word of it, and nothing is published."""
    for path in site.objects.rglob("manifest.json"):
        path.unlink()
    key = key_file(site.folder)
    key.chmod(0o644)
    monkeypatch.setenv("STATEFERRY_SIGN_KEY_FILE", str(key))
    done = site.here("snapshot")
    done.failed(SecretUnusable)

    assert "PRIVATE KEY" not in done.stderr
    assert not list(site.objects.rglob("manifest.json"))
