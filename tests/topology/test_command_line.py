"""The command line as a whole: what it offers, and what that costs."""

from __future__ import annotations

import subprocess
import sys

import click

from topology.cli import cli

_HELP = """
import sys
from topology.cli import cli
cli.main(["--help"], standalone_mode=False)
loaded = [name for name in sys.modules if name.startswith(("topology.commands", "topology.bench", "faust"))]
print(*loaded, file=sys.stderr)
"""


def test_help_says_a_line_of_each_command_and_imports_none() -> None:
    """Whoever asks what there is reads it at once, and whole on a terminal of 80 columns."""
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=True)
    said = done.stdout.partition("Commands:\n")[2].splitlines()

    assert [line.split()[0] for line in said] == cli.list_commands(click.Context(cli))
    assert max(map(len, said)) <= 80
    assert not any("..." in line for line in said)
    assert done.stderr.split() == []


def test_each_command_is_where_it_is_said_to_be() -> None:
    """Every name leads to a command of this name, with a help of its own."""
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert (command.name, bool(command.help)) == (name, True)
