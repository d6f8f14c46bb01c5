"""Which letters a `dlq` command is about: the options that choose them, and whose they are.

A topic of a pool holds the letters of several tenants: only those whose headers name the tenant are looked at, and the
tenant's own key is the only one that opens them.
"""

import functools
import shlex
from collections.abc import Callable
from typing import Any, Final

import click
import msgspec
from msgspec import Struct

from cli.output import Moment, tenant_option, vendor_option
from config.plan import CurrentTenant
from config.settings import Settings
from config.vault import MasterKeys, Unsealable, Vault
from config.writer import read_current
from schemas.dead_letter import Selectors
from schemas.event import rfc3339
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef, Vendor, digest, parts

unrouted_option = click.option(
    "--unrouted", is_flag=True, help="Instead of a tenant's: records that were no event, or of no tenant."
)

_SELECTORS: Final = (
    tenant_option("Whose letters."),
    vendor_option,
    unrouted_option,
    click.option("--destination", metavar="ID", help="Only those for this destination."),
    click.option("--error", metavar="CODE", help="Only those that ended with this code."),
    click.option("--since", type=Moment(), metavar="TIME", help="Not older: 2h (ago), or 2026-11-21T09:30:00Z."),
    click.option("--until", type=Moment(), metavar="TIME", help="Not newer."),
    click.option("--key", metavar="KEY", help="With --unrouted: only those with this record key."),
)


class Which(Struct, frozen=True):
    """The letters that a command line names. `owner` None: those of `dlq.unrouted`."""

    vendor: Vendor
    owner: TenantRef | None
    chosen: Selectors

    def of_whom(self) -> str:
        return f"of tenant {self.owner.tenant!r}" if self.owner is not None else "of dlq.unrouted"

    def hash(self) -> str:
        """8 hexadecimal digits: the same for the same letters, whenever they are named."""
        tenant = "" if self.owner is None else self.owner.tenant
        return digest(parts(self.vendor, tenant, msgspec.json.encode(self.chosen).decode()))[:4].hex()

    def spelled(self) -> str:
        """The options that name these letters at any time: `2h` was when they were first named."""
        chosen = self.chosen
        times = {"since": chosen.since_ms, "until": chosen.until_ms}
        given = {
            "tenant": None if self.owner is None else self.owner.tenant,
            "vendor": None if self.vendor == DEFAULT_VENDOR else self.vendor,
            "destination": chosen.destination,
            "error": chosen.error,
            **{name: None if at_ms is None else rfc3339(at_ms) for name, at_ms in times.items()},
            "key": chosen.key,
        }
        named = [f"--{name} {shlex.quote(text)}" for name, text in given.items() if text is not None]
        return " ".join(["--unrouted"] * (self.owner is None) + named)


def selectors(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that choose letters, as one parameter `which`."""

    @functools.wraps(command)
    def wrapped(
        *,
        tenant: ExternalId | None,
        vendor: Vendor,
        unrouted: bool,
        destination: str | None,
        error: str | None,
        since: int | None,
        until: int | None,
        key: str | None,
        **more: Any,
    ) -> None:
        owner = owner_of(vendor, tenant, unrouted)
        if unrouted and destination is not None:
            raise click.UsageError("--destination goes with --tenant")
        if key is not None and not unrouted:
            raise click.UsageError("--key goes with --unrouted")
        if since is not None and until is not None and since > until:
            raise click.UsageError("--since is later than --until: no letter is of both times")
        command(which=Which(vendor, owner, Selectors(destination, error, since, until, key)), **more)

    chosen: Callable[..., None] = wrapped
    for option in reversed(_SELECTORS):
        chosen = option(chosen)
    return chosen


def owner_of(vendor: Vendor, tenant: ExternalId | None, unrouted: bool) -> TenantRef | None:
    """Whose letters are meant; None for unrouted ones."""
    if unrouted == (tenant is not None):
        raise click.UsageError("name a tenant with --tenant, or give --unrouted")
    return None if tenant is None else TenantRef(vendor, tenant)


def current_tenant(settings: Settings, tenant: TenantRef) -> CurrentTenant:
    found = read_current(settings.kafka.confluent(), settings.topics, tenant.vendor).tenants.get(tenant.tenant)
    if found is None:
        raise click.ClickException(f"vendor {tenant.vendor} has no tenant {tenant.tenant!r}")
    return found


def topic_of(settings: Settings, vendor: Vendor, owner: TenantRef | None) -> str:
    """The topic in which the letters lie."""
    if owner is None:
        return settings.topics.unrouted(vendor)
    return settings.topics.dead_letters(vendor, Tag(current_tenant(settings, owner).record.tag))


def vault_of(settings: Settings, tenant: TenantRef, current: CurrentTenant) -> Vault:
    """The keys of this tenant alone."""
    master = MasterKeys.load(settings.keys)
    try:
        keys = {version: master.unwrap(tenant, key) for version, key in current.keys.items()}
    except Unsealable as fault:
        raise click.ClickException(f"the letters do not open: {WHY_SEALED[fault.code]}") from None
    return Vault(tenant, keys, current.record.keyVersion, current.shredded_through)


WHY_SEALED: Final = {
    "unknown_key": "its key is not in the keys topic",
    "shredded": "its key was shredded",
    "unknown_master": "its key is wrapped by a master key that is not given; see HEADGATE_MASTER_KEY_FILE",
    "unsealable": "it was not sealed for this tenant, destination and delivery",
}
