"""The demo's verdict is worth something only if it notices what is wrong: each promise is broken here once."""

import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from uuid import uuid4

import msgspec
import psutil
import pytest
import yaml
from confluent_kafka.admin import AdminClient
from msgspec import structs
from rich.console import Console

from cli.demo import Row, live_table, try_next
from dev import s3, wait
from dev.demo.checks import Letter, Seen, all_stored, check, check_mended, check_stored, complete, due
from dev.demo.events import DemoEvent, stream
from dev.demo.far_sides import Bucket, FarSideError, FarSides, Held
from dev.demo.places import PLACES, STORES, TENANTS, Kind, Place, Store
from dev.inbox import Received
from dev.stack import Stack, status

EVENTS = list(islice(stream("test", 1), 200))
CONFIG = Path("dev/demo/config.yaml")


def request(place: Place, event: DemoEvent, status: int) -> Received:
    payload = dict(event.payload)
    if place.redacts_card:
        payload.pop("card", None)
    body = msgspec.json.encode({"id": event.id, "type": event.type, "payload": payload})
    return Received(place.path, f"dlv_{place.path}_{event.id}", "0", True, 1, 0.0, 1, status, body, ())


def perfect() -> Seen:
    """What a faultless run leaves behind."""
    received: dict[str, list[Received]] = {}
    letters: dict[str, list[Letter]] = {tenant: [] for tenant in TENANTS}
    for place in PLACES:
        wanted = list(due(place, EVENTS).values())
        received[place.path] = [request(place, event, 503) for event in wanted[: place.failures]]
        received[place.path] += [request(place, event, 422 if place.dead else 200) for event in wanted]
        if place.dead:
            letters[place.tenant] = [Letter(place.tenant, place.destination, e.id, "refused") for e in wanted]
    return Seen(received, letters)


def path_of(seen: Seen, path: str) -> list[Received]:
    found = seen.received[path]
    assert isinstance(found, list)
    return found


def lose_one(seen: Seen) -> None:
    path_of(seen, "/acme").pop()


def cross_over(seen: Seen) -> None:
    path_of(seen, "/acme2").append(structs.replace(path_of(seen, "/acme")[0], path="/acme2", webhook_id="dlv_x"))


def pass_the_filter(seen: Seen) -> None:
    place = next(place for place in PLACES if place.tenant == "globex")
    other = next(event for event in EVENTS if event.tenant == "globex" and event.id not in due(place, EVENTS))
    path_of(seen, place.path).append(request(place, other, 200))


def change_a_payload(seen: Seen) -> None:
    got = path_of(seen, "/ACME")
    got[0] = structs.replace(got[0], body=got[0].body.replace(b'"payload":{', b'"payload":{"more":1,'))


def forge(seen: Seen) -> None:
    got = path_of(seen, "/hooli-crm")
    got[0] = structs.replace(got[0], signature_ok=False)


def not_checked(seen: Seen) -> None:
    got = path_of(seen, "/hooli-crm")
    got[0] = structs.replace(got[0], signature_ok=None)


def change_the_id(seen: Seen) -> None:
    got = path_of(seen, "/initech")
    got[0] = structs.replace(got[0], webhook_id="dlv_other")


def give_up(seen: Seen) -> None:
    got = path_of(seen, "/initech")
    first = got[0].body
    got[:] = [one for one in got if one.body != first or one.status == 503]


def show_the_card(seen: Seen) -> None:
    got = path_of(seen, "/globex")
    got[0] = structs.replace(
        got[0], body=got[0].body.replace(b'"payload":{', b'"payload":{"card":{"number":"4242 1"},')
    )


def lose_a_letter(seen: Seen) -> None:
    letters = seen.letters["umbrella"]
    assert isinstance(letters, list)
    letters.pop()


def wrong_letter(seen: Seen) -> None:
    letters = seen.letters["acme"]
    assert isinstance(letters, list)
    letters.append(Letter("acme", "hook", EVENTS[0].id, "timeout"))


def test_a_faultless_run_holds() -> None:
    assert complete(EVENTS, perfect().received)
    results = check(EVENTS, perfect())
    assert [result for result in results if not result.held] == []
    assert all(result.count for result in results)


@pytest.mark.parametrize(
    ("breach", "promise"),
    [
        (lose_one, "every event that a route matches has arrived"),
        (cross_over, "no request holds another tenant's event, or one that the filter leaves out"),
        (pass_the_filter, "no request holds another tenant's event, or one that the filter leaves out"),
        (change_a_payload, "type and payload are as published"),
        (forge, "every request is signed with its own destination's secret"),
        (not_checked, "every request is signed with its own destination's secret"),
        (change_the_id, "a delivery keeps its webhook-id through all attempts"),
        (give_up, "what failed at first was tried again until it went well"),
        (show_the_card, "redacted fields did not leave"),
        (lose_a_letter, "what was refused lies in its tenant's dead letters"),
        (wrong_letter, "nothing else is a dead letter"),
    ],
)
def test_each_breach_breaks_its_promise(breach: Callable[[Seen], None], promise: str) -> None:
    seen = perfect()
    breach(seen)
    assert promise in [result.promise for result in check(EVENTS, seen) if not result.held]


def mended() -> Seen:
    """What a faultless replay leaves behind."""
    received = {
        place.path: [request(place, e, 200) for e in due(place, EVENTS).values()] for place in PLACES if place.dead
    }
    return Seen(received, {tenant: [] for tenant in TENANTS})


def not_delivered(seen: Seen) -> None:
    path_of(seen, "/umbrella").pop()


def refused_again(seen: Seen) -> None:
    got = path_of(seen, "/umbrella")
    got[0] = structs.replace(got[0], status=422)


def forged_again(seen: Seen) -> None:
    got = path_of(seen, "/umbrella")
    got[0] = structs.replace(got[0], signature_ok=False)


def under_a_new_id(seen: Seen) -> None:
    got = path_of(seen, "/umbrella")
    got[0] = structs.replace(got[0], webhook_id="dlv_other")


def still_listed(seen: Seen) -> None:
    letters = seen.letters["umbrella"]
    assert isinstance(letters, list)
    letters.append(perfect().letters["umbrella"][0])


def test_a_faultless_replay_holds() -> None:
    results = check_mended(EVENTS, perfect(), mended())
    assert [result for result in results if not result.held] == []


@pytest.mark.parametrize(
    ("breach", "promise"),
    [
        (not_delivered, "what was refused has arrived by a replay, well signed, under the same webhook-id"),
        (refused_again, "what was refused has arrived by a replay, well signed, under the same webhook-id"),
        (forged_again, "what was refused has arrived by a replay, well signed, under the same webhook-id"),
        (under_a_new_id, "what was refused has arrived by a replay, well signed, under the same webhook-id"),
        (still_listed, "what was replayed is no longer listed as a dead letter"),
    ],
)
def test_each_breach_of_a_replay_breaks_its_promise(breach: Callable[[Seen], None], promise: str) -> None:
    after = mended()
    breach(after)
    assert [result.promise for result in check_mended(EVENTS, perfect(), after) if not result.held] == [promise]


Stored = dict[Kind, list[Held]]


def stored() -> Stored:
    """What a faultless run leaves in bucket, dataset and topic."""
    return {
        store.kind: [
            Held(event.id, event.type, payload_of(event), store.tenant if store.kind is Kind.BIGQUERY else None)
            for event in due(store, EVENTS).values()
        ]
        for store in STORES
    }


def payload_of(event: DemoEvent) -> str:
    return bytes(msgspec.json.decode(event.value, type=dict[str, msgspec.Raw])["payload"]).decode()


def never_came(held: list[Held]) -> None:
    held.pop()


def came_twice(held: list[Held]) -> None:
    held.append(held[0])


def is_anothers(held: list[Held]) -> None:
    other = next(event for event in EVENTS if event.tenant == "acme")
    held.append(Held(other.id, other.type, payload_of(other)))


def is_unknown(held: list[Held]) -> None:
    held.append(structs.replace(held[0], id="evt_other"))


def names_another(held: list[Held]) -> None:
    held[0] = structs.replace(held[0], owner="acme")


def is_of_another_type(held: list[Held]) -> None:
    held[0] = structs.replace(held[0], type="other")


def lost_a_zero(held: list[Held]) -> None:
    at = next(at for at, one in enumerate(held) if "8.10" in one.payload)
    held[at] = structs.replace(held[at], payload=held[at].payload.replace("8.10", "8.1"))


def went_through_a_float(held: list[Held]) -> None:
    at = next(at for at, one in enumerate(held) if "exchangeRate" in one.payload)
    payload = {**msgspec.json.decode(held[at].payload), "taxRate": msgspec.Raw(b"8.10")}
    held[at] = structs.replace(held[at], payload=msgspec.json.encode(payload).decode())


def became_a_text(held: list[Held]) -> None:
    at = next(at for at, one in enumerate(held) if "8.10" in one.payload)
    held[at] = structs.replace(held[at], payload=held[at].payload.replace("8.10", '"8.10"'))


def test_a_faultless_run_of_bucket_dataset_and_topic_holds() -> None:
    assert all_stored(EVENTS, stored())
    assert [result for result in check_stored(EVENTS, stored()) if not result.held] == []


def test_white_space_and_the_order_of_fields_are_no_change_of_a_payload() -> None:
    held = {
        kind: [
            structs.replace(one, payload=json.dumps(msgspec.json.decode(one.payload), sort_keys=True, indent=1))
            for one in all_of
            if "exchangeRate" not in one.payload
        ]
        for kind, all_of in stored().items()
    }
    events = [event for event in EVENTS if "exchangeRate" not in event.payload]
    assert [result for result in check_stored(events, held) if not result.held] == []


@pytest.mark.parametrize("store", STORES, ids=lambda store: str(store.kind))
@pytest.mark.parametrize(
    ("breach", "promise"),
    [
        (never_came, "holds every event of its tenant once"),
        (came_twice, "holds every event of its tenant once"),
        (is_anothers, "holds nothing else"),
        (is_unknown, "holds nothing else"),
        (names_another, "holds nothing else"),
        (is_of_another_type, "holds type and payload as published, digit for digit"),
        (lost_a_zero, "holds type and payload as published, digit for digit"),
        (went_through_a_float, "holds type and payload as published, digit for digit"),
        (became_a_text, "holds type and payload as published, digit for digit"),
    ],
)
def test_each_breach_of_a_store_breaks_its_promise_and_no_other(
    store: Store, breach: Callable[[list[Held]], None], promise: str
) -> None:
    held = stored()
    breach(held[store.kind])
    broken = [result.promise for result in check_stored(EVENTS, held) if not result.held]
    assert broken == [f"{store.shown} {promise}"]
    assert all_stored(EVENTS, held) is (breach is not never_came)


def test_the_configuration_names_the_places_and_stores_that_the_checks_expect() -> None:
    tenants = yaml.safe_load(CONFIG.read_text())["tenants"]
    configured = [
        (tenant["externalId"], each["id"], each["options"]["url"], each["secrets"]["signing"]["env"])
        for tenant in tenants
        for each in tenant["destinations"]
        if each["type"] == "webhook"
    ]
    others = [
        (tenant["externalId"], each["id"], each["type"])
        for tenant in tenants
        for each in tenant["destinations"]
        if each["type"] != "webhook"
    ]
    assert others == [(store.tenant, store.destination, store.kind) for store in STORES]
    assert configured == [(p.tenant, p.destination, f"INBOX{p.path}", p.secret) for p in PLACES]
    assert [tenant["externalId"] for tenant in tenants] == list(TENANTS)


def test_the_stream_is_the_same_for_the_same_seed_and_reaches_every_place() -> None:
    assert [(e.tenant, e.payload) for e in islice(stream("a", 7), 50)] == [
        (e.tenant, e.payload) for e in islice(stream("b", 7), 50)
    ]
    assert all(due(place, EVENTS) for place in (*PLACES, *STORES))


def test_a_far_side_that_does_not_start_says_why_and_keeps_no_other_from_opening(tmp_path: Path) -> None:
    far_sides = FarSides(tmp_path, "test")
    try:
        far_sides.start()
        far_sides.dataset.close()  # its process has ended before it could answer
        with pytest.raises(FarSideError, match="BigQuery did not start"):
            far_sides.wait_until_open()
        assert "BigQuery did not start" in (far_sides.fault(Kind.BIGQUERY) or "")
        assert not far_sides.is_open(Kind.BIGQUERY)
        assert far_sides.is_open(Kind.S3)
    finally:
        far_sides.close()


def test_a_far_side_that_has_gone_is_told_of_while_the_others_are_read_on(tmp_path: Path) -> None:
    far_sides = FarSides(tmp_path, "test")
    try:
        far_sides.start()
        assert wait.until(lambda: far_sides.is_open(Kind.S3), 60)
        far_sides.take_done()
        far_sides.bucket.close()
        assert wait.until(lambda: not far_sides.take_done() and far_sides.fault(Kind.S3) is not None, 60)
        assert "could not be read" in (far_sides.fault(Kind.S3) or "")
        with pytest.raises(FarSideError, match="could not be read"):
            far_sides.take_all()
        assert far_sides.fault(Kind.BIGQUERY) is None
    finally:
        far_sides.close()


def test_what_a_bucket_holds_is_taken_once_and_an_object_written_over_again(tmp_path: Path) -> None:
    bucket = Bucket(tmp_path, "demo-test")

    def put(key: str, *events: str) -> None:
        lines = "".join(f'{{"id":"{event}","type":"a.b","payload":{{"n":1.10}}}}\n' for event in events)
        url = f"{s3.url(bucket.port)}/demo-test/{key}"
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, Signature=0",
            "Content-Type": "application/gzip",
        }
        request = urllib.request.Request(url, gzip.compress(lines.encode()), headers, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    try:
        bucket.open()
        put("type%3Da.b/1", "evt_1", "evt_2")
        assert [(one.id, one.payload) for one in bucket.take()] == [("evt_1", '{"n":1.10}'), ("evt_2", '{"n":1.10}')]
        assert bucket.take() == []
        put("type%3Da.b/1", "evt_3")
        assert [one.id for one in bucket.take()] == ["evt_3"]
    finally:
        bucket.close()


@pytest.mark.broker
def test_the_demo_checks_every_delivery_and_ends_what_it_started(stack: Stack) -> None:
    prefix = f"demo-{uuid4().hex[:8]}"
    before = status(stack.dir).services
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "demo", "--once", "--events", "150"],
        env={**os.environ, "HEADGATE_DEV_DIR": str(stack.dir), "HEADGATE_PREFIX": prefix},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held: 150 events of 10 tenants" in done.stdout
    assert "FAILED" not in done.stdout
    assert "ok     what was refused has arrived by a replay" in done.stdout
    for store in STORES:
        assert f"ok     {store.shown} holds every event of its tenant once" in done.stdout
    admin = AdminClient({"bootstrap.servers": stack.kafka_bootstrap})
    assert [
        topic for topic in admin.list_topics(timeout=30).topics if re.fullmatch("headgate-demo-[0-9a-f]{6}", topic)
    ] == []
    assert status(stack.dir).services == before


@pytest.mark.broker
def test_a_demo_whose_terminal_is_closed_ends_what_it_started(stack: Stack) -> None:
    terminal, its_side = pty.openpty()
    demo = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo"],
        env={**os.environ, "HEADGATE_DEV_DIR": str(stack.dir), "HEADGATE_PREFIX": f"demo-{uuid4().hex[:8]}"},
        stdin=subprocess.DEVNULL,
        stdout=its_side,
        stderr=its_side,
        start_new_session=True,
    )
    os.close(its_side)
    shown = b""
    while b"events published" not in shown:
        shown += os.read(terminal, 65536)
    started = psutil.Process(demo.pid).children()
    try:
        os.close(terminal)
        demo.send_signal(signal.SIGHUP)  # as its shell does
        demo.wait(60)
        assert len(started) >= 4  # S3, BigQuery, the inbox and the worker
        assert [one for one in started if one.is_running()] == []
    finally:
        for one in started:
            if one.is_running():
                one.kill()


def test_what_to_try_next_fits_a_terminal_of_80_columns_line_by_line() -> None:
    env = {"HEADGATE_DEV_DIR": "/home/someone/headgate/.headgate", "HEADGATE_PREFIX": "headgate-demo"}
    lines = [text.plain for text in try_next(env)]
    assert max(map(len, lines)) <= 80
    event = next(line for line in lines if "echo" in line).split("'")[1]
    assert msgspec.json.decode(event)["payload"] == {"total": 500, "country": "CH"}


def test_the_live_table_is_whole_in_a_terminal_of_80_by_24() -> None:
    rows = [Row(tenant, 12345, 12345, 12, 12345, 13.0, 3200.0, "BigQuery starts") for tenant in TENANTS]
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(live_table(rows, 99999))
    lines = capture.get().splitlines()
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()
    for tenant in TENANTS:
        assert len([line for line in lines if f" {tenant} " in line and "12345" in line and "3.2 s" in line]) == 1
    assert len(lines) + 1 + len(try_next({"HEADGATE_DEV_DIR": ".headgate", "HEADGATE_PREFIX": "p"})) <= 24
