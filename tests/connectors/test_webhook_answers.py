"""What an answer means: the table of design section 5, over the wire (scoreboard R7, the connector's half)."""

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.egress import Egress
from connectors.http.answer import Answer
from connectors.webhook.classify import CODES, MAX_RETRY_AFTER_S, classify, retry_after_s
from tests.connectors.receiver import OK, Peer, Receiver, answering
from tests.connectors.webhooks import AT_MS, deliver, delivery, hook


def _answer(status: int, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d Status\r\n%bcontent-length: 4\r\n\r\nbody" % (status, headers)


MEANINGS = {
    200: ("delivered", "", "ok"),
    201: ("delivered", "", "ok"),
    202: ("delivered", "", "ok"),
    299: ("delivered", "", "ok"),
    301: ("reject", "destination", "redirect"),
    302: ("reject", "destination", "redirect"),
    307: ("reject", "destination", "redirect"),
    400: ("reject", "event", "refused"),
    401: ("reject", "destination", "denied"),
    403: ("reject", "destination", "denied"),
    404: ("reject", "destination", "refused"),
    408: ("retry", "destination", "request_timeout"),
    410: ("reject", "destination", "gone"),
    413: ("reject", "event", "refused"),
    422: ("reject", "event", "refused"),
    425: ("retry", "destination", "too_early"),
    429: ("retry", "destination", "throttled"),
    500: ("retry", "destination", "server_error"),
    501: ("retry", "destination", "server_error"),
    503: ("retry", "destination", "server_error"),
    599: ("retry", "destination", "server_error"),
}


@pytest.mark.parametrize("status", MEANINGS)
async def test_each_status_has_its_outcome(egress: Egress, status: int) -> None:
    async with answering(_answer(status)) as receiver:
        outcome = await deliver(hook(egress, f"http://127.0.0.1:{receiver.port}/"), delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == MEANINGS[status]
    assert (outcome.status, outcome.answer) == (status, b"body")
    assert len(receiver.requests) == 1


async def test_a_script_of_failures_is_one_request_an_attempt(egress: Egress) -> None:
    """Each attempt is one request at the far side, whatever became of the connection of the one before."""
    steps = ["500", "429", "503", "reset", "302", "close", "garbage", "200"]
    left = list(steps)

    async def script(peer: Peer) -> None:
        while True:
            receiver.requests.append(await peer.request())
            match left.pop(0):
                case "reset":
                    peer.reset()
                    return
                case "close":
                    return
                case "garbage":
                    await peer.send(b"no HTTP\r\n\r\n")
                case "503":
                    await peer.send(_answer(503, b"retry-after: 30\r\n"))
                case status:
                    await peer.send(_answer(int(status)))

    async with Receiver(script) as receiver:
        connector = hook(egress, f"http://127.0.0.1:{receiver.port}/")
        outcomes = [await deliver(connector, delivery(1, attempt=attempt)) for attempt in range(len(steps))]
    assert [outcome.code for outcome in outcomes] == [
        "server_error", "throttled", "server_error", "reset", "redirect", "reset", "protocol", "ok",
    ]  # fmt: skip
    assert [outcome.retry_after_s for outcome in outcomes] == [0, 0, 30, 0, 0, 0, 0, 0]
    assert [request.headers["headgate-attempt"] for request in receiver.requests] == [str(n + 1) for n in range(8)]
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert len({request.body for request in receiver.requests}) == 1


async def test_a_status_that_the_destination_lists_retries(egress: Egress) -> None:
    async with answering(_answer(404, b"retry-after: 9\r\n"), _answer(403), _answer(410), OK) as receiver:
        connector = hook(egress, f"http://127.0.0.1:{receiver.port}/", retry_also={404, 403})
        outcomes = [await deliver(connector, delivery()) for _ in range(4)]
    assert [outcome.verdict for outcome in outcomes] == ["retry", "retry", "reject", "delivered"]
    assert (outcomes[0].code, outcomes[0].retry_after_s) == ("also", 9)


async def test_a_blocked_address_is_rejected_as_the_destinations_fault() -> None:
    counted: list[object] = []
    egress = Egress(on_blocked=counted.append)
    outcome = await deliver(hook(egress, "https://169.254.169.254/latest/meta-data"), delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("reject", "destination", "egress_blocked")
    assert len(counted) == 1
    egress.close()


async def test_a_check_names_what_is_wrong(egress: Egress) -> None:
    async def no_tls(peer: Peer) -> None:
        await peer.send(b"no TLS here, whatever you say\r\n")

    async with Receiver(no_tls) as receiver:
        plain = await hook(egress, f"https://127.0.0.1:{receiver.port}/?token=canary").check()
    assert [(step.name, step.ok) for step in plain] == [("resolve", True), ("connect", True), ("tls", False)]
    assert "canary" not in repr(plain)
    guarded = Egress(lookup=lambda host: ["10.0.0.1"])
    blocked = await hook(guarded, "https://name.example/").check()
    assert [(step.name, step.ok) for step in blocked] == [("resolve", True), ("connect", False)]
    assert "not public" in blocked[-1].detail
    guarded.close()


@pytest.mark.parametrize(
    ("text", "wait_s"),
    [
        ("", 0),
        ("0", 0),
        ("120", 120),
        ("99999999999999999999999999", MAX_RETRY_AFTER_S),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("٣", 0),
        (formatdate(AT_MS / 1000 + 90, usegmt=True), 90),
        (formatdate(AT_MS / 1000 - 90, usegmt=True), 0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        ("Fri, 99 Zzz 2026 99:99:99 GMT", 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(text: str, wait_s: float) -> None:
    assert retry_after_s(text, AT_MS) == wait_s


@given(st.text(max_size=60))
def test_any_retry_after_is_a_wait_that_can_be_kept_to(text: str) -> None:
    assert 0 <= retry_after_s(text, AT_MS) <= MAX_RETRY_AFTER_S


@given(st.integers(200, 599), st.text(max_size=30), st.frozensets(st.integers(200, 599), max_size=4))
def test_every_status_has_a_declared_code_and_only_2xx_delivers(status: int, after: str, also: frozenset[int]) -> None:
    outcome = classify(Answer(status, retry_after=after), AT_MS, also)
    assert outcome.code in CODES
    assert (outcome.verdict == "delivered") == (200 <= status < 300)
    assert outcome.verdict != "reject" or status not in also
