"""Rotations, shredding and deletion: what they write is folded as the topics would be, and read by the registry."""

import os
from collections.abc import Sequence
from itertools import permutations

import pytest

from config.plan import Write, disabled_key, tenant_key
from config.registry import Registry, Tenant, open_secrets
from config.rotation import (
    Refusal,
    begin_deletion,
    end_deletion,
    known_tenant,
    own_tag,
    rewrap,
    rotate_secrets,
    rotate_tenant_key,
    shred,
    tick_key,
)
from config.settings import SettingsError
from config.vault import MasterKeys, Unsealable
from connectors.registry import KINDS
from schemas.control import DisabledRecord, TenantRecord, decode_control, encode_control
from schemas.ids import DestinationId, ExternalId, TenantRef
from tests.config.test_plan import ACME, BASE, DAY_MS, FIRST, MASTER, TOPICS, Log

HOOK = DestinationId("hook")
HOUR_MS = 3_600_000
NAMES = {"control": TOPICS.control, "keys": TOPICS.keys, "state": TOPICS.state}


@pytest.fixture
def log() -> Log:
    made = Log()
    made.apply(BASE + "  - externalId: acme2\n")
    return made


def rotate(log: Log, now_ms: int, overlap_ms: int = 24 * HOUR_MS, destination: str = "hook") -> str:
    """The new signing secret."""
    rotated = rotate_secrets(
        ACME,
        DestinationId(destination),
        log.current(),
        kinds=KINDS,
        master=MASTER,
        overlap_ms=overlap_ms,
        now_ms=now_ms,
    )
    log.writes += rotated.writes
    (made,) = rotated.made
    return made.value.get_secret_value()


def rekey(log: Log, now_ms: int = 0) -> int:
    rekeyed = rotate_tenant_key(ACME, log.current(), master=MASTER, now_ms=now_ms)
    log.writes += rekeyed.writes
    return rekeyed.key_version


def the(registry: Registry, ref: TenantRef = ACME) -> Tenant:
    tenant = registry.tenant(ref)
    assert tenant is not None
    return tenant


# ---------------------------------------------------------------- secrets


def test_both_secrets_sign_during_the_overlap_the_new_one_first_and_one_after_it(log: Log) -> None:
    second = rotate(log, 1000)
    assert log.secrets(1000) == {"signing": [second, FIRST]}
    assert log.secrets(1000 + 24 * HOUR_MS - 1) == {"signing": [second, FIRST]}
    assert log.secrets(1000 + 24 * HOUR_MS) == {"signing": [second]}


def test_an_overlap_of_nothing_ends_the_old_secret_at_once(log: Log) -> None:
    second = rotate(log, 1000, 0)
    assert log.secrets(1000) == {"signing": [second]}
    assert len(log.current().tenants[ACME.tenant].destinations["hook"].secrets["signing"]) == 1


def test_a_second_rotation_lengthens_no_overlap_and_forgets_what_has_ended(log: Log) -> None:
    second = rotate(log, 0)
    third = rotate(log, HOUR_MS)
    assert log.secrets(HOUR_MS) == {"signing": [third, second, FIRST]}
    assert log.secrets(24 * HOUR_MS) == {"signing": [third, second]}
    fourth = rotate(log, 3 * DAY_MS)
    assert log.secrets(3 * DAY_MS) == {"signing": [fourth, third]}


def test_the_new_secret_comes_first_also_where_the_clock_went_back(log: Log) -> None:
    second = rotate(log, HOUR_MS)
    third = rotate(log, 0)
    assert log.secrets(0)["signing"][:2] == [third, second]


def test_a_rotation_changes_the_tenant_whole_and_nobody_else(log: Log) -> None:
    before = log.registry()
    count = len(log.writes)
    rotate(log, 0)
    for kept in range(count, len(log.writes)):
        assert the(log.registry(log.writes[:kept])).config_version == 1
    after = log.registry()
    assert the(after).config_version == 2
    other = TenantRef(ACME.vendor, ExternalId("acme2"))
    assert the(after, other).config_version == the(before, other).config_version
    assert all(b"/acme/" in write.key for write in log.writes[count:])


def test_what_a_410_disabled_stays_disabled_by_a_rotation(log: Log) -> None:
    log.writes.append(Write("state", disabled_key(ACME, "hook").encode(), encode_control(DisabledRecord(1, 5))))
    assert the(log.registry()).destinations[HOOK].disabled
    rotate(log, 0)
    rekey(log)
    assert the(log.registry()).destinations[HOOK].disabled


def test_the_file_s_own_secret_still_tells_no_change_after_a_key_rotation(log: Log) -> None:
    rekey(log)
    assert log.apply(BASE).writes == ()


def test_what_cannot_be_rotated_is_refused_and_says_what_there_is(log: Log) -> None:
    with pytest.raises(Refusal, match="tenant 'acme' has no destination 'hok'; it has: hook"):
        rotate(log, 0, destination="hok")
    log.apply("tenants: [{externalId: acme2}]", prune=True)
    with pytest.raises(Refusal, match="tenant 'acme' is removed; apply it again first"):
        rotate(log, 0)
    with pytest.raises(Refusal, match="vendor default has no tenant 'nobody'"):
        known_tenant(TenantRef(ACME.vendor, ExternalId("nobody")), log.current())


# ---------------------------------------------------------------- keys


def test_a_new_key_version_seals_and_the_earlier_ones_go_on_opening(log: Log) -> None:
    earlier = the(log.registry()).vault.seal("delivery", "hook", "d1", b"waits")
    assert (rekey(log), rekey(log)) == (2, 3)
    tenant = the(log.registry())
    assert (tenant.key_version, tenant.vault.versions) == (3, (1, 2, 3))
    assert tenant.vault.open("delivery", "hook", "d1", earlier) == b"waits"
    assert tenant.vault.seal("delivery", "hook", "d1", b"new")[1:5] == (3).to_bytes(4, "big")


def test_the_secrets_are_sealed_with_the_new_version_and_keep_their_values_and_ends(log: Log) -> None:
    second = rotate(log, 0)
    rekey(log)
    assert log.secrets(1) == {"signing": [second, FIRST]}
    assert log.secrets(24 * HOUR_MS) == {"signing": [second]}
    (hook,) = log.current().tenants[ACME.tenant].destinations.values()
    assert {one.sealed[1:5] for one in hook.secrets["signing"]} == {(2).to_bytes(4, "big")}


def test_a_secret_whose_overlap_has_ended_is_not_carried_on(log: Log) -> None:
    rotate(log, 0)
    rekey(log, now_ms=24 * HOUR_MS)
    (hook,) = log.current().tenants[ACME.tenant].destinations.values()
    assert len(hook.secrets["signing"]) == 1


def test_a_key_rotation_takes_effect_whole(log: Log) -> None:
    count = len(log.writes)
    rekey(log)
    for kept in range(count, len(log.writes)):
        tenant = the(log.registry(log.writes[:kept]))
        assert tenant.key_version == 1
        assert open_secrets(tenant, tenant.destinations[HOOK], 0) == {"signing": [FIRST]}


def test_a_new_master_key_wraps_the_data_keys_that_there_are() -> None:
    old, new = os.urandom(32), os.urandom(32)
    both, only = MasterKeys({"k2": new, "k1": old}), MasterKeys({"k2": new})
    fresh = Log()
    fresh.apply(BASE, master=MasterKeys({"k1": old}))
    known = fresh.current().tenants[ACME.tenant]
    writes = rewrap(ACME, known, both)
    assert {write.topic for write in writes} == {"keys"}
    latest = {write.key: write for write in [*fresh.writes, *writes]}  # as after a compaction
    registry = Registry(only, TOPICS)
    for write in latest.values():
        registry.fold(NAMES[write.topic], write.key, write.value)
    tenant = the(registry)
    assert open_secrets(tenant, tenant.destinations[HOOK], 0) == {"signing": [FIRST]}
    fresh.writes += writes
    assert rewrap(ACME, fresh.current().tenants[ACME.tenant], both) == []


def test_a_worker_hears_nothing_of_a_master_rotation() -> None:
    both = MasterKeys({"k2": os.urandom(32), "k1": (old := os.urandom(32))})
    fresh = Log()
    fresh.apply(BASE, master=MasterKeys({"k1": old}))
    registry = Registry(both, TOPICS)
    for write in fresh.writes:
        registry.fold(NAMES[write.topic], write.key, write.value)
    before = the(registry)
    for write in rewrap(ACME, fresh.current().tenants[ACME.tenant], both):
        assert registry.fold(NAMES[write.topic], write.key, write.value) is None
    assert the(registry) is before
    assert registry.faults == {}


def test_a_foreign_master_key_wraps_nothing(log: Log) -> None:
    foreign = MasterKeys({"k9": os.urandom(32)})
    for act in (
        lambda: rotate_tenant_key(ACME, log.current(), master=foreign, now_ms=0),
        lambda: rewrap(ACME, log.current().tenants[ACME.tenant], foreign),
    ):
        with pytest.raises(SettingsError, match="HEADGATE_MASTER_KEY_FILE"):
            act()


# ---------------------------------------------------------------- shredding and deletion


def unsealable(tenant: Tenant, sealed: bytes) -> str:
    with pytest.raises(Unsealable) as caught:
        tenant.vault.open("delivery", "hook", "d1", sealed)
    return caught.value.code


def test_a_shredded_key_opens_nothing_in_whatever_order_it_is_read(log: Log) -> None:
    rekey(log)
    sealed = the(log.registry()).vault.seal("delivery", "hook", "d1", b"gone")
    writes = shred(ACME, log.current().tenants[ACME.tenant], 7)
    assert [(write.topic, write.value is None) for write in writes] == [
        ("keys", True),
        ("keys", True),
        ("control", False),
    ]
    for order in permutations(writes):
        registry = log.registry()
        for write in order:
            registry.fold(NAMES[write.topic], write.key, write.value)
        assert unsealable(the(registry), sealed) == "shredded"
    log.writes += writes
    assert shred(ACME, log.current().tenants[ACME.tenant], 8) == []


def test_a_process_that_starts_after_the_shredding_knows_that_the_key_is_gone(log: Log) -> None:
    sealed = the(log.registry()).vault.seal("delivery", "hook", "d1", b"gone")
    log.writes += shred(ACME, log.current().tenants[ACME.tenant], 7)
    latest = {write.key: write for write in log.writes}  # as after a compaction: the key was never there
    for reverse in (False, True):
        registry = log.registry(sorted(latest.values(), key=lambda write: write.topic, reverse=reverse))
        tenant = the(registry)
        assert (tenant.state, tenant.shredded_through) == ("active", 1)
        assert unsealable(tenant, sealed) == "shredded"


def test_without_the_marker_a_process_waits_for_the_key(log: Log) -> None:
    """The control: what is merely absent is not gone."""
    log.writes += [write for write in shred(ACME, log.current().tenants[ACME.tenant], 7) if write.topic == "keys"]
    latest = {write.key: write for write in log.writes}
    assert log.registry(list(latest.values())).tenant(ACME) is None


def test_a_shredded_tenant_that_is_applied_again_has_a_new_key(log: Log) -> None:
    log.writes += shred(ACME, log.current().tenants[ACME.tenant], 7)
    log.apply(BASE)
    tenant = the(log.registry())
    assert (tenant.key_version, tenant.vault.versions, tenant.shredded_through) == (2, (2,), 1)
    assert log.secrets() == {"signing": [FIRST]}


def test_a_tick_means_nothing_to_a_reader(log: Log) -> None:
    registry = log.registry()
    before = the(registry)
    assert registry.fold(TOPICS.keys, tick_key(ACME), None) is None
    assert the(registry) is before
    assert registry.faults == {}


def removed(log: Log) -> None:
    log.apply("tenants: [{externalId: acme2}]", prune=True)


def state_of(writes: Sequence[Write]) -> TenantRecord:
    record = decode_control(writes[-1].value or b"")
    assert writes[-1].key == tenant_key(ACME).encode()
    assert isinstance(record, TenantRecord)
    return record


def test_a_removed_tenant_is_deleting_then_deleted_and_leaves_no_data(log: Log) -> None:
    removed(log)
    first = begin_deletion(ACME, log.current().tenants[ACME.tenant])
    assert state_of(first).state == "deleting"
    log.writes += first
    assert the(log.registry()).state == "deleting"
    assert begin_deletion(ACME, log.current().tenants[ACME.tenant]) == []  # run again, it goes on from here
    second = end_deletion(ACME, log.current().tenants[ACME.tenant], 9)
    log.writes += second
    left = log.current().tenants[ACME.tenant]
    assert (left.destinations, left.routes, left.keys, left.disabled) == ({}, {}, {}, {})
    assert left.shredded_through == 1
    assert left.record == TenantRecord("acme", "acme", "acme", left.record.configVersion, 1, state="deleted")
    assert end_deletion(ACME, left, 9) == shred(ACME, left, 9) == []
    assert the(log.registry()).state == "deleted"


def test_an_active_tenant_is_never_deleted(log: Log) -> None:
    known = log.current().tenants[ACME.tenant]
    assert begin_deletion(ACME, known) == end_deletion(ACME, known, 0) == []


def test_a_deleted_tenant_that_is_applied_again_starts_with_higher_numbers(log: Log) -> None:
    removed(log)
    log.writes += begin_deletion(ACME, log.current().tenants[ACME.tenant])
    log.writes += end_deletion(ACME, log.current().tenants[ACME.tenant], 9)
    before = log.current().tenants[ACME.tenant].record.configVersion
    log.apply(BASE)
    tenant = the(log.registry())
    assert (tenant.state, tenant.key_version, tenant.tag) == ("active", 2, "acme")
    assert tenant.config_version > before


@pytest.mark.parametrize(("topics", "tag"), [("own", "acme"), ("pooled", None)])
def test_only_topics_that_are_the_tenant_s_own_are_its_to_delete(topics: str, tag: str | None) -> None:
    log = Log()
    log.apply(f"tenants: [{{externalId: acme, topics: {topics}}}, {{externalId: acme2, topics: {topics}}}]")
    assert own_tag(ACME, log.current()) == tag
