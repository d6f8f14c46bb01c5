"""Whatever is done to it, in any order: no event is lost, none crosses, and each ends where the model says that it may.

`whole_path.py` holds the machine and its model. Hypothesis chooses the steps: few of them in the small size, always the
same, so that a run tells something of the code and nothing of luck; many, and others each time, with the `chaos` mark.
"""

import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from dev.stack import Stack
from tests.chaos.whole_path import IDS, TENANTS, TYPES, EventKey, WholePath

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]

COMMON = settings(
    deadline=None,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
SMALL = settings(COMMON, max_examples=2, stateful_step_count=15, derandomize=True, phases=[Phase.generate])
FULL = settings(COMMON, max_examples=15, stateful_step_count=40, phases=[Phase.generate, Phase.shrink])
PARTS = 4  # of the full size: each is some ten minutes, and tells what it found at its end


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SMALL, id="small"),
        *(
            pytest.param(FULL, id=f"full-{part}", marks=[pytest.mark.chaos("whole path"), pytest.mark.timeout(7200)])
            for part in range(PARTS)
        ),
    ],
)
def test_every_event_is_accounted_for_and_none_crosses_whatever_is_done_in_any_order(
    breakable: Stack, size: settings
) -> None:
    run_state_machine_as_test(lambda: WholePath(breakable), settings=size)


def test_one_of_everything_that_an_operator_a_receiver_and_bad_luck_can_do(breakable: Stack) -> None:
    """A story told by hand, so that each run has each kind of step."""
    with WholePath(breakable) as machine:
        machine.far_side("acme", "one", "refuses")
        machine.far_side("acme2", "one", "hangs")
        machine.far_side("ACME", "two", "is gone")
        everything = [EventKey(tenant, type_, id_) for tenant in TENANTS for type_ in TYPES for id_ in IDS[:3]]
        machine.publish(everything)
        machine.operate("acme", "two", "disable")
        machine.wait_until_all_is_routed()
        machine.start_or_end_worker("w0", kill=True)
        machine.publish(everything[::3])
        machine.reconfigure("acme2", "large-both")
        machine.reconfigure("ACME", "tenant")
        machine.operate("acme2", "one", "secret")
        machine.operate("acme", "one", "key")
        machine.start_or_end_worker("w0", kill=True)
        machine.publish([EventKey(tenant, "order.made", IDS[5]) for tenant in TENANTS])
        machine.wait_until_all_is_routed()
        machine.drop("acme", ())
        machine.nothing_crosses()
        machine.far_side("acme", "one", "fails once")
        machine.publish([EventKey("acme", "invoice.paid", IDS[5]), EventKey("acme2", "invoice.paid", IDS[5])])
        machine.restart_redis()
        machine.reconfigure("ACME", "tenant")
        machine.reconfigure("acme", "one moves")
        machine.replay_unrouted()
        machine.replay("acme2", (), force=True)
        machine.start_or_end_worker("w0", kill=False)


def sabotaged(stack: Stack, how: str, timeout: str = "1s") -> WholePath:
    return WholePath(stack, (sys.executable, "-m", "tests.chaos.sabotaged_worker", how), timeout)


def test_control_a_worker_that_acknowledges_early_is_found_to_lose_what_was_in_flight_when_it_was_killed(
    breakable: Stack,
) -> None:
    lost = r"acme order\.made evt-1 is lost: dlv_\w+ to one: requests \['/acme/one"
    with pytest.raises(AssertionError, match=lost), sabotaged(breakable, "acknowledges_early", "20s") as machine:
        machine.far_side("acme", "one", "hangs")
        machine.publish([EventKey("acme", "order.made", "evt-1")])
        machine.wait_until_all_is_routed()
        machine.wait_until_all_is_committed()
        machine.start_or_end_worker("w0", kill=True)


def test_control_a_worker_that_takes_a_destination_for_another_tenant_s_is_found_out(breakable: Stack) -> None:
    crossed = r"evt-1: dlv_\w+ of .* came to"
    with pytest.raises(AssertionError, match=crossed), sabotaged(breakable, "crosses_tenants") as machine:
        machine.publish([EventKey(tenant, "invoice.paid", "evt-1") for tenant in ("acme", "acme2")])


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["acknowledges_early", "crosses_tenants"])
def test_control_the_search_finds_a_sabotaged_worker_by_itself(breakable: Stack, how: str) -> None:
    search = settings(FULL, phases=[Phase.generate])
    with pytest.raises(AssertionError, match=r"is lost|came to"):
        run_state_machine_as_test(lambda: sabotaged(breakable, how), settings=search)
