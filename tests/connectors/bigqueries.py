"""What the tests of BigQuery destinations share: deliveries, a pipeline's memory of a batch, a connector."""

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from connectors.bigquery.connector import connect
from connectors.bigquery.options import Options, Secrets
from connectors.bigquery.writer import BigQueryConnector
from connectors.contract import Batch, NotOwned, Span
from connectors.egress import Egress
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from schemas.outcome import Outcome
from tests.bigquery_proxy import BigQueryProxy
from tests.contract.farsides.bigquery import BigQueryFarSide

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
SINK = DestinationId("sink")
POISON = b"poison"


def delivery(number: int, kind: str = "invoice.paid", text: str = "") -> Delivery:
    payload = Raw(b'{"n":%d,"text":"%b"}' % (number, (text or "x" * 60).encode()))
    event = Event(kind, payload, f"evt_{number}", "2026-11-21T09:30:00Z", "acme", idempotencyKey=f"evt_{number}")
    return Delivery(ACME, SINK, DeliveryId(f"dlv_{number:026}"), event, f"t/0/{number}", 1_790_000_000_000, 1024)


def poisoned(number: int) -> Delivery:
    return delivery(number, text=POISON.decode())


class Kept:
    """What the log keeps of a batch, and who owns it."""

    def __init__(self) -> None:
        self.noted = b""
        self.owner = 0
        self.times = 0

    def batch(self, *deliveries: Delivery) -> Batch:
        owner = self.owner

        async def note(noted: bytes) -> None:
            await asyncio.sleep(0)
            if owner != self.owner:
                raise NotOwned
            self.noted = noted
            self.times += 1
            await asyncio.sleep(0)

        return Batch(ACME, SINK, 0, Span("cluster/topic", 0, 0, len(deliveries) - 1), deliveries, self.noted, note)


def connected(far: BigQueryFarSide, **options: Any) -> BigQueryConnector:
    values = {**far.options(), "timeout": "10s", **options}
    egress = Egress(bigquery=far.bigquery)
    return connect(ACME, SINK, Options.model_validate(values), Secrets(**far.secrets()), egress)


async def until_settled(
    far: BigQueryFarSide, kept: Kept, *deliveries: Delivery, by: BigQueryConnector | None = None
) -> Mapping[DeliveryId, Outcome]:
    """Delivers until nothing is to be tried again: as another worker would, or `by` a connector that goes on."""
    connector = by or connected(far)
    for _ in range(6):
        ends = await connector.deliver(kept.batch(*deliveries))
        if all(end.verdict != "retry" for end in ends.values()):
            break
    else:
        raise AssertionError(ends)
    await connector.close()
    return ends


def held(proxy: BigQueryProxy, table: str = "events") -> list[str]:
    return [str(ident) for (ident,) in proxy.rows("delivery_id", table)]
