"""Builds the one compiled part, the inner loop of LtHash. All else that is to be said of the package is in
pyproject.toml.

A C compiler is among what the build requires, so that a machine needs none; where there is none for it, and where
compiling fails, the package is complete without that part, and slower.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCE = Path("pipeline/commitment/lattice.c")
IS_BUILT = sys.platform == "linux" and platform.machine() == "x86_64"
# For any x86-64, any C library: what needs more than that says so, function by function, and asks before it runs.
FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC", "-nostdlib", "-s"]


def compiler() -> list[str] | None:
    if importlib.util.find_spec("ziglang"):
        # It would build for the very processor that it runs on, and with traps for what C leaves undefined.
        return [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu", "-fno-sanitize=all"]
    found = shutil.which("cc")
    return [found] if found else None


class BuildLattice(build_py):
    def run(self) -> None:
        super().run()
        command = compiler() if IS_BUILT else None
        if command is None:
            self.warn(f"no compiler: {SOURCE} is left out, and hashing takes longer")
            return
        target = (Path() if self.editable_mode else Path(self.build_lib)) / SOURCE.with_suffix(".so")
        new = target.with_suffix(".so.new")  # what a process has mapped is replaced, never written into
        try:
            subprocess.run([*command, *FLAGS, "-o", str(new), str(SOURCE)], check=True)
            new.replace(target)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"{SOURCE} is left out, and hashing takes longer: {error}")


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of this platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not IS_BUILT

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return ("py3", "none", machine) if IS_BUILT else (python, abi, machine)


setup(cmdclass={"build_py": BuildLattice, "bdist_wheel": PlatformWheel})
