"""Signed snapshots: the signature changes neither name nor digest, and whoever requires one takes no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pipeline.errors import ManifestCorrupt, SecretUnusable, SignatureMissing, SignatureWrong, UsageError
from pipeline.objects import LocalObjects
from pipeline.signature import Signature, SigningKey, check_signature, public_key
from pipeline.snapshot import decode_manifest, encode_manifest, signed
from tests.ferries import SMALL_PART_BYTES, Ferry, make_ferry
from topology.restore_plans import Request
from topology.restorer import restore
from topology.settings import Settings
from topology.signing import required_signer, signing_key
from topology.snapshotter import take_snapshot

SEED = bytes(range(32))
SIGNER = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
"""The public key of `SEED`, as OpenSSL has it too."""


def pem(key: Ed25519PrivateKey, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


KEY = Ed25519PrivateKey.from_private_bytes(SEED)
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.of_pem(pem(KEY))


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"), events=200, snapshots=1)


@pytest.fixture
def objects(ferry: Ferry, tmp_path: Path) -> LocalObjects:
    return ferry.damageable(tmp_path / "objects")


def put(objects: LocalObjects, name: str, data: bytes) -> None:
    objects.delete(name)
    objects.put_new(name, data)


def test_a_signature_stands_beside(ferry: Ferry, key: SigningKey) -> None:
    """Name and digest are those of the unsigned manifest, the bytes are written alike, and it is one of this key."""
    (bare,) = ferry.manifests
    one = signed(bare, key)
    read = decode_manifest(encode_manifest(one))

    assert read == one != bare
    assert (read.name, read.digest) == (bare.name, bare.digest)
    assert encode_manifest(read) == encode_manifest(one)
    assert read.signature is not None and read.signature.signer == SIGNER == key.signer
    check_signature(read.signature, read.digest, SIGNER, "here")
    check_signature(read.signature, read.digest, None, "here")
    assert decode_manifest(encode_manifest(bare)).signature is None


def test_what_is_refused(ferry: Ferry, key: SigningKey) -> None:
    """No signature, another's, one of another manifest, one with a bit flipped, one that claims to be another's."""
    (bare,) = ferry.manifests
    digest, signature = bare.digest, key.sign(bare.digest)
    flipped = bytes([signature.value[0] ^ 1]) + signature.value[1:]
    check_signature(None, digest, None, "here")
    with pytest.raises(SignatureMissing):
        check_signature(None, digest, SIGNER, "here")
    for wrong in (
        OTHER.sign(digest),
        key.sign(bytes(32)),
        Signature(SIGNER, flipped),
        Signature(SIGNER, OTHER.sign(digest).value),
    ):
        with pytest.raises(SignatureWrong):
            check_signature(wrong, digest, SIGNER, "here")
    with pytest.raises(SignatureWrong):
        check_signature(Signature(SIGNER, flipped), digest, None, "here")


@pytest.mark.parametrize(
    ("signature", "signer"),
    [("", "ab" * 32), ("ab" * 63, "ab" * 32), ("AB" * 64, "ab" * 32), ("xy", "zz"), (None, "ab" * 32)],
)
def test_malformed(ferry: Ferry, key: SigningKey, signature: str | None, signer: str) -> None:
    """Fields that no signature can have are no manifest's."""
    data = encode_manifest(signed(ferry.manifests[0], key)).decode()
    held = signed(ferry.manifests[0], key).signature
    assert held is not None
    if signature is None:
        changed = data.replace(f'"signature":"{held.value.hex()}",', "")
    else:
        changed = data.replace(held.value.hex(), signature).replace(held.signer.hex(), signer)

    assert changed != data
    with pytest.raises(ManifestCorrupt):
        decode_manifest(changed.encode())


def test_restores(ferry: Ferry, objects: LocalObjects, tmp_path: Path, key: SigningKey) -> None:
    """Who requires a signature gets what its holder signed, and nothing else; who does not, gets it all the same."""
    (bare,) = ferry.manifests
    height = ferry.node.meta.final_height
    wanted = Request(height=height, signer=SIGNER)
    with pytest.raises(SignatureMissing, match="not signed"):
        restore(objects, tmp_path / "a", wanted)
    put(objects, bare.name, encode_manifest(signed(bare, OTHER)))
    with pytest.raises(SignatureWrong, match="is required"):
        restore(objects, tmp_path / "a", wanted)
    forged = replace(bare, signature=Signature(SIGNER, bytes(64)))
    put(objects, bare.name, encode_manifest(forged))
    for request in (wanted, Request(height=height)):
        with pytest.raises(SignatureWrong, match="is not one of"):
            restore(objects, tmp_path / "a", request)
    assert not (tmp_path / "a" / "store").exists()
    put(objects, bare.name, encode_manifest(signed(bare, key)))

    assert restore(objects, tmp_path / "a", wanted, claimed=True).ref.height == height
    assert restore(objects, tmp_path / "b", Request(height=height), claimed=True).ref.height == height


def test_the_archive_alone_is_not_signed(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """What begins with no snapshot begins with no signature."""
    with pytest.raises(SignatureMissing, match="archive alone"):
        restore(objects, tmp_path / "a", Request(height=ferry.manifests[0].height - 1, signer=SIGNER))


def test_a_plan_of_less_is_made_again(ferry: Ferry, objects: LocalObjects, tmp_path: Path) -> None:
    """A restore that was begun without asking for a signature is not gone on with by one that asks."""
    request = Request(height=ferry.manifests[0].height)

    assert request.fields() != request._replace(signer=SIGNER).fields()


def test_snapshots_are_signed(ferry: Ferry, tmp_path: Path, key: SigningKey) -> None:
    """A snapshot that is published is signed; one that is there already stays as it is."""
    objects = LocalObjects(tmp_path / "objects")

    def take(with_key: SigningKey | None) -> Signature | None:
        copy = ferry.copy()
        return take_snapshot(
            [copy], tmp_path / "scratch", objects, key=with_key, part_raw_bytes_max=SMALL_PART_BYTES
        ).signature

    first = take(key)
    assert first is not None and first.signer == SIGNER
    assert take(None) == take(OTHER) == first


def key_file(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "sign.pem"
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_the_key_file(tmp_path: Path) -> None:
    """A private key of Ed25519 in PEM, which nobody else may read; refused without a word of what is in it."""
    loaded = signing_key(key_file(tmp_path, pem(KEY)))
    assert loaded is not None and loaded.signer == SIGNER
    assert SEED.hex() not in repr(loaded)
    elliptic = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data, mode in ((pem(KEY), 0o644), (b"nonsense", 0o600), (elliptic, 0o600), (pem(KEY, b"word"), 0o600)):
        with pytest.raises(SecretUnusable) as caught:
            signing_key(key_file(tmp_path, data, mode))
        assert "sign_key_file" in str(caught.value)
        assert "BEGIN" not in str(caught.value)
    with pytest.raises(SecretUnusable):
        signing_key(tmp_path / "nowhere.pem")
    assert signing_key(None) is None


def test_the_key_to_require(tmp_path: Path) -> None:
    """In hex, or a PEM file by its path."""
    path = tmp_path / "public.pem"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    assert required_signer(Settings(require_signature=SIGNER.hex())) == SIGNER
    assert required_signer(Settings(require_signature=str(path))) == SIGNER
    assert required_signer(Settings()) is None
    for nonsense in ("ab", "xy" * 32, "-----BEGIN PUBLIC KEY-----"):
        with pytest.raises(UsageError):
            public_key(nonsense)
