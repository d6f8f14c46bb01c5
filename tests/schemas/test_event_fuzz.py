"""Whatever a record of ingress holds: an event that all that follows can work with, or a problem; nothing else."""

import json
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final

import pytest
from msgspec import Raw

from connectors.body import body
from schemas.event import Event, Problem, canonical, correlation_id, decode_event, from_canonical
from schemas.ids import DEFAULT_VENDOR, DestinationId, ExternalId, TenantRef, delivery_id
from tests.mutate import mutated

ACME: Final = TenantRef(DEFAULT_VENDOR, ExternalId("acme"))
MAX_BYTES: Final = 16 * 1024
BOUND_S: Final = 0.05

CORPUS: Final = [
    b'{"eventType": "invoice.paid", "payload": {}}',
    b'{"eventType":"a","payload":[1,2.50,-0,1e400,"x",null,true,{"a":{"b":[]}}]}',
    b'{"payload": "\\u0000\\ud83d\\ude00 caf\xc3\xa9", "eventType": "\xc3\xa9.\xf0\x9f\x98\x80"}',
    b'{"eventId": "evt_1", "eventType": "invoice.paid", "occurredAt": "2026-11-21T09:30:00Z", "payload": {"total": 12},'
    b' "customerExternalId": "acme", "schemaVersion": 1, "idempotencyKey": "k1", "source": "billing",'
    b' "aggregateId": "inv_42", "metadata": {"userId": "u1", "correlationId": "c1", "causationId": "evt_0"}}',
    b'{"eventType":"t","payload":1,"occurredAt":"2026-11-21t09:30:00.123456+05:30","metadata":{"correlationId":7}}',
    b'{"eventType":"t","payload":%b}' % (b"[" * 200 + b"]" * 200),
    b'{"eventType":"t","payload":"%b"}' % (b"x" * (MAX_BYTES - 400)),
    b"\x00\x00\x00\x00\x01\x02ab",  # as Avro begins
]
TIMES_MS: Final = (1_795_000_000_000, 0, -1, 1, -(2**63), 2**63 - 1, 253_402_300_800_000)


def refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def checked(value: bytes, found: Event | Problem) -> str:
    """What came of it; asserts that all that takes an event takes this one."""
    if isinstance(found, Problem):
        assert found.detail
        found.detail.encode()
        return found.code
    whole = canonical(found)
    assert len(whole) <= MAX_BYTES
    assert from_canonical(whole) == found
    assert bytes(found.payload) in value
    for text in (whole, body(found)):
        json.loads(text, parse_int=float, parse_constant=refuse)
    assert found.customerExternalId == ACME.tenant
    assert len(correlation_id(found)) <= 200
    assert delivery_id(ACME, found.eventType, found.idempotencyKey, DestinationId("hook"))
    return "event"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.chaos("fuzz"))])
def test_whatever_ingress_holds_is_an_event_or_a_problem(count: int, report: Callable[[str], None]) -> None:
    dice = Random(count)
    ends: Counter[str] = Counter()
    worst_s, worst = 0.0, b""
    for number in range(count):
        value = mutated(dice, CORPUS)
        began = time.thread_time()
        found = decode_event(value, ACME.tenant, "t-00000000-0-", number, dice.choice(TIMES_MS), MAX_BYTES)
        spent_s = time.thread_time() - began
        if spent_s > worst_s:
            worst_s, worst = spent_s, value
        try:
            ends[checked(value, found)] += 1
        except Exception as fault:
            raise AssertionError(f"seed {count}, input {number}: {value[:500]!r}") from fault
    report(f"{count:,} inputs (seed {count}), none unhandled, at most {worst_s * 1000:.1f} ms: {dict(ends)}")
    assert worst_s < BOUND_S, worst[:500]
    # the control: inputs of all kinds
    assert ends["event"] > count / 20
    assert min(ends["malformed"], ends["too_large"], ends["key_mismatch"]) > 0


@pytest.mark.scoreboard("fuzz")
@pytest.mark.parametrize("payload", [b'{"a": 01}', b'"a', b'"\xff"', b""])
def test_a_payload_that_went_on_unchecked_is_found(payload: bytes) -> None:
    """The control: an event that was not looked at does not pass for one."""
    event = Event("t", Raw(payload), "e", "2026-11-21T09:30:00Z", ACME.tenant, idempotencyKey="e")
    with pytest.raises((AssertionError, ValueError)):
        checked(payload, event)
