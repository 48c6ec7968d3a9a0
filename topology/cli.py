"""The command line: `stateferry`, also `python -m topology`.

Exit codes are those of `pipeline.errors`, and stable: 0 done, 1 failed, 2 usage, 3 diverged, 4 gap, 5 corrupt input,
6 wrong chain or generation, 7 fenced, 8 unsupported version, 9 locked, 10 disk full, 11 rewind deeper than finality,
12 not proven, 13 not found, 14 broker unavailable, 15 access denied, 16 object store unavailable,
17 different. Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys

import click

from pipeline.errors import StateferryError, UsageError, disk_full

_COMMANDS = {
    "ingest": ("topology.commands.ingest:ingest", "Publish blocks, and rewinds where the branch changes"),
    "run": ("topology.commands.run:run", "Follow a chain, as its primary or as a replica"),
    "status": ("topology.commands.store:status", "Where this node stands, its lag, proof and buffers"),
    "get": ("topology.commands.store:get", "Values of keys, with the position they are read at"),
    "scan": ("topology.commands.store:scan", "A page of keys and values, all at one position"),
    "root": ("topology.commands.store:root", "The root at the store's position, and its MuHash"),
    "verify": ("topology.commands.verify:verify", "Audit the store and the object store"),
    "compare": ("topology.commands.compare:compare", "Where two states or histories begin to differ"),
    "trace": ("topology.commands.trace:trace", "Where a key's values came from, what a block did"),
    "snapshot": ("topology.commands.store:snapshot", "Publish the state at a final height"),
    "restore": ("topology.commands.restore:restore", "Fill a data directory from the object store"),
    "gc": ("topology.commands.retention:gc", "Delete snapshots that no rule keeps"),
    "prove-restorable": ("topology.commands.retention:prove_restorable", "How each promised height restores"),
    "drill": ("topology.commands.drill:drill", "Rehearse the loss of broker and disks"),
    "frame": ("topology.commands.frames:frames", "Look into archived frames, without a broker"),
    "archive": ("topology.commands.archive:archive_group", "Work on archived blocks, without a worker"),
    "quarantine": ("topology.commands.quarantine:quarantine", "The evidence of a quarantine, and the way out"),
    "generation": ("topology.commands.generation:generation_group", "Show a chain's generation, begin a new one"),
    "topics": ("topology.commands.topics:topics_group", "Make, check and trim a chain's topics"),
    "bench": ("topology.bench.cli:bench", "Measure this machine"),
    "demo": ("topology.commands.demo:demo", "See all of it on real blocks, in a minute"),
}
"""Where each is, imported when it is asked for: Faust and the benches are half of a second that most do not need. And
what `--help` says of it, which imports none of them."""
_INTERRUPTED = 130
_TERMINATED = 143


class _Commands(click.Group):
    """A group that imports the command that runs, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        assert command.name == cmd_name, (command.name, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="stateferry", message="stateferry %(version)s")
def cli() -> None:
    """Ferry chain state from where blocks arrive to where people need it, and prove it at every block.

    Settings come from options, then STATEFERRY_... in the environment, then stateferry.toml. Exit codes: 0 done,
    1 failed, 2 usage, 3 diverged, 4 gap, 5 corrupt input, 6 wrong chain, 7 fenced, 8 unsupported, 9 locked,
    10 disk full, 11 rewind deeper than finality, 12 not proven, 13 not found, 14 broker unavailable,
    15 access denied, 16 object store unavailable, 17 different.
    """


def main() -> None:
    """Run a command; errors of ours become a sentence on stderr (and a document with --json) and their exit code."""
    # The kernel has no default for the first process of a container. `run` puts an orderly end in this place.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_TERMINATED))
    try:
        result = cli.main(standalone_mode=False)
        code = result if isinstance(result, int) else 0  # what `Exit` carried
    except StateferryError as error:
        _show(error)
        code = error.exit_code
    except OSError as error:
        full = disk_full(error)
        if full is None:
            raise
        _show(full)
        code = full.exit_code
    except click.ClickException as error:
        error.show()
        code = UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Helper threads of the broker may still wait on a file; nothing of theirs is left to do.
    os._exit(code)


def _show(error: StateferryError) -> None:
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps(error.document))
    click.echo(f"{error.name}: {error}", err=True)
