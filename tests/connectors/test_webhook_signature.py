"""Signatures and bodies (scoreboard R15), checked by the reference package."""

import base64
import datetime
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from connectors.body import body
from connectors.egress import Egress
from connectors.webhook.encode import USER_AGENT, Signer
from connectors.webhook.options import generate_secrets, signing_key
from tests.connectors.receiver import OK, Request, answering
from tests.connectors.webhooks import AT_MS, SECRET, deliver, delivery, hook

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "standard-webhooks.json").read_text(encoding="utf-8")
)


@pytest.mark.scoreboard("R15")
@pytest.mark.parametrize("vector", VECTORS["accept"], ids=lambda vector: str(vector["timestamp"]))
def test_the_vectors_are_signed_as_published(vector: dict[str, Any]) -> None:
    signer = Signer([signing_key(VECTORS["secret"])])
    signed = signer.sign(vector["id"].encode(), b"%d" % vector["timestamp"], vector["body"].encode())
    assert signed.decode() == vector["signature"]


@pytest.mark.scoreboard("R15")
@pytest.mark.parametrize("vector", VECTORS["reject"], ids=lambda vector: str(vector["why"]))
def test_what_the_vectors_refuse_is_not_what_we_sign(vector: dict[str, Any]) -> None:
    accepted = VECTORS["accept"][0]
    signer = Signer([signing_key(VECTORS["secret"])])
    signed = signer.sign(accepted["id"].encode(), b"%d" % accepted["timestamp"], accepted["body"].encode())
    assert vector["signature"] not in signed.decode().split(" ")


async def _received(egress: Egress, count: int, secrets: dict[str, Any]) -> list[Request]:
    dice = random.Random(15)
    async with answering(OK) as receiver:
        connector = hook(egress, f"http://127.0.0.1:{receiver.port}/", secrets)
        for number in range(count):
            text = "".join(chr(dice.choice((dice.randrange(32, 127), dice.randrange(160, 0xD7FF)))) for _ in range(30))
            payload = json.dumps({"n": number, "text": text}, ensure_ascii=dice.random() < 0.5).encode()
            outcome = await deliver(connector, delivery(number, payload), int(time.time() * 1000))
            assert outcome.verdict == "delivered"
        return receiver.requests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.chaos("R15"))])
async def test_all_requests_verify_and_none_that_was_tampered_with(
    egress: Egress, count: int, report: Callable[[str], None]
) -> None:
    secrets = dict(generate_secrets())
    verifier = Webhook(secrets["signing"])
    other = Webhook(generate_secrets()["signing"])
    requests = await _received(egress, count, secrets)
    assert len(requests) == count
    for number, request in enumerate(requests):
        assert verifier.verify(request.body, request.headers)["payload"]["n"] == number
        flipped = bytearray(request.body)
        flipped[number % len(flipped)] ^= 1
        tampered = [
            (bytes(flipped), request.headers),
            (request.body + b" ", request.headers),
            (request.body, {**request.headers, "webhook-id": request.headers["webhook-id"] + "x"}),
            (
                request.body,
                {**request.headers, "webhook-timestamp": str(int(request.headers["webhook-timestamp"]) + 1)},
            ),
            (request.body, {**request.headers, "webhook-signature": "v1," + base64.b64encode(b"x" * 32).decode()}),
        ]
        for content, headers in tampered:
            with pytest.raises((WebhookVerificationError, UnicodeDecodeError)):
                verifier.verify(content, headers)
        with pytest.raises(WebhookVerificationError):
            other.verify(request.body, request.headers)
    report(f"{count:,} requests verify; each of 6 changes to each of them is refused")


async def test_during_a_rotation_receivers_with_the_old_or_the_new_secret_both_verify(egress: Egress) -> None:
    new, old = generate_secrets()["signing"], generate_secrets()["signing"]
    for request in await _received(egress, 10, {"signing": [new, old]}):
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        newest_first = Webhook(new).sign(
            request.headers["webhook-id"],
            _at(request.headers["webhook-timestamp"]),
            request.body.decode(),
        )
        assert request.headers["webhook-signature"].split(" ")[0] == newest_first
        for secret in (new, old):
            Webhook(secret).verify(request.body, request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(request.body, request.headers)


def _at(seconds: str) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), tz=datetime.UTC)


async def test_without_a_live_secret_nothing_is_sent(egress: Egress) -> None:
    async with answering(OK) as receiver:
        outcome = await deliver(hook(egress, f"http://127.0.0.1:{receiver.port}/", {}), delivery())
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "platform", "unsigned")
    assert receiver.connections == 0


async def test_the_request_is_the_one_that_is_documented(egress: Egress) -> None:
    async with answering(OK) as receiver:
        connector = hook(
            egress, f"http://127.0.0.1:{receiver.port}/in", {"signing": SECRET, "headers": {"X-Key": "k 1"}}
        )
        payload = b'{"total": 12.00, "big": 123456789012345678901234567890, "e": 1E5, "t":"\\u00e9\xc3\xa9"}'
        await deliver(connector, delivery(7, payload, attempt=3, metadata=b'{"userId": "u1"}'))
    [request] = receiver.requests
    assert request.line == "POST /in HTTP/1.1"
    signature = request.headers.pop("webhook-signature")
    assert signature.startswith("v1,")
    assert request.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-type": "application/json",
        "user-agent": USER_AGENT,
        "x-key": "k 1",
        "webhook-id": f"dlv_{7:026}",
        "webhook-timestamp": str(AT_MS // 1000),
        "headgate-attempt": "4",
        "content-length": str(len(request.body)),
    }
    assert USER_AGENT.startswith("Headgate/")
    assert request.body == (
        b'{"id":"evt_7","type":"invoice.paid","occurredAt":"2026-11-21T09:30:00Z","schemaVersion":1,"payload":%b,'
        b'"metadata":{"userId": "u1"}}' % payload
    )


def test_a_second_attempt_signs_the_same_bytes_under_the_same_id() -> None:
    first, second = delivery(1, b'{"a":1.0}'), delivery(1, b'{"a":1.0}', attempt=1)
    assert body(first.event) == body(second.event)
    assert first.id == second.id


def test_signing_keys_up_to_the_hashs_block_size_are_signed_as_the_package_does() -> None:
    for size in range(24, 65):
        secret = "whsec_" + base64.b64encode(bytes(range(size))).decode()
        ours = Signer([signing_key(secret)]).sign(b"dlv_1", b"1790000000", b"{}").decode()
        assert ours == Webhook(secret).sign("dlv_1", _at("1790000000"), "{}")


def test_the_example_of_the_guide_is_signed_with_the_secret_it_names() -> None:
    guide = (Path(__file__).parents[2] / "connectors" / "webhook" / "GUIDE.md").read_text(encoding="utf-8")
    head, _, rest = guide.partition("```http\n")[2].partition("\n\n")
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    content = rest.partition("\n```")[0]
    signed = Webhook(SECRET).sign(headers["webhook-id"], _at(headers["webhook-timestamp"]), content)
    assert SECRET in guide
    assert headers["webhook-signature"] == signed
