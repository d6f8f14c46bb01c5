"""What a process knows of its tenants: folds the records of `control`, `keys` and `state` into frozen snapshots.

Owns that a tenant changes as a whole: a new configuration takes effect once every part that its `TenantRecord` names is
there in the version that it names; until then the earlier snapshot stays (design, section 7). Pure but for the vaults:
who reads the topics, and how, is `streams/control.py`'s and the commands'.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from config.vault import MasterKeys, Unsealable, Vault
from schemas.attempt import PURPOSE_SECRET
from schemas.control import (
    ControlKey,
    ControlRecord,
    DestinationRecord,
    DisabledRecord,
    RouteRecord,
    ShreddedMarker,
    TenantRecord,
    TenantState,
    WrappedKey,
    decode_control,
    parse_control_key,
)
from schemas.ids import DestinationId, Slug, Tag, TenantRef, Vendor
from schemas.topics import Topics

Part: TypeAlias = DestinationRecord | RouteRecord | WrappedKey
FaultReason: TypeAlias = Literal["key", "value", "misplaced", "contradiction", "data_key"]


class Fault(Struct, frozen=True):
    """A record that was left out. `key` is the record's key as text; nothing of its value is told.

    `key`: no key of ours; `value`: no record of this version; `misplaced`: of a kind that does not belong into this
    topic or under this key; `contradiction`: says another tenant, id or version than its key; `data_key`: no master key
    of this process opens it.
    """

    reason: FaultReason
    topic: str
    key: str


class Destination(Struct, frozen=True):
    """`disabled`: it answered 410 in this very version. A hold is the record's own (`record.held`)."""

    record: DestinationRecord
    disabled: bool

    @property
    def id(self) -> DestinationId:
        return DestinationId(self.record.id)


class Tenant(Struct, frozen=True):
    """A tenant as one of its records has it, whole. Key versions up to `shredded_through` are gone for good."""

    ref: TenantRef
    name: str
    slug: Slug
    tag: Tag
    config_version: int
    key_version: int
    payload_mode: Literal["sealed", "private"]
    state: TenantState
    destinations: Mapping[DestinationId, Destination]
    routes: tuple[RouteRecord, ...]
    vault: Vault
    shredded_through: int = 0


def open_secrets(tenant: Tenant, destination: Destination, now_ms: int) -> dict[str, list[str]]:
    """The live values of each secret field, the newest first; fields without one are left out. Raises `Unsealable`."""
    opened: dict[str, list[str]] = {}
    for field, values in destination.record.secrets.items():
        live = [value for value in values if not value.until_ms or value.until_ms > now_ms]
        if live:
            live.sort(key=lambda value: value.made_ms, reverse=True)
            opened[field] = [
                tenant.vault.open(PURPOSE_SECRET, destination.record.id, field, value.sealed).decode() for value in live
            ]
    return opened


class _Known:
    """Everything that the topics say of one tenant, complete or not."""

    __slots__ = ("data_keys", "disabled", "missing", "parts", "record", "shredded_through", "snapshot")

    def __init__(self) -> None:
        self.record: TenantRecord | None = None
        self.parts: dict[str, Part] = {}
        self.data_keys: dict[int, bytes] = {}
        self.missing: set[str] = set()  # what the record names and is not there in that version
        self.disabled: dict[str, DisabledRecord] = {}
        self.shredded_through = 0
        self.snapshot: Tenant | None = None

    @property
    def whole(self) -> bool:
        """Whether the record can take effect. One that ends a tenant always can: it needs no parts."""
        return self.record is not None and (not self.missing or self.record.state != "active")


class Registry:
    """All tenants that the topics name. `fold` each record, of one topic in its order, of several in any."""

    def __init__(self, master_keys: MasterKeys, topics: Topics) -> None:
        self._master_keys = master_keys
        self._topics = topics
        self._known: dict[TenantRef, _Known] = {}
        self._by_key: dict[Vendor, dict[bytes, Tenant]] = {}
        self._on_change: list[Callable[[Tenant], None]] = []
        self._on_fault: list[Callable[[Fault], None]] = []
        self.faults: dict[FaultReason, int] = {}

    def on_change(self, callback: Callable[[Tenant], None]) -> None:
        """Calls back with every tenant that changes from now on. One that is gone comes as `deleted`, without parts.

        Callbacks run inside `fold`, must not raise and must not fold.
        """
        self._on_change.append(callback)

    def on_fault(self, callback: Callable[[Fault], None]) -> None:
        self._on_fault.append(callback)

    # ---------------------------------------------------------------- what is known

    def tenant(self, ref: TenantRef) -> Tenant | None:
        known = self._known.get(ref)
        return None if known is None else known.snapshot

    def by_key(self, vendor: Vendor, key: bytes) -> Tenant | None:
        """By the raw key of an ingress record."""
        return self._by_key.get(vendor, {}).get(key)

    def tenants(self, vendor: Vendor) -> Iterable[Tenant]:
        return tuple(self._by_key.get(vendor, {}).values())

    @property
    def versions(self) -> dict[TenantRef, int]:
        """The configuration version in effect, of each tenant."""
        return {ref: known.snapshot.config_version for ref, known in self._known.items() if known.snapshot is not None}

    def __len__(self) -> int:
        return sum(len(tenants) for tenants in self._by_key.values())

    # ---------------------------------------------------------------- folding

    def fold(self, topic: str, raw_key: bytes | None, value: bytes | None) -> TenantRef | None:
        """Takes one record in. Returns the tenant if its snapshot changed.

        Raises nothing for any input: what cannot be read is counted in `faults`, told to `on_fault`, and left out.
        """
        key = parse_control_key(raw_key or b"")
        if key is None or key.encode() != raw_key:  # one tenant must not have two spellings
            return self._fault("key", topic, raw_key)
        if key.kind not in self._kinds_of(topic):
            return self._fault("misplaced", topic, raw_key)
        ref = TenantRef(key.vendor, key.tenant)
        if value is None:
            known = self._known.get(ref)
            return None if known is None else self._drop(ref, known, key)
        try:
            record: ControlRecord = decode_control(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._fault("value", topic, raw_key)
        if record.__struct_config__.tag != key.kind:
            return self._fault("misplaced", topic, raw_key)
        match record:
            case TenantRecord(externalId=tenant) | ShreddedMarker(externalId=tenant):
                agrees = tenant == key.tenant
            case DestinationRecord(id=ident) | RouteRecord(id=ident):
                agrees = ident == key.id
            case WrappedKey(version=version):
                agrees = str(version) == key.id
            case DisabledRecord():
                agrees = True
        if not agrees:
            return self._fault("contradiction", topic, raw_key)
        known = self._known.get(ref)
        if known is None:
            known = self._known[ref] = _Known()
        match record:
            case TenantRecord():
                return self._take_record(ref, known, record)
            case DestinationRecord() | RouteRecord():
                return self._take_part(ref, known, key.text(), record)
            case WrappedKey():
                return self._take_key(ref, known, key, record, topic)
            case ShreddedMarker():
                return self._shredded(ref, known, record.keyVersion)
            case DisabledRecord():
                known.disabled[key.id] = record
                return self._able(ref, known, DestinationId(key.id))

    def _kinds_of(self, topic: str) -> tuple[str, ...]:
        """Workers may write `state`: nothing but what belongs there may come from it."""
        topics = self._topics
        if topic == topics.control:
            return ("tenant", "destination", "route", "shredded")
        if topic == topics.keys:
            return ("key",)
        return ("disabled",) if topic == topics.state else ()

    def _fault(self, reason: FaultReason, topic: str, raw_key: bytes | None) -> TenantRef | None:
        self.faults[reason] = self.faults.get(reason, 0) + 1
        fault = Fault(reason, topic, (raw_key or b"")[:400].decode("utf-8", "replace"))
        for tell in self._on_fault:
            tell(fault)
        return None

    def _take_record(self, ref: TenantRef, known: _Known, record: TenantRecord) -> TenantRef | None:
        if known.record is not None and record.configVersion < known.record.configVersion:
            return None  # versions only rise: the topic is being read again from an earlier place
        known.record = record
        known.missing = _missing(ref, known, record)
        return self._swap(ref, known) if known.whole else None

    def _take_part(self, ref: TenantRef, known: _Known, text: str, part: Part) -> TenantRef | None:
        known.parts[text] = part
        needed = None if known.record is None else _needed_version(ref, known.record, text)
        if needed is None:
            return None
        if part.version == needed:
            known.missing.discard(text)
        else:
            known.missing.add(text)
        return self._swap(ref, known) if known.whole else None

    def _take_key(
        self, ref: TenantRef, known: _Known, key: ControlKey, record: WrappedKey, topic: str
    ) -> TenantRef | None:
        try:
            data_key = self._master_keys.unwrap(ref, record)
        except Unsealable:
            return self._fault("data_key", topic, key.encode())  # an earlier wrapping of it goes on serving
        known.data_keys[record.version] = data_key
        return self._take_part(ref, known, key.text(), record) or self._rekey(ref, known)

    def _drop(self, ref: TenantRef, known: _Known, key: ControlKey) -> TenantRef | None:
        """A tombstone. A part that a record still names keeps its place in the snapshot; a key goes at once."""
        text = key.text()
        match key.kind:
            case "tenant":
                known.record = None
                known.missing = set()
                gone = known.snapshot
                if gone is None:
                    return None
                known.snapshot = None
                self._by_key[ref.vendor].pop(ref.tenant.encode(), None)
                gone = replace(gone, state="deleted", destinations={}, routes=())
                for tell in self._on_change:
                    tell(gone)
                return ref
            case "disabled":
                known.disabled.pop(key.id, None)
                return self._able(ref, known, DestinationId(key.id))
            case "shredded":
                return self._shredded(ref, known, 0)
        part = known.parts.pop(text, None)
        if known.record is not None:
            known.missing = _missing(ref, known, known.record)
        if isinstance(part, WrappedKey):
            known.data_keys.pop(part.version, None)
            return self._rekey(ref, known)
        return None

    def _shredded(self, ref: TenantRef, known: _Known, through: int) -> TenantRef | None:
        """A key that is gone for good is not waited for: the tenant's record can take effect without it."""
        known.shredded_through = through
        record = known.record
        if record is not None:
            known.missing = _missing(ref, known, record)
            if known.whole and (known.snapshot is None or known.snapshot.config_version != record.configVersion):
                return self._swap(ref, known)
        return self._rekey(ref, known)

    # ---------------------------------------------------------------- snapshots

    def _swap(self, ref: TenantRef, known: _Known) -> TenantRef | None:
        """The record takes effect."""
        record = known.record
        assert record is not None
        destinations: dict[DestinationId, Destination] = {}
        routes: list[RouteRecord] = []
        for text, version in record.parts.items():
            part = known.parts.get(text)
            if part is None or part.version != version:
                continue  # only where the tenant is no longer active
            match part:
                case DestinationRecord():
                    destinations[DestinationId(part.id)] = Destination(part, _disabled(part, known))
                case RouteRecord():
                    routes.append(part)
                case WrappedKey():
                    pass
        return self._install(
            known,
            Tenant(
                ref=ref,
                name=record.name,
                slug=Slug(record.slug),
                tag=Tag(record.tag),
                config_version=record.configVersion,
                key_version=record.keyVersion,
                payload_mode=record.payloadMode,
                state=record.state,
                destinations=destinations,
                routes=tuple(routes),
                vault=_vault(ref, known, record.keyVersion),
                shredded_through=known.shredded_through,
            ),
        )

    def _rekey(self, ref: TenantRef, known: _Known) -> TenantRef | None:
        """The snapshot stays, but opens with the keys that are there now."""
        old = known.snapshot
        if old is None:
            return None
        vault = _vault(ref, known, old.key_version)
        return self._install(known, replace(old, vault=vault, shredded_through=known.shredded_through))

    def _able(self, ref: TenantRef, known: _Known, name: DestinationId) -> TenantRef | None:
        """Whether a destination is disabled may have changed."""
        old = known.snapshot
        destination = None if old is None else old.destinations.get(name)
        if old is None or destination is None:
            return None
        now = Destination(destination.record, _disabled(destination.record, known))
        return self._install(known, replace(old, destinations={**old.destinations, name: now}))

    def _install(self, known: _Known, tenant: Tenant) -> TenantRef | None:
        if tenant == known.snapshot:
            return None
        known.snapshot = tenant
        self._by_key.setdefault(tenant.ref.vendor, {})[tenant.ref.tenant.encode()] = tenant
        for tell in self._on_change:
            tell(tenant)
        return tenant.ref


def _version(part: Part | None) -> int | None:
    return None if part is None else part.version


def _key_text(ref: TenantRef, version: int) -> str:
    return ControlKey("key", ref.vendor, ref.tenant, str(version)).text()


def _needed(ref: TenantRef, record: TenantRecord) -> dict[str, int]:
    """The parts that a record names; its key counts as one, whether it is listed or not."""
    return {_key_text(ref, record.keyVersion): record.keyVersion, **record.parts}


def _missing(ref: TenantRef, known: _Known, record: TenantRecord) -> set[str]:
    """What a record names and is not there in that version, without the keys that a marker says are gone."""
    return {
        text
        for text, version in _needed(ref, record).items()
        if _version(known.parts.get(text)) != version
        and not (version <= known.shredded_through and text == _key_text(ref, version))
    }


def _needed_version(ref: TenantRef, record: TenantRecord, text: str) -> int | None:
    version = record.parts.get(text)
    if version is None and text == _key_text(ref, record.keyVersion):
        return record.keyVersion
    return version


def _disabled(record: DestinationRecord, known: _Known) -> bool:
    disabled = known.disabled.get(record.id)
    return disabled is not None and disabled.destinationVersion == record.version


def _vault(ref: TenantRef, known: _Known, current: int) -> Vault:
    """The vault in use if nothing of it changed, else a new one."""
    old = None if known.snapshot is None else known.snapshot.vault
    vault = Vault(ref, known.data_keys, current, known.shredded_through)
    return old if old is not None and old.same_keys(vault) else vault
