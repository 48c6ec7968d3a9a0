"""`stateferry topics acls`: what to grant on a broker with ACLs."""

from __future__ import annotations

import click

from topology import acls
from topology.commands.common import common_options, emit
from topology.settings import Settings
from topology.transports.kafka_address import addresses, is_kafka, shown


@click.command("acls")
@click.option("--role", type=click.Choice(list(acls.ROLES)), required=True)
@click.option("--principal", metavar="USER", required=True, help="Whom to grant it: User:name, as the broker sees it.")
@common_options
def acls_command(settings: Settings, role: str, principal: str, as_json: bool) -> None:
    """Print the kafka-acls.sh lines that let a role work, and do no more. Nothing is asked of the broker.

    Roles: the operator makes topics and new generations, a source ingests, workers are primary or replica. Where there
    are several shards, grant a primary both its own role and that of a splitter. Who trims topics, by hand or as a
    primary, is a trimmer, too.
    """
    bootstrap = shown(addresses(settings.broker)) if is_kafka(settings.broker) else "HOST:PORT"
    grants = acls.grants_of(role, settings.topic_prefix)
    document = [grant._asdict() for grant in grants]
    lines = (grant.command(principal, bootstrap) for grant in grants)
    emit(document, as_json=as_json, text=lambda: "\n".join(lines))
