"""`headgate secrets`: a new secret beside the old one, so that no delivery fails while the receiver changes over."""

from time import time
from typing import Any, Final

import click

from cli.groups import Group
from cli.output import (
    load_settings,
    output_option,
    printable,
    say,
    show_json,
    tenant_option,
    tenant_ref,
    told,
    vendor_option,
)
from config.rotation import Rotated, rotate_secrets
from config.settings import Settings, parse_duration_s
from config.vault import MasterKeys
from config.writer import Writer
from connectors.registry import KINDS
from schemas.event import rfc3339
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor
from schemas.topics import record_bytes

LONGEST_OVERLAP_S: Final = 30 * 86_400.0


class _Overlap(click.ParamType):
    """A duration, in milliseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            seconds = parse_duration_s(str(value))
        except ValueError as fault:
            self.fail(f"{value!r}: {fault}", param, ctx)
        if seconds > LONGEST_OVERLAP_S:
            self.fail(f"{value!r}: an old secret counts 30d at most", param, ctx)
        return int(seconds * 1000)


@click.group(cls=Group)
def group() -> None:
    """Rotate the signing secret of a destination."""


@group.command()
@tenant_option("Whose destination.", required=True)
@click.option("--destination", metavar="ID", required=True, help="Whose secret.")
@click.option(
    "--overlap",
    "overlap_ms",
    type=_Overlap(),
    default="24h",
    show_default=True,
    metavar="TIME",
    help="How long the old secret goes on signing too; 0s ends it at once.",
)
@vendor_option
@output_option
@told
def rotate(tenant: ExternalId, destination: str, overlap_ms: int, vendor: Vendor, output: str) -> None:
    """Make a new signing secret, and show it this once.

    \b
      headgate secrets rotate --tenant acme --destination orders-hook
      headgate secrets rotate --tenant acme --destination orders-hook --overlap 0s    the old one is known to others

    During the overlap every request carries both signatures, the new one first: the receiver can change over at any
    time. After it only the new one signs. Where the output was lost, rotate again: what signed so far goes on to the
    end of its overlap.

    A secret that the configuration file gives must be changed there too, or the next apply brings it back.
    """
    owner = tenant_ref(vendor, tenant)
    rotated = rotate_destination(load_settings(vendor), owner, DestinationId(destination), overlap_ms)
    if output == "json":
        show_json(
            {
                "vendor": vendor,
                "tenant": tenant,
                "destination": destination,
                "overlapUntil": rfc3339(rotated.until_ms) if rotated.until_ms else "",
                "secrets": [{"field": each.field, "value": each.value.get_secret_value()} for each in rotated.made],
            }
        )
    else:
        for each in rotated.made:
            click.echo(f"{printable(tenant)}/{destination}/{each.field}: {each.value.get_secret_value()}")
    if rotated.until_ms:
        say(f"the old secret signs too until {rfc3339(rotated.until_ms)}; the new one is shown this once")
    else:
        say("the old secret signs no more; the new one is shown this once")


def rotate_destination(settings: Settings, owner: TenantRef, destination: DestinationId, overlap_ms: int) -> Rotated:
    """On return every process that reads the topics can see it. Raises Refusal, SettingsError, KafkaFault, Fenced."""
    master = MasterKeys.load(settings.keys)
    with Writer(settings.kafka.confluent(), settings.topics, owner.vendor, "headgate secrets rotate") as writer:
        rotated = rotate_secrets(
            owner,
            destination,
            writer.current(),
            kinds=KINDS,
            master=master,
            overlap_ms=overlap_ms,
            now_ms=int(time() * 1000),
        )
        writer.write(rotated.writes, record_bytes(settings.sizes.max_event_bytes))
    return rotated
