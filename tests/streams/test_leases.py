"""Rates of destinations across workers: leases on a real Redis, and what a worker does without it."""

import asyncio
import time
import uuid
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer

from config.vault import MasterKeys, Vault
from config.writer import read_current
from dev.stack import Stack
from routing.share import LEASE_S
from schemas.attempt import PURPOSE_DELIVERY
from schemas.event import Event, canonical
from schemas.ids import DEFAULT_VENDOR, DestinationId, EventId, ExternalId, Tag, TenantRef, delivery_id
from schemas.topics import delivery_key
from schemas.wire import Parked, parked_headers
from streams.ledger import Ledger
from tests.deployment import Deployment, event, free_port

pytestmark = pytest.mark.broker

PER_S = 200.0


async def given(stack: Stack, keys: list[str]) -> tuple[int, float]:
    """What as many workers as there are keys get, asking for more than there is for a second; and how long it took."""
    url = stack.settings()["HEADGATE_REDIS_URL"]
    ledgers = [Ledger(url, dedupe_ttl_s=60, ledger_ttl_s=60, deadline_s=5, on_error=lambda: None) for _ in keys]
    for ledger in ledgers:
        await ledger.warm()
    started = time.monotonic()

    async def asking(ledger: Ledger, key: str) -> int:
        total = 0
        while time.monotonic() - started < 1.0:
            answer = await ledger.lease([key], [50], [PER_S])
            assert answer is not None
            total += answer[0]
            await asyncio.sleep(0.01)
        return total

    counts = await asyncio.gather(*map(asking, ledgers, keys))
    took_s = time.monotonic() - started
    for ledger in ledgers:
        await ledger.close()
    return sum(counts), took_s


async def test_workers_that_lease_the_same_rate_get_no_more_than_it_together(stack: Stack) -> None:
    key = uuid.uuid4().hex
    count, took_s = await given(stack, [key, key, key])
    assert PER_S * 0.5 < count <= PER_S * (took_s + LEASE_S) + 1
    count, took_s = await given(stack, [f"{key}{number}" for number in range(3)])  # the control: rates of their own
    assert count > PER_S * (took_s + LEASE_S) + 1


async def test_workers_are_counted_while_they_say_that_they_are_there(stack: Stack) -> None:
    url = stack.settings()["HEADGATE_REDIS_URL"]
    ledger = Ledger(url, dedupe_ttl_s=60, ledger_ttl_s=60, deadline_s=5, on_error=lambda: None)
    key = uuid.uuid4().hex
    assert [await ledger.count_workers(key, name, 20) for name in ("a", "b", "a", "c")] == [1, 2, 2, 3]
    await ledger.close()


def most_within(at_s: list[float], span_s: float) -> int:
    return max(sum(1 for at in at_s if start <= at < start + span_s) for start in at_s)


@pytest.mark.parametrize("redis", ["there", "away"])
async def test_a_destination_gets_its_rate_and_no_more(deployment: Deployment, redis: str) -> None:
    limited: dict[str, Any] = {"limits": {"rate": "50/s"}}
    await deployment.apply({"tenants": [deployment.tenant("acme", **limited), deployment.tenant("beta")]})
    env = {} if redis == "there" else {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    await deployment.worker(**env)
    await deployment.publish([(name, event(f"e{number}")) for number in range(150) for name in ("acme", "beta")])
    await deployment.inbox.wait_for("/beta", 150, 60)
    await deployment.inbox.wait_for("/acme", 150, 60)
    limited_at = [one.arrived_at_ms / 1000 for one in deployment.inbox.received("/acme")]
    free_at = [one.arrived_at_ms / 1000 for one in deployment.inbox.received("/beta")]
    assert most_within(limited_at, 1.0) <= 50 * (1.0 + 2 * LEASE_S + 0.5) + 2
    assert most_within(free_at, 1.0) > 50 * (1.0 + 2 * LEASE_S + 0.5) + 2  # the control: without a rate


def park(deployment: Deployment, count: int, due_ms: int) -> None:
    """Deliveries of tenant acme as a worker parks them: as many in each of the two partitions, all due at once."""
    settings = deployment.settings
    kafka = settings.kafka.confluent()
    tenant = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
    current = read_current(kafka, settings.topics, tenant.vendor).tenants[tenant.tenant]
    master = MasterKeys.load(settings.keys)
    keys = {version: master.unwrap(tenant, key) for version, key in current.keys.items()}
    vault = Vault(tenant, keys, current.record.keyVersion)
    hook = DestinationId("hook")
    producer = Producer(kafka)
    for number in range(2 * count):
        named = EventId(f"e{number}")
        delivery = delivery_id(tenant, "invoice.paid", named, hook)
        value = Event("invoice.paid", msgspec.Raw(b"{}"), named, "2026-11-21T09:30:00Z", "acme", idempotencyKey=named)
        parked = Parked(
            tenant, hook, delivery, named, "invoice.paid", 0, 1, 1, due_ms, "t/0/0", "rate", "", "", due_ms, ""
        )
        sealed = vault.seal(PURPOSE_DELIVERY, hook, delivery, canonical(value))
        topic = settings.topics.retry(tenant.vendor, Tag("acme"))
        producer.produce(topic, sealed, delivery_key(tenant, hook), number % 2, headers=parked_headers(parked))
    assert producer.flush(30) == 0


@pytest.mark.chaos("rates")
@pytest.mark.parametrize("redis", ["there", "away"])
async def test_two_workers_keep_to_a_rate_together(deployment: Deployment, redis: str) -> None:
    """`away` is the control: a worker that never could count the others takes itself for the only one."""
    deployment.env["HEADGATE_RETRY_TIERS"] = "1s,2s"  # a partition for each worker
    limited: dict[str, Any] = {"limits": {"rate": "50/s"}}
    await deployment.apply({"tenants": [deployment.tenant("acme", **limited)]})
    park(deployment, 150, int((time.time() + 20) * 1000))
    env = {} if redis == "there" else {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    for name in ("w0", "w1"):
        await deployment.worker(name, **env)
    assert deployment.inbox.received("/acme") == []
    await deployment.inbox.wait_for("/acme", 300, 90)
    most = most_within([one.arrived_at_ms / 1000 for one in deployment.inbox.received("/acme")], 2.0)
    assert (most <= 50 * (2.0 + 3 * LEASE_S + 0.25) + 3) == (redis == "there"), most
