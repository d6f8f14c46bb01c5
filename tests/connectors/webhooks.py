"""Webhook connectors that point at a test's receiver, and deliveries for them."""

from collections.abc import Mapping, Set
from typing import Any

from msgspec import Raw

from connectors.contract import Batch
from connectors.egress import Egress
from connectors.webhook.connector import WebhookConnector, connect
from connectors.webhook.options import Options, Secrets
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId
from schemas.outcome import Outcome
from tests.connectors.post import ACME

HOOK = DestinationId("hook")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
AT_MS = 1_790_000_000_000


def hook(
    egress: Egress, url: str, secrets: Mapping[str, Any] | None = None, retry_also: Set[int] = frozenset()
) -> WebhookConnector:
    given = {"signing": SECRET} if secrets is None else secrets
    options = Options(url=url, timeout="5s")
    return connect(ACME, HOOK, options, Secrets.model_validate(given), egress, retry_also)


def delivery(number: int = 1, payload: bytes = b"{}", *, attempt: int = 0, metadata: bytes = b"{}") -> Delivery:
    event = Event(
        eventType="invoice.paid",
        payload=Raw(payload),
        eventId=f"evt_{number}",
        occurredAt="2026-11-21T09:30:00Z",
        metadata=Raw(metadata),
    )
    return Delivery(ACME, HOOK, DeliveryId(f"dlv_{number:026}"), event, "t/0/0", 0, 0, attempt=attempt)


async def deliver(connector: WebhookConnector, one: Delivery, at_ms: int = AT_MS) -> Outcome:
    outcomes = await connector.deliver(Batch(ACME, HOOK, at_ms, None, (one,)))
    return outcomes[one.id]
