"""Events in Avro, and upcasters of installed packages, through real workers and a schema registry on a real socket."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from config.settings import SettingsError
from config.upcasters import installed_upcasters
from dev.inbox import Hang
from dev.stack import Stack
from tests.cli.shell import headgate
from tests.deployment import ROOT, Deployment, Worker, event, eventually
from tests.schema_registry import FarRegistry, record

pytestmark = pytest.mark.broker

PUBLISHED: Final = json.loads((ROOT / "schemas" / "avro" / "event.avsc").read_text())
MONEY: Final = {"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 2}
TYPED: Final = {
    "type": "record",
    "name": "InvoicePaid",
    "namespace": "billing",
    "fields": [
        {"name": "eventType", "type": {"type": "enum", "name": "EventType", "symbols": ["invoice_paid"]}},
        {"name": "eventId", "type": "string"},
        {"name": "occurredAt", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "schemaVersion", "type": "int", "default": 1},
        {
            "name": "payload",
            "type": {
                "type": "record",
                "name": "Invoice",
                "fields": [
                    {"name": "total", "type": MONEY},
                    {"name": "lines", "type": {"type": "array", "items": {"type": "map", "values": "long"}}},
                    {"name": "note", "type": ["null", "string"], "default": None},
                ],
            },
        },
    ],
}


@pytest.fixture
async def far() -> AsyncIterator[FarRegistry]:
    async with FarRegistry(user="reader", password="canary-pw") as registry:
        yield registry


async def avro_worker(deployment: Deployment, far: FarRegistry, **env: str) -> Worker:
    return await deployment.worker(
        SCHEMA_REGISTRY_URL=far.url, SCHEMA_REGISTRY_USER="reader", SCHEMA_REGISTRY_PASSWORD="canary-pw", **env
    )


def invoice(event_id: str, total: str = "120.50", **more: Any) -> dict[str, Any]:
    at = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
    payload = {"total": Decimal(total), "lines": [{"amount": 7}], "note": None}
    return {"eventType": "invoice_paid", "eventId": event_id, "occurredAt": at, "payload": payload, **more}


def bodies(deployment: Deployment, path: str = "/acme") -> dict[str, bytes]:
    return {json.loads(one.body)["id"]: one.body for one in deployment.inbox.received(path)}


async def test_an_avro_event_is_routed_and_delivered_as_the_same_event_in_json_would_be(
    deployment: Deployment, far: FarRegistry
) -> None:
    tenant = deployment.tenant("acme")
    tenant["routes"][0]["match"] = {"types": ["*"], "where": "payload.total > 100.0"}
    await deployment.apply({"tenants": [tenant]})
    typed, published = far.register(TYPED), far.register(PUBLISHED)
    worker = await avro_worker(deployment, far)
    in_text = {"eventType": "invoice_paid", "eventId": "text", "payload": '{"total": 100.10, "id": 1e400}'}
    await deployment.publish(
        [
            ("acme", record(typed, TYPED, invoice("typed", "123456789012345678901234.50"))),
            ("acme", record(typed, TYPED, invoice("small", "99.99"))),
            ("acme", record(published, PUBLISHED, in_text)),
            ("acme", record(published, PUBLISHED, {**in_text, "source": "billing"})),  # the same event again
            ("acme", record(published, PUBLISHED, {**in_text, "eventId": "other", "customerExternalId": "acme2"})),
            ("acme", event("json", payload={"total": 120})),
        ]
    )
    await deployment.inbox.wait_for("/acme", 3, 30)
    await deployment.all_committed()
    found = bodies(deployment)
    assert found.keys() == {"typed", "text", "json"}
    assert len(deployment.inbox.received("/acme")) == 3
    typed_body = json.loads(found["typed"])
    assert (typed_body["occurredAt"], typed_body["schemaVersion"]) == ("2026-11-21T09:30:00.000000Z", 1)
    expected = b'"payload":{"total":123456789012345678901234.50,"lines":[{"amount":7}],"note":null}'
    assert expected in found["typed"]
    assert b'"payload":{"total": 100.10, "id": 1e400}' in found["text"]
    assert worker.metric("headgate_events_total", result="routed") == 3
    assert worker.metric("headgate_events_total", result="unmatched") == 1
    assert worker.metric("headgate_events_total", result="duplicate") == 1
    assert [one.headers["hg-error"] for one in deployment.unrouted()] == [b"key_mismatch"]
    assert sorted(far.asked) == [f"/schemas/ids/{number}" for number in (typed, published)]
    assert "canary" not in worker.log.read_text()


async def test_while_the_registry_is_away_all_else_goes_on_and_what_it_left_unread_comes_back_by_replay(
    deployment: Deployment, far: FarRegistry
) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    known, new = far.register(PUBLISHED), far.register(TYPED)
    worker = await avro_worker(deployment, far)
    small = {"eventType": "order.paid", "payload": "1"}
    await deployment.publish([("acme", record(known, PUBLISHED, {**small, "eventId": "first"}))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    await far.go()
    lost = record(new, TYPED, invoice("lost"))
    await deployment.publish([("acme", lost)])
    for number in range(5):
        known_one = record(known, PUBLISHED, {**small, "eventId": f"avro{number}"})
        await deployment.publish([("acme", known_one), ("acme", event(f"json{number}"))])
    received = await deployment.inbox.wait_for("/acme", 11, 30)
    (letter,) = await eventually(deployment.unrouted, "given up after 30 s")
    assert max(one.arrived_at_ms for one in received) < letter.timestamp_ms  # meanwhile, not afterwards
    assert letter.headers["hg-error"] == b"schema_unavailable"
    assert b"schema 2: the schema registry did not tell the schema within 30 s" in letter.headers["hg-detail"]
    assert (letter.key, letter.value) == (b"acme", lost)
    await deployment.all_committed()
    assert "schema_registry_silent" in worker.log.read_text()
    await far.come()
    done = await headgate(deployment, "dlq", "replay", "--unrouted", "--error", "schema_unavailable")
    assert done.exit_code == 0, done.output
    await deployment.inbox.wait_for("/acme", 12, 20)
    assert "lost" in bodies(deployment)
    assert worker.process.poll() is None


async def test_without_a_registry_an_avro_record_is_unrouted_at_once(deployment: Deployment) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    await deployment.worker()
    await deployment.publish([("acme", record(7, TYPED, invoice("e1"))), ("acme", event("json"))])
    await deployment.inbox.wait_for("/acme", 1, 30)
    (letter,) = await eventually(deployment.unrouted, "unrouted")
    assert letter.headers["hg-error"] == b"schema_unavailable"
    assert b"HEADGATE_SCHEMA_REGISTRY_URL is not set" in letter.headers["hg-detail"]


async def test_a_small_record_that_becomes_a_large_event_counts_as_what_it_becomes(
    deployment: Deployment, far: FarRegistry
) -> None:
    """Some bytes that stand for 750 KB of JSON, and an endpoint that never answers."""
    fields = [{"name": "eventType", "type": "string"}, {"name": "payload", "type": {"type": "array", "items": "null"}}]
    schema = {"type": "record", "name": "Event", "fields": fields}
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    deployment.inbox.script("/acme", Hang())
    worker = await avro_worker(deployment, far)
    small = record(far.register(schema), schema, {"eventType": "t", "payload": [None] * 150_000})
    assert len(small) < 100
    await deployment.publish([("acme", small)])
    await eventually(deployment.attempts, "what the worker wrote of it is acknowledged, and so held no more")
    await eventually(
        lambda: worker.metric("headgate_in_flight") == 1 and worker.metric("headgate_held_bytes") > 750_000,
        "the event that is in flight counts",
    )


async def test_records_that_are_long_to_read_do_not_stop_a_worker_until_all_are_read(
    deployment: Deployment, far: FarRegistry
) -> None:
    """Ten bytes that declare 10^9 records without a field: each takes long until it is refused."""
    empty = {"type": "record", "name": "Empty", "fields": []}
    fields = [{"name": "eventType", "type": "string"}, {"name": "payload", "type": {"type": "array", "items": empty}}]
    number = far.register({"type": "record", "name": "Event", "fields": fields})
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    worker = await avro_worker(deployment, far)
    hostile = b"\x00" + number.to_bytes(4, "big") + b"\x02t" + b"\x80\xa8\xd6\xb9\x07"
    count = 24
    await deployment.publish([("acme", hostile)] * count)
    seen = await eventually(
        lambda: worker.metric("headgate_events_total", result="unrouted"), "it answers once some are read"
    )
    assert seen < count  # while others are still to be read
    await deployment.all_committed()
    assert [one.headers["hg-error"] for one in deployment.unrouted()] == [b"too_large"] * count


# ---------------------------------------------------------------- upcasters


UPCASTERS: Final = """
from decimal import Decimal

def register(upcasters):
    upcasters.register("invoice.paid", 1, to_cents)
    upcasters.register("invoice.paid", 2, lambda payload: {"amount": payload, "currency": "CHF"})
    upcasters.register("invoice_paid", 1, to_cents)
    upcasters.register("order.paid", 2, lambda payload: payload)

def to_cents(payload):
    return {"cents": payload["total"] * 100}
"""


def install(folder: Path, code: str) -> None:
    """As pip would a package with this entry point."""
    (folder / "acme_upcasters.py").write_text(code)
    info = folder / "acme_upcasters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-upcasters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headgate.upcasters]\nacme = acme_upcasters:register\n")


async def test_upcasters_of_an_installed_package_raise_json_and_avro_events(
    deployment: Deployment, far: FarRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, UPCASTERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tenant = deployment.tenant("acme")
    tenant["routes"][0]["match"] = {"types": ["*"], "where": "schemaVersion != 3 || payload.amount.cents > 0.0"}
    await deployment.apply({"tenants": [tenant]})
    typed = far.register(TYPED)
    await avro_worker(deployment, far)
    await deployment.publish(
        [
            ("acme", event("v1", payload={"total": 12, "drop": 1})),
            ("acme", b'{"eventId":"digits","eventType":"invoice.paid","payload":{"total":0.100000000000001}}'),
            ("acme", event("v2", payload={"cents": 5}, schemaVersion=2)),
            (
                "acme",
                b'{"eventId":"v3","eventType":"invoice.paid","schemaVersion":3,"payload":{"amount": {"cents":1}}}',
            ),
            ("acme", event("v9", "refund.paid", schemaVersion=9)),
            ("acme", record(typed, TYPED, invoice("avro", "1.50"))),
            ("acme", event("too new", schemaVersion=4)),
            ("acme", event("gap", "order.paid", schemaVersion=1)),
            ("acme", event("raises", payload={"secret": "canary-77"})),
            ("acme", record(typed, TYPED, invoice("avro too new", schemaVersion=3))),
        ]
    )
    await deployment.inbox.wait_for("/acme", 6, 30)
    await deployment.all_committed()
    found = {
        name: body[body.index(b'"schemaVersion"') :].removesuffix(b',"metadata":{}}')
        for name, body in bodies(deployment).items()
    }
    assert found == {
        "v1": b'"schemaVersion":3,"payload":{"amount":{"cents":1200},"currency":"CHF"}',
        "digits": b'"schemaVersion":3,"payload":{"amount":{"cents":10.000000000000100},"currency":"CHF"}',
        "v2": b'"schemaVersion":3,"payload":{"amount":{"cents":5},"currency":"CHF"}',
        "v3": b'"schemaVersion":3,"payload":{"amount": {"cents":1}}',
        "v9": b'"schemaVersion":9,"payload":{"total":12}',
        "avro": b'"schemaVersion":2,"payload":{"cents":150.00}',
    }
    letters = deployment.unrouted()
    assert sorted(one.headers["hg-error"] for one in letters) == [b"malformed", *[b"unknown_schema"] * 3]
    assert not any(b"canary" in one.headers["hg-detail"] for one in letters)


async def test_publish_filter_and_doctor_know_the_upcasters_too(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, UPCASTERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_upcasters", raising=False)
    await deployment.apply({"tenants": [deployment.tenant("acme")]})
    events = tmp_path / "events.ndjson"
    line = {"customerExternalId": "acme", "eventType": "invoice.paid", "payload": {"total": 1}}
    events.write_text(json.dumps(line) + "\n" + json.dumps({**line, "schemaVersion": 4}))
    published = await headgate(deployment, "publish", "-f", str(events))
    assert published.exit_code == 1
    assert "2: field schemaVersion: 4 of invoice.paid, but the newest known is 3" in published.stderr
    tried = await headgate(deployment, "filter", "payload.amount.cents == 100", "-f", str(events))
    assert "match" in tried.stdout
    doctor = await headgate(deployment, "doctor", "--output", "json")
    (check,) = [one for one in json.loads(doctor.stdout)["checks"] if one["name"] == "upcasters"]
    assert check["status"] == "warn"
    assert check["says"] == "order.paid: nothing raises version 1"


def test_a_worker_with_upcasters_that_cannot_be_loaded_does_not_start(stack: Stack, tmp_path: Path) -> None:
    install(tmp_path, "raise RuntimeError('broken')")
    env = {**os.environ, **stack.settings(), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "cli.main", "worker"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "package acme-upcasters: RuntimeError: broken; mend the package, or uninstall it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("", "AttributeError"),
        (UPCASTERS.replace("2, lambda", "1, lambda"), "two upcasters from version 1"),
        (UPCASTERS.replace("2, lambda", "0, lambda"), "a version that is 1 or more"),
        ("register = 7", "TypeError"),
    ],
)
def test_upcasters_that_cannot_be_loaded_are_told_with_their_package(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_upcasters", raising=False)
    with pytest.raises(SettingsError) as told:
        installed_upcasters()
    monkeypatch.delitem(sys.modules, "acme_upcasters", raising=False)
    (problem,) = told.value.problems
    assert "headgate.upcasters: acme = acme_upcasters:register of package acme-upcasters" in problem
    assert why in problem


# ---------------------------------------------------------------- doctor


async def test_doctor_asks_the_registry_where_there_is_one(deployment: Deployment, far: FarRegistry) -> None:
    await deployment.apply({"tenants": [deployment.tenant("acme")]})

    async def check(**env: str) -> dict[str, str] | None:
        found = await headgate(deployment, "doctor", "--output", "json", **env)
        checks = {one["name"]: one for one in json.loads(found.stdout)["checks"]}
        return checks.get("schema registry")

    assert await check() is None
    given = {
        "HEADGATE_SCHEMA_REGISTRY_URL": far.url,
        "HEADGATE_SCHEMA_REGISTRY_USER": "reader",
        "HEADGATE_SCHEMA_REGISTRY_PASSWORD": "canary-pw",
    }
    found = await check(**given)
    assert found is not None and found["status"] == "ok"
    wrong = await check(**given | {"HEADGATE_SCHEMA_REGISTRY_PASSWORD": "canary-other"})
    assert wrong is not None and wrong["status"] == "fail"
    assert "HEADGATE_SCHEMA_REGISTRY_USER" in wrong["says"]
    assert "canary" not in str(wrong)
    no_registry = await check(**given | {"HEADGATE_SCHEMA_REGISTRY_URL": deployment.inbox.url("/x")})
    assert no_registry is not None and no_registry["status"] == "fail"
    await far.go()
    away = await check(**given)
    assert away is not None and away["status"] == "fail"
    await far.come()
