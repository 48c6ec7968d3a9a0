"""Where settings come from: an option, then the environment, then stateferry.toml; and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import BrokerUrlError, NotFound, UsageError, WrongChain
from tests.chains import block_files
from tests.topology.commands import Site, command, here


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Three directories, named by their heights."""
    site = Site(tmp_path_factory.mktemp("settings"))
    site.ingest(*block_files("reorg_btcd", "main"))
    for height in (1, 2, 3):
        site.here("run", "--role", "primary", "--until-height", height, node=str(height)).ok()
    return site


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own, and no settings in the environment."""
    for name in [name for name in os.environ if name.startswith("STATEFERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_precedence(site: Site, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option is stronger than the environment, which is stronger than the file."""
    toml = elsewhere / "stateferry.toml"
    toml.write_text(f'data_dir = "{site.dir("1")}"\nobjects = "file://{site.objects}"\n')
    assert here("status", "--json").ok()["height"] == 1
    monkeypatch.setenv("STATEFERRY_DATA_DIR", str(site.dir("2")))
    assert here("status", "--json").ok()["height"] == 2
    assert here("status", "--json", "--data-dir", site.dir("3")).ok()["height"] == 3

    other = toml.rename(elsewhere / "other.toml")
    monkeypatch.delenv("STATEFERRY_DATA_DIR")
    here("status", "--json").failed(NotFound)
    monkeypatch.setenv("STATEFERRY_CONFIG", str(other))
    assert here("status", "--json").ok()["height"] == 1


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name the file may be missing; a name that leads nowhere is a mistake."""
    monkeypatch.setenv("STATEFERRY_CONFIG", "nowhere.toml")

    assert "nowhere.toml" in here("status", "--json").failed(UsageError)


def test_chain_and_broker_by_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every common option has its variable."""
    monkeypatch.setenv("STATEFERRY_BROKER", f"embedded://{site.log}")
    monkeypatch.setenv("STATEFERRY_OBJECTS", f"file://{site.objects}")
    assert here("generation", "show", "--json").ok()["chain"] == "bitcoin"
    monkeypatch.setenv("STATEFERRY_CHAIN", "signet")

    assert "'signet' was asked for" in here("run", "--role", "replica", "--until-idle", "--json").failed(WrongChain)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("STATEFERRY_SERVE", "everything", "serve"),
        ("STATEFERRY_FINALITY", "-1", "finality"),
        ("STATEFERRY_CHAIN", "two words", "chain"),
        ("STATEFERRY_CODEC", "lzma", "codec"),
        ("STATEFERRY_GROUP_BYTES_MAX", "1", "group_bytes_max"),
        ("STATEFERRY_FAILPOINT", "no.such", "no.such"),
    ],
)
def test_bad_value(name: str, value: str, says: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be is named."""
    monkeypatch.setenv(name, value)

    assert says in here("status", "--json", "--data-dir", site.dir("1")).failed(UsageError)


@pytest.mark.parametrize(
    ("text", "says"), [('colour = "red"', "colour"), ("data_dir = ", "stateferry.toml"), ("finality = 'x'", "finality")]
)
def test_bad_file(text: str, says: str, elsewhere: Path) -> None:
    """A file that cannot be read, or says something unknown, is not half obeyed."""
    (elsewhere / "stateferry.toml").write_text(text)

    assert says in here("status", "--json").failed(UsageError)


@pytest.mark.parametrize(
    "url",
    [
        "kafka://",
        "kafka://localhost:99999",
        "kafka://localhost/topic",
        "redis://localhost:9092",
        "embedded://relative/log.sqlite",
        "embedded:///",
        "log.sqlite",
        "embedded:///a/log.sqlite?mode=ro",
    ],
)
def test_broker_url(url: str) -> None:
    """A broker URL that names no broker here says how to write one."""
    for words in (("run", "--role", "replica", "--until-idle"), ("generation", "show")):
        said = here(*words, "--broker", url, "--data-dir", "node", "--json").failed(BrokerUrlError)
        assert "kafka://host:port" in said


def test_password_in_a_broker_url_is_not_shown() -> None:
    """Errors end up in logs."""
    done = here("generation", "show", "--broker", "kafka://me:secret@host", "--json")
    done.failed(BrokerUrlError)

    assert "secret" not in done.stderr + str(done.document)


def test_usage_of_the_process(site: Site) -> None:
    """The process itself: usage errors exit with 2, a missing store with 13, help and version with 0."""
    assert command("run").code == 2
    assert command("no-such-command").code == 2
    assert command("--version").code == 0
    command("status", "--data-dir", site.folder / "nothing", "--json").failed(NotFound)
