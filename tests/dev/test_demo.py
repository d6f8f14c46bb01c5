"""The demo's verdict is worth something only if it notices what is wrong: each promise is broken here once."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from uuid import uuid4

import msgspec
import psutil
import pytest
import yaml
from msgspec import structs
from rich.console import Console

from cli.demo import Row, live_table, try_next
from dev.demo.checks import Letter, Seen, check, check_mended, complete, due
from dev.demo.events import DemoEvent, stream
from dev.demo.places import PLACES, TENANTS, Place
from dev.inbox import Received
from dev.stack import Stack

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


def test_the_configuration_names_the_places_that_the_checks_expect() -> None:
    tenants = yaml.safe_load(CONFIG.read_text())["tenants"]
    configured = [
        (tenant["externalId"], each["id"], each["options"]["url"], each["secrets"]["signing"]["env"])
        for tenant in tenants
        for each in tenant["destinations"]
    ]
    assert configured == [(p.tenant, p.destination, f"INBOX{p.path}", p.secret) for p in PLACES]
    assert [tenant["externalId"] for tenant in tenants] == list(TENANTS)


def test_the_stream_is_the_same_for_the_same_seed_and_reaches_every_place() -> None:
    assert [(e.tenant, e.payload) for e in islice(stream("a", 7), 50)] == [
        (e.tenant, e.payload) for e in islice(stream("b", 7), 50)
    ]
    assert all(due(place, EVENTS) for place in PLACES)


@pytest.mark.broker
def test_the_demo_checks_every_delivery_and_ends_what_it_started(stack: Stack) -> None:
    prefix = f"demo-{uuid4().hex[:8]}"
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "demo", "--once", "--events", "150"],
        env={**os.environ, "HEADGATE_DEV_DIR": str(stack.dir), "HEADGATE_PREFIX": prefix},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held: 150 events of 7 tenants" in done.stdout
    assert "FAILED" not in done.stdout
    assert "ok     what was refused has arrived by a replay" in done.stdout


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
        assert len(started) >= 2  # the inbox and the worker
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
    rows = [Row(tenant, 12345, 12345, 12, 12345, 13.0, 3200.0) for tenant in TENANTS]
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(live_table(rows, 99999))
    lines = capture.get().splitlines()
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()
    for tenant in TENANTS:
        assert len([line for line in lines if f" {tenant} " in line and "12345" in line and "3.2 s" in line]) == 1
    assert len(lines) + 1 + len(try_next({"HEADGATE_DEV_DIR": ".headgate", "HEADGATE_PREFIX": "p"})) <= 24
