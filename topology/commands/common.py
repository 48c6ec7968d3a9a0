"""What all commands share: options, output, and reaching a store whether a worker owns it or nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from pipeline.errors import NotFound
from pipeline.retention import Rules
from pipeline.shards import stand_together
from pipeline.stores.rocksdb import RocksStore
from topology import control, logs, settings, topics, views
from topology.data_dir import DataDir
from topology.reads import View
from topology.settings import Settings
from topology.transports.base import Broker
from topology.transports.factory import open_broker
from topology.transports.kafka_security import security_of

Command = TypeVar("Command", bound=Callable[..., Any])
Answer = TypeVar("Answer")

console = Console(stderr=True)
"""Progress and words go to stderr; stdout is for results."""

_OPTIONS = (
    click.option("--broker", metavar="URL", help="Where the topics are. [default: embedded:///DATA-DIR/log.sqlite]"),
    click.option("--topic-prefix", metavar="P", help="What the topics' names begin with. [default: nothing]"),
    click.option(
        "--data-dir", type=click.Path(path_type=Path), help="The node's directory. [default: stateferry-data]"
    ),
    click.option(
        "--objects", metavar="URL", help="Where snapshots and archive are. [default: file:///DATA-DIR/objects]"
    ),
    click.option("--chain", metavar="NAME", help="Chain id. [default: what is there, else bitcoin]"),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-v", "--verbose", is_flag=True, help="Log every unit of work on stderr."),
)


def common_options(command: Command) -> Command:
    """The options of every command that touches a node; the command gets `Settings` and `as_json`."""

    @functools.wraps(command)
    def wrapped(*args: Any, verbose: bool, **kwargs: Any) -> Any:
        logs.configure(verbose=verbose)
        given = {name: kwargs.pop(name, None) for name in ("broker", "topic_prefix", "data_dir", "objects", "chain")}
        extra = {name: kwargs.pop(name) for name in _EXTRA if name in kwargs}
        return command(*args, settings=settings.load(**given, **extra), **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


_EXTRA = (
    *("finality", "serve", "require_signature", "trim_keep_blocks"),
    *("keep_last", "keep_days", "keep_heights", "keep_every", "keep_ended_days"),
)
"""Settings that are options of some commands only."""


def rules_options(command: Command) -> Command:
    """The options of every command that must know what is kept."""
    for option in (
        click.option(
            "--keep-ended-days",
            type=click.FloatRange(0),
            metavar="DAYS",
            help="The newest and the base state of a generation, so long after another one took over. [default: 30]",
        ),
        click.option("--keep-every", type=click.IntRange(0), metavar="N", help="One of each run of N blocks."),
        click.option(
            "--keep-height",
            "keep_heights",
            type=int,
            multiple=True,
            callback=lambda *given: list(given[2]) or None,
            help="Those of this height; may be given again.",
        ),
        click.option("--keep-days", type=click.FloatRange(0), metavar="DAYS", help="Those put within so many days."),
        click.option("--keep-last", type=click.IntRange(0), metavar="N", help="The newest N of each generation."),
    ):
        command = option(command)
    return command


def rules_of(given: Settings) -> Rules:
    return Rules(
        last=given.keep_last,
        days=given.keep_days,
        heights=frozenset(given.keep_heights),
        every=given.keep_every,
        ended_days=given.keep_ended_days,
    )


serve_option = click.option(
    "--serve", type=click.Choice(["proven", "claimed"]), help="Answer from a state not proven yet. [default: proven]"
)


signature_option = click.option(
    "--require-signature",
    metavar="PUBKEY",
    help="Restore from no snapshot but those that this Ed25519 key signed: in hex, or a PEM file. [default: any]",
)


def emit(document: Any, *, as_json: bool, text: Callable[[], str] | None = None) -> None:
    """A result: the document as JSON, or for people."""
    if as_json or text is None:
        click.echo(json.dumps(document, indent=None if as_json else 1))
    else:
        click.echo(text())


def rows(document: dict[str, Any]) -> str:
    """A flat document for people: a name and a value a line."""
    width = max(map(len, document))
    return "\n".join(f"{name:<{width}}  {_word(value)}" for name, value in document.items())


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def ask_worker(given: Settings, request: dict[str, Any], *, timeout_s: float = control.ANSWER_S) -> Any:
    """The answer of the worker that owns the data directory; None if there is none."""
    return control.ask(DataDir(given.data_dir).socket_path, request, timeout_s=timeout_s)


def ask_broker(given: Settings, work: Callable[[Broker], Awaitable[Answer]]) -> Answer:
    """What ``work`` answers of the broker, which is open meanwhile."""

    async def main() -> Answer:
        broker = open_broker(given.broker_url, given.topic_prefix, security_of(given))
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(main())


@contextlib.contextmanager
def opened_view(given: Settings) -> Iterator[View]:
    """The data directory's state to read from, at one position. Raises NotFound, Quarantined, WrongChain."""
    with opened_views(given) as views_:
        yield views.join(views_)


@contextlib.contextmanager
def opened_views(given: Settings) -> Iterator[list[View]]:
    """The stores of the data directory, one a shard, at one position if they can be brought there: a worker's copies of
    them, or the stores themselves."""
    data_dir = DataDir(given.data_dir)
    answer = ask_worker(given, {"what": "copy"})
    if answer is not None:
        copies = list(map(Path, answer["paths"]))
    elif not data_dir.has_store:
        raise NotFound(
            "there is no store in this data directory",
            where=str(data_dir.path),
            way_out="`stateferry run` follows a chain into it, `stateferry restore` fills it from a snapshot",
        )
    else:
        data_dir.check_quarantine()
        copies = _copies_if_apart(data_dir)
    try:
        views.bring_together(copies)
        paths = copies or [found.store_path for found in data_dir.shard_dirs]
        with views.opened(paths) as found:
            topics.check_chain(given.chain, found[0].meta.chain_id, str(data_dir.path))
            yield found
    finally:
        views.remove(copies)


def _copies_if_apart(data_dir: DataDir) -> list[Path]:
    """Copies of stores that do not stand together; none if they do, and may be read as they are."""
    if stand_together(views.metas_of([found.store_path for found in data_dir.shard_dirs])):
        return []
    with data_dir:
        return views.copy_closed(data_dir)


@contextlib.contextmanager
def owned_stores(given: Settings) -> Iterator[tuple[DataDir, list[tuple[RocksStore, DataDir]]]]:
    """The data directory and its stores, one a shard, to work on while no worker has them. Raises Locked, NotFound,
    Quarantined."""
    with DataDir(given.data_dir) as data_dir, contextlib.ExitStack() as stack:
        stores = []
        for found in data_dir.shard_dirs or [data_dir]:
            store = found.open_store()
            stack.callback(store.close)
            topics.check_chain(given.chain, views.view_of(store).meta.chain_id, str(data_dir.path))
            stores.append((store, found))
        yield data_dir, stores


def is_terminal() -> bool:
    return sys.stderr.isatty()
