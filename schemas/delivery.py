"""The delivery: event x destination, with what its earlier copies have been through."""

from typing import Literal, TypeAlias

from msgspec import Struct

from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, TenantRef

Trigger: TypeAlias = Literal["event", "retry", "replay", "manual"]


class Delivery(Struct, gc=False):
    """One event on its way to one destination.

    `event` is already redacted. `attempt` counts attempts made so far, `hop` re-publications since ingress, `parks` the
    parks since the last attempt. `first_failed_ms` is 0 until the first attempt or park failed. `origin` is
    `topic/partition/offset` of the ingress record. `replay` is the replay job's id, empty outside a replay.
    `correlation` is the event's correlation id. `appended_ms` is the append time of the record that brought it into
    this worker; `size` the bytes it holds.
    """

    tenant: TenantRef
    destination: DestinationId
    id: DeliveryId
    event: Event
    origin: str
    appended_ms: int
    size: int
    route: str = ""
    correlation: str = ""
    trigger: Trigger = "event"
    attempt: int = 0
    hop: int = 0
    parks: int = 0
    first_failed_ms: int = 0
    replay: str = ""
