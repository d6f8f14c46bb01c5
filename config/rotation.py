"""What a rotation of secrets or keys, the shredding of a key and the deletion of a tenant write.

Like `plan.py`: no I/O and no clock; only sealing and new keys are random. Each function is one step, whole in the one
transaction that its writes go into, and finds out from the state alone whether it is still to be done. So a command
that was killed goes on when it is run again (ADR 0013).
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace
from pydantic import SecretStr

from config.document import Kind
from config.plan import (
    Current,
    CurrentTenant,
    MadeSecret,
    Write,
    data_key_key,
    destination_key,
    disabled_key,
    is_disabled,
    overlapping,
    refuse_foreign_master,
    route_key,
    seal_secret,
    tenant_key,
    unwrapped,
)
from config.secret_fields import overlaps
from config.vault import MasterKeys, Unsealable, Vault, new_data_key
from schemas.attempt import PURPOSE_SECRET
from schemas.control import (
    ControlKey,
    ControlRecord,
    DestinationRecord,
    SealedSecret,
    ShreddedMarker,
    TenantRecord,
    encode_control,
)
from schemas.ids import DestinationId, Tag, TenantRef

NO_VERSION: Final = 0  # key versions start at 1


class Refusal(Exception):
    """What was asked for cannot be done with what the topics hold. The text is for a person."""


class Rotated(Struct, frozen=True):
    """A new value of secret fields of one destination. `until_ms`: the old ones count until then, 0 for no longer."""

    writes: tuple[Write, ...]
    made: tuple[MadeSecret, ...]
    until_ms: int


class Rekeyed(Struct, frozen=True):
    """A tenant's new data-key version. `secrets`: how many live secrets were sealed with it anew."""

    writes: tuple[Write, ...]
    key_version: int
    secrets: int


# ---------------------------------------------------------------- secrets


def rotate_secrets(
    tenant: TenantRef,
    destination: DestinationId,
    current: Current,
    *,
    kinds: Mapping[str, Kind],
    master: MasterKeys,
    overlap_ms: int,
    now_ms: int,
) -> Rotated:
    """New values for those secrets of a destination that Headgate makes and that can have several live ones.

    Raises Refusal and SettingsError.
    """
    known = _active(tenant, current)
    record = known.destinations.get(destination)
    if record is None:
        there = f"; it has: {', '.join(sorted(known.destinations))}" if known.destinations else ""
        raise Refusal(f"tenant {tenant.tenant!r} has no destination {destination!r}{there}")
    kind = kinds.get(record.type)
    new = {} if kind is None else {n: value for n, value in kind.generate().items() if overlaps(kind.secrets, n)}
    if not new:
        raise Refusal(
            f"destination {destination!r} is of type {record.type}, which has no secret that Headgate makes; "
            "change its secrets in the configuration and run `headgate apply`"
        )
    vault = _vault(tenant, known, master)
    secrets = dict(record.secrets)
    made = []
    for field, value in sorted(new.items()):
        live = secrets.get(field, ())
        made_ms = max(now_ms, *(one.made_ms + 1 for one in live)) if live else now_ms  # the newest, whatever the clock
        fresh = seal_secret(vault, destination, field, value, made_ms)
        secrets[field] = (fresh, *overlapping(live, now_ms, overlap_ms))
        made.append(MadeSecret(tenant.tenant, destination, field, SecretStr(value)))
    writes = _changed(tenant, known, {destination: secrets}, known.record.keyVersion)
    ends = [one.until_ms for field in new for one in secrets[field] if one.until_ms]
    return Rotated(tuple(writes), tuple(made), max(ends, default=0))


# ---------------------------------------------------------------- keys


def rotate_tenant_key(tenant: TenantRef, current: Current, *, master: MasterKeys, now_ms: int) -> Rekeyed:
    """A new key version becomes current; the earlier ones stay, to open what they sealed.

    The tenant's live secrets are sealed with the new version; those whose overlap has ended are left behind. Raises
    Refusal and SettingsError.
    """
    known = _active(tenant, current)
    refuse_foreign_master(master, tenant.vendor, current)
    old = _vault(tenant, known, master)
    version = 1 + max(known.record.keyVersion, known.shredded_through, *known.keys)
    data_key = new_data_key()
    keys = {number: unwrapped(master, tenant, key) for number, key in known.keys.items()}
    vault = Vault(tenant, {**keys, version: data_key}, version)
    resealed = {}
    for name, record in known.destinations.items():
        live = {
            field: tuple(_resealed(old, vault, record, field, one) for one in values if not 0 < one.until_ms <= now_ms)
            for field, values in record.secrets.items()
        }
        if live:
            resealed[DestinationId(name)] = live
    wrapped = _write("keys", data_key_key(tenant, version), master.wrap(tenant, version, data_key))
    count = sum(len(values) for fields in resealed.values() for values in fields.values())
    return Rekeyed((wrapped, *_changed(tenant, known, resealed, version)), version, count)


def rewrap(tenant: TenantRef, known: CurrentTenant, master: MasterKeys) -> list[Write]:
    """The tenant's data keys, as they are, wrapped by the first master key where another wraps them.

    Nothing else of the tenant changes: no worker has anything to do. Raises SettingsError.
    """
    return [
        _write("keys", data_key_key(tenant, version), master.wrap(tenant, version, unwrapped(master, tenant, key)))
        for version, key in sorted(known.keys.items())
        if key.master != master.first
    ]


# ---------------------------------------------------------------- the end of a key, and of a tenant


def shred(tenant: TenantRef, known: CurrentTenant, now_ms: int) -> list[Write]:
    """Tombstones of all its key versions, and the marker that says they are gone for good; none if it has no key."""
    if not known.keys:
        return []
    marker = ShreddedMarker(tenant.tenant, _newest(known), now_ms)
    tombstones = [Write("keys", data_key_key(tenant, version).encode(), None) for version in sorted(known.keys)]
    return [*tombstones, _write("control", shredded_key(tenant), marker)]


def begin_deletion(tenant: TenantRef, known: CurrentTenant) -> list[Write]:
    """The state `deleting`, and the end of all parts of the configuration; none where that was done."""
    if known.record.state != "removed":
        return []
    parts = [destination_key(tenant, name) for name in known.destinations]
    parts += [route_key(tenant, name) for name in known.routes]
    writes = [Write("control", key.encode(), None) for key in parts]
    writes += [Write("state", disabled_key(tenant, name).encode(), None) for name in known.disabled]
    return [*writes, _write("control", tenant_key(tenant), _without_data(known.record, "deleting"))]


def end_deletion(tenant: TenantRef, known: CurrentTenant, now_ms: int) -> list[Write]:
    """Its key is shredded, and what stays of the tenant names its slug and its numbers: no name, no configuration.

    They stay so that the slug is nobody else's, and versions go on rising where the tenant comes back.
    """
    if known.record.state != "deleting":
        return []
    gone = _without_data(known.record, "deleted")
    return [*shred(tenant, known, now_ms), _write("control", tenant_key(tenant), gone)]


def own_tag(tenant: TenantRef, current: Current) -> Tag | None:
    """The tag whose topics are the tenant's alone; None where it shares a pool."""
    record = current.tenants[tenant.tenant].record
    others = (other.record.tag for name, other in current.tenants.items() if name != tenant.tenant)
    return Tag(record.tag) if record.tag == record.slug and record.tag not in others else None


def tick_key(tenant: TenantRef) -> bytes:
    """Of a tombstone that means nothing to any reader: no key has this version."""
    return data_key_key(tenant, NO_VERSION).encode()


def shredded_key(tenant: TenantRef) -> ControlKey:
    return ControlKey("shredded", tenant.vendor, tenant.tenant, "")


# ---------------------------------------------------------------- what they share


def known_tenant(tenant: TenantRef, current: Current) -> CurrentTenant:
    """Raises Refusal."""
    known = current.tenants.get(tenant.tenant)
    if known is None:
        raise Refusal(f"vendor {tenant.vendor} has no tenant {tenant.tenant!r}")
    return known


def _active(tenant: TenantRef, current: Current) -> CurrentTenant:
    known = known_tenant(tenant, current)
    if known.record.state != "active":
        raise Refusal(f"tenant {tenant.tenant!r} is {known.record.state}; apply it again first")
    if known.record.keyVersion not in known.keys:
        raise Refusal(f"tenant {tenant.tenant!r} has no key, it was shredded; apply it again for a new one")
    return known


def _vault(tenant: TenantRef, known: CurrentTenant, master: MasterKeys) -> Vault:
    keys = {version: unwrapped(master, tenant, key) for version, key in known.keys.items()}
    return Vault(tenant, keys, known.record.keyVersion)


def _resealed(old: Vault, new: Vault, record: DestinationRecord, field: str, secret: SealedSecret) -> SealedSecret:
    try:
        value = old.open(PURPOSE_SECRET, record.id, field, secret.sealed).decode()
    except Unsealable as fault:
        raise Refusal(
            f"the secret {field} of destination {record.id!r} of tenant {old.tenant.tenant!r} does not open "
            f"({fault.code}), so it cannot be sealed with a new key; give it in the configuration and run "
            "`headgate apply`"
        ) from None
    return seal_secret(new, record.id, field, value, secret.made_ms, secret.until_ms)


def _changed(
    tenant: TenantRef,
    known: CurrentTenant,
    secrets: Mapping[DestinationId, Mapping[str, Sequence[SealedSecret]]],
    key_version: int,
) -> list[Write]:
    """The destinations with these secrets, and the tenant's record that puts all of it in force at once."""
    version = known.record.configVersion + 1
    writes = []
    parts = dict(known.record.parts)
    for name, fields in secrets.items():
        record = known.destinations[name]
        values = {field: tuple(live) for field, live in fields.items()}
        writes.append(
            _write("control", destination_key(tenant, name), replace(record, secrets=values, version=version))
        )
        disabled = known.disabled.get(name)
        if disabled is not None and is_disabled(record, disabled):
            # what a 410 disabled stays disabled: the record that says so names the destination's version
            writes.append(_write("state", disabled_key(tenant, name), replace(disabled, destinationVersion=version)))
        parts[destination_key(tenant, name).text()] = version
    parts[data_key_key(tenant, key_version).text()] = key_version
    whole = replace(known.record, configVersion=version, keyVersion=key_version, parts=parts)
    return [*writes, _write("control", tenant_key(tenant), whole)]


def _newest(known: CurrentTenant) -> int:
    return max(known.record.keyVersion, known.shredded_through, *known.keys)


def _without_data(record: TenantRecord, state: Literal["deleting", "deleted"]) -> TenantRecord:
    return TenantRecord(
        externalId=record.externalId,
        slug=record.slug,
        tag=record.tag,
        configVersion=record.configVersion + 1,
        keyVersion=record.keyVersion,
        state=state,
    )


def _write(topic: Literal["control", "keys", "state"], key: ControlKey, record: ControlRecord) -> Write:
    return Write(topic, key.encode(), encode_control(record))
