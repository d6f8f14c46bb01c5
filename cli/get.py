"""`headgate get`: what the topics hold of tenants, destinations and routes. Shows no secret, and no query of a URL."""

import re
from collections.abc import Iterator
from time import time
from typing import Any, Final

import click
import msgspec

from cli.groups import Group
from cli.output import (
    load_settings,
    output_option,
    say,
    show_json,
    show_table,
    tenant_option,
    told,
    vendor_option,
)
from config.plan import Current, CurrentTenant, is_disabled
from config.writer import read_current
from schemas.control import DestinationRecord
from schemas.event import rfc3339
from schemas.ids import ExternalId, Vendor

_UNSET: Final[tuple[object, ...]] = ([], {}, "", 0.0)
_QUERY: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://[^?#]*)\?.*", re.DOTALL)


@click.group(cls=Group)
def group() -> None:
    """Show tenants, destinations or routes as the workers know them."""


@group.command()
@tenant_option("Only this tenant.")
@vendor_option
@output_option
@told
def tenants(tenant: ExternalId | None, vendor: Vendor, output: str) -> None:
    """Tenants: state, topics, and how many destinations and routes they have."""
    rows = [
        {
            "tenant": name,
            "name": found.record.name,
            "state": found.record.state,
            "slug": found.record.slug,
            "tag": found.record.tag,
            "payloadMode": found.record.payloadMode,
            "configVersion": found.record.configVersion,
            "keyVersion": found.record.keyVersion,
            "destinations": len(found.destinations),
            "routes": len(found.routes),
        }
        for name, found in _chosen(vendor, tenant)
    ]
    _show(rows, output, "tenants", hidden=("payloadMode", "keyVersion"))


@group.command()
@tenant_option("Only those of this tenant.")
@vendor_option
@output_option
@told
def destinations(tenant: ExternalId | None, vendor: Vendor, output: str) -> None:
    """Destinations: where they lead, whether they are held or disabled, which secrets they have."""
    now_ms = int(time() * 1000)
    rows = [
        {
            "tenant": name,
            "id": record.id,
            "type": record.type,
            "state": _state(found, record),
            "options": shown_options(msgspec.json.decode(record.options)),
            "secrets": {
                field: sum(1 for secret in live if not secret.until_ms or secret.until_ms > now_ms)
                for field, live in record.secrets.items()
            },
            "retry": {
                "attempts": len(record.retry.schedule_s),
                "maxAge": _duration(record.retry.max_age_s),
                "also": list(record.retry.also),
            },
            "limits": {"inFlight": record.limits.in_flight, "ratePerS": record.limits.rate_per_s},
            "version": record.version,
        }
        for name, found in _chosen(vendor, tenant)
        for record in sorted(found.destinations.values(), key=lambda record: record.id)
    ]
    _show(rows, output, "destinations")


@group.command()
@tenant_option("Only those of this tenant.")
@vendor_option
@output_option
@told
def routes(tenant: ExternalId | None, vendor: Vendor, output: str) -> None:
    """Routes: which events go to which destinations."""
    rows = [
        {
            "tenant": name,
            "id": record.id,
            "types": list(record.types),
            "where": record.where,
            "to": list(record.to),
            "redact": list(record.redact),
            "version": record.version,
        }
        for name, found in _chosen(vendor, tenant)
        for record in sorted(found.routes.values(), key=lambda record: record.id)
    ]
    _show(rows, output, "routes")


def shown_options(value: Any) -> Any:
    """Options as they may be shown: the query of every URL is `?…`."""
    if isinstance(value, str):
        return _QUERY.sub(r"\1?…", value)
    if isinstance(value, list):
        return [shown_options(each) for each in value]
    if isinstance(value, dict):
        return {name: shown_options(each) for name, each in value.items()}
    return value


def _chosen(vendor: Vendor, tenant: ExternalId | None) -> Iterator[tuple[ExternalId, CurrentTenant]]:
    settings = load_settings(vendor)
    current: Current = read_current(settings.kafka.confluent(), settings.topics, vendor)
    if tenant is not None and tenant not in current.tenants:
        raise click.ClickException(f"vendor {vendor} has no tenant {tenant!r}")
    for name in sorted(current.tenants) if tenant is None else [tenant]:
        yield name, current.tenants[name]


def _state(tenant: CurrentTenant, record: DestinationRecord) -> str:
    disabled = tenant.disabled.get(record.id)
    if disabled is not None and is_disabled(record, disabled):
        return f"disabled since {rfc3339(disabled.at_ms)} (410)"
    return "held" if record.held else "on"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _show(rows: list[dict[str, Any]], output: str, what: str, hidden: tuple[str, ...] = ()) -> None:
    if output == "json":
        show_json(rows)
        return
    if not rows:
        say(f"there are no {what}")
        return
    header = [name for name in rows[0] if name not in hidden]
    show_table([name.upper() for name in header], ([_cell(row[name]) for name in header] for row in rows))


def _cell(value: Any) -> str:
    """A value in a table: what is not set is left out of its group, and `-` where it stands alone."""
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(each)}" for name, each in value.items() if each not in _UNSET) or "-"
    if value in _UNSET:
        return "-"
    if isinstance(value, list):
        return ",".join(_cell(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
