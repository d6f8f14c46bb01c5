"""What an apply would change: the difference between a `Document` and what the compacted topics hold.

No I/O and no clock; only sealing and new keys are random. Owns versions (a tenant's `configVersion` rises
only when something of it changed, and a changed part takes that number), rotation of secrets, and the choice of a
tenant's slug and tag, which are kept for good.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct
from pydantic import SecretStr

from config.document import (
    DestinationEntry,
    Document,
    DocumentError,
    Fault,
    Kind,
    RouteEntry,
    TenantEntry,
)
from config.secret_fields import overlaps
from config.settings import SettingsError, TopicsChoice
from config.vault import MasterKeys, Unsealable, Vault, new_data_key
from schemas.attempt import PURPOSE_SECRET
from schemas.control import (
    ControlKey,
    ControlRecord,
    DestinationRecord,
    DisabledRecord,
    RouteRecord,
    SealedSecret,
    ShreddedMarker,
    TenantRecord,
    WrappedKey,
    decode_control,
    encode_control,
    parse_control_key,
)
from schemas.ids import DestinationId, ExternalId, Slug, Tag, TenantRef, Vendor, default_slug, digest, parts
from schemas.wire import unpack_sealed

OVERLAP_MS: Final = 24 * 3_600_000

Sign: TypeAlias = Literal["+", "~", "-"]


class Creation(Struct, frozen=True):
    """What a new tenant gets where the file leaves it open."""

    topics: TopicsChoice
    pools: int


class CurrentTenant(Struct, frozen=True):
    """What the topics hold of a tenant. `keys` has every version that is not shredded."""

    record: TenantRecord
    destinations: Mapping[str, DestinationRecord]
    routes: Mapping[str, RouteRecord]
    keys: Mapping[int, WrappedKey]
    disabled: Mapping[str, DisabledRecord]
    shredded_through: int = 0


class Current(Struct, frozen=True):
    """One vendor's part of the compacted topics."""

    tenants: Mapping[ExternalId, CurrentTenant]


class Line(Struct, frozen=True):
    """One line of a plan. `name` is empty for the tenant itself, `<destination>/<field>` for a secret."""

    sign: Sign
    what: Literal["tenant", "destination", "route", "secret"]
    tenant: str
    name: str = ""
    note: str = ""

    def __str__(self) -> str:
        path = f"{self.tenant}/{self.name}" if self.name else self.tenant
        return f"{self.sign} {self.what} {path}" + (f": {self.note}" if self.note else "")


class Write(Struct, frozen=True):
    """One record to write; a value of None is a tombstone."""

    topic: Literal["control", "keys", "state"]
    key: bytes
    value: bytes | None


class MadeSecret(Struct, frozen=True):
    """A secret that was made because none was given: shown once, after the apply."""

    tenant: ExternalId
    destination: DestinationId
    field: str
    value: SecretStr


class Plan(Struct, frozen=True):
    """`writes` are in the order in which they must lie in the topics. `tags` are those whose topics must exist, with
    the kinds of destination that use them.

    `longest_max_age_s` is the longest that a delivery of the vendor can wait, of what is configured after the apply.
    `warning` is of the master key with which it wraps new data keys; empty where that is in use.
    """

    vendor: Vendor
    lines: tuple[Line, ...]
    writes: tuple[Write, ...]
    tags: Mapping[Tag, frozenset[str]]
    longest_max_age_s: float
    made: tuple[MadeSecret, ...]
    removed: tuple[ExternalId, ...]
    warning: str


def tenant_key(tenant: TenantRef) -> ControlKey:
    return ControlKey("tenant", tenant.vendor, tenant.tenant, "")


def destination_key(tenant: TenantRef, destination: str) -> ControlKey:
    return ControlKey("destination", tenant.vendor, tenant.tenant, destination)


def route_key(tenant: TenantRef, route: str) -> ControlKey:
    return ControlKey("route", tenant.vendor, tenant.tenant, route)


def data_key_key(tenant: TenantRef, version: int) -> ControlKey:
    return ControlKey("key", tenant.vendor, tenant.tenant, str(version))


def disabled_key(tenant: TenantRef, destination: str) -> ControlKey:
    return ControlKey("disabled", tenant.vendor, tenant.tenant, destination)


def current_state(vendor: Vendor, records: Iterable[tuple[bytes, bytes | None]]) -> Current:
    """Folds the records of control, keys and state, in the order of each topic, to what they say of one vendor.

    Raises msgspec.DecodeError if a record is not of this version's form.
    """
    latest: dict[ControlKey, bytes] = {}
    for raw_key, value in records:
        key = parse_control_key(raw_key)
        if key is None or key.vendor != vendor:
            continue
        if value is None:
            latest.pop(key, None)
        else:
            latest[key] = value
    by_tenant: dict[ExternalId, dict[ControlKey, ControlRecord]] = {}
    for key, value in latest.items():
        by_tenant.setdefault(key.tenant, {})[key] = decode_control(value)
    found: dict[ExternalId, CurrentTenant] = {}
    for tenant, records_of in by_tenant.items():
        current = _current_tenant(records_of)
        if current is not None:
            found[tenant] = current
    return Current(found)


def _current_tenant(records: Mapping[ControlKey, ControlRecord]) -> CurrentTenant | None:
    record: TenantRecord | None = None
    destinations: dict[str, DestinationRecord] = {}
    routes: dict[str, RouteRecord] = {}
    keys: dict[int, WrappedKey] = {}
    disabled: dict[str, DisabledRecord] = {}
    shredded_through = 0
    for key, part in records.items():
        match part:
            case TenantRecord():
                record = part
            case DestinationRecord():
                destinations[part.id] = part
            case RouteRecord():
                routes[part.id] = part
            case WrappedKey():
                keys[part.version] = part
            case DisabledRecord():
                disabled[key.id] = part
            case ShreddedMarker():
                shredded_through = max(shredded_through, part.keyVersion)
    if record is None:
        return None
    keys = {version: key for version, key in keys.items() if version > shredded_through}
    return CurrentTenant(record, destinations, routes, keys, disabled, shredded_through)


def is_disabled(destination: DestinationRecord, disabled: DisabledRecord | None) -> bool:
    """As the workers' registry has it: a record about another version than this one counts no more."""
    return disabled is not None and disabled.destinationVersion == destination.version


def make_plan(
    document: Document,
    current: Current,
    *,
    kinds: Mapping[str, Kind],
    master: MasterKeys,
    creation: Creation,
    prune: bool,
    now_ms: int,
) -> Plan:
    """What to write so that the topics say what the document says.

    Raises `DocumentError` where the document asks for what a tenant cannot have: another slug, another kind of topics.
    """
    _refuse_what_is_kept(document, current, creation)
    work = _Work(document.vendor, kinds, master, now_ms, current)
    tags: dict[Tag, set[str]] = {}
    for tenant in current.tenants.values():
        if tenant.record.state == "active":
            tags.setdefault(Tag(tenant.record.tag), set()).update(d.type for d in tenant.destinations.values())
    ages = [d.retry.max_age_s for tenant in current.tenants.values() for d in tenant.destinations.values()]
    ages += [d.retry.max_age_s for entry in document.tenants for d in entry.destinations]
    for entry in document.tenants:
        tag = work.tenant(entry, current.tenants.get(entry.external_id), creation)
        tags.setdefault(tag, set()).update(d.type for d in entry.destinations)
    if prune:
        named = {entry.external_id for entry in document.tenants}
        for external_id, tenant in current.tenants.items():
            if external_id not in named and tenant.record.state == "active":
                work.remove(external_id, tenant.record)
    return Plan(
        document.vendor,
        tuple(work.lines),
        tuple(work.writes),
        {tag: frozenset(kinds) for tag, kinds in tags.items()},
        max(ages, default=0.0),
        tuple(work.made),
        tuple(work.removed),
        new_master(master, current) if any(write.topic == "keys" for write in work.writes) else "",
    )


def choose_tag(tenant: TenantRef, slug: Slug, topics: TopicsChoice, pools: int) -> Tag:
    """A new tenant's tag: its slug, or one of the pools that there are now."""
    if topics == "own":
        return Tag(slug)
    number = int.from_bytes(digest(parts(tenant.vendor, tenant.tenant)), "big") % pools
    return Tag(f"pool-{number:02d}")


def _refuse_what_is_kept(document: Document, current: Current, creation: Creation) -> None:
    """Slugs and tags are for good, and a slug names one tenant of the vendor."""
    faults: list[Fault] = []
    owners: dict[str, str] = {tenant.record.slug: name for name, tenant in current.tenants.items()}
    for entry in document.tenants:

        def refuse(field: str, message: str, remedy: str, entry: TenantEntry = entry) -> None:
            faults.append(Fault(document.file, entry.place, f"{entry.path}.{field}", message, remedy))

        known = current.tenants.get(entry.external_id)
        if known is not None:
            record = known.record
            has: TopicsChoice = "own" if record.tag == record.slug else "pooled"
            if entry.slug is not None and entry.slug != record.slug:
                refuse(
                    "slug", f"this tenant's slug is {record.slug!r} for good", f"write {record.slug} or leave it out"
                )
            if entry.topics is not None and entry.topics != has:
                refuse("topics", f"this tenant's topics are {has} for good", f"write {has} or leave it out")
            if record.state == "deleting":
                refuse("externalId", "this tenant is being deleted", "run `headgate keys shred` to its end, then apply")
            continue
        slug = entry.slug or default_slug(entry.external_id)
        owner = owners.setdefault(slug, entry.external_id)
        if owner != entry.external_id:
            refuse("slug", f"{slug!r} is the slug of tenant {owner[:60]!r}", "choose another slug for this tenant")
    if faults:
        raise DocumentError(faults)


class _Work:
    """Gathers lines and writes, tenant by tenant."""

    def __init__(
        self, vendor: Vendor, kinds: Mapping[str, Kind], master: MasterKeys, now_ms: int, current: Current
    ) -> None:
        self.lines: list[Line] = []
        self.writes: list[Write] = []
        self.made: list[MadeSecret] = []
        self.removed: list[ExternalId] = []
        self._vendor = vendor
        self._kinds = kinds
        self._master = master
        self._now_ms = now_ms
        self._current = current
        self._proven = False

    def tenant(self, entry: TenantEntry, known: CurrentTenant | None, creation: Creation) -> Tag:
        ref = TenantRef(self._vendor, entry.external_id)
        first_write, first_line = len(self.writes), len(self.lines)
        version = 1 if known is None else known.record.configVersion + 1
        vault, keys = self._vault(ref, known)
        # Where the key was shredded the tenant starts anew: what the old key sealed stays unreadable, secrets too
        has_key = known is not None and known.record.keyVersion in known.keys
        known_parts = known.destinations if known is not None and has_key else {}
        if known is None:
            slug = entry.slug or default_slug(entry.external_id)
            tag = choose_tag(ref, slug, entry.topics or creation.topics, creation.pools)
            self._line("+", "tenant", ref, note=f"slug {slug}, topics {tag}")
        else:
            slug, tag = Slug(known.record.slug), Tag(known.record.tag)
        destinations = {
            d.id: self._destination(d, known_parts.get(d.id), known, vault, version) for d in entry.destinations
        }
        routes = {
            r.id: self._route(ref, r, None if known is None else known.routes.get(r.id), version) for r in entry.routes
        }
        if known is not None:
            self._remove_parts(ref, known, destinations.keys(), routes.keys())
            changed = _changed_fields(
                ("name", known.record.name, entry.name),
                ("payloadMode", known.record.payloadMode, entry.payload_mode),
            )
            if known.record.state != "active":
                self.lines.insert(first_line, Line("+", "tenant", entry.external_id, "", f"was {known.record.state}"))
            elif changed:
                self.lines.insert(first_line, Line("~", "tenant", entry.external_id, "", ", ".join(changed)))
        if len(self.writes) == first_write and len(self.lines) == first_line:
            return tag
        listed = {
            **{data_key_key(ref, key_version).text(): key_version for key_version in keys},
            **{destination_key(ref, name).text(): part.version for name, part in destinations.items()},
            **{route_key(ref, name).text(): part.version for name, part in routes.items()},
        }
        record = TenantRecord(
            externalId=entry.external_id,
            slug=slug,
            tag=tag,
            configVersion=version,
            keyVersion=vault.current,
            name=entry.name,
            state="active",
            payloadMode=entry.payload_mode,
            parts=listed,
        )
        self._write("control", tenant_key(ref), record)
        return tag

    def remove(self, external_id: ExternalId, record: TenantRecord) -> None:
        """Its topics and its key stay until `keys shred`, and its slug stays taken."""
        ref = TenantRef(self._vendor, external_id)
        self._line("-", "tenant", ref, note="its topics and key stay until `headgate keys shred`")
        self.removed.append(external_id)
        gone = msgspec.structs.replace(record, state="removed", configVersion=record.configVersion + 1)
        self._write("control", tenant_key(ref), gone)

    def _destination(
        self,
        entry: DestinationEntry,
        known: DestinationRecord | None,
        tenant: CurrentTenant | None,
        vault: Vault,
        version: int,
    ) -> DestinationRecord:
        ref = vault.tenant
        line_at = len(self.lines)
        same_kind = known is not None and known.type == entry.type
        secrets = self._secrets(vault, entry, known.secrets if known is not None and same_kind else {})
        record = DestinationRecord(
            id=entry.id,
            type=entry.type,
            version=version,
            options=entry.options,
            secrets=secrets,
            retry=entry.retry,
            limits=entry.limits,
            held=known is not None and known.held,
        )
        if known is None:
            self.lines.insert(line_at, Line("+", "destination", ref.tenant, entry.id, entry.type))
        else:
            changed = [
                *_changed_fields(("type", known.type, entry.type)),
                *_changed_options(known.options, entry.options),
                *_changed_fields(("retry", known.retry, entry.retry), ("limits", known.limits, entry.limits)),
            ]
            if not changed and secrets == known.secrets:
                return known
            disabled = None if tenant is None else tenant.disabled.get(entry.id)
            if disabled is not None and is_disabled(known, disabled):
                if bytes(known.options) != bytes(entry.options) or not same_kind:
                    self.writes.append(Write("state", disabled_key(ref, entry.id).encode(), None))
                    changed.append("enabled again")
                else:
                    # Only new options enable it: what says that it is disabled has to name the new version
                    still = msgspec.structs.replace(disabled, destinationVersion=version)
                    self._write("state", disabled_key(ref, entry.id), still)
            if changed:
                self.lines.insert(line_at, Line("~", "destination", ref.tenant, entry.id, ", ".join(changed)))
        self._write("control", destination_key(ref, entry.id), record)
        return record

    def _secrets(
        self, vault: Vault, entry: DestinationEntry, known: Mapping[str, tuple[SealedSecret, ...]]
    ) -> dict[str, tuple[SealedSecret, ...]]:
        """The live values of each field, the newest first."""
        ref = vault.tenant
        given = {name: value.get_secret_value() for name, value in entry.secrets.items()}
        kind = self._kinds[entry.type]
        made = dict(kind.generate())
        result: dict[str, tuple[SealedSecret, ...]] = {}
        for field in sorted({*given, *made}):
            live = known.get(field, ())
            path = f"{entry.id}/{field}"
            if field in given:
                if live and _is_value(vault, entry.id, field, live[0], given[field]):
                    result[field] = live
                    continue
                fresh = self._sealed(vault, entry.id, field, given[field])
                replaced = (one for one in live if not _is_value(vault, entry.id, field, one, given[field]))
                overlap = overlaps(kind.secrets, field)
                result[field] = (fresh, *(overlapping(replaced, self._now_ms, OVERLAP_MS) if overlap else ()))
                note = ("rotated, the old one stays valid for 24 h" if overlap else "replaced") if live else ""
                self._line("~" if live else "+", "secret", ref, path, note)
            elif live:
                result[field] = live
            else:
                result[field] = (self._sealed(vault, entry.id, field, made[field]),)
                self.made.append(MadeSecret(ref.tenant, entry.id, field, SecretStr(made[field])))
                self._line("+", "secret", ref, path, "made, shown once")
        for field in sorted(known.keys() - result.keys()):
            self._line("-", "secret", ref, f"{entry.id}/{field}")
        return result

    def _sealed(self, vault: Vault, destination: DestinationId, field: str, value: str) -> SealedSecret:
        return seal_secret(vault, destination, field, value, self._now_ms)

    def _vault(self, ref: TenantRef, known: CurrentTenant | None) -> tuple[Vault, Mapping[int, WrappedKey]]:
        """The tenant's vault and wrapped keys; a new key is written where it has none. Raises SettingsError."""
        if known is not None and known.record.keyVersion in known.keys:
            opened = {version: unwrapped(self._master, ref, key) for version, key in known.keys.items()}
            return Vault(ref, opened, known.record.keyVersion), known.keys
        version = 1 if known is None else 1 + max(known.record.keyVersion, known.shredded_through)
        if not self._proven:
            refuse_foreign_master(self._master, self._vendor, self._current)
            self._proven = True
        data_key = new_data_key()
        wrapped = self._master.wrap(ref, version, data_key)
        self._write("keys", data_key_key(ref, version), wrapped)
        return Vault(ref, {version: data_key}, version), {version: wrapped}

    def _route(self, ref: TenantRef, entry: RouteEntry, known: RouteRecord | None, version: int) -> RouteRecord:
        record = RouteRecord(
            id=entry.id, version=version, types=entry.types, to=entry.to, where=entry.where, redact=entry.redact
        )
        if known is None:
            self._line("+", "route", ref, entry.id)
        else:
            changed = _changed_fields(
                ("types", known.types, record.types),
                ("to", known.to, record.to),
                ("where", known.where, record.where),
                ("redact", known.redact, record.redact),
            )
            if not changed:
                return known
            self._line("~", "route", ref, entry.id, ", ".join(changed))
        self._write("control", route_key(ref, entry.id), record)
        return record

    def _remove_parts(
        self, ref: TenantRef, known: CurrentTenant, destinations: Iterable[str], routes: Iterable[str]
    ) -> None:
        for name in sorted(known.routes.keys() - set(routes)):
            self._line("-", "route", ref, name)
            self.writes.append(Write("control", route_key(ref, name).encode(), None))
        for name in sorted(known.destinations.keys() - set(destinations)):
            self._line("-", "destination", ref, name, "what is parked for it becomes dead letters")
            self.writes.append(Write("control", destination_key(ref, name).encode(), None))
            if name in known.disabled:
                self.writes.append(Write("state", disabled_key(ref, name).encode(), None))

    def _line(
        self,
        sign: Sign,
        what: Literal["tenant", "destination", "route", "secret"],
        ref: TenantRef,
        name: str = "",
        note: str = "",
    ) -> None:
        self.lines.append(Line(sign, what, ref.tenant, name, note))

    def _write(self, topic: Literal["control", "keys", "state"], key: ControlKey, record: ControlRecord) -> None:
        self.writes.append(Write(topic, key.encode(), encode_control(record)))


def unwrapped(master: MasterKeys, ref: TenantRef, key: WrappedKey) -> bytes:
    """The data key. Raises SettingsError where no given master key opens it."""
    try:
        return master.unwrap(ref, key)
    except Unsealable as fault:
        held = ", ".join(master.ids)
        raise SettingsError(
            [
                f"tenant {ref.tenant!r}: its key is wrapped by master key {key.master!r} and does not open with those "
                f"that are given ({held}): {fault.code}; give HEADGATE_MASTER_KEY_FILE all that were ever in use"
            ]
        ) from None


def new_master(master: MasterKeys, current: Current) -> str:
    """What to heed before the first master key wraps a data key, where it has wrapped none of those in use."""
    in_use = {key.master for tenant in current.tenants.values() for key in tenant.keys.values()}
    if not in_use or master.first in in_use:
        return ""
    return f"{master.first} has wrapped no key so far: a worker whose master key file lacks it ends"


def refuse_foreign_master(master: MasterKeys, vendor: Vendor, current: Current) -> None:
    """Raises SettingsError where the master keys show not to be those of this deployment.

    A worker ends where it cannot open a data key, so one that a foreign master key has wrapped would end all of them.
    """
    held = [(TenantRef(vendor, name), key) for name, tenant in current.tenants.items() for key in tenant.keys.values()]
    # those of the key that is to wrap; before it has wrapped any, all
    asked = [(ref, key) for ref, key in held if key.master == master.first] or held
    if not asked:
        return
    for ref, key in asked:
        try:
            master.unwrap(ref, key)
        except Unsealable:
            continue
        return
    ref, key = asked[0]
    raise SettingsError(
        [
            f"the master keys that are given ({', '.join(master.ids)}) do not open the keys of tenants that exist, "
            f"such as that of {ref.tenant!r}, wrapped by {key.master!r}: a key that they wrap would stop every worker; "
            "give the HEADGATE_MASTER_KEY_FILE that the workers have"
        ]
    )


def _is_value(vault: Vault, destination: DestinationId, field: str, secret: SealedSecret, value: str) -> bool:
    """Whether a sealed secret holds this value, told by its print, which its own key version made."""
    sealed = unpack_sealed(secret.sealed)
    if sealed is None or sealed.key_version not in vault.versions:
        return False
    return secret.print == vault.secret_print(destination, field, value, sealed.key_version)


def seal_secret(
    vault: Vault, destination: str, field: str, value: str, made_ms: int, until_ms: int = 0
) -> SealedSecret:
    """A live value of a secret field, sealed with the tenant's current key."""
    sealed = vault.seal(PURPOSE_SECRET, destination, field, value.encode())
    return SealedSecret(sealed, made_ms, until_ms, vault.secret_print(destination, field, value))


def overlapping(live: Iterable[SealedSecret], now_ms: int, overlap_ms: int) -> Iterator[SealedSecret]:
    """The values that a new one replaces, as long as they still count."""
    for secret in live:
        until_ms = min(secret.until_ms or now_ms + overlap_ms, now_ms + overlap_ms)
        if until_ms > now_ms:
            yield msgspec.structs.replace(secret, until_ms=until_ms)


def _changed_fields(*fields: tuple[str, object, object]) -> list[str]:
    return [name for name, old, new in fields if old != new]


def _changed_options(old: msgspec.Raw, new: msgspec.Raw) -> list[str]:
    """Names only: an option's value may hold what not everybody may read, such as a URL's query."""
    if bytes(old) == bytes(new):
        return []
    before = msgspec.json.decode(old, type=dict[str, msgspec.Raw])
    after = msgspec.json.decode(new, type=dict[str, msgspec.Raw])
    names = sorted(before.keys() | after.keys())
    return [f"options.{name}" for name in names if bytes(before.get(name, b"")) != bytes(after.get(name, b""))]
