"""Kafka destinations on a real cluster of tenants' own: passwords by SCRAM over TLS, an authorizer, sessions that end.

Each tenant is a user with the right to write to its own topic, and nothing else. What is asserted is what the topics
hold.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AclBindingFilter, AdminClient, NewTopic
from msgspec import Struct

from config.acls import Acl, Operation
from config.rights import binding
from config.settings import Settings
from connectors.body import body
from connectors.egress import Egress
from dev import broker, certificates
from dev.stack import Stack
from schemas.ids import ExternalId, TenantRef, Vendor
from schemas.outcome import Outcome
from schemas.topics import partition_of
from tests.connectors.kafkas import deliver, delivery, sink
from tests.connectors.post import LOOPBACK
from tests.deployment import event, eventually
from tests.secured.users import Secured

pytestmark = pytest.mark.broker

PARTITIONS = 3


class Found(Struct, frozen=True):
    partition: int
    key: bytes | None
    value: bytes
    headers: dict[str, bytes]

    @property
    def delivery(self) -> str:
        return self.headers["deliveryId"].decode()


class Cluster:
    """The tenants' cluster, as who runs it sees it."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.kafka = Settings.load(stack.settings()).kafka.confluent()
        self.admin = AdminClient(self.kafka)

    def topic(self, name: str, **config: str) -> str:
        for future in self.admin.create_topics([NewTopic(name, PARTITIONS, 1, config=config)]).values():
            future.result()
        return name

    def user(self, name: str) -> str:
        """Its password; one that exists gets another."""
        return self._stack.add_user(name)["HEADGATE_KAFKA_SASL_PASSWORD"]

    def may(self, user: str, topic: str, operation: Operation = "Write") -> None:
        given = binding(f"User:{user}", Acl("topic", topic, "literal", operation))
        for future in self.admin.create_acls([given]).values():
            future.result()
        asked = AclBindingFilter(
            given.restype, topic, given.resource_pattern_type, given.principal, "*", given.operation,
            given.permission_type,
        )  # fmt: skip
        while not self.admin.describe_acls(asked).result():  # the broker has written it, and will know it soon
            time.sleep(0.02)

    def options(self, user: str, topic: str) -> dict[str, Any]:
        return {
            "bootstrap": f"localhost:{self._stack.kafka.port}",
            "topic": topic,
            "ca": (self._stack.kafka.tls / certificates.AUTHORITY).read_text(),
            "sasl": "scram-sha-512",
            "username": user,
        }

    def read(self, topic: str) -> list[Found]:
        """Everything that the topic holds, by partition."""
        found: list[Found] = []
        ended = 0
        consumer = Consumer({**self.kafka, "group.id": "none", "enable.partition.eof": True})
        try:
            consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
            while ended < PARTITIONS:
                message = consumer.poll(20)
                assert message is not None
                if message.error() is not None:
                    ended += 1
                    continue
                headers = {name: bytes(value or b"") for name, value in message.headers() or ()}
                found.append(Found(message.partition() or 0, message.key(), message.value() or b"", headers))
        finally:
            consumer.close()
        return found


@pytest.fixture
def cluster(stack: Stack) -> Cluster:
    return Cluster(stack)


@pytest.fixture
async def egress() -> AsyncIterator[Egress]:
    made = Egress(LOOPBACK)
    yield made
    made.close()


class Own(Struct, frozen=True):
    """A tenant's user and topic, with the one right that it needs."""

    user: str
    topic: str
    options: Mapping[str, Any]
    secrets: Mapping[str, Any]


def own(cluster: Cluster, name: str = "", **config: str) -> Own:
    name = name or f"acme-{secrets.token_hex(4)}"
    password = cluster.user(name)
    topic = cluster.topic(f"{name}-orders", **config)
    cluster.may(name, topic)
    return Own(name, topic, cluster.options(name, topic), {"password": password})


# ---------------------------------------------------------------- what must work


@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip", "none"])
async def test_a_tenant_s_topic_holds_its_events_with_the_one_right_to_write(
    cluster: Cluster, egress: Egress, compression: str
) -> None:
    mine = own(cluster)
    connector = sink(egress, mine.options, mine.secrets, compression=compression, key="event_id")
    steps = await connector.check()
    assert [(step.name, step.detail) for step in steps if not step.ok] == []
    assert [step.name for step in steps] == ["resolve", "connect", "tls", "login", "topic", "brokers", "write"]
    assert cluster.read(mine.topic) == []  # and leaves nothing behind

    sent = [delivery(number, b'{"n": %d.0}' % number, aggregateId=f"inv_{number}") for number in range(50)]
    outcomes = await deliver(connector, *sent)
    assert {one.verdict for one in outcomes} == {"delivered"}
    found = {one.delivery: one for one in cluster.read(mine.topic)}
    assert found.keys() == {one.id for one in sent}
    for one in sent:
        record = found[one.id]
        assert record.value == body(one.event)
        assert record.key == one.event.eventId.encode()
        assert record.partition == partition_of(record.key, PARTITIONS)
        assert record.headers["aggregateId"] == one.event.aggregateId.encode()
    await connector.close()


async def test_a_client_certificate_is_a_login_too(stack: Stack, cluster: Cluster, egress: Egress) -> None:
    """At the listener that asks for one; who has none is turned away there."""
    topic = cluster.topic(f"mtls-{secrets.token_hex(4)}")
    pem = (stack.kafka.tls / certificates.BROKER).read_text()
    key, marker, certificate = pem.partition("-----BEGIN CERTIFICATE-----")
    options = {
        "bootstrap": f"127.0.0.1:{stack.kafka.internal_port}",
        "topic": topic,
        "ca": cluster.options("", topic)["ca"],
    }
    connector = sink(egress, options, {"client_cert": marker + certificate, "client_key": key})
    assert {one.verdict for one in await deliver(connector, delivery(1))} == {"delivered"}
    await connector.close()
    connector = sink(egress, options, {}, timeout="3s")
    (outcome,) = await deliver(connector, delivery(2))
    assert (outcome.verdict, outcome.fault, outcome.code in ("tls", "reset")) == ("retry", "destination", True)
    assert len(cluster.read(topic)) == 1
    await connector.close()


async def test_a_session_that_the_broker_ends_costs_no_record_and_makes_none_twice(
    cluster: Cluster, egress: Egress
) -> None:
    mine = own(cluster)
    connector = sink(egress, mine.options, mine.secrets)
    sent = [delivery(number) for number in range(120)]
    ends = await asyncio.gather(*(_later(connector, one, at) for at, one in enumerate(sent)))
    assert {end for (end,) in ends} == {"delivered"}
    assert sorted(one.delivery for one in cluster.read(mine.topic)) == [one.id for one in sent]
    await connector.close()


async def _later(connector: Any, one: Any, at: int) -> list[str]:
    await asyncio.sleep(at * broker.SESSION_MS / 1000 * 2.5 / 120)  # over two and a half sessions
    return [outcome.verdict for outcome in await deliver(connector, one)]


async def test_the_whole_path_from_ingress_to_a_tenant_s_topic(secured: Secured, cluster: Cluster) -> None:
    mine = own(cluster)
    sink_of = {
        "id": "topic",
        "type": "kafka",
        "options": {**mine.options, "key": "payload.customer"},
        "secrets": {"password": {"value": mine.secrets["password"]}},
        "retry": {"schedule": ["0s", "200ms"], "max_age": "1h"},
    }
    route = {"id": "all", "match": {"types": ["order.*"]}, "to": ["topic"]}
    await secured.apply({"tenants": [{"externalId": "acme", "destinations": [sink_of], "routes": [route]}]})
    await secured.worker()
    events = [{**event(f"e{number}", "order.paid"), "payload": {"customer": f"c{number}"}} for number in range(200)]
    keyless = event("keyless", "order.paid")
    await secured.publish_as_producer(*({"customerExternalId": "acme", **one} for one in (*events, keyless)))
    await eventually(lambda: len(cluster.read(mine.topic)) >= 200, "all are in the topic")
    await secured.all_committed()
    found = cluster.read(mine.topic)
    assert sorted(one.headers["eventId"].decode() for one in found) == sorted(one["eventId"] for one in events)
    assert {one.key for one in found} == {f"c{number}".encode() for number in range(200)}
    (letter,) = await secured.told("operator", "dlq", "list", "--tenant", "acme")
    assert letter["error"] == "key"


# ---------------------------------------------------------------- what must not


async def test_a_right_that_comes_late_finds_the_backlog_alive(cluster: Cluster, egress: Egress) -> None:
    user = f"late-{secrets.token_hex(4)}"
    password = cluster.user(user)
    topic = cluster.topic(f"{user}-orders")
    connector = sink(egress, cluster.options(user, topic), {"password": password})
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", "denied")
    assert (await connector.check())[-1].name == "topic"
    cluster.may(user, topic, "Describe")
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.code) == ("retry", "denied")
    step = (await connector.check())[-1]
    assert (step.name, step.ok) == ("write", False)
    assert "TOPIC_AUTHORIZATION_FAILED" in step.detail
    cluster.may(user, topic)
    assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
    assert len(cluster.read(topic)) == 1
    await connector.close()


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"username": "nobody"}, "login"),
        ({"sasl": "scram-sha-256"}, "login"),
        ({"ca": ""}, "tls"),
        ({"topic": "not-there"}, "topic"),
    ],
)
async def test_a_check_names_what_is_wrong(cluster: Cluster, egress: Egress, change: dict[str, str], step: str) -> None:
    mine = own(cluster)
    connector = sink(egress, mine.options, mine.secrets, **change)
    found = (await connector.check())[-1]
    assert (found.name, found.ok) == (step, False)
    assert mine.secrets["password"] not in found.detail
    (outcome,) = await deliver(connector, delivery(1))
    assert outcome.fault == "destination"
    await connector.close()


async def test_a_password_that_is_changed_is_noticed_and_the_new_one_works(cluster: Cluster, egress: Egress) -> None:
    mine = own(cluster)
    connector = sink(egress, mine.options, {"password": "wrong"})
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.code) == ("retry", "denied")
    await connector.close()
    connector = sink(egress, mine.options, mine.secrets)
    assert [one.verdict for one in await deliver(connector, delivery(1))] == ["delivered"]
    await connector.close()


async def test_what_a_topic_does_not_take_is_refused_alone(cluster: Cluster, egress: Egress) -> None:
    mine = own(cluster, **{"max.message.bytes": "50000"})
    connector = sink(egress, mine.options, mine.secrets, key="tenant")
    large = delivery(0, msgspec.json.encode(os.urandom(100_000).hex()))
    small = [delivery(number, msgspec.json.encode(os.urandom(1000).hex())) for number in range(1, 101)]
    first, *others = await deliver(connector, large, *small)
    assert (first.verdict, first.fault, first.code) == ("reject", "event", "too_large")
    assert {one.verdict for one in others} == {"delivered"}
    assert [one.delivery for one in cluster.read(mine.topic)] == [one.id for one in small]
    await connector.close()


async def test_a_compacted_topic_refuses_what_has_no_key_alone(cluster: Cluster, egress: Egress) -> None:
    mine = own(cluster, **{"cleanup.policy": "compact"})
    connector = sink(egress, mine.options, mine.secrets)
    keyless, keyed = await deliver(connector, delivery(1), delivery(2, aggregateId="inv_42"))
    assert (keyless.verdict, keyless.fault, keyless.code) == ("reject", "event", "refused")
    assert keyed.verdict == "delivered"
    await connector.close()


async def test_tenants_with_look_alike_names_on_one_cluster_never_meet(cluster: Cluster, egress: Egress) -> None:
    """Through one door, at the same time; each one's credentials open its own topic alone."""
    tag = secrets.token_hex(4)
    names = [f"acme-{tag}", f"acme-{tag}2", f"ACME-{tag}", f"acme.{tag}"]
    owners = [own(cluster, name) for name in names]
    tenants = [TenantRef(Vendor("default"), ExternalId(name)) for name in names]
    connectors = [
        sink(egress, mine.options, mine.secrets, tenant=tenant) for mine, tenant in zip(owners, tenants, strict=True)
    ]
    sent = [[delivery(at * 1000 + number) for number in range(40)] for at in range(len(names))]
    await asyncio.gather(*(deliver(one, *mine) for one, mine in zip(connectors, sent, strict=True)))
    for mine, its in zip(owners, sent, strict=True):
        assert sorted(one.delivery for one in cluster.read(mine.topic)) == [one.id for one in its]

    # aimed at the other's topic, while the other's producer is live behind the same door
    for at, mine in enumerate(owners):
        other = owners[(at + 1) % len(owners)]
        stray = sink(egress, {**mine.options, "topic": other.topic}, mine.secrets, tenant=tenants[at])
        (outcome,) = await deliver(stray, delivery(9_000_000))
        assert (outcome.verdict, outcome.code) == ("retry", "denied")
        await stray.close()
    assert all(len(cluster.read(mine.topic)) == 40 for mine in owners)
    for connector in connectors:
        await connector.close()


async def test_a_broker_that_is_killed_has_each_record_once_and_all_that_it_acknowledged(
    stack: Stack, cluster: Cluster, egress: Egress
) -> None:
    """The last test of this file: it kills the broker. Nothing here tries a delivery again."""
    mine = own(cluster)
    connector = sink(egress, mine.options, mine.secrets, key="event_id", timeout="25s")
    await deliver(connector, delivery(0))
    sent = [delivery(number) for number in range(1, 401)]

    async def killed() -> None:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(stack.stop_kafka, kill=True)
        await asyncio.to_thread(stack.start_kafka)

    async def one(at: int) -> Outcome:
        await asyncio.sleep(at * 0.01)
        (outcome,) = await deliver(connector, sent[at])
        return outcome

    outcomes, _ = await asyncio.gather(asyncio.gather(*map(one, range(len(sent)))), killed())
    found = [record.delivery for record in cluster.read(mine.topic)]
    assert len(found) == len(set(found))
    acknowledged = {its.id for its, outcome in zip(sent, outcomes, strict=True) if outcome.verdict == "delivered"}
    assert acknowledged <= set(found)
    assert {outcome.verdict for outcome in outcomes} <= {"delivered", "retry"}
    assert {outcome.fault for outcome in outcomes} <= {"", "destination"}
    assert [end.verdict for end in await deliver(connector, delivery(1000))] == ["delivered"]
    await connector.close()
