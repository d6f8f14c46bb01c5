"""A plausible stream of a SaaS product's events, for the tenants of config.yaml."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from dev.demo.places import TENANTS

_NAMES: Final = ("Ada Byron", "Béla Kovács", "Chidi Obi", "Dana Weiß", "Emi Sato", "Farid Ali", "Greta Lind", "Hồ Anh")
_CARRIERS: Final = ("DHL", "Swiss Post", "UPS", "GLS")
_COUNTRIES: Final = ("CH", "DE", "US", "JP", "BR")
_PLANS: Final = ("starter", "team", "business")
_REASONS: Final = ("card_expired", "insufficient_funds", "do_not_honor")
_SKUS: Final = ("A-100", "B-200", "C-300", "D-400")
_TYPES: Final = {
    "user.created": 3,
    "user.deleted": 1,
    "order.placed": 4,
    "order.shipped": 3,
    "invoice.paid": 4,
    "invoice.payment_failed": 1,
    "subscription.renewed": 2,
}


class DemoEvent(Struct, frozen=True):
    """One event as it is published: the record's key is `tenant`, its value `value`."""

    id: str
    tenant: str
    type: str
    payload: dict[str, Any]
    value: bytes


def stream(run: str, seed: int) -> Iterator[DemoEvent]:
    """Events without end. The same seed gives the same ones, but for their times; `run` makes their ids unique."""
    dice = random.Random(seed)
    number = 0
    while True:
        number += 1
        tenant = dice.choice(TENANTS)
        event_type = dice.choices(tuple(_TYPES), tuple(_TYPES.values()))[0]
        aggregate, written = _payload(dice, event_type)
        payload = msgspec.json.encode(written)
        event_id = f"evt_{run}_{number:06d}"
        user = f"usr_{dice.randrange(1000)}"
        value = {
            "eventId": event_id,
            "eventType": event_type,
            "occurredAt": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "payload": Raw(payload),
            "customerExternalId": tenant,
            "source": event_type.partition(".")[0],
            "aggregateId": aggregate,
            "metadata": {"userId": user, "correlationId": f"req_{dice.getrandbits(48):012x}"},
        }
        yield DemoEvent(event_id, tenant, event_type, msgspec.json.decode(payload), msgspec.json.encode(value))


def _payload(dice: random.Random, event_type: str) -> tuple[str, dict[str, Any]]:
    """The thing that the event is about, and what happened to it."""
    number = dice.randrange(1, 10_000)
    match event_type.partition(".")[0]:
        case "user":
            name = dice.choice(_NAMES)
            return f"usr_{number}", {
                "user": {"id": f"usr_{number}", "name": name, "email": f"user{number}@example.com"},
                "country": dice.choice(_COUNTRIES),
                "plan": dice.choice(_PLANS),
            }
        case "order":
            lines: list[dict[str, Any]] = [
                {"sku": dice.choice(_SKUS), "quantity": dice.randint(1, 5), "price": dice.randint(5, 120)}
                for _ in range(dice.randint(1, 4))
            ]
            order: dict[str, Any] = {
                "number": f"ORD-{number:05d}",
                "country": dice.choice(_COUNTRIES),
                "currency": "EUR",
                "lines": lines,
                "total": sum(line["quantity"] * line["price"] for line in lines),
            }
            if event_type == "order.shipped":
                order["shipment"] = {"carrier": dice.choice(_CARRIERS), "tracking": f"{dice.getrandbits(40):010X}"}
            return f"ord_{number}", order
        case "invoice":
            invoice: dict[str, Any] = {
                "number": f"INV-{number:05d}",
                "country": dice.choice(_COUNTRIES),
                "currency": "CHF",
                "total": round(dice.lognormvariate(4.5, 1.0), 2),
                # what a floating-point number would lose: a zero at the end, and digits beyond the seventeenth
                "taxRate": Raw(b"8.10"),
                "exchangeRate": Raw(b"1.0%016d10" % number),
                "card": {"brand": "visa", "number": f"4242 4242 4242 {number % 10_000:04d}"},
            }
            if event_type == "invoice.payment_failed":
                invoice["reason"] = dice.choice(_REASONS)
            return f"inv_{number}", invoice
        case _:
            return f"sub_{number}", {
                "plan": dice.choice(_PLANS),
                "seats": dice.randint(1, 50),
                "renewsAt": f"2027-{dice.randint(1, 12):02d}-01",
            }
