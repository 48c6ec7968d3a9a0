"""The command line: `stateferry`, also `python -m topology`.

Exit codes are those of `pipeline.errors`, and stable: 0 done, 1 failed, 2 usage, 3 diverged, 4 gap, 5 corrupt input,
6 wrong chain or generation, 7 fenced, 8 unsupported version, 9 locked, 10 disk full, 11 rewind deeper than finality,
12 not proven, 13 not found. Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

import click

from pipeline.errors import StateferryError, UsageError
from topology.bench.cli import bench
from topology.commands.demo import demo
from topology.commands.frames import frames
from topology.commands.generation import generation_group
from topology.commands.ingest import ingest
from topology.commands.quarantine import quarantine
from topology.commands.restore import restore
from topology.commands.run import run
from topology.commands.store import get, root, scan, snapshot, status, verify

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="stateferry", message="stateferry %(version)s")
def cli() -> None:
    """Ferry chain state from where blocks arrive to where people need it, and prove it at every block.

    Settings come from options, then STATEFERRY_... in the environment, then stateferry.toml. Exit codes: 0 done,
    1 failed, 2 usage, 3 diverged, 4 gap, 5 corrupt input, 6 wrong chain, 7 fenced, 8 unsupported, 9 locked,
    10 disk full, 11 rewind deeper than finality, 12 not proven, 13 not found.
    """


for command in (
    ingest,
    run,
    status,
    get,
    scan,
    root,
    verify,
    snapshot,
    restore,
    frames,
    quarantine,
    generation_group,
    bench,
    demo,
):
    cli.add_command(command)


def main() -> None:
    """Run a command; errors of ours become a sentence on stderr (and a document with --json) and their exit code."""
    try:
        cli.main(standalone_mode=False)
    except StateferryError as error:
        _show(error)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except click.exceptions.Exit as error:
        code = error.exit_code
    else:
        code = 0
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Helper threads of the broker may still wait on a file; nothing of theirs is left to do.
    os._exit(code)


def _show(error: StateferryError) -> None:
    if "--json" in sys.argv[1:]:
        document = {
            "error": error.name,
            "exit_code": error.exit_code,
            "message": error.what,
            "where": error.where,
            "way_out": error.way_out,
        }
        click.echo(json.dumps(document))
    click.echo(f"{error.name}: {error}", err=True)
