"""A tenant changes as a whole, whatever the order in which the records of several topics come."""

import os
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.registry import Destination, Fault, Registry, Tenant, open_secrets
from config.vault import MasterKeys, Unsealable, Vault
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
    TenantState,
    encode_control,
)
from schemas.ids import DestinationId, ExternalId, TenantRef, Vendor
from schemas.topics import Topics

TOPICS = Topics()
MASTER = MasterKeys({"k1": os.urandom(32)})
ACME = TenantRef(Vendor("default"), ExternalId("acme"))
HOOK = DestinationId("hook")
DATA_KEYS = {version: os.urandom(32) for version in (1, 2, 3)}

Row = tuple[str, bytes, bytes | None]


def row(topic: str, kind: str, ident: str, record: ControlRecord | None, ref: TenantRef = ACME) -> Row:
    key = ControlKey(kind, ref.vendor, ref.tenant, ident)
    return topic, key.encode(), None if record is None else encode_control(record)


def destination(version: int, ident: str = "hook", **fields: object) -> DestinationRecord:
    options = msgspec.Raw(b'{"url":"https://v%d.example"}' % version)
    return DestinationRecord(id=ident, type="webhook", version=version, options=options, **fields)  # type: ignore[arg-type]


def destination_row(version: int, ident: str = "hook", ref: TenantRef = ACME, **fields: object) -> Row:
    return row(TOPICS.control, "destination", ident, destination(version, ident, **fields), ref)


def route_row(version: int, ident: str = "all", to: Sequence[str] = ("hook",), ref: TenantRef = ACME) -> Row:
    record = RouteRecord(id=ident, version=version, types=(f"v{version}.*",), to=tuple(to))
    return row(TOPICS.control, "route", ident, record, ref)


def key_row(version: int, ref: TenantRef = ACME, master: MasterKeys = MASTER) -> Row:
    return row(TOPICS.keys, "key", str(version), master.wrap(ref, version, DATA_KEYS[version]), ref)


def tenant_row(
    version: int,
    parts: Mapping[str, int],
    *,
    key: int = 1,
    state: TenantState = "active",
    ref: TenantRef = ACME,
) -> Row:
    """`parts` by `<kind>/<id>`."""
    texts = {}
    for name, part_version in parts.items():
        kind, ident = name.split("/")
        texts[ControlKey(kind, ref.vendor, ref.tenant, ident).text()] = part_version
    record = TenantRecord(ref.tenant, ref.tenant, ref.tenant, version, key, state=state, parts=texts)
    return row(TOPICS.control, "tenant", "", record, ref)


def disabled_row(version: int | None, ident: str = "hook") -> Row:
    record = None if version is None else DisabledRecord(version, 0)
    return row(TOPICS.state, "disabled", ident, record)


def shredded_row(version: int) -> Row:
    return row(TOPICS.control, "shredded", "", ShreddedMarker(ACME.tenant, version, 0))


PARTS = {"destination/hook": 1, "route/all": 1, "key/1": 1}
FIRST = [destination_row(1), route_row(1), key_row(1), tenant_row(1, PARTS)]


def folded(rows: Sequence[Row], registry: Registry | None = None) -> Registry:
    registry = Registry(MASTER, TOPICS) if registry is None else registry
    for one in rows:
        registry.fold(*one)
    return registry


def shape(tenant: Tenant | None) -> object:
    """What a snapshot says, with the vault as what it can open."""
    if tenant is None:
        return None
    vault = tenant.vault
    plain = [getattr(tenant, name) for name in tenant.__struct_fields__ if name != "vault"]
    return (*plain, vault.versions, vault.current, vault.shredded_through)


def the(registry: Registry, ref: TenantRef = ACME) -> Tenant:
    tenant = registry.tenant(ref)
    assert tenant is not None
    return tenant


# ---------------------------------------------------------------- swaps


def test_a_tenant_is_there_once_all_of_it_is() -> None:
    registry = Registry(MASTER, TOPICS)
    assert [registry.fold(*one) for one in FIRST] == [None, None, None, ACME]
    tenant = the(registry)
    assert tenant.destinations[HOOK].record == destination(1)
    assert [route.id for route in tenant.routes] == ["all"]
    assert tenant.vault.versions == (1,)
    assert registry.by_key(ACME.vendor, b"acme") is tenant
    assert registry.by_key(Vendor("other"), b"acme") is None
    assert registry.by_key(ACME.vendor, b"ACME") is None
    assert list(registry.tenants(ACME.vendor)) == [tenant]
    assert registry.versions == {ACME: 1}
    assert len(registry) == 1


@pytest.mark.parametrize("absent", range(4))
def test_without_any_one_part_there_is_no_tenant(absent: int) -> None:
    registry = folded([one for place, one in enumerate(FIRST) if place != absent])
    assert registry.tenant(ACME) is None
    assert registry.fold(*FIRST[absent]) == ACME


def test_until_all_of_the_new_is_there_the_old_stays() -> None:
    registry = folded(FIRST)
    old = the(registry)
    parts = {"destination/hook": 2, "destination/second": 2, "route/all": 1, "key/1": 1}
    for one in (destination_row(2), tenant_row(2, parts)):
        assert registry.fold(*one) is None
        assert the(registry) is old
    assert registry.fold(*destination_row(2, "second")) == ACME
    assert the(registry).config_version == 2
    assert set(the(registry).destinations) == {"hook", "second"}
    assert the(registry).destinations[HOOK].record.version == 2


def test_the_key_counts_as_a_part_even_where_it_is_not_listed() -> None:
    registry = folded([destination_row(1), tenant_row(1, {"destination/hook": 1}, key=2), key_row(1)])
    assert registry.tenant(ACME) is None
    registry.fold(*key_row(2))
    assert the(registry).vault.current == 2


def test_a_removed_part_leaves_with_the_new_record_only() -> None:
    registry = folded(FIRST)
    registry.fold(*row(TOPICS.control, "route", "all", None))
    assert the(registry).routes
    registry.fold(*tenant_row(2, {"destination/hook": 1, "key/1": 1}))
    assert not the(registry).routes


@pytest.mark.parametrize("state", ["removed", "deleting", "deleted"])
def test_an_ended_tenant_ends_though_its_parts_are_gone(state: TenantState) -> None:
    registry = folded(FIRST)
    registry.fold(*row(TOPICS.control, "destination", "hook", None))
    registry.fold(*tenant_row(2, PARTS, state=state))
    assert the(registry).state == state
    assert the(registry).destinations == {}
    fresh = folded([tenant_row(2, {}, state=state)])  # a process that starts after the parts were compacted away
    assert the(fresh).state == state


def test_a_tombstone_of_the_record_takes_the_tenant_away() -> None:
    registry = folded(FIRST)
    seen: list[Tenant] = []
    registry.on_change(seen.append)
    assert registry.fold(*row(TOPICS.control, "tenant", "", None)) == ACME
    assert registry.tenant(ACME) is None
    assert registry.by_key(ACME.vendor, b"acme") is None
    assert [(tenant.state, tenant.destinations, tenant.routes) for tenant in seen] == [("deleted", {}, ())]
    assert registry.fold(*tenant_row(1, PARTS)) == ACME  # made anew


def test_reading_the_topics_again_from_the_start_changes_nothing() -> None:
    rows = [*FIRST, destination_row(2), tenant_row(2, PARTS | {"destination/hook": 2})]
    registry = folded(rows)
    seen: list[Tenant] = []
    registry.on_change(seen.append)
    folded(rows, registry)
    assert seen == []
    assert the(registry).destinations[HOOK].record.version == 2


def test_subscribers_hear_of_changes_alone() -> None:
    registry = Registry(MASTER, TOPICS)
    seen: list[int] = []
    registry.on_change(lambda tenant: seen.append(tenant.config_version))
    folded([*FIRST, *FIRST, tenant_row(2, PARTS), tenant_row(2, PARTS)], registry)
    assert seen == [1, 2]


# Look-alike tenants with the histories of three topics, interleaved at will.
REFS = [
    TenantRef(Vendor(vendor), ExternalId(tenant))
    for vendor, tenant in [
        ("default", "acme"),
        ("default", "ACME"),
        ("default", "a/b"),
        ("default", "a%2Fb"),
        ("other", "acme"),
    ]
]
# By configuration version: what the tenant consists of. A snapshot must be one of these, never a mixture.
VERSIONS: Mapping[int, Mapping[str, int]] = {
    1: {"destination/hook": 1, "route/all": 1, "key/1": 1},
    2: {"destination/hook": 2, "destination/second": 2, "route/all": 1, "key/1": 1},
    3: {"destination/hook": 2, "destination/second": 3, "route/all": 3, "route/more": 3, "key/2": 2},
}


def history(ref: TenantRef) -> dict[str, list[Row]]:
    """The records of each topic in their order."""
    control = [destination_row(1, ref=ref), route_row(1, ref=ref), tenant_row(1, VERSIONS[1], ref=ref)]
    control += [destination_row(2, ref=ref), destination_row(2, "second", ref=ref), tenant_row(2, VERSIONS[2], ref=ref)]
    control += [destination_row(3, "second", ref=ref), route_row(3, ref=ref), route_row(3, "more", ref=ref)]
    control += [tenant_row(3, VERSIONS[3], key=2, ref=ref)]
    keys = [key_row(1, ref), key_row(2, ref)]
    disabled = ControlKey("disabled", ref.vendor, ref.tenant, "hook").encode()
    state: list[Row] = [
        (TOPICS.state, disabled, encode_control(DisabledRecord(1, 0))),
        (TOPICS.state, disabled, encode_control(DisabledRecord(2, 0))),
    ]
    return {"control": control, "keys": keys, "state": state}


@st.composite
def interleavings(draw: st.DrawFn) -> list[Row]:
    queues = [list(rows) for ref in REFS for rows in history(ref).values()]
    turns = [number for number, queue in enumerate(queues) for _ in queue]
    order = draw(st.permutations(turns))
    return [queues[number].pop(0) for number in order]


def mixture(tenant: Tenant) -> str | None:
    """Why a snapshot is not exactly one configuration version; None if it is."""
    has = {f"destination/{name}": found.record.version for name, found in tenant.destinations.items()}
    has |= {f"route/{route.id}": route.version for route in tenant.routes}
    due = {name: version for name, version in VERSIONS[tenant.config_version].items() if not name.startswith("key/")}
    if has != due:
        return f"{has} instead of {due}"
    if not tenant.vault.can_seal or tenant.vault.current != (2 if tenant.config_version == 3 else 1):
        return f"{tenant.vault} does not go with version {tenant.config_version}"
    return None


@settings(max_examples=60, deadline=None)
@given(interleavings())
def test_any_order_leads_to_the_same_tenants_and_never_to_half_of_one(rows: list[Row]) -> None:
    registry = Registry(MASTER, TOPICS)
    heard: list[Tenant] = []
    registry.on_change(heard.append)
    for one in rows:
        registry.fold(*one)
        for ref in REFS:
            tenant = registry.tenant(ref)
            assert tenant is None or (tenant.ref == ref and mixture(tenant) is None)
    assert not [problem for tenant in heard if (problem := mixture(tenant))]
    in_order = folded([one for ref in REFS for part in history(ref).values() for one in part])
    for ref in REFS:
        assert shape(registry.tenant(ref)) == shape(in_order.tenant(ref))
        assert the(registry, ref).destinations[HOOK].disabled
        versions = [tenant.config_version for tenant in heard if tenant.ref == ref]
        assert versions == sorted(versions)
    assert registry.faults == {}


def test_a_swap_part_by_part_would_be_seen_as_a_mixture() -> None:
    """The control of the property above: the same history, each part taking effect as it comes."""
    rows = history(ACME)
    registry = folded([*rows["keys"], *rows["control"][:3]])
    tenant = the(registry)
    assert mixture(tenant) is None
    newer = {**tenant.destinations, HOOK: Destination(destination(2), False)}
    assert mixture(msgspec.structs.replace(tenant, destinations=newer))


# ---------------------------------------------------------------- keys


def test_an_older_key_that_comes_late_opens_what_it_sealed() -> None:
    registry = folded([destination_row(1), key_row(2), tenant_row(1, {"destination/hook": 1, "key/2": 2}, key=2)])
    sealed = Vault(ACME, DATA_KEYS, 1).seal("delivery", "hook", "dlv_1", b"payload")
    with pytest.raises(Unsealable) as caught:
        the(registry).vault.open("delivery", "hook", "dlv_1", sealed)
    assert caught.value.code == "unknown_key"
    assert registry.fold(*key_row(1)) == ACME
    assert the(registry).vault.open("delivery", "hook", "dlv_1", sealed) == b"payload"


def test_a_key_that_is_taken_away_opens_nothing_and_the_marker_says_why() -> None:
    registry = folded([*FIRST, key_row(2), tenant_row(2, {"destination/hook": 1, "key/2": 2}, key=2)])
    sealed = Vault(ACME, DATA_KEYS, 1).seal("delivery", "hook", "dlv_1", b"payload")
    assert the(registry).vault.open("delivery", "hook", "dlv_1", sealed) == b"payload"
    assert registry.fold(*row(TOPICS.keys, "key", "1", None)) == ACME
    with pytest.raises(Unsealable) as caught:
        the(registry).vault.open("delivery", "hook", "dlv_1", sealed)
    assert caught.value.code == "unknown_key"  # an absence alone does not say that it was shredded
    assert registry.fold(*shredded_row(1)) == ACME
    with pytest.raises(Unsealable) as caught:
        the(registry).vault.open("delivery", "hook", "dlv_1", sealed)
    assert caught.value.code == "shredded"
    assert the(registry).shredded_through == 1
    assert the(registry).vault.can_seal


def test_the_current_key_goes_at_once_though_the_tenant_is_active() -> None:
    registry = folded(FIRST)
    registry.fold(*row(TOPICS.keys, "key", "1", None))
    assert the(registry).vault.versions == ()
    assert not the(registry).vault.can_seal


def test_a_key_that_no_master_key_opens_leaves_the_earlier_wrapping_in_use() -> None:
    registry = folded(FIRST)
    stranger = MasterKeys({"k9": os.urandom(32)})
    assert registry.fold(*key_row(1, master=stranger)) is None
    assert registry.faults == {"data_key": 1}
    assert the(registry).vault.can_seal
    new = folded([destination_row(1), route_row(1), key_row(1, master=stranger), tenant_row(1, PARTS)])
    assert new.tenant(ACME) is None


def test_a_key_of_another_tenant_does_not_open() -> None:
    other = TenantRef(Vendor("default"), ExternalId("other"))
    topic, _, value = key_row(1, other)
    registry = folded([(topic, ControlKey("key", ACME.vendor, ACME.tenant, "1").encode(), value)])
    assert registry.faults == {"data_key": 1}


# ---------------------------------------------------------------- disabled destinations


def test_a_disabled_destination_is_disabled_in_that_version_only() -> None:
    registry = folded(FIRST)
    assert not the(registry).destinations[HOOK].disabled
    assert registry.fold(*disabled_row(1)) == ACME
    assert the(registry).destinations[HOOK].disabled
    registry.fold(*destination_row(2))
    registry.fold(*tenant_row(2, PARTS | {"destination/hook": 2}))
    assert not the(registry).destinations[HOOK].disabled


def test_a_cleared_record_enables_again() -> None:
    registry = folded([*FIRST, disabled_row(1)])
    assert registry.fold(*disabled_row(None)) == ACME
    assert not the(registry).destinations[HOOK].disabled


def test_a_record_of_another_version_disables_nothing() -> None:
    registry = folded(FIRST)
    assert registry.fold(*disabled_row(7)) is None
    assert registry.fold(*disabled_row(1, "unknown")) is None
    assert not the(registry).destinations[HOOK].disabled


# ---------------------------------------------------------------- secrets


def sealed(value: str, made_ms: int, until_ms: int = 0, field: str = "signing", place: str = "hook") -> SealedSecret:
    vault = Vault(ACME, DATA_KEYS, 1)
    return SealedSecret(vault.seal(PURPOSE_SECRET, place, field, value.encode()), made_ms, until_ms)


def test_live_secrets_open_newest_first() -> None:
    secrets = {
        "signing": (sealed("old", 1, until_ms=100), sealed("new", 3), sealed("older", 0, until_ms=50)),
        "headers.x-token": (sealed("t", 1, until_ms=60, field="headers.x-token"),),
    }
    registry = folded([destination_row(1, secrets=secrets), *FIRST[1:]])
    tenant = the(registry)
    hook = tenant.destinations[HOOK]
    assert open_secrets(tenant, hook, 40) == {"signing": ["new", "old", "older"], "headers.x-token": ["t"]}
    assert open_secrets(tenant, hook, 99) == {"signing": ["new", "old"]}
    assert open_secrets(tenant, hook, 100) == {"signing": ["new"]}


@pytest.mark.parametrize("moved", [{"field": "client_key"}, {"place": "hook2"}])
def test_a_secret_of_another_field_or_destination_does_not_open(moved: dict[str, str]) -> None:
    registry = folded([destination_row(1, secrets={"signing": (sealed("s", 1, **moved),)}), *FIRST[1:]])  # type: ignore[arg-type]
    with pytest.raises(Unsealable):
        open_secrets(the(registry), the(registry).destinations[HOOK], 0)


# ---------------------------------------------------------------- records that are left out


def faults_of(rows: Sequence[tuple[str, bytes | None, bytes | None]]) -> tuple[Registry, list[Fault]]:
    registry = folded(FIRST)
    before = shape(the(registry))
    told: list[Fault] = []
    registry.on_fault(told.append)
    for topic, key, value in rows:
        assert registry.fold(topic, key, value) is None
    assert shape(the(registry)) == before
    assert sum(registry.faults.values()) == len(told)
    return registry, told


def malformed() -> Iterator[tuple[str, bytes | None, bytes | None, str]]:
    good = encode_control(destination(1))
    control, keys, state = TOPICS.control, TOPICS.keys, TOPICS.state
    yield control, None, good, "key"
    yield control, b"", good, "key"
    yield control, b"destination/default/acme", good, "key"
    yield control, b"destination/default/acme/hook/x", good, "key"
    yield control, b"destination/default/%FF/hook", good, "key"
    yield control, b"\xff\xfe", good, "key"
    yield control, b"tenant/default/%61cme/", tenant_row(9, {})[2], "key"
    yield control, b"destination/default/acme/hook", b"", "value"
    yield control, b"destination/default/acme/hook", b"{", "value"
    yield control, b"destination/default/acme/hook", b'{"kind":"unheard-of"}', "value"
    yield control, b"destination/default/acme/hook", b"[" * 100_000, "value"
    yield control, b"destination/default/acme/hook", b'{"kind":"destination","id":"\xff"}', "value"
    yield control, b"route/default/acme/hook", good, "misplaced"
    yield control, b"nonsense/default/acme/hook", good, "misplaced"
    yield keys, b"destination/default/acme/hook", good, "misplaced"
    # what workers may write must not configure a tenant
    yield state, b"tenant/default/acme/", tenant_row(9, {})[2], "misplaced"
    yield state, b"tenant/default/acme/", None, "misplaced"
    yield state, b"disabled/default/acme/hook", tenant_row(9, {})[2], "misplaced"
    yield control, b"key/default/acme/1", key_row(1)[2], "misplaced"
    yield "headgate.other", b"tenant/default/acme/", None, "misplaced"
    yield control, b"destination/default/acme/other", good, "contradiction"
    yield control, b"tenant/default/other/", tenant_row(9, {})[2], "contradiction"
    yield keys, b"key/default/acme/2", key_row(1)[2], "contradiction"
    yield keys, b"key/default/other/1", key_row(1)[2], "data_key"


@pytest.mark.parametrize(("topic", "key", "value", "reason"), list(malformed()))
def test_a_record_that_cannot_be_is_counted_and_left_out(
    topic: str, key: bytes | None, value: bytes | None, reason: str
) -> None:
    registry, told = faults_of([(topic, key, value)])
    assert registry.faults == {reason: 1}
    assert told[0].topic == topic


@given(st.lists(st.tuples(st.sampled_from([TOPICS.control, TOPICS.keys, TOPICS.state]), st.binary(), st.binary())))
def test_no_bytes_crash_it(rows: list[tuple[str, bytes, bytes]]) -> None:
    faults_of(rows)
