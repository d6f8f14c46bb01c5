"""`headgate destinations`: holds a destination by hand, and enables one that is held or that answered 410."""

import difflib
from collections.abc import Callable
from typing import TypeAlias

import click

from cli.groups import Group
from cli.output import load_settings, output_option, printable, say, show_json, tenant_option, told, vendor_option
from config.hold import Change, enable, hold
from config.plan import CurrentTenant
from config.writer import Writer
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor
from schemas.topics import record_bytes

_Make: TypeAlias = Callable[[TenantRef, CurrentTenant, DestinationId], Change]


@click.group(cls=Group)
def group() -> None:
    """Hold a destination, or enable it again.

    `headgate get destinations` shows which are held, and which are disabled because they answered 410.
    """


@group.command("disable")
@click.argument("destination", metavar="ID")
@tenant_option("Whose destination.", required=True)
@vendor_option
@output_option
@told
def disable_destination(destination: str, tenant: ExternalId, vendor: Vendor, output: str) -> None:
    """Hold a destination: nothing is sent to it until it is enabled.

    \b
      headgate destinations disable --tenant acme orders-hook

    Takes effect in every worker within 2 s; what is in flight ends. Deliveries park (reason `suspended`) without
    costing an attempt, and a later apply does not lift the hold. The time counts towards the destination's max_age:
    what waits longer becomes a dead letter (`expired`).
    """
    _change(TenantRef(vendor, tenant), destination, hold, output)


@group.command("enable")
@click.argument("destination", metavar="ID")
@tenant_option("Whose destination.", required=True)
@vendor_option
@output_option
@told
def enable_destination(destination: str, tenant: ExternalId, vendor: Vendor, output: str) -> None:
    """Enable a destination that is held, or disabled because it answered 410.

    \b
      headgate destinations enable --tenant acme orders-hook

    New deliveries go out within 2 s, parked ones when their wait ends, within 5 min. What a 410 has made a dead letter
    stays one.
    """
    _change(TenantRef(vendor, tenant), destination, enable, output)


def _change(tenant: TenantRef, destination: str, make: _Make, output: str) -> None:
    settings = load_settings(tenant.vendor)
    # Taken before the state is read: an apply that runs meanwhile either is seen here, or notices us (ADR 0007)
    with Writer(settings.kafka.confluent(), settings.topics, tenant.vendor) as writer:
        current = writer.current().tenants.get(tenant.tenant)
        if current is None:
            raise click.ClickException(f"vendor {tenant.vendor} has no tenant {tenant.tenant!r}")
        if current.record.state != "active":
            raise click.ClickException(f"tenant {tenant.tenant!r} is {current.record.state}: it takes no deliveries")
        if destination not in current.destinations:
            raise click.ClickException(_unknown(tenant, destination, sorted(current.destinations)))
        change = make(tenant, current, DestinationId(destination))
        writer.write(change.writes, record_bytes(settings.sizes.max_event_bytes))
    name = printable(f"{tenant.tenant}/{destination}")
    changed = bool(change.writes)
    if output == "json":
        show_json(
            {
                "vendor": tenant.vendor,
                "tenant": tenant.tenant,
                "destination": destination,
                "was": change.was,
                "state": change.now,
                "changed": changed,
            }
        )
    elif change.was == change.now:
        click.echo(f"{'~' if changed else '='} destination {name}: {_is(change)}")
    else:
        click.echo(f"~ destination {name}: {change.was} → {change.now}")
    if change.now == "disabled":
        say("it answered 410, so its deliveries become dead letters until it is enabled or its options change")


def _is(change: Change) -> str:
    held = "held as well, " if change.writes else ""
    return f"{held}{'still' if change.writes else 'already'} {change.now}"


def _unknown(tenant: TenantRef, destination: str, known: list[str]) -> str:
    close = difflib.get_close_matches(destination, known, 1)
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    hint = f"did you mean {close[0]}?" if close else f"it has {shown}" if known else "it has none"
    return f"tenant {tenant.tenant!r} has no destination {destination!r}; {hint}"
