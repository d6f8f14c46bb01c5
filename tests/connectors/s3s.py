"""S3 connectors that point at a test's far side, and batches for them."""

from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from connectors.contract import Batch, Span
from connectors.egress import Egress
from connectors.s3.connector import S3Connector, connect
from connectors.s3.options import Options, Secrets
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome
from tests.connectors.post import ACME

LAKE = DestinationId("lake")
AT = "2026-11-21T09:30:00Z"
AT_MS = 1_795_512_600_000


def sink(
    egress: Egress,
    options: Mapping[str, Any],
    secrets: Mapping[str, Any],
    *,
    tenant: TenantRef = ACME,
    destination: DestinationId = LAKE,
    **more: Any,
) -> S3Connector:
    """`more` are options that differ."""
    told = Options.model_validate({**options, "timeout": "10s", **more})
    return connect(tenant, destination, told, Secrets.model_validate(secrets), egress)


def delivery(
    number: int = 1,
    payload: bytes = b'{"total":12}',
    *,
    event_type: str = "invoice.paid",
    at: str = AT,
    tenant: TenantRef = ACME,
    **fields: Any,
) -> Delivery:
    event = Event(
        eventType=event_type,
        payload=Raw(payload),
        eventId=f"evt_{number}",
        occurredAt=at,
        customerExternalId=tenant.tenant,
        **fields,
    )
    return Delivery(tenant, LAKE, DeliveryId(f"dlv_{number:026}"), event, f"t/0/{number}", AT_MS, len(payload) + 200)


def batch(
    *deliveries: Delivery,
    first: int = 40,
    partition: int = 2,
    log: str = "cluster/topic",
    tenant: TenantRef = ACME,
    destination: DestinationId = LAKE,
) -> Batch:
    span = Span(log, partition, first, first + len(deliveries) - 1)
    return Batch(tenant, destination, AT_MS, span, deliveries)


async def deliver(connector: S3Connector, *deliveries: Delivery, **of: Any) -> list[Outcome]:
    """The outcomes, in the order of the deliveries."""
    outcomes = await connector.deliver(batch(*deliveries, **of))
    assert set(outcomes) == {one.id for one in deliveries}
    return [outcomes[one.id] for one in deliveries]
