"""`headgate acls`: what each kind of user may do in Kafka, printed for Kafka's own tool, or given."""

import click

from cli.output import load_settings, output_option, printable, say, show_json, told, vendor_of
from config.acls import ROLES, Role, acls_of, kafka_acls
from config.rights import Granted, grant
from schemas.ids import Vendor


def _principal(_context: click.Context, _option: click.Parameter, value: str) -> str:
    kind, colon, name = value.partition(":")
    if not colon or not kind.isalnum() or not name or not name.isprintable():
        raise click.BadParameter(f"{value!r} is no principal; write User:NAME, as Kafka does")
    if name == "*":
        raise click.BadParameter("'*' is everybody; name one user")
    return value


@click.command()
@click.option("--role", type=click.Choice(ROLES), required=True, help="What the user does; see above.")
@click.option(
    "--principal", metavar="USER", required=True, callback=_principal, help="The user, as Kafka names it: User:NAME."
)
@click.option("--vendor", callback=vendor_of, metavar="VENDOR", help="Only this one's topics; without: all vendors'.")
@click.option("--apply", "give", is_flag=True, help="Give the rights, as an administrator of Kafka.")
@output_option
@told
def command(role: Role, principal: str, vendor: Vendor | None, give: bool, output: str) -> None:
    """Print the ACLs of a Kafka user, or give it these rights.

    \b
      headgate acls --role worker --principal User:worker            as lines for kafka-acls.sh
      headgate acls --role worker --principal User:worker --apply    gives what is missing

    \b
    worker     headgate worker
    producer   who writes events of one vendor: headgate publish, your services
    operator   headgate get, trace, dlq, doctor
    control    headgate apply, secrets, keys, destinations

    They are the least: control and keys are written by `control` alone, a producer reads nothing. A user that has
    several roles gets each of them. --apply connects with the settings that are set, which must be those of a user that
    may alter the cluster; it adds what is missing, takes nothing away, and names what the user has beside it.
    """
    settings = load_settings(vendor)
    if vendor is None and role == "producer" and len(settings.vendors) > 1:
        raise click.UsageError(f"a producer is of one vendor; name it with --vendor ({', '.join(settings.vendors)})")
    needed = acls_of(role, settings.topics, (vendor,) if vendor is not None else settings.vendors)
    granted: Granted | None = None
    if give:
        granted = grant(settings.kafka.confluent(), principal, needed, settings.topics.prefix)
    if output == "json":
        show_json(
            {
                "role": role,
                "principal": principal,
                "acls": needed,
                "applied": granted is not None,
                "added": granted.added if granted is not None else (),
                "others": granted.others if granted is not None else (),
            }
        )
    elif granted is None:
        for line in kafka_acls(needed, principal, settings.kafka.bootstrap):
            click.echo(line)
    else:
        for acl in granted.added:
            click.echo(printable(f"+ {principal}: {acl}"))
    if granted is None:
        return
    say(f"{len(granted.added)} added, {len(needed) - len(granted.added)} were there")
    if granted.others:
        say(f"{printable(principal)} has more than this role needs; where it has no other role, take that away:")
        for line in kafka_acls(granted.others, principal, settings.kafka.bootstrap, "remove"):
            say(printable(line))
