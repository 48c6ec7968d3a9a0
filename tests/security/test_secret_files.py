"""Settings of a secured broker: what is in the files that they name, and what must not be set together."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SecretUnusable, SettingsConflict, UsageError
from tests.kafka.certificates import Authority
from tests.topology.commands import here
from topology import logs
from topology.settings import Settings
from topology.transports.factory import faust_credentials
from topology.transports.kafka_security import PASSWORD_BYTES_MAX, PLAINTEXT, Security, security_of

SECRET = "Zq7-never-shown"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as they should be, and with everything that may be wrong with one."""
    folder = tmp_path_factory.mktemp("secrets")
    authority = Authority(folder, "tests")
    authority.client("own.pem", name="own")
    authority.client("other.pem", name="other")
    authority.client("encrypted.pem", name="own", password=SECRET.encode())
    authority.server("expired.pem", hosts=("localhost",), days=(-20, -10))
    for name, content, mode in (
        ("password", SECRET + "\n", 0o600),
        ("group", SECRET, 0o640),
        ("windows", SECRET + "\r\n", 0o400),
        ("empty", "", 0o600),
        ("line", "\n", 0o600),
        ("lines", f"{SECRET}\n{SECRET}\n", 0o600),
        ("world", SECRET, 0o644),
        ("group-writes", SECRET, 0o660),
        ("long", "x" * (PASSWORD_BYTES_MAX + 1), 0o600),
        ("garbage.pem", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", 0o600),
    ):
        (folder / name).write_text(content)
        (folder / name).chmod(mode)
    (folder / "latin").write_bytes("Grüße".encode("latin-1"))
    (folder / "latin").chmod(0o600)
    (folder / "directory").mkdir()
    (folder / "world.pem").write_bytes((folder / "own.pem").read_bytes())
    (folder / "world.pem").chmod(0o644)
    os.mkfifo(folder / "pipe", 0o600)
    return folder


def settings(folder: Path, **given: Any) -> Settings:
    """A SASL_SSL user; a value of a file's setting is its name in the folder."""
    base = {"kafka_security_protocol": "SASL_SSL", "kafka_username": "me", "kafka_password_file": "password"}
    found = {"broker": "kafka://localhost", "kafka_ca_file": "ca.pem"} | base | given
    found = {name: folder / value if name.endswith("_file") and value else value for name, value in found.items()}
    return Settings(**{name: value for name, value in found.items() if value is not None})


NO_SASL = {"kafka_username": None, "kafka_password_file": None}


@pytest.mark.parametrize("name", ["password", "group", "windows"])
def test_password(name: str, folder: Path) -> None:
    """The file's only line, whoever ended it; its owner's group may read it."""
    found = security_of(settings(folder, kafka_password_file=name))

    assert found.password.get_secret_value() == SECRET
    assert found.client_settings["sasl_plain_password"] == SECRET
    assert found.client_settings["sasl_mechanism"] == "SCRAM-SHA-512"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kafka_password_file": "nowhere"}, "kafka_password_file cannot be read: No such file"),
        ({"kafka_password_file": "directory"}, "kafka_password_file cannot be read: Is a directory"),
        ({"kafka_password_file": "pipe"}, "kafka_password_file is not a file"),
        ({"kafka_password_file": "empty"}, "kafka_password_file is empty"),
        ({"kafka_password_file": "line"}, "kafka_password_file is empty"),
        ({"kafka_password_file": "lines"}, "more than one line"),
        ({"kafka_password_file": "long"}, f"more than {PASSWORD_BYTES_MAX} bytes"),
        ({"kafka_password_file": "latin"}, "is not text in UTF-8"),
        ({"kafka_password_file": "world"}, "mode 0644: others may read or write it.*chmod o-rwx"),
        ({"kafka_password_file": "group-writes"}, "mode 0660: its group may write it"),
        ({"kafka_ca_file": "nowhere"}, "kafka_ca_file cannot be read"),
        ({"kafka_ca_file": "empty"}, "kafka_ca_file is empty"),
        ({"kafka_ca_file": "password"}, "kafka_ca_file holds no certificates in PEM"),
        ({"kafka_ca_file": "garbage.pem"}, "kafka_ca_file holds no certificates in PEM"),
        ({"kafka_certificate_file": "nowhere"}, "kafka_certificate_file cannot be read"),
        ({"kafka_certificate_file": "garbage.pem"}, "kafka_certificate_file holds no certificate in PEM"),
        ({"kafka_certificate_file": "world.pem"}, "kafka_certificate_file has mode 0644"),
        ({"kafka_certificate_file": "expired.pem"}, "holds a certificate that expired on 20"),
        ({"kafka_certificate_file": "encrypted.pem"}, "encrypted key.*set kafka_key_password_file"),
        ({"kafka_certificate_file": "encrypted.pem", "kafka_key_password_file": "lines"}, "more than one line"),
        ({"kafka_certificate_file": "encrypted.pem", "kafka_key_password_file": "other-password"}, "another password"),
        ({"kafka_certificate_file": "own.pem", "kafka_key_file": "other.pem"}, "not the one of the certificate in"),
        ({"kafka_certificate_file": "own.pem", "kafka_key_file": "world.pem"}, "kafka_key_file has mode 0644"),
        ({"kafka_certificate_file": "own.pem", "kafka_key_file": "ca.pem"}, "kafka_key_file"),
    ],
)
def test_unusable_files(given: dict[str, Any], says: str, folder: Path) -> None:
    """The setting, the file, what is wrong with it; and not a word of what it holds."""
    other = folder / "other-password"
    other.write_text("wrong\n")
    other.chmod(0o600)
    with pytest.raises(SecretUnusable, match=says) as caught:
        security_of(settings(folder, **given))

    assert str(folder) in caught.value.where
    assert SECRET not in repr(caught.value) + str(caught.value)


def test_key_files(folder: Path) -> None:
    """A key beside its certificate, in a file of its own, and encrypted."""
    for given in (
        {"kafka_certificate_file": "own.pem"},
        {"kafka_certificate_file": "world.pem", "kafka_key_file": "own.pem"},
        {"kafka_certificate_file": "encrypted.pem", "kafka_key_password_file": "password"},
    ):
        found = security_of(settings(folder, kafka_security_protocol="SSL", **NO_SASL, **given))
        assert found.has_certificate and found.context is not None and found.context.check_hostname


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kafka_security_protocol": None}, "kafka_ca_file is set, and PLAINTEXT has no TLS"),
        ({"kafka_security_protocol": None, "kafka_ca_file": None}, "kafka_username is set, and PLAINTEXT"),
        ({"kafka_security_protocol": "SSL"}, "kafka_username is set, and SSL has no login by name"),
        ({"kafka_username": None}, "SASL_SSL needs a user's name"),
        ({"kafka_username": "two\nlines"}, "SASL_SSL needs a user's name"),
        ({"kafka_password_file": None}, "SASL_SSL needs the path of a file"),
        ({"kafka_key_file": "own.pem"}, "kafka_key_file is set, and kafka_certificate_file is not"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], says: str, folder: Path) -> None:
    """What has no effect is refused: it would be believed to have one."""
    with pytest.raises(UsageError, match=says):
        security_of(settings(folder, **given))


def test_only_for_kafka(folder: Path) -> None:
    """An embedded log has nobody to prove anything to."""
    assert security_of(settings(folder, broker="", kafka_password_file="nowhere")) is PLAINTEXT
    assert security_of(Settings(broker="kafka://localhost")) is PLAINTEXT


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("STATEFERRY_KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT", "use SASL_SSL"),
        ("STATEFERRY_KAFKA_SECURITY_PROTOCOL", "TLS", "'PLAINTEXT', 'SSL' or 'SASL_SSL'"),
        ("STATEFERRY_KAFKA_SASL_MECHANISM", "SCRAM-SHA-256", "'SCRAM-SHA-512' or 'PLAIN'"),
    ],
)
def test_refused_values(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login without TLS is refused, whatever the broker would allow."""
    monkeypatch.setenv(name, value)

    assert says in here("topics", "describe", "--broker", "kafka://localhost", "--json").failed(UsageError)


def test_a_password_in_the_wrong_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret as a setting, in a URL, or instead of its file's path is refused, and not repeated."""
    (tmp_path / "stateferry.toml").write_text(f'kafka_password = "{SECRET}"\n')
    done = [here("status", "--json")]
    assert "kafka_password" in done[0].failed(UsageError)
    (tmp_path / "stateferry.toml").write_text(f'kafka_security_protocol = "{SECRET}"\n')
    done.append(here("status", "--json"))
    (tmp_path / "stateferry.toml").unlink()
    done.append(here("topics", "describe", "--broker", f"kafka://me:{SECRET}@localhost", "--json"))

    assert [each.code for each in done] == [2, 2, 2]
    assert SECRET not in "".join(each.stderr + str(each.document) for each in done)


def test_no_secret_in_what_is_shown(folder: Path) -> None:
    """Neither settings, nor what became of them, nor Faust's copy of it shows a password."""
    given = settings(folder, kafka_certificate_file="encrypted.pem", kafka_key_password_file="password")
    found = security_of(given)
    shown = [repr(given), str(given), given.model_dump_json(), repr(found), str(found), repr(copy.copy(found))]
    shown += [repr(faust_credentials(found)), str(found.password)]

    assert not [text for text in shown if SECRET in text]
    with pytest.raises(TypeError):
        pickle.dumps(found)
    assert SECRET in str(found.client_settings)


def test_no_local_variable_in_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal errors that nobody expected are shown with their lines, and not with what stood in variables."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def login(password: str) -> None:
        raise RuntimeError(len(password))

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    logs.configure(verbose=False)
    try:
        login(SECRET)
    except RuntimeError as error:
        logs.get().error("worker_failed", error="RuntimeError", exc_info=error)

    assert "raise RuntimeError(len(password))" in terminal.getvalue()
    assert SECRET not in terminal.getvalue()


def test_conflict_has_its_name(folder: Path) -> None:
    """Two settings that contradict each other are a conflict of settings; a missing one is not."""
    with pytest.raises(SettingsConflict):
        security_of(settings(folder, kafka_security_protocol="SSL"))
    assert Security() == PLAINTEXT
