"""Images with the official names, built from Debian's packages and Maven's jars, where no registry may be reachable.

They hold what `docker/` uses of the official ones: Python on its path, and a Kafka that takes its configuration from
`KAFKA_...`. The compose file and the Dockerfile stay as users have them. What an image needs of this host to reach
package servers (certificates, pip's configuration, Debian's mirror) is read from it when the image is built.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.kafka.server import CACHE, jars

ROOT: Final = Path(__file__).parents[2]
CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
MIRROR: Final = "http://deb.debian.org/debian"
SUITE: Final = "bookworm"  # its Python is 3.11
PACKAGES: Final = "ca-certificates,openjdk-17-jre-headless,python3,python3-venv"
PIP_SETTINGS: Final = ("cert", "extra-index-url", "index-url", "proxy", "retries", "timeout", "trusted-host")

_LABEL: Final = "stateferry.stand-in"
_DPKG: Final = """force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
"""
_KAFKA_RUN: Final = """#!/bin/bash
# As the official image starts: properties from KAFKA_..., a format of what has none yet, then the broker.
set -eu
export CLASSPATH='/opt/kafka/libs/*'
said=$(java kafka.docker.KafkaDockerWrapper setup --default-configs-dir /etc/kafka/docker \
    --mounted-configs-dir /mnt/shared/config --final-configs-dir /opt/kafka/config 2>&1) \
    || grep -qi 'already formatted' <<< "$said" || { echo "$said"; exit 1; }
exec java ${KAFKA_HEAP_OPTS:--Xmx1G} kafka.Kafka /opt/kafka/config/server.properties
"""
_KAFKA_DOCKERFILE: Final = """FROM {base}
COPY libs /opt/kafka/libs
COPY run /etc/kafka/docker/run
RUN useradd --uid 1000 appuser && mkdir -p /opt/kafka/config /var/lib/kafka/data /mnt/shared/config \
    && touch /etc/kafka/docker/server.properties /opt/kafka/config/server.properties \
    && chmod +x /etc/kafka/docker/run && chown -R appuser /opt/kafka/config /var/lib/kafka
USER appuser
VOLUME ["/var/lib/kafka/data"]
CMD ["/etc/kafka/docker/run"]
"""


def names() -> tuple[str, str]:
    """The official images that `docker/` names: Python's, and Kafka's."""
    python = re.findall(r"^FROM (python:\S+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    (kafka,) = re.findall(r"image: (apache/kafka:\S+)", (ROOT / "docker" / "compose.yaml").read_text())
    assert len(set(python)) == 1, python
    return python[0], kafka


def build(host: str) -> None:
    """Have both images in a daemon. Minutes at first; later, what is there of this recipe stays."""
    env = os.environ | {"DOCKER_HOST": host}
    python, kafka = names()
    debian = _recipe(python, SUITE, PACKAGES, _DPKG)
    broker = _recipe(debian, kafka, _KAFKA_RUN, _KAFKA_DOCKERFILE)
    with tempfile.TemporaryDirectory(prefix="stand-in-", dir=CACHE) as folder:
        if _recipe_of(python, env) != debian:
            _import_debian(Path(folder) / "root", python, debian, env)
        if _recipe_of(kafka, env) != broker:
            _build_kafka(Path(folder) / "kafka", python, kafka, broker, env)


def _recipe(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _recipe_of(image: str, env: dict[str, str]) -> str:
    wanted = f'{{{{index .Config.Labels "{_LABEL}"}}}}'
    found = subprocess.run(
        ["docker", "image", "inspect", "--format", wanted, image], env=env, capture_output=True, check=False, text=True
    )
    return found.stdout.strip()


def _import_debian(root: Path, name: str, recipe: str, env: dict[str, str]) -> None:
    """Debian with Python and Java as an image of this name."""
    dpkg = root / "etc" / "dpkg" / "dpkg.cfg.d"
    dpkg.mkdir(parents=True)
    (dpkg / "stand-in").write_text(_DPKG)
    _run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), _mirror()])
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    (root / "etc" / "pip.conf").write_text(_pip_settings())
    (root / "usr" / "local" / "bin" / "python").symlink_to("/usr/bin/python3")
    shutil.rmtree(root / "var" / "cache" / "apt", ignore_errors=True)
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        _run(["docker", "import", "--change", f"LABEL {_LABEL}={recipe}", "-", name], env, stdin=tar.stdout)
    assert tar.returncode == 0, tar.returncode


def _build_kafka(folder: Path, base: str, name: str, recipe: str, env: dict[str, str]) -> None:
    """Kafka of that version on top of it."""
    shutil.copytree(jars(name.rpartition(":")[2]), folder / "libs")
    (folder / "run").write_text(_KAFKA_RUN)
    (folder / "Dockerfile").write_text(_KAFKA_DOCKERFILE.format(base=base))
    build = ["docker", "build", "--network", "host", "--label", f"{_LABEL}={recipe}", "--tag", name, str(folder)]
    _run(build, env | {"DOCKER_BUILDKIT": "0"})


def _mirror() -> str:
    """Where this host gets that suite's packages from."""
    if shutil.which("apt-get") is None:
        return MIRROR
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {SUITE}", "Component: main"],
        capture_output=True,
        check=False,
        text=True,
    )
    return next((line for line in listed.stdout.split() if line.startswith("http")), MIRROR)


def _pip_settings() -> str:
    """A pip.conf of what this host's pip needs to reach its index."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, check=False, text=True
    )
    lines = dict.fromkeys(
        f"{name} = {value}"
        for name, value in re.findall(r"^[^=]*\.([a-z-]+)='(.*)'$", listed.stdout, re.M)
        if name in PIP_SETTINGS
    )
    return "\n".join(["[global]", *lines, ""])


def _run(command: list[str], env: dict[str, str] | None = None, **kwargs: object) -> None:
    """A command that must work. Raises RuntimeError with the end of what it said."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True, **kwargs
    )  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
