"""Holding and enabling a destination: what is written is folded as the topics would be, and read by the registry."""

import pytest

from config.hold import Change, enable, hold, state_of
from config.plan import CurrentTenant, Write, disabled_key
from schemas.control import DisabledRecord, encode_control
from schemas.ids import DestinationId
from tests.config.test_plan import ACME, BASE, Log

HOOK = DestinationId("hook")


@pytest.fixture
def log() -> Log:
    made = Log()
    made.apply(BASE)
    return made


def current(log: Log) -> CurrentTenant:
    return log.current().tenants[ACME.tenant]


def take(log: Log, change: Change) -> Change:
    log.writes += change.writes
    return change


def answered_410(log: Log) -> None:
    record = DisabledRecord(current(log).destinations[HOOK].version, 1)
    log.writes.append(Write("state", disabled_key(ACME, HOOK).encode(), encode_control(record)))


def in_workers(log: Log) -> tuple[bool, bool]:
    """Whether the workers' registry has the destination as held, and as disabled."""
    tenant = log.registry().tenant(ACME)
    assert tenant is not None
    return tenant.destinations[HOOK].record.held, tenant.destinations[HOOK].disabled


def test_a_hold_is_seen_by_the_workers_and_lifted_by_enabling(log: Log) -> None:
    assert in_workers(log) == (False, False)
    assert take(log, hold(ACME, current(log), HOOK)).now == "held"
    assert in_workers(log) == (True, False)
    change = take(log, enable(ACME, current(log), HOOK))
    assert (change.was, change.now) == ("held", "on")
    assert in_workers(log) == (False, False)


def test_a_hold_outlives_an_apply_that_changes_the_destination(log: Log) -> None:
    take(log, hold(ACME, current(log), HOOK))
    assert log.apply(BASE).writes == ()
    assert log.apply(BASE.replace("a.example", "b.example")).writes
    assert in_workers(log) == (True, False)


def test_a_second_hold_and_a_second_enabling_write_nothing(log: Log) -> None:
    assert enable(ACME, current(log), HOOK).writes == ()
    take(log, hold(ACME, current(log), HOOK))
    assert hold(ACME, current(log), HOOK) == Change("held", "held")


def test_enabling_clears_a_410_and_without_it_the_destination_stays_disabled(log: Log) -> None:
    answered_410(log)
    assert in_workers(log) == (False, True)
    version = current(log).record.configVersion
    change = take(log, enable(ACME, current(log), HOOK))
    assert (change.was, change.now) == ("disabled", "on")
    assert [write.topic for write in change.writes] == ["state"]
    assert current(log).record.configVersion == version
    assert in_workers(log) == (False, False)


def test_a_hold_does_not_enable_what_answered_410(log: Log) -> None:
    answered_410(log)
    change = take(log, hold(ACME, current(log), HOOK))
    assert (change.was, change.now) == ("disabled", "disabled")
    assert in_workers(log) == (True, True)
    assert state_of(current(log), current(log).destinations[HOOK]) == "disabled"
    # control: a hold that did not take the 410's record along would have lifted it
    carried = [write for write in change.writes if write.topic == "state"]
    log.writes.remove(carried[0])
    assert in_workers(log) == (True, False)


def test_enabling_lifts_a_hold_and_a_410_at_once(log: Log) -> None:
    answered_410(log)
    take(log, hold(ACME, current(log), HOOK))
    take(log, enable(ACME, current(log), HOOK))
    assert in_workers(log) == (False, False)
    assert disabled_key(ACME, HOOK).encode() in {write.key for write in log.writes if write.value is None}
