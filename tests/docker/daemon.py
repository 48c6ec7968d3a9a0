"""A Docker daemon of this test run, where none runs: started by hand as root, without a network of its own.

Its images stay in a cache outside of the work tree; whatever containers a killed run left there is removed first. Ours
reaches nothing of the host's firewall: containers use the host's network, on loopback.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.kafka.server import CACHE

START_TIMEOUT_S: Final = 60.0
KEPT_HOURS: Final = 168
"""Layers of images that were replaced are kept for a week."""


def answers() -> bool:
    """Whether a daemon runs that this user may use."""
    return shutil.which("docker") is not None and _docker("info").returncode == 0


def missing_tools() -> list[str]:
    """What keeps this user from running a daemon here."""
    lacking = [tool for tool in ("docker", "dockerd", "debootstrap") if shutil.which(tool) is None]
    return lacking if os.geteuid() == 0 else ["root", *lacking]


def _docker(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *args], check=False, env=os.environ | (env or {}), capture_output=True, text=True)


@contextmanager
def running() -> Iterator[str]:
    """The address of a daemon that ends with this context, and at the latest with this process."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="sf-docker-"))  # short: sockets lie in there
    host = f"unix://{folder}/docker.sock"
    with (CACHE / "docker.LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = _start(folder, host)
        try:
            _wait(process, folder / "log", host)
            _remove_containers(host)
            yield host
            _docker("image", "prune", "--force", "--filter", f"until={KEPT_HOURS}h", env={"DOCKER_HOST": host})
        finally:
            _remove_containers(host)
            process.terminate()
            process.wait(60)
            subprocess.run(["umount", "-q", str(folder / "exec" / "netns" / "default")], check=False)
            shutil.rmtree(folder)


def _start(folder: Path, host: str) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM", "dockerd", "--host", host, "--pidfile", str(folder / "pid")),
                *("--data-root", str(CACHE / "docker"), "--exec-root", str(folder / "exec")),
                *("--bridge", "none", "--iptables=false", "--ip6tables=false"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], log: Path, host: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while _docker("info", env={"DOCKER_HOST": host}).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(
                f"dockerd, which needs all of root's privileges, did not start:\n{log.read_text()[-4000:]}"
            )
        time.sleep(0.1)


def _remove_containers(host: str) -> None:
    found = _docker("ps", "--all", "--quiet", env={"DOCKER_HOST": host}).stdout.split()
    if found:
        _docker("rm", "--force", "--volumes", *found, env={"DOCKER_HOST": host})
    _docker("volume", "prune", "--force", env={"DOCKER_HOST": host})
