"""The records of `headgate.<vendor>.attempts`: what was routed, and how each attempt ended (design, section 5)."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from schemas.ids import TenantRef


class RouteVerdict(Struct, gc=False, omit_defaults=True):
    """What one route made of an event. `why` is `type`, `where` or the expression's error; empty if it matched."""

    route: str
    matched: bool
    why: str = ""


class EventRecord(Struct, gc=False, omit_defaults=True, tag_field="kind", tag="event"):
    """Written once per routed event. `sealed` holds the canonical event, redacted as its deliveries were.

    `deliveries` maps each destination that the event goes to onto its delivery's id. Times are RFC 3339, UTC.
    """

    id: str
    vendor: str
    tenant: str
    eventId: str
    eventType: str
    at: str
    origin: str
    worker: str
    correlationId: str = ""
    configVersion: int = 0
    routes: Sequence[RouteVerdict] = ()
    deliveries: dict[str, str] = {}
    sealed: bytes | None = None


class AttemptRecord(Struct, gc=False, omit_defaults=True, tag_field="kind", tag="attempt"):
    """How one attempt, or the lack of one, ended.

    An attempt of a batch is one record (several where it is large) that lists its `deliveries` (`listed`); `delivery`
    is then the batch's id, `bat_…`, and `eventId` and `eventType` are empty.

    `route` names the routes that led here, comma-separated, on the first attempt. `attempt` counts from 1. `code` is
    the outcome's code (`recovered`: the ledger knew the delivery as done). `nextAt` is set where another one follows.
    `sealed` holds the `SealedAnswer`.
    """

    id: str
    vendor: str
    tenant: str
    eventId: str
    eventType: str
    delivery: str
    destination: str
    destinationType: str
    attempt: int
    trigger: str
    at: str
    durationMs: float
    verdict: str
    code: str
    origin: str
    worker: str
    route: str = ""
    fault: str = ""
    status: int = 0
    nextAt: str = ""
    correlationId: str = ""
    configVersion: int = 0
    receipt: str = ""
    sealed: bytes | None = None
    deliveries: Sequence[str] = ()


class SealedAnswer(Struct, gc=False, omit_defaults=True):
    """What only the tenant may read of an attempt: the start of the far side's answer, and our words on it."""

    excerpt: bytes = b""
    detail: str = ""


def listed(delivery: str, replay: str) -> str:
    """A delivery among those of a batch: its id, and after a slash the replay job that it is of."""
    return f"{delivery}/{replay}" if replay else delivery


def attempt_aad_item(delivery: str, attempt: int) -> str:
    return f"{delivery}/{attempt}"


PURPOSE_DELIVERY = "delivery"
PURPOSE_ATTEMPT = "attempt"
PURPOSE_EVENT = "event"
PURPOSE_SECRET = "secret"

encode_record = msgspec.json.Encoder().encode
decode_record = msgspec.json.Decoder(EventRecord | AttemptRecord).decode
encode_answer = msgspec.json.Encoder().encode
decode_answer = msgspec.json.Decoder(SealedAnswer).decode

__all__ = [
    "PURPOSE_ATTEMPT",
    "PURPOSE_DELIVERY",
    "PURPOSE_EVENT",
    "PURPOSE_SECRET",
    "AttemptRecord",
    "EventRecord",
    "RouteVerdict",
    "SealedAnswer",
    "TenantRef",
    "attempt_aad_item",
    "decode_answer",
    "decode_record",
    "encode_answer",
    "encode_record",
    "listed",
]
