"""`headgate trace` of events that were delivered in batches: an attempt's record lists deliveries, and no event."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from connectors.registry import KINDS
from schemas.attempt import AttemptRecord, EventRecord, encode_record
from schemas.ids import DEFAULT_VENDOR
from tests.cli.shell import headgate, told
from tests.deployment import Deployment, event, eventually
from tests.files import SPEC, become
from tests.streams.test_stage import files, tenant, worker

pytestmark = pytest.mark.broker


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, SPEC.kind, SPEC)  # type: ignore[arg-type]


async def traced(deployment: Deployment, wanted: str, tenant: str = "acme") -> dict[str, dict[str, Any]]:
    """The deliveries of the one event that is found, by destination."""
    (one,) = (await told(deployment, "trace", "--tenant", tenant, wanted))["events"]
    return {delivery["destination"]: delivery for delivery in one["deliveries"]}


async def test_the_attempts_of_a_batch_are_shown_for_each_event_in_it(deployment: Deployment, tmp_path: Path) -> None:
    good, later = tmp_path / "good", tmp_path / "later"
    hour = {"schedule": ["0s", "1h"], "max_age": "2h"}
    both = [files(good, "good", window_ms=1000), files(later, "later", retry=hour, window_ms=1000)]
    await deployment.apply({"tenants": [tenant(name, *both, topics="pooled") for name in ("acme", "acme2")]})
    become(later, "fail")
    running = await worker(deployment)
    refused = {**event("e2"), "payload": {"refuse": True}}
    await deployment.publish([(name, one) for name in ("acme", "acme2") for one in (event("e1"), refused)])
    # of each tenant: of each destination its batch, and the one that was refused by itself
    await eventually(lambda: sum(one["kind"] == "attempt" for one in deployment.attempts()) == 6, "6 attempts")
    assert await running.terminate() == 0

    first, second = await traced(deployment, "e1"), await traced(deployment, "e2")
    assert (first["good"]["now"]["state"], second["good"]["now"]["state"]) == ("delivered", "dead")
    (stored,), (denied,) = first["good"]["attempts"], second["good"]["attempts"]
    assert (stored["attempt"], stored["code"], denied["code"]) == (1, "ok", "refused")
    (failed,) = first["later"]["attempts"]
    assert (failed["code"], failed["verdict"]) == ("unavailable", "retry")
    assert failed["detail"] == "told to fail"  # sealed under the batch's id
    assert second["later"]["attempts"] == [failed]  # they were in it together
    assert failed["batch"].startswith("bat_")
    assert stored["batch"] not in ("", failed["batch"])
    now = first["later"]["now"]
    assert (now["state"], now["why"], now["dueAt"]) == ("waiting", "unavailable", failed["nextAt"])
    delivery = first["later"]["delivery"]
    assert await traced(deployment, delivery) == {"later": first["later"]}
    text = await headgate(deployment, "trace", "--tenant", "acme", "e1")
    assert text.exit_code == 0
    assert "waiting in retry, due" in text.stdout
    assert "told to fail" in text.stdout
    # nobody else's
    assert (await headgate(deployment, "trace", "--tenant", "acme2", delivery)).exit_code == 1
    theirs = await traced(deployment, "e1", "acme2")
    assert theirs["later"]["attempts"][0]["batch"] != failed["batch"]


async def test_what_may_have_arrived_is_told_and_a_forced_replay_of_it_too(
    deployment: Deployment, tmp_path: Path
) -> None:
    once = {"schedule": ["0s"], "max_age": "1h"}
    await deployment.apply({"tenants": [tenant("acme", files(tmp_path, retry=once))]})
    become(tmp_path, "timeout")
    await worker(deployment)
    await deployment.publish([("acme", event("e1"))])
    await eventually(lambda: deployment.dead_letters("acme"), "a dead letter")
    before = (await traced(deployment, "e1"))["files"]
    assert (before["now"]["state"], before["now"]["why"]) == ("dead", "unknown_outcome")
    assert [one["code"] for one in before["attempts"]] == ["timeout"]
    become(tmp_path, "")
    assert await told(deployment, "dlq", "replay", "--tenant", "acme") == {"matched": 1, "replayed": 0, "skipped": 1}
    forced = await told(deployment, "dlq", "replay", "--tenant", "acme", "--force")
    assert forced == {"matched": 1, "replayed": 1, "skipped": 0}
    attempts = lambda: sum(one["kind"] == "attempt" for one in deployment.attempts())  # noqa: E731
    await eventually(lambda: attempts() == 2, "another attempt")
    after = (await traced(deployment, "e1"))["files"]
    assert after["now"]["state"] == "delivered"
    assert after["now"]["replay"]
    assert [one["code"] for one in after["attempts"]] == ["timeout", "ok"]


async def test_a_batch_is_found_where_its_record_came_first_and_where_the_event_s_is_gone(
    deployment: Deployment,
) -> None:
    """Workers write the two, each for itself."""
    await deployment.apply({"tenants": [deployment.tenant("acme")]})

    def attempt(batch: str, *deliveries: str) -> AttemptRecord:
        return AttemptRecord(
            f"att_{batch}", DEFAULT_VENDOR, "acme", "", "", batch, "hook", "webhook", 1, "event",
            "2026-11-21T09:30:00.000Z", 5.0, "delivered", "ok", "stage/0/1", "w0", deliveries=deliveries,
        )  # fmt: skip

    routed = EventRecord(
        "evt_x", DEFAULT_VENDOR, "acme", "e1", "invoice.paid", "2026-11-21T09:29:59.000Z", "in/0/1", "w0",
        deliveries={"hook": "dlv_mine"},
    )  # fmt: skip
    records = [attempt("bat_1", "dlv_other", "dlv_mine"), attempt("bat_2", "dlv_other"), routed]
    await asyncio.to_thread(write, deployment, *records)
    await eventually(lambda: len(deployment.attempts()) == 3, "they are in the log")
    found = (await traced(deployment, "e1"))["hook"]
    assert [one["batch"] for one in found["attempts"]] == ["bat_1"]
    assert found["now"]["state"] == "delivered"
    old = (await traced(deployment, "dlv_other"))["hook"]
    assert sorted(one["batch"] for one in old["attempts"]) == ["bat_1", "bat_2"]
    text = await headgate(deployment, "trace", "--tenant", "acme", "dlv_other")
    assert "event that is not known any more" in text.stdout


def write(deployment: Deployment, *records: EventRecord | AttemptRecord) -> None:
    """Into the attempts topic, as a worker does."""
    producer = Producer({**deployment.settings.kafka.confluent(), "partitioner": "murmur2_random"})
    for record in records:
        producer.produce(deployment.settings.topics.attempts(DEFAULT_VENDOR), encode_record(record), b"acme")
    assert producer.flush(30) == 0
