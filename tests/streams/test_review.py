"""What once could end a worker, stall it without a word, or lose a record: on real Kafka, one test each."""

import asyncio
import secrets
import sys
from typing import Any, cast

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from msgspec.structs import replace

from cli.keys import shred_tenant
from config.provision import delete_topics
from connectors.egress import Egress
from dev.inbox import Ok, Refuse, Slow, Steps, Throttle, fail_first
from dev.stack import Stack
from schemas.control import ControlKey, RouteRecord, ShreddedMarker, TenantRecord, decode_control, encode_control
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DEFAULT_VENDOR, DeliveryId, DestinationId, ExternalId, Tag, TenantRef
from schemas.wire import read_parked
from streams.compiled import UNKNOWN_OVERHEAD_BYTES, Tenants, Unknowns
from streams.flight import Fan, Flight
from streams.lanes import Lanes, LaneSettings
from streams.ledger import CONNECTIONS, Ledger
from streams.metrics import Metrics
from tests.deployment import Deployment, Read, event, eventually

pytestmark = pytest.mark.broker

QUICK: dict[str, Any] = {"schedule": ["0s", "1s", "1s"], "max_age": "1h"}
BREAKS_SETTLING = """
from cli.main import main
from streams.settle import Settle
def bug(self, flights, batches):
    raise RuntimeError("a bug")
Settle._attempt_records = bug
main(["worker"])
"""


def error(record: Read) -> str:
    found = read_parked(list(record.headers.items()))
    assert found is not None
    return found.error


def shred(deployment: Deployment, producer: Producer, tenant: ExternalId) -> None:
    """The first version of its key, with nobody waiting until it is gone from the topic."""
    topics = deployment.settings.topics
    marker = ControlKey("shredded", DEFAULT_VENDOR, tenant, "").encode()
    producer.produce(topics.control, encode_control(ShreddedMarker(tenant, 1, 0)), marker, partition=0)
    producer.produce(topics.keys, None, ControlKey("key", DEFAULT_VENDOR, tenant, "1").encode(), partition=0)
    producer.flush(10)


async def test_a_bug_in_settling_ends_the_worker_and_the_next_one_loses_nothing(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    broken = deployment.launch("w0", (sys.executable, "-c", BREAKS_SETTLING))
    await broken.ready()
    await deployment.publish([("acme", event("e1"))])
    assert await broken.ended() == 1
    await deployment.worker()
    await deployment.all_committed()
    assert {one.webhook_id for one in deployment.inbox.received("/acme")} != set()
    attempts = await eventually(
        lambda: [one for one in deployment.attempts() if one["kind"] == "attempt"], "an attempt record"
    )
    assert [one["verdict"] for one in attempts] == ["delivered"]


async def test_a_tenant_whose_data_key_is_shredded_ends_nothing_but_its_own(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK), deployment.tenant("other")]})
    deployment.inbox.script("/acme", Steps((Slow(delay_s=8.0, status=500), Ok()), per="path"))
    worker = await deployment.worker()
    await deployment.publish([("acme", event("flying"))])
    await eventually(lambda: worker.metric("headgate_in_flight") == 1, "in flight")
    shred(deployment, Producer(deployment.settings.kafka.confluent()), ExternalId("acme"))
    await deployment.known_to(worker)
    await deployment.publish([("acme", event("late")), ("other", event("e1"))])
    await deployment.inbox.wait_for("/other", 1, 30)
    (letter,) = await eventually(deployment.unrouted, "what can be neither parked nor logged is kept as it came")
    assert letter.headers["hg-error"] == b"unsealable"
    await deployment.all_committed()
    assert worker.metric("headgate_dropped_total", reason="shredded") == 1  # the one in flight
    assert worker.process.poll() is None


async def test_forged_records_of_a_retry_topic_end_no_worker_and_hold_nothing_up(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry={**QUICK, "schedule": ["0s", "3s"]})]})
    deployment.inbox.script("/acme", fail_first(1))
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    (real,) = await eventually(lambda: deployment.retries("acme"), "a retry record")
    producer = Producer(deployment.settings.kafka.confluent())
    forged: list[dict[str, bytes | None]] = [
        {"hg-hop": b"9" * 30},
        {"hg-not-before": b"9" * 400},
        {"hg-not-before": b"-" + b"9" * 400},
        {"hg-not-before": None},
        {"hg-attempt": b"-1"},
        {"hg-tenant": None},
        {"hg-first-failed": b"1" * 19},
    ]
    for change in forged:
        headers = {**real.headers, **change}
        producer.produce(real.topic, real.value, real.key, partition=0, headers=list(headers.items()))  # type: ignore[arg-type]
    producer.flush(10)
    letters = await eventually(lambda: (x := deployment.unrouted())[len(forged) - 1 :] and x, "all are unrouted")
    assert {one.headers["hg-error"] for one in letters} == {b"malformed"}
    received = await deployment.inbox.wait_for("/acme", 1, 30)
    assert [one.status for one in received] == [503, 200]
    assert worker.process.poll() is None


@pytest.mark.parametrize("answer", [Throttle("86400"), Refuse(410)], ids=["retry-after", "410"])
async def test_what_the_old_place_answers_says_nothing_of_the_new_one(deployment: Deployment, answer: Any):
    tenant = deployment.tenant("acme", retry=QUICK)
    await deployment.apply({"tenants": [tenant]})
    slow = Slow(delay_s=4.0, status=410) if isinstance(answer, Refuse) else answer
    deployment.inbox.script("/acme", slow)
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    if isinstance(answer, Refuse):
        await eventually(lambda: worker.metric("headgate_in_flight") == 1, "in flight")
    else:
        await eventually(lambda: deployment.inbox.received("/acme"), "throttled")
    tenant["destinations"][0]["options"]["url"] = deployment.inbox.url("/fresh")
    await deployment.apply({"tenants": [tenant]})
    await deployment.known_to(worker)
    if isinstance(answer, Refuse):
        await eventually(lambda: deployment.dead_letters("acme"), "the old place has answered")
    await deployment.publish([("acme", event("e2"))])
    await deployment.inbox.wait_for("/fresh", 1, 20)
    assert [error(one) for one in deployment.dead_letters("acme")] in (["expired"], ["gone"])


async def test_a_redacted_correlation_id_is_in_no_record(deployment: Deployment):
    tenant = deployment.tenant("acme", retry=QUICK)
    tenant["routes"][0]["redact"] = ["metadata.correlationId"]
    await deployment.apply({"tenants": [tenant]})
    deployment.inbox.script("/acme", fail_first(1))
    await deployment.worker()
    await deployment.publish([("acme", event("e1", metadata={"correlationId": "canary-7"}))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await eventually(lambda: deployment.attempts()[2:], "the event's record and two attempts")
    assert "canary-7" not in msgspec.json.encode(deployment.attempts()).decode()
    assert {one.get("correlationId") for one in deployment.attempts()} == {"[redacted]"}


async def test_one_tenants_missing_topic_holds_up_nobody_elses_retries(deployment: Deployment):
    lost, other = deployment.tenant("lost", retry=QUICK), deployment.tenant("other", retry=QUICK)
    await deployment.apply({"tenants": [lost, other]})
    deployment.inbox.script("/lost", Refuse(503))
    deployment.inbox.script("/other", fail_first(1))
    await deployment.worker()
    topic = deployment.settings.topics.retry(DEFAULT_VENDOR, Tag("lost"))
    admin = AdminClient(deployment.settings.kafka.confluent())
    admin.delete_topics([topic])[topic].result(10)
    large = [("lost", event(f"e{n}", payload="x" * 500_000)) for n in range(100)]  # three times what is sealed ahead
    await deployment.publish(large)
    await eventually(lambda: len(deployment.inbox.received("/lost")) > 5, "its attempts fail")
    await asyncio.sleep(4.0)  # until the producer takes the topic for missing
    await deployment.publish([("other", event(f"e{n}")) for n in range(5)])
    received = await deployment.inbox.wait_for("/other", 5, 60)
    assert sorted(one.status for one in received) == [200] * 5 + [503] * 5
    assert deployment.retries("lost") == []
    await deployment.apply({"tenants": [lost, other]})  # makes the topic again
    await deployment.all_committed()
    assert len({one.headers["hg-delivery"] for one in deployment.retries("lost")}) == 100


async def test_what_is_to_be_written_for_a_tenant_that_is_deleted_meanwhile_is_dropped(deployment: Deployment):
    """Its destination was removed before, so that its lane hears of no change any more."""
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK)]})
    deployment.inbox.script("/acme", Slow(delay_s=12.0, status=503))  # until its topic is gone
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: worker.metric("headgate_in_flight") == 1, "in flight")
    await deployment.apply({"tenants": [{"externalId": "acme"}]})
    acme = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
    kafka, topics = deployment.settings.kafka.confluent(), deployment.settings.topics
    await asyncio.to_thread(delete_topics, kafka, [topics.retry(DEFAULT_VENDOR, Tag("acme"))])
    await eventually(lambda: "topic_missing" in worker.log.read_text(), "its retry record cannot be written")
    await deployment.apply({"tenants": []}, prune=True)
    await asyncio.to_thread(shred_tenant, deployment.settings, acme, say=print, agreed=lambda question: True)
    await deployment.all_committed()
    assert worker.metric("headgate_dropped_total", reason="tenant_deleted") == 1


async def test_a_key_that_is_shredded_goes_though_the_tenant_stays_as_it_was_for_a_strange_route(
    deployment: Deployment,
):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    topics = deployment.settings.topics
    producer = Producer(deployment.settings.kafka.confluent())
    for one in await asyncio.to_thread(deployment.read, topics.control):  # the tenant comes last
        match record := decode_control(one.value or b""):
            case RouteRecord():
                record = replace(record, version=2, where="of_a_later_release(payload)")
            case TenantRecord():
                parts = {name: 2 if name.startswith("route/") else version for name, version in record.parts.items()}
                record = replace(record, configVersion=2, parts=parts)
            case _:
                continue
        producer.produce(topics.control, encode_control(record), one.key, partition=0)
    producer.flush(10)
    await eventually(lambda: "route_not_compiled" in worker.log.read_text(), "the route is not read")
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    shred(deployment, producer, ExternalId("acme"))
    await deployment.known_to(worker)
    await deployment.publish([("acme", event("e2"))])
    (letter,) = await eventually(deployment.unrouted, "what can be neither parked nor logged is kept as it came")
    assert letter.headers["hg-error"] == b"unsealable"
    assert len(deployment.inbox.received("/acme")) == 1


async def test_more_questions_to_redis_than_connections_are_all_answered(stack: Stack):
    """As many schemas as were waited for ask at once when there is room again."""
    url = stack.settings()["HEADGATE_REDIS_URL"]
    ledger = Ledger(url, dedupe_ttl_s=60, ledger_ttl_s=60, deadline_s=5, on_error=lambda: None)
    keys = [f"{secrets.token_hex(8)}e" for _ in range(5 * CONNECTIONS)]
    answers = await asyncio.gather(*[ledger.ask([key], ["0"], (), ()) for key in keys])
    assert all(answer is not None and answer.clean for answer in answers)
    await ledger.close()


def lanes_alone() -> Lanes:
    metrics = Metrics(tenant_label="tag", type_label=False, version="0")
    return Lanes(LaneSettings(1, 1000, 1000), Egress((), on_blocked=lambda _: None), metrics)


def copy_of(hop: int, offset: int) -> Flight:
    whose = TenantRef(DEFAULT_VENDOR, ExternalId("acme")), DestinationId("hook"), DeliveryId("dlv_1")
    delivery = Delivery(*whose, Event("t", msgspec.Raw(b"1")), "", 0, 1, hop=hop, attempt=hop)
    return Flight(delivery, cast(Any, None), Fan(lambda _: None), offset, "dlv_1", "dlv_1", 1)


async def test_a_stale_copy_does_not_hide_the_one_in_flight_from_its_own_copies():
    lanes = lanes_alone()
    flying, stale, again = copy_of(1, 10), copy_of(0, 20), copy_of(1, 11)
    lanes.hold(flying)
    lanes.hold(stale)
    lanes.release([stale])
    lanes.admit(again, 0.0)
    assert flying.joined == [(again.source, 11)]


async def test_a_copy_that_has_come_further_joins_what_flies_and_what_follows_counts_on_from_it():
    lanes = lanes_alone()
    flying, further = copy_of(1, 10), copy_of(3, 20)
    lanes.hold(flying)
    lanes.admit(further, 0.0)
    assert flying.joined == [(further.source, 20)]
    assert (flying.delivery.hop, flying.delivery.attempt) == (3, 3)


async def test_what_waits_for_a_control_plane_that_is_away_is_bounded():
    answered = asyncio.Event()
    again: list[int] = []
    held: list[int] = []

    class Away(Tenants):
        def __init__(self) -> None:
            pass

        async def ask(self) -> None:
            await answered.wait()

    async def take(items: Any) -> None:
        held.append(unknowns.held_bytes)
        again.extend(items)

    unknowns: Unknowns[int] = Unknowns(Away(), take, max_bytes=100_000)
    taken = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            for number in range(1000):
                await unknowns.room()
                unknowns.add(number, 9000)
                taken += 1
                await asyncio.sleep(0)
    assert taken == 10
    answered.set()
    await unknowns.room()
    await eventually(lambda: len(again) == taken, "all are taken up again", 5)
    assert held == [size * (9000 + UNKNOWN_OVERHEAD_BYTES) for size in (10, 9)]  # until they are somebody else's
    assert unknowns.held_bytes == 0


def test_averages_in_redis_that_are_not_of_our_writing_are_left_out():
    metrics = Metrics(tenant_label="tag", type_label=False, version="0")
    average = metrics.average(TenantRef(DEFAULT_VENDOR, ExternalId("acme")), "acme", "other")
    (name,) = [name for name, _ in metrics.unknown_averages()]
    for garbage in (b"", b"x y", b"\xff", b"1", b"100 nan", b"100 inf"):
        metrics.restore_averages({name: garbage})
    assert (average.count, average.seconds) == (0, 0.0)
    metrics.restore_averages({name: b"30 0.5"})
    assert (average.count, average.seconds) == (30, 0.5)
