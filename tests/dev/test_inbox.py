"""The inbox is what demo, tests and benchmarks believe: so it must not call a bad delivery good."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from standardwebhooks.webhooks import Webhook

from dev.inbox import (
    Hang,
    Inbox,
    InboxError,
    Redirect,
    Refuse,
    RemoteInbox,
    Reset,
    Slow,
    Steps,
    Throttle,
    fail_first,
    signature_ok,
)

SECRET = "whsec_" + b64encode(b"k" * 32).decode()
OTHER = "whsec_" + b64encode(b"o" * 32).decode()


def signed(webhook_id: str, body: str, *, secret: str = SECRET, at: datetime | None = None) -> dict[str, str]:
    at = at or datetime.now(UTC)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(webhook_id, at, body),
        "headgate-attempt": "1",
    }


async def post(session: aiohttp.ClientSession, url: str, webhook_id: str = "dlv_1", body: str = "{}") -> int:
    async with session.post(url, data=body, headers=signed(webhook_id, body), allow_redirects=False) as answer:
        await answer.read()
        return answer.status


async def test_a_delivery_signed_by_the_reference_library_counts_as_well_signed() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        inbox.script("/a", secrets=[SECRET])
        assert await post(session, inbox.url("/a"), "dlv_1", '{"total": 12}') == 200
        (got,) = await inbox.wait_for("/a", 1)
        assert (got.webhook_id, got.signature_ok, got.attempt, got.body) == ("dlv_1", True, 1, b'{"total": 12}')


@pytest.mark.parametrize("fault", ["body", "id", "secret", "old", "new", "version", "missing"])
async def test_a_delivery_that_is_not_well_signed_is_called_bad(fault: str) -> None:
    headers = signed("dlv_1", "{}")
    body = "{}"
    match fault:
        case "body":
            body = "{ }"
        case "id":
            headers["webhook-id"] = "dlv_2"
        case "secret":
            headers = signed("dlv_1", "{}", secret=OTHER)
        case "old" | "new":
            away = timedelta(seconds=310 if fault == "new" else -310)
            headers = signed("dlv_1", "{}", at=datetime.now(UTC) + away)
        case "version":
            headers["webhook-signature"] = headers["webhook-signature"].replace("v1,", "v2,")
        case "missing":
            del headers["webhook-signature"]
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        inbox.script("/a", secrets=[SECRET])
        await session.post(inbox.url("/a"), data=body, headers=headers)
        (got,) = await inbox.wait_for("/a", 1, what="requests")
        assert got.signature_ok is False
        assert inbox.stats().paths["/a"].bad_signatures == 1


def test_during_a_rotation_any_of_several_signatures_and_secrets_holds() -> None:
    headers = signed("dlv_1", "{}")
    both = "v1,AAAA " + headers["webhook-signature"]
    assert signature_ok([OTHER, SECRET], "dlv_1", headers["webhook-timestamp"], b"{}", both, time.time())
    assert not signature_ok([OTHER], "dlv_1", headers["webhook-timestamp"], b"{}", both, time.time())


async def test_a_repeated_id_is_one_acceptance_and_one_duplicate() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        for webhook_id in ("dlv_1", "dlv_1", "dlv_2"):
            await post(session, inbox.url("/a"), webhook_id)
        stats = inbox.stats().paths["/a"]
        assert (stats.requests, stats.accepted, stats.duplicates, stats.connections) == (3, 2, 1, 1)


async def test_failing_first_is_counted_for_each_delivery_or_for_the_whole_path() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        inbox.script("/each", fail_first(1))
        inbox.script("/all", fail_first(1, per="path"))
        each = [await post(session, inbox.url("/each"), webhook_id) for webhook_id in ("a", "b", "a", "b")]
        whole = [await post(session, inbox.url("/all"), webhook_id) for webhook_id in ("a", "b")]
        assert (each, whole) == ([503, 503, 200, 200], [503, 200])
        assert inbox.accepted("/each") == {"a", "b"}
        assert inbox.stats().paths["/each"].duplicates == 0


async def test_a_script_of_steps_is_met_in_order_and_its_last_one_repeats() -> None:
    steps = Steps((Refuse(500), Throttle("7"), Redirect("http://127.0.0.1:9/"), Slow(0.01), Refuse(410)))
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        inbox.script("/a", steps)
        assert [await post(session, inbox.url("/a")) for _ in range(6)] == [500, 429, 302, 200, 410, 410]
        assert [one.status for one in inbox.received("/a")] == [500, 429, 302, 200, 410, 410]
        inbox.script("/a", Throttle("7", 503))
        async with session.post(inbox.url("/a")) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "7")


async def test_a_reset_is_seen_as_a_broken_connection_and_a_hang_as_silence() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        inbox.script("/reset", Reset())
        inbox.script("/hang", Hang())
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(session, inbox.url("/reset"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(post(session, inbox.url("/hang")), 0.2)
        assert [one.status for one in inbox.received("/hang")] == [0]


async def test_waiting_for_what_does_not_come_says_what_was_there() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        await post(session, inbox.url("/a"))
        with pytest.raises(InboxError, match=r"/a: 1 of 2 accepted after 0.05 s"):
            await inbox.wait_for("/a", 2, 0.05)


def test_the_inbox_runs_as_a_process_of_its_own_and_takes_scripts() -> None:
    async def send(url: str, count: int) -> list[int]:
        async with aiohttp.ClientSession() as session:
            return [await post(session, url, f"dlv_{number}") for number in range(count)]

    with RemoteInbox.spawn() as inbox:
        inbox.script("/a b?c", Refuse(410))
        inbox.script("/a", fail_first(1, per="path"), secrets=[SECRET])
        assert asyncio.run(send(inbox.url("/a"), 3)) == [503, 200, 200]
        assert [one.signature_ok for one in inbox.received("/a")] == [True, True, True]
        assert inbox.stats().paths["/a"].accepted == 2
        with pytest.raises(InboxError, match="400"):
            inbox._call("POST", "script", dict[str, str], json.dumps({"path": "/a", "script": {"mode": "no"}}).encode())
    assert inbox.process.returncode == 0


def test_a_taken_port_and_a_script_that_is_none_are_messages_and_not_tracebacks() -> None:
    def told(*args: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "dev.inbox", *args], capture_output=True, text=True, timeout=30)
        assert (done.stdout, "Traceback" in done.stderr) == ("", False)
        return done.returncode, done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert told("--port", str(port)) == (
            1,
            f"Error: --port {port}: cannot listen there (address already in use); give another port, or 0 for one that "
            "is free\n",
        )
    code, message = told("--script", '/a={"mode":"hangs"}')
    assert code == 2
    assert "is not PATH=JSON of a script: " in message
    assert "hangs" in message


def test_counting_only_tells_ids_apart_and_keeps_times_of_arrival() -> None:
    async def send(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            for number in (1, 2, 2):
                await post(session, url, f"dlv_{number}", f'{{"id":"evt_{number}","payload":{{}}}}')

    with RemoteInbox.spawn(count_only=True, arrivals=True) as inbox:
        asyncio.run(send(inbox.url("/a")))
        stats = inbox.stats()
        assert (stats.requests, stats.accepted) == (3, 2)
        assert stats.connections == 2  # the sender's, and the one that asks
        assert [arrival.event for arrival in inbox.arrivals()] == ["evt_1", "evt_2", "evt_2"]


def test_the_process_ends_with_the_one_that_started_it() -> None:
    inbox = RemoteInbox.spawn()
    assert inbox.process.stdin is not None
    inbox.process.stdin.close()  # all that is left of a starter that was killed
    assert inbox.process.wait(10) == 0
    inbox.close()


async def test_what_was_taken_is_forgotten_but_still_counted() -> None:
    async with Inbox() as inbox, aiohttp.ClientSession() as session:
        await post(session, inbox.url("/a"), "dlv_1")
        assert [one.webhook_id for one in inbox.take("/a")] == ["dlv_1"]
        await post(session, inbox.url("/a"), "dlv_2")
        assert [one.webhook_id for one in inbox.take("/a")] == ["dlv_2"]
        assert inbox.stats().paths["/a"].accepted == 2
