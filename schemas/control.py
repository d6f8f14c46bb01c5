"""The records of the control plane: `headgate.control`, `headgate.keys`, `headgate.state` (design, sections 7 and 8).

Values are JSON. A tenant is swapped as a whole: its `TenantRecord` is written last and lists the version of each of its
parts; readers keep what they had until every part is there.
"""

from typing import Final, Literal

import msgspec
from msgspec import Struct

from schemas.ids import ExternalId, Vendor, percent, unpercent

DEFAULT_SCHEDULE_S: Final = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
DEFAULT_MAX_AGE_S: Final = 96 * 3600.0
DEFAULT_LANE_IN_FLIGHT: Final = 16


class RetrySpec(Struct, frozen=True, omit_defaults=True):
    """`schedule_s[k]` is the wait before attempt k+1; `also` lists statuses that retry though they would reject."""

    schedule_s: tuple[float, ...] = DEFAULT_SCHEDULE_S
    max_age_s: float = DEFAULT_MAX_AGE_S
    also: tuple[int, ...] = ()


class LimitSpec(Struct, frozen=True, omit_defaults=True):
    """`in_flight` is per worker; `rate_per_s` across workers, 0 for none."""

    in_flight: int = DEFAULT_LANE_IN_FLIGHT
    rate_per_s: float = 0.0


class SealedSecret(Struct, frozen=True, omit_defaults=True):
    """One live value of a secret field, sealed for (tenant, `secret`, destination, field). `until_ms` 0: no end."""

    sealed: bytes
    made_ms: int
    until_ms: int = 0
    print: str = ""  # a keyed hash, so that apply can tell a changed value from the same one without opening it


class DestinationRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="destination"):
    id: str
    type: str
    version: int
    options: msgspec.Raw
    secrets: dict[str, tuple[SealedSecret, ...]] = {}
    retry: RetrySpec = RetrySpec()
    limits: LimitSpec = LimitSpec()
    held: bool = False


class RouteRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="route"):
    id: str
    version: int
    types: tuple[str, ...]
    to: tuple[str, ...]
    where: str = ""
    redact: tuple[str, ...] = ()


TenantState = Literal["active", "removed", "deleting", "deleted"]


class TenantRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="tenant"):
    """Written last. `parts` maps the key of each record of the tenant (in `control` or `keys`) to its version."""

    externalId: str
    slug: str
    tag: str
    configVersion: int
    keyVersion: int
    name: str = ""
    state: TenantState = "active"
    payloadMode: Literal["sealed", "private"] = "sealed"
    parts: dict[str, int] = {}


class ShreddedMarker(Struct, frozen=True, tag_field="kind", tag="shredded"):
    """Says that a tenant's key versions up to `keyVersion` are gone for good; what they sealed is dropped."""

    externalId: str
    keyVersion: int
    at_ms: int


class WrappedKey(Struct, frozen=True, tag_field="kind", tag="key"):
    """A tenant's data key, wrapped by the master key `master`. Lies in `headgate.keys`."""

    version: int
    master: str
    wrapped: bytes


class DisabledRecord(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="disabled"):
    """A destination that answered 410. Lies in `headgate.state`, written by workers, cleared by the control plane.

    `destinationVersion` is the record's version that was disabled: newer options enable it again.
    """

    destinationVersion: int
    at_ms: int
    delivery: str = ""


ControlRecord = DestinationRecord | RouteRecord | TenantRecord | ShreddedMarker | WrappedKey | DisabledRecord
encode_control = msgspec.json.Encoder().encode
decode_control = msgspec.json.Decoder(ControlRecord).decode


class ControlKey(Struct, frozen=True):
    """`<kind>/<vendor>/<tenant>/<id>`; the tenant stands percent-encoded."""

    kind: str
    vendor: Vendor
    tenant: ExternalId
    id: str

    def text(self) -> str:
        return f"{self.kind}/{self.vendor}/{percent(self.tenant)}/{self.id}"

    def encode(self) -> bytes:
        return self.text().encode()


def parse_control_key(raw: bytes) -> ControlKey | None:
    try:
        kind, vendor, tenant, ident = raw.decode().split("/")
        return ControlKey(kind, Vendor(vendor), unpercent(tenant), ident)
    except ValueError:
        return None
