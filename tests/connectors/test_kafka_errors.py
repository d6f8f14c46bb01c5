"""Every error of a broker, and of aiokafka, has its meaning here, and the far side's numbers come to the right end."""

import inspect

import pytest
from aiokafka import errors

from connectors.egress import Egress
from connectors.kafka.classify import CODES, ERRORS, NEWER, Fault, fault_of, raised
from tests.connectors.kafkas import deliver, delivery, sink
from tests.contract.farsides.kafka import KafkaFarSide

KNOWN = {
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if issubclass(one, Exception) and one.__module__ == errors.__name__
}


def test_every_error_of_aiokafka_has_its_place_and_none_is_there_that_it_does_not_have() -> None:
    assert set(ERRORS) == KNOWN
    assert len(KNOWN) > 90


@pytest.mark.parametrize("error", sorted(KNOWN, key=lambda one: one.__name__))
def test_an_error_comes_to_an_outcome_that_the_kind_declares(error: type[Exception]) -> None:
    outcome = raised(error(), "login").outcome
    assert outcome.code in CODES
    assert outcome.verdict in ("retry", "reject")
    assert outcome.detail


def test_numbers_that_aiokafka_has_no_class_for_are_still_unknown_to_it() -> None:
    """When this fails, move them into the table of classes."""
    assert {number for number in NEWER if errors.for_code(number) is not errors.UnknownError} == set()


def test_a_number_that_nobody_knows_is_tried_again() -> None:
    outcome = fault_of(12_345).outcome
    assert (outcome.verdict, outcome.fault, outcome.code) == ("retry", "destination", "server_error")


def test_what_only_the_tenant_can_mend_kills_no_backlog() -> None:
    mended_by_a_grant = ["denied", "unknown_topic", "token", "tls", "dns", "connect_refused"]
    assert {Fault(code).outcome.verdict for code in mended_by_a_grant} == {"retry"}


@pytest.mark.parametrize(
    ("number", "verdict", "fault", "code"),
    [
        (10, "reject", "event", "too_large"),
        (18, "reject", "event", "too_large"),
        (32, "reject", "event", "refused"),
        (44, "reject", "event", "refused"),
        (87, "reject", "event", "refused"),
        (17, "reject", "destination", "invalid_topic"),
        (35, "reject", "destination", "incompatible"),
        (43, "reject", "destination", "incompatible"),
        (76, "reject", "destination", "incompatible"),
        (2, "retry", "destination", "server_error"),
        (-1, "retry", "destination", "server_error"),
        (3, "retry", "destination", "unknown_topic"),
        (19, "retry", "destination", "unavailable"),
        (56, "retry", "destination", "unavailable"),
        (29, "retry", "destination", "denied"),
        (31, "retry", "destination", "denied"),
        (89, "retry", "destination", "throttled"),
        (45, "retry", "destination", "sequence"),
        (47, "retry", "destination", "sequence"),
        (59, "retry", "destination", "sequence"),
        (22, "retry", "destination", "protocol"),
    ],
)
async def test_an_answer_comes_to_its_end_at_once_and_the_next_event_is_stored(
    far: KafkaFarSide, egress: Egress, number: int, verdict: str, fault: str, code: str
) -> None:
    connector = sink(egress, far.options(), far.secrets())
    far.answers = [number]
    (outcome,) = await deliver(connector, delivery(1))
    assert (outcome.verdict, outcome.fault, outcome.code) == (verdict, fault, code)
    assert far.stored == []
    (outcome,) = await deliver(connector, delivery(2))
    assert outcome.verdict == "delivered"
    assert len(far.stored) == 1
    await connector.close()
