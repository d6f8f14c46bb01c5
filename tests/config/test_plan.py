"""What an apply would change: plans are folded as the topics would be, and read by the workers' registry."""

import os
from collections.abc import Iterable

import msgspec
import pytest

from cli.apply import RULES
from config.document import DocumentError, parse_document
from config.plan import OVERLAP_MS, Creation, Current, Plan, Write, current_state, disabled_key, make_plan
from config.registry import Registry, open_secrets
from config.settings import SettingsError
from config.vault import MasterKeys
from connectors.registry import KINDS
from schemas.control import ControlKey, DisabledRecord, ShreddedMarker, decode_control, encode_control
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef, Vendor
from schemas.topics import Topics

MASTER = MasterKeys({"k1": os.urandom(32)})
TOPICS = Topics()
ACME = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
FIRST, SECOND = "whsec_" + "QUFB" * 8, "whsec_" + "QkJC" * 8
DAY_MS = 86_400_000
OWN = Creation("own", 16)

BASE = """\
tenants:
  - externalId: acme
    name: Acme
    destinations:
      - id: hook
        type: webhook
        options: {url: "https://a.example/in?token=hidden"}
        secrets: {signing: {env: SIGNING}}
    routes:
      - id: all
        match: {types: ["*"]}
        to: [hook]
"""


class Log:
    """The compacted topics, kept as a list of writes."""

    def __init__(self) -> None:
        self.writes: list[Write] = []

    def current(self) -> Current:
        return current_state(DEFAULT_VENDOR, ((write.key, write.value) for write in self.writes))

    def registry(self, writes: Iterable[Write] | None = None) -> Registry:
        registry = Registry(MASTER, TOPICS)
        names = {"control": TOPICS.control, "keys": TOPICS.keys, "state": TOPICS.state}
        for write in self.writes if writes is None else writes:
            registry.fold(names[write.topic], write.key, write.value)
        return registry

    def apply(
        self,
        text: str,
        signing: str = FIRST,
        *,
        now_ms: int = 0,
        prune: bool = False,
        creation: Creation = OWN,
        master: MasterKeys = MASTER,
    ) -> Plan:
        document = parse_document(
            text, file="f.yaml", rules=RULES, env={"SIGNING": signing}, vendors=[DEFAULT_VENDOR, Vendor("other")]
        )
        plan = make_plan(
            document, self.current(), kinds=KINDS, master=master, creation=creation, prune=prune, now_ms=now_ms
        )
        self.writes += plan.writes
        return plan

    def secrets(self, now_ms: int = 0) -> dict[str, list[str]]:
        tenant = self.registry().tenant(ACME)
        assert tenant is not None
        return open_secrets(tenant, next(iter(tenant.destinations.values())), now_ms)


@pytest.fixture
def log() -> Log:
    return Log()


def lines(plan: Plan) -> list[str]:
    return [str(line) for line in plan.lines]


def test_a_new_tenant_is_read_by_the_registry_as_it_was_written(log: Log) -> None:
    plan = log.apply(BASE)
    assert lines(plan) == [
        "+ tenant acme: slug acme, topics acme",
        "+ destination acme/hook: webhook",
        "+ secret acme/hook/signing",
        "+ route acme/all",
    ]
    tenant = log.registry().tenant(ACME)
    assert tenant is not None
    assert (tenant.name, tenant.slug, tenant.tag, tenant.config_version, tenant.state) == (
        "Acme",
        "acme",
        "acme",
        1,
        "active",
    )
    assert [route.id for route in tenant.routes] == ["all"]
    assert log.secrets() == {"signing": [FIRST]}


def test_the_tenant_s_record_is_written_last_and_swaps_it_whole(log: Log) -> None:
    log.apply(BASE)
    for count in range(len(log.writes)):
        assert log.registry(log.writes[:count]).tenant(ACME) is None
    assert log.registry().tenant(ACME) is not None


def test_a_second_identical_apply_changes_nothing(log: Log) -> None:
    log.apply(BASE)
    plan = log.apply(BASE, now_ms=DAY_MS)
    assert (plan.lines, plan.writes) == ((), ())


def test_only_what_changed_gets_a_new_version(log: Log) -> None:
    log.apply(BASE)
    plan = log.apply(BASE.replace("in?token", "out?token"))
    assert lines(plan) == ["~ destination acme/hook: options.url"]
    assert "hidden" not in "".join(lines(plan))
    tenant = log.current().tenants[ExternalId("acme")]
    assert tenant.record.configVersion == 2
    assert (tenant.destinations["hook"].version, tenant.routes["all"].version) == (2, 1)


def test_a_changed_secret_overlaps_with_the_old_one_for_a_day(log: Log) -> None:
    log.apply(BASE, FIRST, now_ms=1000)
    plan = log.apply(BASE, SECOND, now_ms=5000)
    assert lines(plan) == ["~ secret acme/hook/signing: rotated, the old one stays valid for 24 h"]
    assert log.secrets(5000) == {"signing": [SECOND, FIRST]}
    assert log.secrets(5000 + OVERLAP_MS - 1) == {"signing": [SECOND, FIRST]}
    assert log.secrets(5000 + OVERLAP_MS) == {"signing": [SECOND]}
    assert log.apply(BASE, SECOND, now_ms=6000).lines == ()


def test_a_secret_taken_back_is_live_once(log: Log) -> None:
    for at, secret in enumerate((FIRST, SECOND, FIRST)):
        log.apply(BASE, secret, now_ms=at)
    assert log.secrets(10) == {"signing": [FIRST, SECOND]}


def test_a_header_is_replaced_without_overlap(log: Log) -> None:
    text = BASE.replace("{signing:", "{headers: {X-Token: {env: SIGNING}}, signing:")
    log.apply(text, FIRST)
    plan = log.apply(text, SECOND, now_ms=1)
    assert "~ secret acme/hook/headers.X-Token: replaced" in lines(plan)
    assert log.secrets(1)["headers.X-Token"] == [SECOND]


def test_a_secret_that_is_not_given_is_made_once_and_then_kept(log: Log) -> None:
    text = BASE.replace("        secrets: {signing: {env: SIGNING}}\n", "")
    plan = log.apply(text)
    (made,) = plan.made
    assert "+ secret acme/hook/signing: made, shown once" in lines(plan)
    assert log.secrets() == {"signing": [made.value.get_secret_value()]}
    assert made.value.get_secret_value() not in repr(plan)
    again = log.apply(text)
    assert (again.lines, again.made) == ((), ())


def test_a_secret_that_is_no_longer_named_is_removed(log: Log) -> None:
    log.apply(BASE.replace("{signing:", "{headers: {X-Token: {env: SIGNING}}, signing:"))
    plan = log.apply(BASE)
    assert lines(plan) == ["- secret acme/hook/headers.X-Token"]
    assert set(log.secrets()) == {"signing"}


def test_within_a_tenant_the_file_is_the_whole_list(log: Log) -> None:
    log.apply(BASE)
    plan = log.apply("tenants:\n  - externalId: acme\n    name: Acme\n")
    assert lines(plan) == [
        "- route acme/all",
        "- destination acme/hook: what is parked for it becomes dead letters",
    ]
    tenant = log.registry().tenant(ACME)
    assert tenant is not None
    assert (tenant.destinations, tenant.routes) == ({}, ())


OTHER = "tenants:\n  - externalId: other\n"


def test_a_tenant_that_is_not_in_the_file_is_left_alone_unless_pruned(log: Log) -> None:
    log.apply(BASE)
    assert lines(log.apply(OTHER)) == ["+ tenant other: slug other, topics other"]
    assert log.current().tenants[ExternalId("acme")].record.state == "active"
    plan = log.apply(OTHER, prune=True)
    assert plan.removed == ("acme",)
    assert log.current().tenants[ExternalId("acme")].record.state == "removed"
    assert log.apply(OTHER, prune=True).lines == ()
    back = log.apply(BASE)
    assert lines(back) == ["+ tenant acme: was removed"]
    assert log.secrets() == {"signing": [FIRST]}


def test_slug_and_topics_are_for_good(log: Log) -> None:
    log.apply("tenants:\n  - {externalId: acme, slug: a1, topics: pooled}\n")
    assert log.apply("tenants:\n  - {externalId: acme}\n").lines == ()
    with pytest.raises(DocumentError) as raised:
        log.apply("tenants:\n  - {externalId: acme, slug: a2, topics: own}\n")
    assert [str(fault) for fault in raised.value.faults] == [
        "f.yaml:2:18: tenants[0].slug: this tenant's slug is 'a1' for good; write a1 or leave it out",
        "f.yaml:2:18: tenants[0].topics: this tenant's topics are pooled for good; write pooled or leave it out",
    ]


def test_a_slug_names_one_tenant_of_the_vendor(log: Log) -> None:
    log.apply("tenants:\n  - {externalId: acme, slug: taken}\n")
    with pytest.raises(DocumentError, match=r"tenants\[0\].slug: 'taken' is the slug of tenant 'acme'"):
        log.apply("tenants:\n  - {externalId: taken}\n")


def test_a_pool_is_kept_when_their_number_grows(log: Log) -> None:
    text = "tenants:\n" + "".join(f"  - externalId: t{n}\n" for n in range(50))
    log.apply(text, creation=Creation("pooled", 4))
    tags = {name: tenant.record.tag for name, tenant in log.current().tenants.items()}
    assert set(tags.values()) == {"pool-00", "pool-01", "pool-02", "pool-03"}
    log.apply(text.replace("tenants:", "tenants:\n  - externalId: new"), creation=Creation("pooled", 64))
    after = log.current().tenants
    assert {name: after[name].record.tag for name in tags} == tags


def disable(log: Log) -> None:
    version = log.current().tenants[ExternalId("acme")].destinations["hook"].version
    record = encode_control(DisabledRecord(version, 1))
    log.writes.append(Write("state", disabled_key(ACME, "hook").encode(), record))


def is_off(log: Log) -> bool:
    tenant = log.registry().tenant(ACME)
    assert tenant is not None
    return next(iter(tenant.destinations.values())).disabled


def test_only_new_options_enable_a_disabled_destination(log: Log) -> None:
    log.apply(BASE)
    disable(log)
    log.apply(BASE, SECOND)
    assert is_off(log)
    log.apply(BASE.replace('in?token=hidden"}', 'in?token=hidden"}\n        limits: {in_flight: 3}'), SECOND)
    assert is_off(log)
    plan = log.apply(BASE.replace("a.example", "b.example"), SECOND)
    assert lines(plan) == ["~ destination acme/hook: options.url, limits, enabled again"]
    assert not is_off(log)
    assert any(write.topic == "state" and write.value is None for write in plan.writes)


def test_a_shredded_tenant_starts_anew_with_a_new_key(log: Log) -> None:
    log.apply(BASE)
    marker = ShreddedMarker("acme", 1, 5)
    key = ControlKey("shredded", ACME.vendor, ACME.tenant, "")
    log.writes.append(Write("control", key.encode(), encode_control(marker)))
    plan = log.apply(BASE, now_ms=7)
    assert [write.topic for write in plan.writes].count("keys") == 1
    tenant = log.registry().tenant(ACME)
    assert tenant is not None
    assert tenant.key_version == 2
    assert log.secrets() == {"signing": [FIRST]}


def test_a_key_that_no_master_key_opens_is_told_by_name(log: Log) -> None:
    log.apply(BASE)
    with pytest.raises(SettingsError, match=r"tenant 'acme': its key is wrapped by master key 'k1' .*\(k2\)"):
        log.apply(BASE, SECOND, master=MasterKeys({"k2": os.urandom(32)}))


@pytest.mark.parametrize("name", ["k1", "k2"])
def test_a_master_key_that_opens_no_tenant_s_key_wraps_none(log: Log, name: str) -> None:
    log.apply(BASE)
    foreign = MasterKeys({name: os.urandom(32)})
    with pytest.raises(SettingsError, match=rf"\({name}\) do not open .* 'acme', wrapped by 'k1': .*MASTER_KEY_FILE"):
        log.apply(BASE.replace("acme", "globex"), master=foreign)


def test_a_new_master_key_wraps_beside_the_one_before_it(log: Log) -> None:
    old = os.urandom(32)
    log.apply(BASE, master=MasterKeys({"k1": old}))
    both = MasterKeys({"k2": os.urandom(32), "k1": old})
    plan = log.apply(BASE.replace("acme", "globex"), master=both)
    assert [write.topic for write in plan.writes].count("keys") == 1


def test_another_vendor_s_tenant_of_the_same_name_is_another_tenant(log: Log) -> None:
    log.apply("vendor: other\n" + BASE)
    assert "acme" not in log.current().tenants
    plan = log.apply(BASE)
    assert lines(plan)[0] == "+ tenant acme: slug acme, topics acme"


def test_look_alike_ids_share_no_record(log: Log) -> None:
    names = ["a/b", "a%2Fb", "A", "a", "ü", "u\u0308", "a b", "acme", "acme2"]
    text = "tenants:\n" + "".join(f"  - externalId: {msgspec.json.encode(name).decode()}\n" for name in names)
    plan = log.apply(text)
    keys = [write.key for write in plan.writes if write.topic == "control"]
    assert len(set(keys)) == len(names)
    assert set(log.current().tenants) == set(names)
    slugs = {tenant.record.slug for tenant in log.current().tenants.values()}
    assert len(slugs) == len(names)


def test_no_record_holds_a_secret_in_the_clear(log: Log) -> None:
    log.apply(BASE)
    log.apply(BASE, SECOND)
    everything = b"".join(write.value or b"" for write in log.writes)
    for secret in (FIRST, SECOND):
        assert secret.encode() not in everything
        assert secret.removeprefix("whsec_").encode() not in everything
    assert b"a.example" in everything  # the control: what is no secret is found
    assert all(decode_control(write.value) for write in log.writes if write.value)


def test_what_must_wait_longest_is_known_to_who_makes_topics(log: Log) -> None:
    text = BASE.replace('hidden"}', 'hidden"}\n        retry: {schedule: [0s], max_age: 200h}')
    assert log.apply(text).longest_max_age_s == 200 * 3600
    assert log.apply(OTHER).longest_max_age_s == 200 * 3600


def test_which_kinds_a_tag_has_to_do_with_is_known_to_who_makes_topics(log: Log) -> None:
    pooled = BASE.replace("    name: Acme\n", "    name: Acme\n    topics: pooled\n")
    assert pooled != BASE
    kafka = "      - {id: k, type: kafka, options: {bootstrap: 'k.example:9093', topic: t}}\n"
    other = pooled.replace("externalId: acme", "externalId: other").replace("    routes:\n", f"{kafka}    routes:\n")
    assert log.apply(pooled, creation=Creation("pooled", 1)).tags == {Tag("pool-00"): {"webhook"}}
    assert log.apply(other, creation=Creation("pooled", 1)).tags == {Tag("pool-00"): {"webhook", "kafka"}}
    # also of who is not in the file
    assert log.apply(pooled, creation=Creation("pooled", 1)).tags == {Tag("pool-00"): {"webhook", "kafka"}}
