"""Runs connectors, and is where what they do not know ends: an unexpected error becomes a `platform` outcome.

One of the two places that catch everything (the other is the poison guard of `streams/ingress.py`). A connector's bug
costs its own delivery a retry, bounded by age, and nobody else anything.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from connectors.contract import Batch, Connector, Direct, NotOwned, place_of
from schemas.delivery import Delivery
from schemas.ids import DeliveryId
from schemas.outcome import Outcome, retry

log = structlog.get_logger()

Done = Callable[[Outcome], None]


NOT_CONNECTED: Final = retry("platform", "connector_error", "an error on our side; we have been told")


def _bug(delivery: Delivery, fault: Exception) -> Outcome:
    log.error(
        "connector_bug",
        vendor=delivery.tenant.vendor,
        destination=delivery.destination,
        delivery=delivery.id,
        fault=type(fault).__name__,
        place=place_of(fault),
    )
    return NOT_CONNECTED


def connected(delivery: Delivery, connect: Callable[[], Connector]) -> Connector | None:
    """A connector of the delivery's destination; None where it cannot be made: then `NOT_CONNECTED` is the outcome."""
    try:
        return connect()
    except Exception as fault:
        _bug(delivery, fault)
        return None


def start_direct(connector: Direct, delivery: Delivery, at_ms: int, done: Done) -> None:
    """Begins one attempt without a task. `done` comes later, from the event loop."""
    try:
        connector.start(delivery, at_ms, done)
    except Exception as fault:
        asyncio.get_running_loop().call_soon(done, _bug(delivery, fault))


async def deliver(connector: Connector, batch: Batch) -> dict[DeliveryId, Outcome]:
    """Exactly one outcome for each delivery of the batch, whatever the connector does."""
    try:
        async with asyncio.timeout(connector.batching.timeout_s):
            outcomes = await connector.deliver(batch)
    except TimeoutError:
        late = retry("destination", "timeout", f"no answer within {connector.batching.timeout_s:g} s")
        return {delivery.id: late for delivery in batch.deliveries}
    except NotOwned:
        return {delivery.id: NOT_CONNECTED for delivery in batch.deliveries}
    except Exception as fault:
        bug = _bug(batch.deliveries[0], fault)
        return {delivery.id: bug for delivery in batch.deliveries}
    missing = retry("platform", "connector_error", "the connector named no outcome")
    return {delivery.id: outcomes.get(delivery.id, missing) for delivery in batch.deliveries}
