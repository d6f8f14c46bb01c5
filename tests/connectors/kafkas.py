"""Kafka connectors that point at a test's far side, and deliveries for them."""

import time
from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from connectors.contract import Batch
from connectors.egress import Egress
from connectors.kafka.connector import KafkaConnector, connect
from connectors.kafka.options import Options, Secrets
from routing.filters import compile_text
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome
from tests.connectors.post import ACME

SINK = DestinationId("sink")


def sink(
    egress: Egress, options: Mapping[str, Any], secrets: Mapping[str, Any], *, tenant: TenantRef = ACME, **more: Any
) -> KafkaConnector:
    """`more` are options that differ."""
    told = Options.model_validate({**options, "timeout": "10s", **more})
    expressions = {name: compile_text(text).text for name, text in told.expressions.items()}
    return connect(tenant, SINK, told, Secrets.model_validate(secrets), egress, frozenset(), expressions)


def delivery(number: int = 1, payload: bytes = b'{"total":12}', **fields: Any) -> Delivery:
    event = Event(
        eventType="invoice.paid",
        payload=Raw(payload),
        eventId=f"evt_{number}",
        occurredAt="2026-11-21T09:30:00Z",
        customerExternalId="acme",
        **fields,
    )
    return Delivery(ACME, SINK, DeliveryId(f"dlv_{number:026}"), event, "t/0/0", 0, 0)


async def deliver(connector: KafkaConnector, *deliveries: Delivery) -> list[Outcome]:
    """The outcomes, in the order of the deliveries."""
    outcomes = await connector.deliver(Batch(ACME, SINK, int(time.time() * 1000), None, deliveries))
    return [outcomes[one.id] for one in deliveries]
