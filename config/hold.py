"""A destination held or enabled by hand: what to write so that the topics say so (design, section 9).

A hold is in the destination's own record, so that an apply, which keeps that field, does not lift it. A destination
that answered 410 is disabled by a record of the workers in `state`, which names a version: a hold makes a new version
and has to take that record along, and enabling deletes it. No I/O and no clock.
"""

from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from config.plan import CurrentTenant, Write, destination_key, disabled_key, is_disabled, tenant_key
from schemas.control import DestinationRecord, TenantRecord, encode_control
from schemas.ids import DestinationId, TenantRef

State: TypeAlias = Literal["on", "held", "disabled"]


class Change(Struct, frozen=True):
    """`was` and `now` may be the same: then there is nothing to write."""

    was: State
    now: State
    writes: tuple[Write, ...] = ()


def state_of(tenant: CurrentTenant, destination: DestinationRecord) -> State:
    """`disabled` (410) goes before `held`, as in the workers: its deliveries become dead letters."""
    if is_disabled(destination, tenant.disabled.get(destination.id)):
        return "disabled"
    return "held" if destination.held else "on"


def hold(tenant: TenantRef, current: CurrentTenant, destination: DestinationId) -> Change:
    """The destination takes no deliveries until it is enabled. It must be one of the tenant's."""
    known = current.destinations[destination]
    was = state_of(current, known)
    if known.held:
        return Change(was, was)
    return Change(was, was if was == "disabled" else "held", _rewritten(tenant, current, known, held=True))


def enable(tenant: TenantRef, current: CurrentTenant, destination: DestinationId) -> Change:
    """The destination takes deliveries, whether it was held, had answered 410, or both."""
    known = current.destinations[destination]
    was = state_of(current, known)
    writes: tuple[Write, ...] = ()
    if known.held:
        writes = _rewritten(tenant, current, known, held=False)
    if destination in current.disabled:
        writes = (Write("state", disabled_key(tenant, destination).encode(), None), *writes)
    return Change(was, "on", writes)


def _rewritten(tenant: TenantRef, current: CurrentTenant, known: DestinationRecord, *, held: bool) -> tuple[Write, ...]:
    """The destination in a new version of the tenant, which lists it; the tenant's record comes last."""
    version = current.record.configVersion + 1
    place = destination_key(tenant, known.id)
    writes: list[Write] = []
    disabled = current.disabled.get(known.id)
    if held and disabled is not None and is_disabled(known, disabled):
        still = replace(disabled, destinationVersion=version)
        writes.append(Write("state", disabled_key(tenant, known.id).encode(), encode_control(still)))
    record: TenantRecord = replace(
        current.record, configVersion=version, parts={**current.record.parts, place.text(): version}
    )
    return (
        *writes,
        Write("control", place.encode(), encode_control(replace(known, version=version, held=held))),
        Write("control", tenant_key(tenant).encode(), encode_control(record)),
    )
