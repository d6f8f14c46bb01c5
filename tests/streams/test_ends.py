"""How deliveries end on real Kafka: retried, dead, unrouted, dropped as duplicates; each with its record of it."""

import base64
import json
from typing import Any

import msgspec
import pytest

from dev.inbox import Ok, Refuse, Slow, Steps, Throttle, fail_first
from schemas.wire import read_parked
from tests.deployment import Deployment, Read, event, eventually

pytestmark = pytest.mark.broker

QUICK: dict[str, Any] = {"schedule": ["0s", "1s", "1s"], "max_age": "1h"}


def parked(record: Read) -> Any:
    found = read_parked(list(record.headers.items()))
    assert found is not None
    return found


async def test_a_failed_delivery_is_tried_again_with_the_same_id_and_bytes_and_then_delivered(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK)]})
    deployment.inbox.script("/acme", fail_first(2))
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    received = await deployment.inbox.wait_for("/acme", 1, 30)
    assert [one.status for one in received] == [503, 503, 200]
    assert [one.attempt for one in received] == [1, 2, 3]
    assert len({one.webhook_id for one in received}) == len({one.body for one in received}) == 1
    assert [parked(r).hop for r in deployment.retries("acme")] == [1, 2]
    attempts = await eventually(
        lambda: (found := [a for a in deployment.attempts() if a["kind"] == "attempt"])[2:] and found, "three attempts"
    )
    assert [(a["attempt"], a["verdict"], a["trigger"]) for a in attempts] == [
        (1, "retry", "event"),
        (2, "retry", "retry"),
        (3, "delivered", "retry"),
    ]
    assert len({a["id"] for a in attempts}) == 3


async def test_the_time_of_a_delivery_counts_from_ingress_and_of_a_retried_one_from_its_first_failure(
    deployment: Deployment,
):
    """A slow refusal ends in its first attempt, a slow failure and success in the second."""
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK)]})
    worker = await deployment.worker()

    def seconds() -> float:
        return worker.metric("headgate_delivery_seconds_sum")

    def ended(count: int) -> bool:
        return worker.metric("headgate_delivery_seconds_count") == count

    deployment.inbox.script("/acme", Slow(1.5, 400))
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: ended(1), "it was refused")
    refused_s = seconds()
    assert refused_s >= 1.5
    deployment.inbox.script("/acme", Steps((Slow(1.5, 503), Ok())))
    await deployment.publish([("acme", event("e2"))])
    await eventually(lambda: ended(2), "it was delivered")
    assert seconds() - refused_s >= 1  # the wait before its second attempt


async def test_an_exhausted_delivery_becomes_a_dead_letter_of_its_tenant_that_opens_for_nobody_else(
    deployment: Deployment,
):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK), deployment.tenant("acme2")]})
    deployment.inbox.script("/acme", Refuse(500))
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    (letter,) = await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    found = parked(letter)
    assert (found.tenant.tenant, found.error, found.fault, found.attempt) == ("acme", "server_error", "destination", 3)
    assert "exhausted" in found.detail
    assert b"total" not in (letter.value or b"")
    assert deployment.dead_letters("acme2") == []
    assert len(deployment.inbox.received("/acme")) == 3
    await deployment.all_committed()


async def test_a_refused_delivery_is_dead_at_once(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    deployment.inbox.script("/acme", Refuse(400))
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    (letter,) = await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    assert parked(letter).error == "refused"
    assert len(deployment.inbox.received("/acme")) == 1


async def test_a_status_listed_in_retry_also_is_tried_again(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry={**QUICK, "also": [404]})]})
    deployment.inbox.script("/acme", fail_first(1, status=404))
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    received = await deployment.inbox.wait_for("/acme", 1, 30)
    assert [one.status for one in received] == [404, 200]


async def test_a_410_disables_the_destination_until_its_options_change(deployment: Deployment):
    tenant = deployment.tenant("acme")
    await deployment.apply({"tenants": [tenant]})
    deployment.inbox.script("/acme", Refuse(410))
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    await deployment.publish([("acme", event("e2"))])
    letters = await eventually(lambda: (x := deployment.dead_letters("acme"))[1:] and x, "a second dead letter")
    assert {parked(one).error for one in letters} == {"gone", "destination_disabled"}
    assert len(deployment.inbox.received("/acme")) == 1
    worker.kill()  # and a new worker knows it from headgate.state
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e3"))])
    await eventually(lambda: deployment.dead_letters("acme")[2:], "a third dead letter")
    assert len(deployment.inbox.received("/acme")) == 1
    tenant["destinations"][0]["options"]["url"] += "?fresh"
    deployment.inbox.script("/acme")
    await deployment.apply({"tenants": [tenant]})
    await deployment.known_to(worker)
    await deployment.publish([("acme", event("e4"))])
    await eventually(
        lambda: deployment.inbox.received("/acme?fresh") or deployment.inbox.received("/acme")[1:], "again"
    )


async def test_a_retry_after_closes_the_lane_and_is_never_cut_short(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme", retry=QUICK, limits={"in_flight": 1})]})
    deployment.inbox.script("/acme", Steps((Throttle("3"), Ok()), per="path"))
    await deployment.worker()
    await deployment.publish([("acme", event(f"e{n}")) for n in range(5)])
    received = await deployment.inbox.wait_for("/acme", 5, 40)
    first = received[0]
    assert first.status == 429
    assert all(one.arrived_at_ms >= first.arrived_at_ms + 3000 for one in received[1:])


async def test_what_cannot_be_routed_lies_in_unrouted_with_its_bytes_headers_and_reason(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    good = json.dumps(event("e")).encode()
    bad: dict[str, tuple[bytes | None, bytes]] = {
        "key_missing": (None, good),
        "key_mismatch": (b"acme", json.dumps(event("e", customerExternalId="other")).encode()),
        "unknown_tenant": (b"nobody", good),
        "malformed": (b"acme", b'{"eventType": "x", "payload": NaN}'),
        "too_large": (b"acme", b'{"eventType": "x", "payload": "' + b"x" * (1024 * 1024 + 20) + b'"}'),
    }
    await deployment.publish(list(bad.values()), headers=[("trace", b"t1")])
    letters = await eventually(lambda: (x := deployment.unrouted())[4:] and x, "five unrouted records")
    found = {one.headers["hg-error"].decode(): one for one in letters}
    assert set(found) == set(bad)
    for reason, (key, value) in bad.items():
        assert (found[reason].key, found[reason].value) == (key, value), reason
        assert found[reason].headers["trace"] == b"t1"
    await deployment.publish([("acme", event("after"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await deployment.all_committed()


async def test_the_same_event_published_twice_is_delivered_once_and_another_tenants_is_not_a_duplicate(
    deployment: Deployment,
):
    await deployment.apply({"tenants": [deployment.tenant("acme"), deployment.tenant("acme2")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1")), ("acme", event("e1")), ("acme2", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await deployment.inbox.wait_for("/acme2", 1, 30)
    await deployment.all_committed()
    assert len(deployment.inbox.received("/acme")) == len(deployment.inbox.received("/acme2")) == 1
    ids = {deployment.inbox.received(path)[0].webhook_id for path in ("/acme", "/acme2")}
    assert len(ids) == 2
    assert worker.metric("headgate_events_total", result="duplicate") == 1


async def test_what_is_parked_for_a_removed_destination_becomes_a_dead_letter(deployment: Deployment):
    tenant = deployment.tenant("acme", retry=QUICK)
    await deployment.apply({"tenants": [tenant]})
    deployment.inbox.script("/acme", Throttle("4"))
    await deployment.worker()
    await deployment.publish([("acme", event("e1"))])
    await deployment.inbox.wait_for("/acme", 1, 30, what="requests")
    await eventually(lambda: deployment.retries("acme"), "a parked record")
    await deployment.apply({"tenants": [{**tenant, "destinations": [], "routes": []}]})
    (letter,) = await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    assert parked(letter).error == "destination_removed"


async def test_events_that_match_no_route_are_settled_and_said_so(deployment: Deployment):
    tenant = deployment.tenant("acme")
    tenant["routes"][0]["match"] = {"types": ["invoice.*"], "where": "payload.total > 100"}
    await deployment.apply({"tenants": [tenant]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event("e1")), ("acme", event("e2", "user.created")), ("acme", event("e3"))])
    await deployment.all_committed()
    assert worker.metric("headgate_events_total", result="unmatched") == 3
    records = [one for one in deployment.attempts() if one["kind"] == "event"]
    assert {(one["eventId"], one["routes"][0].get("why")) for one in records} == {
        ("e1", "where"),
        ("e2", "type"),
        ("e3", "where"),
    }
    assert msgspec.json.encode(records).count(b"total") == 0


async def test_sigterm_settles_what_is_in_flight_and_exits_0(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await deployment.worker()
    await deployment.publish([("acme", event(f"e{n}")) for n in range(500)])
    await deployment.inbox.wait_for("/acme", 1, 30)
    assert await worker.terminate() == 0
    delivered = deployment.inbox.accepted("/acme")
    await deployment.worker("w1")
    await deployment.inbox.wait_for("/acme", 500, 60)
    assert len(deployment.inbox.received("/acme")) == 500, len(delivered)


async def test_a_worker_with_another_master_key_ends_instead_of_calling_every_tenant_unknown(deployment: Deployment):
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.publish([("acme", event("e1"))])
    other = deployment.folder / "other.key"
    other.write_text("other:" + base64.b64encode(b"k" * 32).decode() + "\n")
    worker = deployment.launch(MASTER_KEY_FILE=str(other))
    assert await worker.ended() == 1
    assert "HEADGATE_MASTER_KEY_FILE" in worker.log.read_text()
    assert deployment.unrouted() == []
    await deployment.worker()
    await deployment.inbox.wait_for("/acme", 1, 30)
