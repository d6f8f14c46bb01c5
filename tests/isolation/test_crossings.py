"""Nothing of one tenant reaches another, however alike their names are (scoreboard R13), and no secret leaks (R16)."""

import asyncio
import json
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import quote

import pytest
import redis
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from config.registry import Registry
from config.vault import MasterKeys, Unsealable, Vault
from dev.inbox import Refuse, Throttle
from schemas.attempt import PURPOSE_DELIVERY
from schemas.ids import DEFAULT_VENDOR, ExternalId, Tag, TenantRef, default_slug, percent
from schemas.wire import Parked, parked_headers, read_parked
from tests.deployment import Deployment, Read, event, eventually

pytestmark = pytest.mark.broker

_LONG: Final = "x" * 199
LOOK_ALIKES: Final = (
    "acme",
    "acme2",
    "ACME",
    "Acme",
    "acme-",
    "-acme",
    "a.b",
    "a/b",
    "a%2Fb",
    "a%252Fb",
    "ac me",
    "ac\u00a0me",
    "acme/hook",
    "caf\u00e9",
    "cafe\u0301",
    "\u0430cme",  # a Cyrillic a
    "acme\u200b",
    default_slug("ACME"),  # the slug that another has by default
    "t-acme",
    "pool-00",
    "unrouted",
    "control",
    "*",
    "{acme}",
    "4:acme",
    "\u1e9e",
    "\U0001f600",
    _LONG + "1",
    _LONG + "2",
    "\u00e9" * 100,
)
# to a hundred: each of these differs from the others by what folding, trimming or cutting would take away
MORE_LOOK_ALIKES: Final = tuple(
    name for n in range(10) for name in (f"t-{n}", f"T-{n}", f"t.{n}", f"t-{n}/", f"t-0{n}", f"t-{n}\u0301", f"t-{n} ")
)
SHARED_IDS: Final = ["e1", "e2", "e3"]


def parked(record: Read) -> Parked:
    found = read_parked(list(record.headers.items()))
    assert found is not None
    return found


def secret_of(number: int) -> str:
    return "whsec_" + b64encode(bytes([number]) * 32).decode()


def look_alikes(deployment: Deployment, topics: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """A tenant for each name, with a webhook that takes and one that refuses, each with a path and a secret of its own.

    The payload is not the tenant's name: what crosses would be seen by the path it came in at.
    """
    tenants = []
    for number, name in enumerate(names):
        hooks = [
            {
                "id": place,
                "type": "webhook",
                "options": {"url": deployment.inbox.url(f"/{place}-{number}")},
                "secrets": {"signing": {"value": secret_of(number)}},
                "retry": {"schedule": ["0s", "1s"]},
            }
            for place in ("hook", "refuses")
        ]
        routes = [
            {"id": "all", "match": {"types": ["*"]}, "to": ["hook"]},
            {"id": "paid", "match": {"types": ["invoice.paid"]}, "to": ["refuses"]},
        ]
        # what looks like another's default slug has to be given one of its own
        slug = {"slug": f"own-{number}"} if name == default_slug("ACME") else {}
        tenants.append({"externalId": name, "topics": topics, "destinations": hooks, "routes": routes, **slug})
        deployment.inbox.script(f"/hook-{number}", secrets=[secret_of(number)])
        deployment.inbox.script(f"/refuses-{number}", Refuse(500), secrets=[secret_of(number)])
    return tenants


async def read_all(deployment: Deployment, topics: Sequence[str]) -> list[list[Read]]:
    """What each of the topics holds."""
    return await asyncio.gather(*(asyncio.to_thread(deployment.read, topic) for topic in topics))


def registry_of(deployment: Deployment) -> Registry:
    """What the control plane says, read as an operator's tool would."""
    registry = Registry(MasterKeys.load(deployment.settings.keys), deployment.settings.topics)
    topics = deployment.settings.topics
    for topic in (topics.keys, topics.control):
        for one in deployment.read(topic):
            registry.fold(topic, one.key, one.value)
    return registry


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("topics", "names", "bulk"),
    [
        ("own", LOOK_ALIKES, 0),
        ("pooled", LOOK_ALIKES, 0),
        pytest.param("pooled", LOOK_ALIKES + MORE_LOOK_ALIKES, 997, marks=pytest.mark.chaos("R13")),
    ],
    ids=["own", "pooled", "full"],
)
async def test_of_look_alike_tenants_with_the_same_event_ids_nothing_crosses(
    stack: Any, topics: str, names: Sequence[str], bulk: int, report: Callable[[str], None]
) -> None:
    """Each event goes to one destination that takes and one that refuses; `bulk` more of each tenant to the first."""
    async with Deployment.on(stack, HEADGATE_POOLS="2", HEADGATE_TENANT_LABEL="tenant") as deployment:
        applied = await deployment.apply({"tenants": look_alikes(deployment, topics, names)})
        assert applied.written
        worker = await deployment.worker()
        numbers = range(len(names))
        bulk_ids = [f"bulk{n}" for n in range(bulk)]
        await deployment.publish(
            [
                (name.encode(), {**event(one), "payload": {"of": number}})
                for one in SHARED_IDS
                for number, name in enumerate(names)
            ]
        )
        await deployment.publish(
            [
                (name.encode(), {**event(one, "invoice.sent"), "payload": {"of": number}})
                for one in bulk_ids
                for number, name in enumerate(names)
            ]
        )
        each = len(SHARED_IDS) + bulk
        await asyncio.gather(*(deployment.inbox.wait_for(f"/hook-{n}", each, 300) for n in numbers))
        total = len(names) * len(SHARED_IDS)
        await eventually(
            lambda: worker.metric("headgate_dead_letters_total", code="server_error") == total, "all dead letters", 90
        )
        await deployment.all_committed()

        # deliveries: each at its own path, once, signed with its own secret; by no other tenant's
        ids: set[str] = set()
        for number in numbers:
            for place, expected in (("hook", SHARED_IDS + bulk_ids), ("refuses", SHARED_IDS * 2)):
                received = deployment.inbox.received(f"/{place}-{number}")
                assert sorted(json.loads(one.body)["id"] for one in received) == sorted(expected)
                assert {json.loads(one.body)["payload"]["of"] for one in received} == {number}
                assert all(one.signature_ok for one in received)
                ids |= {one.webhook_id for one in received}
        assert (
            len(ids) == 2 * total + len(names) * bulk
        )  # the same event id names another delivery for each tenant and destination

        # parked and dead: in the tenant's own tag, under its own key
        registry = await asyncio.to_thread(registry_of, deployment)
        tenants = {name: registry.tenant(TenantRef(DEFAULT_VENDOR, ExternalId(name))) for name in names}
        tags = {name: tenant.tag for name, tenant in tenants.items() if tenant is not None}
        assert len(tags) == len(names)
        assert len(set(tags.values())) == (len(names) if topics == "own" else 2)
        of = deployment.settings.topics
        parking = [
            make(DEFAULT_VENDOR, tag) for tag in sorted(set(tags.values())) for make in (of.dead_letters, of.retry)
        ]
        records = [record for topic in await read_all(deployment, parking) for record in topic]
        assert len(records) >= 2 * total
        opened = 0
        for record in records:
            said = parked(record)
            assert record.topic.rpartition(".")[2] == tags[said.tenant.tenant]
            assert record.key == f"{percent(said.tenant.tenant)}/{said.destination}".encode()
            for name, tenant in tenants.items():
                assert tenant is not None
                try:
                    inside = tenant.vault.open(PURPOSE_DELIVERY, said.destination, said.delivery, record.value or b"")
                except Unsealable:
                    assert name != said.tenant.tenant
                else:
                    opened += 1
                    assert json.loads(inside)["customerExternalId"] == name == said.tenant.tenant
        assert opened == len(records)

        # attempts: under the tenant's key
        attempts = [
            (record.key, json.loads(record.value or b"{}"))
            for record in deployment.read(deployment.settings.topics.attempts(DEFAULT_VENDOR))
        ]
        assert all(key == record["tenant"].encode() for key, record in attempts)
        assert {record["tenant"] for _, record in attempts} == set(names)
        # an event and a delivery, and of some two tries refused
        assert len({record["id"] for _, record in attempts}) == 4 * total + 2 * len(names) * bulk

        # metrics: counted to each alone
        counted: dict[str, float] = {}
        for family in text_string_to_metric_families(worker.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == "headgate_deliveries_total":
                    name = sample.labels["tenant"]
                    counted[name] = counted.get(name, 0) + sample.value
        assert counted == dict.fromkeys(names, len(SHARED_IDS) + each)

        # Redis: hashes alone, of each tenant as many
        spaces: dict[bytes, int] = {}
        for key in redis.Redis.from_url(deployment.settings.redis.url).scan_iter(f"*{deployment.prefix}*", 1000):
            # what is shorter may stand in a hash by chance
            assert not any(len(name) > 5 and name.encode() in key for name in names), key
            assert key.isascii() and b"e1" not in key.split(b":"), key
            if b":average:" not in key and not key.endswith(b":workers"):  # of no tenant: which workers there are
                space = key.rpartition(b":")[0]
                spaces[space] = spaces.get(space, 0) + 1
        assert len(spaces) in (0, len(names))
        assert max(spaces.values(), default=0) <= len(SHARED_IDS) + 2 * each  # an event, and two deliveries or one
        report(
            f"{len(names)} tenants, {len(names) * each:,} events, {len(ids):,} deliveries, {len(records):,} records at "
            "rest tried with every key: 0 crossings"
        )


# ---------------------------------------------------------------- forged


def write(deployment: Deployment, topic: str, record: Read, headers: Sequence[tuple[str, bytes]]) -> None:
    producer = Producer(deployment.settings.kafka.confluent())
    producer.produce(topic, record.value, record.key, partition=0, headers=list(headers))
    assert producer.flush(20) == 0


def due_now(said: Parked, tenant: str) -> list[tuple[str, bytes]]:
    """Headers that say the delivery is that tenant's, and due."""
    return parked_headers(
        replace(said, tenant=TenantRef(DEFAULT_VENDOR, ExternalId(tenant)), not_before_ms=1, hop=said.hop + 1)
    )


async def waiting_of_b(deployment: Deployment) -> tuple[Read, Parked]:
    """Tenants a and b, and a delivery of b's that waits for an hour."""
    inbox = deployment.inbox
    inbox.script("/b", Throttle("3600"))
    await deployment.apply({"tenants": [deployment.tenant("a"), deployment.tenant("b")]})
    await deployment.publish([("b", event("e1"))])
    (record,) = await eventually(lambda: deployment.retries("b"), "b's delivery waits")
    return record, parked(record)


@pytest.mark.scoreboard("R13")
async def test_a_forged_retry_record_is_delivered_to_nobody_and_kept_as_unrouted(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("a"), deployment.tenant("b")]})
    await deployment.worker()
    record, said = await waiting_of_b(deployment)
    retry_of_a = deployment.settings.topics.retry(DEFAULT_VENDOR, Tag("a"))
    forged = {
        "says it is b's, in a's topic": due_now(said, "b"),
        "says it is a's, with b's value": due_now(said, "a"),
        "says it is of somebody unknown": due_now(said, "nobody"),
        "says nothing": [],
    }
    for headers in forged.values():
        await asyncio.to_thread(write, deployment, retry_of_a, record, headers)
    letters = await eventually(lambda: (x := deployment.unrouted())[3:] and x, "four unrouted records")
    assert sorted(one.headers["hg-error"] for one in letters) == [
        b"malformed",
        b"unknown_tenant",
        b"unsealable",
        b"wrong_topic",
    ]
    assert {one.value for one in letters} == {record.value}
    await deployment.publish([("a", event("after"))])
    await deployment.inbox.wait_for("/a", 1, 30)
    assert [json.loads(one.body)["id"] for one in deployment.inbox.received("/a")] == ["after"]
    assert len(deployment.inbox.received("/b")) == 1


@pytest.mark.scoreboard("R13")
async def test_without_its_binding_a_swapped_value_is_delivered_to_another_tenant(deployment: Deployment) -> None:
    """The control of the test above."""
    await deployment.apply({"tenants": [deployment.tenant("a"), deployment.tenant("b")]})
    command = (sys.executable, "-m", "tests.isolation.without", "binding")
    await deployment.launch("w0", command).ready()
    record, said = await waiting_of_b(deployment)
    retry_of_a = deployment.settings.topics.retry(DEFAULT_VENDOR, Tag("a"))
    await asyncio.to_thread(write, deployment, retry_of_a, record, due_now(said, "a"))
    (stolen,) = await deployment.inbox.wait_for("/a", 1, 30)
    assert json.loads(stolen.body)["id"] == "e1"


@pytest.mark.scoreboard("R13")
async def test_of_ten_thousand_parked_records_swapped_between_tenants_none_opens(deployment: Deployment) -> None:
    names = [f"t{n}" for n in range(10)]
    await deployment.apply({"tenants": [deployment.tenant(name) for name in names]})
    registry = await asyncio.to_thread(registry_of, deployment)
    vaults: list[Vault] = []
    for name in names:
        tenant = registry.tenant(TenantRef(DEFAULT_VENDOR, ExternalId(name)))
        assert tenant is not None
        vaults.append(tenant.vault)
    swapped = at_home = 0
    for number in range(1200):
        home = vaults[number % len(vaults)]
        value = home.seal(PURPOSE_DELIVERY, "hook", f"dlv_{number}", b"payload")
        for vault in vaults:
            try:
                vault.open(PURPOSE_DELIVERY, "hook", f"dlv_{number}", value)
            except Unsealable:
                swapped += 1
            else:
                assert vault is home
                at_home += 1
    assert swapped >= 10_000
    assert at_home == 1200


# ---------------------------------------------------------------- canaries


@pytest.mark.scoreboard("R16")
async def test_no_secret_and_no_payload_shows_in_a_log_a_metric_or_another_topic(deployment: Deployment) -> None:
    secret = "whsec_" + b64encode(b"canary-of-a-signing-secret-0123456").decode()
    header = "canary-of-a-header"
    query = "canary-of-a-query"
    payload = "canary-of-a-payload"
    answer = "canary-of-an-answer"
    inbox = deployment.inbox
    tenant = deployment.tenant("acme", retry={"schedule": ["0s", "1s"]})
    secrets = {"signing": {"value": secret}, "headers": {"authorization": {"value": header}}}
    for place in ("fails", "refuses"):
        url = inbox.url(f"/{place}?key={query}")
        tenant["destinations"].append(
            {
                "id": place,
                "type": "webhook",
                "options": {"url": url},
                "secrets": secrets,
                "retry": {"schedule": ["0s", "1s"]},
            }
        )
        tenant["routes"][0]["to"].append(place)
    tenant["destinations"][0]["secrets"] = secrets
    tenant["routes"][0]["match"]["where"] = 'payload.text.startsWith("canary")'
    inbox.script(f"/fails?key={query}", Refuse(500, answer))
    inbox.script(f"/refuses?key={query}", Refuse(400, answer))
    await deployment.apply({"tenants": [tenant]})
    worker = await deployment.worker(LOG_LEVEL="debug")
    good = {**event("e1"), "payload": {"text": payload}, "metadata": {"userId": payload}}
    bad = json.dumps(good).encode().replace(b'"payload"', b'"payload": NaN, "x"')
    await deployment.publish([("acme", good), ("acme", bad), ("nobody", good)])
    (received,) = await inbox.wait_for("/acme", 1, 30)
    assert payload.encode() in received.body  # the controls: what is looked for is there
    assert dict(received.headers)["authorization"] == header
    await eventually(lambda: len(deployment.dead_letters("acme")) == 2 and len(deployment.unrouted()) == 2, "the ends")
    await deployment.all_committed()
    scraped = worker.get("/metrics")[1].encode()
    assert await worker.terminate() == 0
    canaries = [text.encode() for text in (secret, secret[6:], quote(secret, safe=""), header, payload, answer)]
    canaries += [b64encode(text.encode()).rstrip(b"=")[:-1] for text in (header, payload, answer)]
    found: dict[str, set[bytes]] = {}

    def look(place: str, text: bytes) -> None:
        found.setdefault(place, set()).update(one for one in canaries if one in text)

    look("log", worker.log.read_bytes())
    look("metrics", scraped)
    names = AdminClient(deployment.settings.kafka.confluent()).list_topics(timeout=10).topics
    topics = sorted(name for name in names if name.startswith(f"{deployment.prefix}."))
    for topic, records in zip(topics, await read_all(deployment, topics), strict=True):
        for one in records:
            headers = b" ".join(name.encode() + b"=" + (value or b"") for name, value in one.headers.items())
            look(topic, b" ".join((one.key or b"", one.value or b"", headers)))
    assert query.encode() not in worker.log.read_bytes() + scraped
    clear = {f"{deployment.prefix}.default.ingress", f"{deployment.prefix}.default.dlq.unrouted"}
    assert {place for place, what in found.items() if what} == clear
    assert found[f"{deployment.prefix}.default.ingress"] == {payload.encode()}
    assert len(found) >= 6  # the log, the metrics, and topics that hold something
