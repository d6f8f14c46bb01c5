"""`headgate trace` on real Kafka: every way in which an event can end or wait, told from the topics."""

import asyncio
import base64
import uuid
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from dev.inbox import Refuse, fail_first
from dev.stack import Stack
from schemas.topics import partition_of
from tests.cli.shell import headgate, told
from tests.deployment import Deployment, event, eventually

pytestmark = pytest.mark.broker

LATER: dict[str, Any] = {"schedule": ["0s", "1h"], "max_age": "2h"}
QUICK: dict[str, Any] = {"schedule": ["0s", "1s"], "max_age": "1h"}


def tenant(deployment: Deployment, name: str, **more: Any) -> dict[str, Any]:
    """Three destinations: one that accepts, one that refuses, one that is to be tried again in an hour."""
    return {
        "externalId": name,
        "destinations": [
            deployment.webhook("good", id="good", retry=QUICK),
            deployment.webhook("bad", id="bad"),
            deployment.webhook("later", id="later", retry=LATER),
        ],
        "routes": [
            {"id": "all", "match": {"types": ["invoice.*"]}, "to": ["good", "bad", "later"]},
            {"id": "others", "match": {"types": ["order.*"]}, "to": ["good"]},
            {"id": "large", "match": {"types": ["*"], "where": "payload.total > 100"}, "to": ["good"]},
            {"id": "faulty", "match": {"types": ["*"], "where": "payload.nothing > 1"}, "to": ["good"]},
        ],
        **more,
    }


@pytest.fixture(scope="module")
def past(stack: Stack) -> Deployment:
    """Events of two tenants that share a pool, all ended or waiting; the worker is gone."""
    return asyncio.run(_past(stack))


async def _past(stack: Stack) -> Deployment:
    async with Deployment.on(stack, HEADGATE_POOLS="1") as made:
        await made.apply({"tenants": [tenant(made, name, topics="pooled") for name in ("acme", "acme2")]})
        made.inbox.script("/good", fail_first(1))
        made.inbox.script("/bad", Refuse(400, "no such thing"))
        made.inbox.script("/later", Refuse(503))
        worker = await made.worker()
        await made.publish(
            [
                *((key, event("e1", payload={"total": 12})) for key in ("acme", "acme2")),
                ("acme", {"eventType": "invoice.paid", "payload": {}}),
                ("acme", event("mine")),
                ("acme", event("nowhere", "unknown")),
                ("acme", {"eventId": "odd", "eventType": "", "payload": {}}),
            ]
        )
        await eventually(lambda: sum(one["kind"] == "attempt" for one in made.attempts()) >= 16, "16 attempts")
        await made.all_committed()
        assert await worker.terminate() == 0
        return made


async def test_a_trace_tells_routes_attempts_and_where_each_delivery_is(past: Deployment) -> None:
    found = await told(past, "trace", "--tenant", "acme", "e1", "--content")
    (one,) = found["events"]
    assert (one["eventId"], one["eventType"], one["content"]["payload"]) == ("e1", "invoice.paid", {"total": 12})
    assert {route["route"]: (route["matched"], route.get("why", "")) for route in one["routes"]} == {
        "all": (True, ""),
        "others": (False, "type"),
        "large": (False, "where"),
        "faulty": (False, "payload.nothing is missing"),
    }
    by = {delivery["destination"]: delivery for delivery in one["deliveries"]}
    assert by["good"]["now"]["state"] == "delivered"
    assert [(a["attempt"], a["code"], a["status"]) for a in by["good"]["attempts"]] == [
        (1, "server_error", 503),
        (2, "ok", 200),
    ]
    assert by["bad"]["now"]["state"] == "dead"
    assert by["bad"]["attempts"][0]["answer"] == "no such thing"
    assert (by["later"]["now"]["state"], by["later"]["now"]["why"]) == ("waiting", "server_error")
    assert by["later"]["attempts"][0]["nextAt"] == by["later"]["now"]["dueAt"]

    text = await headgate(past, "trace", "--tenant", "acme", "e1")
    assert text.exit_code == 0
    assert f"dead letter {by['bad']['now']['letter']} since" in text.stdout
    assert "waiting in retry, due" in text.stdout
    assert "its filter is false" in text.stdout
    shown = await headgate(past, "dlq", "show", by["bad"]["now"]["letter"], "--tenant", "acme")
    assert by["bad"]["delivery"] in shown.stdout


async def test_two_tenants_with_the_same_event_id_see_their_own(past: Deployment) -> None:
    received = {one.webhook_id for one in past.inbox.received("/bad")}
    assert len(received) == 4
    own = {name: str(await told(past, "trace", "--tenant", name, "e1")) for name in ("acme", "acme2")}
    seen = {name: {one for one in received if one in text} for name, text in own.items()}
    assert len(seen["acme"]) == len(seen["acme2"]) == 1
    assert seen["acme"].isdisjoint(seen["acme2"])


async def test_an_event_without_an_id_is_found_by_its_place_and_a_delivery_by_its_own_id(past: Deployment) -> None:
    name = next(one["eventId"] for one in past.attempts() if one["eventId"].startswith(past.prefix))
    (one,) = (await told(past, "trace", "--tenant", "acme", name))["events"]
    assert len(one["deliveries"]) == 3
    wanted = next(each for each in one["deliveries"] if each["destination"] == "bad")
    (alone,) = (await told(past, "trace", "--tenant", "acme", wanted["delivery"]))["events"]
    assert alone["deliveries"] == [wanted]


async def test_another_tenant_s_event_is_not_found_and_what_to_check_is_said(past: Deployment) -> None:
    found = await headgate(past, "trace", "--tenant", "acme2", "mine")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "nothing is known of event 'mine' of tenant 'acme2'" in found.stderr
    assert "the log reaches back to 20" in found.stderr
    assert "dlq list --unrouted" in found.stderr
    assert (await headgate(past, "trace", "--tenant", "acme", "mine")).exit_code == 0  # the control


async def test_without_the_master_key_nothing_sealed_is_shown(past: Deployment, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.key"
    foreign.write_text(f"k9:{base64.b64encode(bytes(32)).decode()}\n")
    asked = ("trace", "--tenant", "acme", "mine", "--content", "--output", "json")
    sealed = await headgate(past, *asked, HEADGATE_MASTER_KEY_FILE=str(foreign))
    assert sealed.exit_code == 0
    assert "sealed details are left out" in sealed.stderr
    assert "total" not in sealed.stdout
    assert "no such thing" not in sealed.stdout
    opened = await headgate(past, *asked)  # the control
    assert '"total": 12' in opened.stdout
    assert "no such thing" in opened.stdout


async def test_what_no_route_wants_is_found_and_said_to_go_nowhere(past: Deployment) -> None:
    found = await headgate(past, "trace", "--tenant", "acme", "nowhere")
    assert found.exit_code == 0
    assert "no route matched" in found.stdout
    assert "its filter fails: payload.nothing is missing" in found.stdout


async def test_what_could_not_be_routed_is_found_by_id_and_by_place_by_its_own_tenant(past: Deployment) -> None:
    (record,) = past.unrouted()
    (one,) = (await told(past, "trace", "--tenant", "acme", "odd"))["unrouted"]
    assert (one["letter"], one["error"]) == (f"{record.partition}/{record.offset}", "malformed")
    topic, partition, offset = record.headers["hg-origin"].decode().split("/")
    name = f"{topic}-00000000-{partition}-{offset}"
    assert (await told(past, "trace", "--tenant", "acme", name))["unrouted"] == [one]
    other = await headgate(past, "trace", "--tenant", "acme2", "odd")
    assert (other.exit_code, other.stdout) == (1, "")


async def test_a_letter_that_was_replayed_or_dropped_is_told_as_such(past: Deployment) -> None:
    async def now(tenant: str) -> dict[str, Any]:
        (one,) = (await told(past, "trace", "--tenant", tenant, "e1"))["events"]
        (bad,) = [each for each in one["deliveries"] if each["destination"] == "bad"]
        return dict(bad["now"])

    assert ((await now("acme"))["state"], (await now("acme2"))["state"]) == ("dead", "dead")
    for verb, tenant in (("drop", "acme"), ("replay", "acme2")):
        done = await headgate(past, "dlq", verb, "--tenant", tenant, "--destination", "bad")
        assert done.exit_code == 0, done.stderr
    assert (await now("acme"))["state"] == "dropped"
    again = await now("acme2")
    assert again["state"] == "waiting"  # no worker runs that would take it
    assert again["replay"]


async def test_what_no_worker_has_read_yet_is_said_to_wait(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [tenant(deployment, "acme")]})
    await deployment.publish([("acme", event("e1"))])
    found = await headgate(deployment, "trace", "--tenant", "acme", "e1")
    assert found.exit_code == 1
    assert "not settled yet: 1 record of the tenant's partition" in found.stderr
    assert "Does a worker run?" in found.stderr


def test_a_key_s_partition_is_where_a_producer_puts_it(stack: Stack) -> None:
    kafka = {"bootstrap.servers": stack.settings()["HEADGATE_KAFKA_BOOTSTRAP"]}
    topic = f"keys-{uuid.uuid4().hex[:8]}"
    admin = AdminClient(kafka)
    admin.create_topics([NewTopic(topic, 7, 1)])[topic].result()
    placed: dict[bytes, int] = {}

    def answered(error: Any, message: Any) -> None:
        assert error is None
        placed[message.key()] = message.partition()

    producer = Producer({**kafka, "partitioner": "murmur2_random"})
    keys = [("kundé-" * 9)[:length].encode() + bytes([length]) for length in range(40)]
    for key in keys:
        producer.produce(topic, b"", key, on_delivery=answered)
    producer.flush(30)
    assert placed == {key: partition_of(key, 7) for key in keys}
