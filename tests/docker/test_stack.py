"""The compose stack: what `make up` starts, whatever is killed in it, and what `make down` leaves."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.docker import daemon, standins
from tests.docker.stack import SERVICES, WORKERS, Stack, compose_command, on_loopback
from tests.kafka.fixtures import IN_CI

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, up. On a daemon of this machine's user, else (in CI: first) on one of this test's own."""
    project = f"stateferry-test-{secrets.token_hex(4)}"
    lacking = daemon.missing_tools()
    uses_own = not lacking and (IN_CI or not daemon.answers())
    if compose_command() is None or not (uses_own or daemon.answers()):
        why = f"no docker daemon answers, or there is no compose; to start a daemon: {', '.join(lacking)}"
        pytest.fail(why) if IN_CI else pytest.skip(why)
    if not uses_own:
        yield from _up(Stack(project))
        return
    with daemon.running() as host:
        standins.build(host)
        override = on_loopback(tmp_path_factory.mktemp("stack") / "override.json")
        yield from _up(Stack(project, host=host, override=override))


def _up(stack: Stack) -> Iterator[Stack]:
    try:
        said = stack.make("up")
        assert "exec replica-1 stateferry status" in said
        yield stack
    finally:
        stack.make("down", "VOLUMES=1")
    assert stack.volumes() == set()


def test_follows(stack: Stack) -> None:
    """A primary and two replicas follow the source, prove what they hold, and docker finds them healthy."""
    stack.wait_until("10 blocks", lambda: all(stack.height(name) >= 10 for name in WORKERS))
    with stack.settled() as found:
        roles = [stack.ask(name, "status")["role"] for name in WORKERS]

    assert (found["chain"], found["proof"], found["role"]) == ("synthetic", "proven", "primary")
    assert roles == ["primary", "replica", "replica"]
    assert stack.state("topics")["ExitCode"] == 0
    for name in ("kafka", *WORKERS):
        stack.wait_until(f"{name} is healthy", lambda name=name: stack.state(name)["Health"]["Status"] == "healthy")


def test_image(stack: Stack) -> None:
    """Nobody special runs in it, nothing in it can be changed, and nothing is left that builds."""
    tools = "for tool in cc gcc make pip; do command -v $tool; done; true"

    assert stack.exec("primary", "id", "-u").strip() == "10001"
    assert (
        stack.exec("primary", "sh", "-c", "touch /x /opt/stateferry/x 2>/dev/null || echo refused").strip() == "refused"
    )
    assert stack.exec("primary", "sh", "-c", f"PATH=/opt/stateferry/bin:/usr/bin:/bin; {tools}") == ""


@pytest.mark.parametrize("service", SERVICES)
def test_killed(stack: Stack, service: str) -> None:
    """`docker kill` of any service, then `make up`: all go on, to one root."""
    before = stack.height("primary")
    stack.docker("kill", stack.container(service))
    if service.startswith("replica"):
        stack.wait_until("the primary goes on alone", lambda: stack.height("primary") > before + 2)
    stack.make("up")
    stack.wait_until("the source goes on", lambda: stack.height("primary") > before + 2)
    with stack.settled() as found:
        assert found["height"] > before
        assert found["proof"] == "proven"


def test_crashed(stack: Stack) -> None:
    """kill -9 of every process at once: docker starts all of them again, and they arrive at one root."""
    before = stack.height("primary")
    restarts = {name: stack.state(name)["RestartCount"] for name in SERVICES}
    for name in reversed(SERVICES):
        stack.exec(name, "sh", "-c", "kill -9 -1")
    for name in SERVICES:
        stack.wait_until(f"{name} is there again", lambda name=name: stack.state(name)["RestartCount"] > restarts[name])
    stack.wait_until("the source goes on", lambda: stack.height("primary") > before + 2)
    with stack.settled() as found:
        assert found["proof"] == "proven"


def test_down_keeps(stack: Stack) -> None:
    """SIGTERM ends every service by itself. `make down` leaves the data, and the next `make up` goes on from it."""
    with stack.settled() as before:
        pass
    stack.compose("stop")
    codes = {name: stack.state(name)["ExitCode"] for name in SERVICES}
    assert codes == dict.fromkeys(WORKERS, 0) | {"source": 143, "kafka": 143}

    stack.make("down")
    assert stack.volumes() == {"kafka", "objects", *WORKERS}
    stack.make("up")
    stack.wait_until("the source goes on", lambda: stack.height("primary") > before["height"])
    with stack.settled() as found:
        verified = [stack.ask(name, "verify") for name in WORKERS]

    assert (found["generation"], found["height"] > before["height"]) == (before["generation"], True)
    for answer in verified:
        there = (answer["verified_height"], answer["verified_root"], answer["keys"])
        assert there == (found["height"], found["root"], found["keys"])
