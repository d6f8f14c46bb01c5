"""What becomes of a delivery, how long a parked one waits, and what a wait costs in writes, in virtual time."""

import heapq
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.policy import Again, Dead, Finished, Look, look, looked_at_ms, next_step, park_until, tier_for
from schemas.control import DEFAULT_SCHEDULE_S, RetrySpec
from schemas.outcome import Fault, Outcome, delivered, reject, retry

HOUR_MS = 3_600_000
NOW_MS = 1_795_000_000_000
TIERS_S = (1.0, 5.0, 30.0, 300.0, 1800.0, 7200.0, 36000.0)
TIERS_MS = tuple(int(tier * 1000) for tier in TIERS_S)
SPEC = RetrySpec((0.0, 5.0, 300.0), 72 * 3600.0)
DICE = st.floats(0, 1, exclude_max=True)
FAILED = retry("destination", "server_error", "answered 500", status=500)
OURS = retry("platform", "connector_error", "an error on our side")


# ---------------------------------------------------------------------------------------------------- after an attempt


def test_what_is_delivered_is_finished() -> None:
    assert next_step(delivered(), 3, NOW_MS, SPEC, NOW_MS, 0.5) == Finished()


@pytest.mark.parametrize("fault", ["event", "destination", "platform"])
def test_a_rejection_is_a_dead_letter_under_its_own_code_whatever_is_left_of_the_schedule(fault: Fault) -> None:
    assert next_step(reject(fault, "refused", "answered 400"), 1, NOW_MS, SPEC, NOW_MS, 0.5) == Dead("refused")


@pytest.mark.parametrize("fault", ["event", "destination"])
def test_the_kth_attempt_comes_the_kth_wait_of_the_schedule_later(fault: Fault) -> None:
    failed = retry(fault, "some_code", "no")
    assert next_step(failed, 1, NOW_MS, SPEC, NOW_MS, 0.0) == Again(NOW_MS + 5_000, 1)
    assert next_step(failed, 2, NOW_MS, SPEC, NOW_MS, 0.0) == Again(NOW_MS + 300_000, 2)


def test_a_used_up_schedule_is_a_dead_letter_under_the_code_of_the_last_outcome() -> None:
    step = next_step(FAILED, 3, NOW_MS - 305_000, SPEC, NOW_MS, 0.0)
    assert isinstance(step, Dead)
    assert step.code == "server_error"
    assert step.detail == "exhausted: 3 of 3 attempts made. answered 500"


def test_the_default_schedule_makes_ten_attempts_within_its_max_age() -> None:
    spec = RetrySpec()
    now_ms = NOW_MS
    for attempt in range(1, 10):
        step = next_step(FAILED, attempt, NOW_MS, spec, now_ms, 0.999)
        assert isinstance(step, Again)
        now_ms = step.at_ms
    assert sum(DEFAULT_SCHEDULE_S) <= (now_ms - NOW_MS) / 1000 <= sum(DEFAULT_SCHEDULE_S) + 9 * 60
    assert isinstance(next_step(FAILED, 10, NOW_MS, spec, now_ms, 0.999), Dead)


@given(
    st.lists(st.floats(0, 10**6), min_size=2, max_size=10),
    st.floats(0, 10**6),
    st.floats(1, 10**7),
    st.integers(0, 10**9),
    DICE,
)
def test_a_planned_attempt_is_never_early_never_past_max_age_and_late_by_jitter_alone(
    schedule_s: list[float], retry_after_s: float, max_age_s: float, age_ms: int, dice: float
) -> None:
    outcome = retry("destination", "busy", "answered 429", status=429, retry_after_s=retry_after_s)
    spec = RetrySpec(tuple(schedule_s), max_age_s)
    floor_s = max(schedule_s[1], retry_after_s)
    ends_ms = NOW_MS - age_ms + max_age_s * 1000
    match next_step(outcome, 1, NOW_MS - age_ms, spec, NOW_MS, dice):
        case Again(at_ms, attempt):
            assert attempt == 1
            assert at_ms >= NOW_MS + floor_s * 1000
            assert at_ms <= NOW_MS + (floor_s + min(floor_s * 0.2, 60)) * 1000 + 1
            assert at_ms <= ends_ms + 1
        case Dead(code):
            assert code == "expired"
            assert NOW_MS + floor_s * 1000 > ends_ms
        case Finished():
            pytest.fail("a failed attempt does not finish a delivery")


def test_a_retry_after_is_a_floor_and_never_a_ceiling() -> None:
    long = retry("destination", "busy", "answered 503", retry_after_s=60)
    short = retry("destination", "busy", "answered 503", retry_after_s=2)
    assert next_step(long, 1, NOW_MS, SPEC, NOW_MS, 0.0) == Again(NOW_MS + 60_000, 1)
    assert next_step(short, 1, NOW_MS, SPEC, NOW_MS, 0.0) == Again(NOW_MS + 5_000, 1)


def test_a_retry_after_that_ends_after_max_age_is_a_dead_letter_at_once() -> None:
    asked = retry("destination", "busy", "answered 429", retry_after_s=72 * 3600)
    assert isinstance(next_step(asked, 1, NOW_MS, SPEC, NOW_MS, 0.9), Again)
    step = next_step(asked, 1, NOW_MS - 1, SPEC, NOW_MS, 0.0)
    assert isinstance(step, Dead)
    assert step.code == "expired"
    assert "busy" in step.detail


def test_max_age_counts_from_the_first_failure_and_not_from_the_last_attempt() -> None:
    old_ms = NOW_MS - 72 * HOUR_MS + 200_000
    assert isinstance(next_step(FAILED, 1, old_ms, SPEC, NOW_MS, 0.0), Again)
    assert next_step(FAILED, 2, old_ms, SPEC, NOW_MS, 0.0) == Dead(
        "expired", "the next attempt is later than max_age (259200 s) allows; last: server_error"
    )


def test_faults_of_ours_cost_no_attempt_and_are_bounded_by_age_alone() -> None:
    spec = RetrySpec((0.0,), 3600.0)  # one attempt, which such a fault does not use up
    now_ms, tries = NOW_MS, 0
    while isinstance(step := next_step(OURS, 0, NOW_MS, spec, now_ms, 0.5), Again):
        assert step.attempt == 0
        assert step.at_ms > now_ms
        now_ms, tries = step.at_ms, tries + 1
    assert isinstance(step, Dead)
    assert step.code == "expired"
    assert now_ms <= NOW_MS + HOUR_MS
    assert 15 <= tries <= 25


def test_a_delivery_that_never_failed_before_counts_from_now() -> None:
    assert isinstance(next_step(FAILED, 1, 0, SPEC, NOW_MS, 0.0), Again)


def every_outcome() -> st.SearchStrategy[Outcome]:
    faults = st.sampled_from(["event", "destination", "platform"])
    return st.one_of(
        st.just(delivered()),
        st.builds(lambda fault: reject(fault, "code", ""), faults),
        st.builds(lambda fault, s: retry(fault, "code", "", retry_after_s=s), faults, st.floats(0, 10**6)),
    )


@given(st.lists(every_outcome(), min_size=40, max_size=60), DICE)
def test_every_delivery_ends_or_goes_on_and_never_makes_more_attempts_than_its_schedule_has(
    outcomes: list[Outcome], dice: float
) -> None:
    now_ms, made, costing = NOW_MS, 0, 0
    for outcome in outcomes:
        costing += outcome.fault != "platform"
        made += outcome.fault != "platform"
        match next_step(outcome, made, NOW_MS, SPEC, now_ms, dice):
            case Again(at_ms):
                now_ms = at_ms
            case Finished() | Dead():
                break
    assert costing <= len(SPEC.schedule_s)


# -------------------------------------------------------------------------------------------------------------- parking


def test_the_kth_park_waits_tier_k_whole_and_at_most_five_minutes() -> None:
    waits_s = [(park_until(k, NOW_MS, 0, TIERS_S) - NOW_MS) / 1000 for k in range(1, 8)]
    assert waits_s == [1, 5, 30, 300, 300, 300, 300]


def test_a_longer_reason_of_its_own_is_rounded_up_to_a_tier() -> None:
    assert park_until(1, NOW_MS, NOW_MS + 2_000, TIERS_S) == NOW_MS + 5_000
    assert park_until(1, NOW_MS, NOW_MS + 29_000, TIERS_S) == NOW_MS + 30_000
    assert park_until(4, NOW_MS, NOW_MS + 29_000, TIERS_S) == NOW_MS + 300_000


def test_a_reason_longer_than_five_minutes_is_kept_to_its_end_and_not_to_that_of_the_next_tier() -> None:
    assert park_until(1, NOW_MS, NOW_MS + 3 * HOUR_MS, TIERS_S) == NOW_MS + 3 * HOUR_MS


@given(st.integers(1, 1000), st.integers(-(10**6), 10**9))
def test_a_park_never_ends_before_its_reason_and_always_waits(parks: int, own_ms: int) -> None:
    at_ms = park_until(parks, NOW_MS, NOW_MS + own_ms, TIERS_S)
    assert at_ms >= NOW_MS + max(1000, own_ms)
    assert at_ms - NOW_MS <= max(300_000, own_ms, 0)


# ---------------------------------------------------------------------------------------------- tiers, in virtual time


def test_the_largest_tier_that_is_not_longer_is_chosen() -> None:
    assert [tier_for(left_ms, TIERS_MS) for left_ms in (-5, 0, 500, 1000, 4800, 5000, 29_000, 30_000)] == [
        0, 0, 0, 0, 0, 1, 1, 2,
    ]  # fmt: skip
    assert tier_for(86_400_000, TIERS_MS) == 6


def test_a_wait_of_a_whole_tier_does_not_miss_it_by_milliseconds() -> None:
    assert tier_for(299_950, TIERS_MS) == 3
    assert tier_for(299_800, TIERS_MS) == 2


@given(st.integers(0, 10**9), st.lists(st.integers(1, 10**8), min_size=1, max_size=8, unique=True))
def test_no_tier_makes_a_record_later_than_a_tenth_of_a_second(left_ms: int, tiers: list[int]) -> None:
    tiers_ms = sorted(tiers)
    partition = tier_for(left_ms, tiers_ms)
    assert partition == 0 or tiers_ms[partition] <= left_ms + 100


def test_all_records_of_a_partition_wait_the_same_whatever_they_say() -> None:
    assert looked_at_ms(NOW_MS, NOW_MS + 3, 1, TIERS_MS) == NOW_MS + 5_000
    assert looked_at_ms(NOW_MS, NOW_MS + 9_000, 1, TIERS_MS) == NOW_MS + 5_000


def test_partitions_beyond_a_shortened_list_count_as_the_first_tier() -> None:
    assert looked_at_ms(NOW_MS, NOW_MS, 5, TIERS_MS[:3]) == NOW_MS + 1_000


def test_a_broker_whose_clock_is_ahead_does_not_lengthen_the_wait() -> None:
    assert looked_at_ms(NOW_MS + 50_000, NOW_MS, 1, TIERS_MS) == NOW_MS + 5_000


@given(st.integers(-(10**9), 10**9), st.booleans())
def test_what_is_looked_at_is_due_waits_in_memory_or_moves_and_pauses_only_for_less_than_a_tier(
    rest_ms: int, room: bool
) -> None:
    match look(NOW_MS + rest_ms, NOW_MS, room, TIERS_MS):
        case Look.DUE:
            assert rest_ms <= 0
        case Look.HEAP:
            assert 0 < rest_ms <= 60_000
            assert room
        case Look.MOVE:
            assert rest_ms > 60_000 or not room
            assert rest_ms >= 1_000
        case Look.PAUSE:
            assert 0 < rest_ms < 1_000
            assert not room


def writes_of(wait_ms: int, tiers_ms: Sequence[int], *, room: bool = True, delay_ms: int = 20) -> tuple[int, int]:
    """How often a record that waits `wait_ms` is written, and how late it is due. A write takes `delay_ms`."""
    now_ms = NOW_MS
    not_before_ms = now_ms + wait_ms
    for writes in count(1):
        partition = tier_for(not_before_ms - now_ms, tiers_ms)
        now_ms = looked_at_ms(now_ms + delay_ms, now_ms + 2 * delay_ms, partition, tiers_ms)
        match look(not_before_ms, now_ms, room, tiers_ms):
            case Look.DUE:
                return writes, now_ms - not_before_ms
            case Look.HEAP | Look.PAUSE:
                return writes, 0
            case Look.MOVE:
                pass
    raise AssertionError


@given(st.integers(1_000, 2 * 86_400_000))
def test_any_delay_up_to_two_days_costs_at_most_25_writes_and_is_met_within_a_second(wait_ms: int) -> None:
    writes, late_ms = writes_of(wait_ms, TIERS_MS)
    assert writes <= 25
    assert late_ms <= 150


def test_every_wait_of_the_default_schedule_costs_few_writes() -> None:
    for wait_s in DEFAULT_SCHEDULE_S[1:]:
        for jitter in (0.0, 0.1, 0.2):
            assert writes_of(int((wait_s + min(wait_s * jitter, 60)) * 1000), TIERS_MS)[0] <= 6


def republications(*, hours: float, own_s: float, whole: bool = True) -> int:
    """Writes of one delivery whose lane never has room. `whole` off: the partition is chosen a little later."""
    now_ms, parks, written = NOW_MS, 0, 0
    while True:
        parks += 1
        not_before_ms = park_until(parks, now_ms, now_ms + int(own_s * 1000) if own_s else 0, TIERS_S)
        decided_ms = now_ms if whole else now_ms + 150
        while True:
            written += 1
            now_ms = looked_at_ms(now_ms + 20, now_ms + 40, tier_for(not_before_ms - decided_ms, TIERS_MS), TIERS_MS)
            if now_ms > NOW_MS + hours * HOUR_MS:
                return written
            what = look(not_before_ms, now_ms, True, TIERS_MS)
            if what is Look.HEAP:
                now_ms = not_before_ms
            if what is not Look.MOVE:
                break
            decided_ms = now_ms if whole else now_ms + 150


@pytest.mark.parametrize("own_s", [0, 3, 30, 290, 300, 900, 86_400])
def test_a_delivery_that_finds_no_room_is_written_at_most_20_times_in_its_first_hour(own_s: float) -> None:
    assert republications(hours=1, own_s=own_s) <= 20
    assert republications(hours=25, own_s=own_s) - republications(hours=24, own_s=own_s) <= 12


def test_control_a_partition_chosen_after_the_decision_misses_its_tier_and_is_written_far_more_often() -> None:
    assert republications(hours=1, own_s=0, whole=False) > 60


def test_100_000_records_of_another_tenant_that_wait_a_day_delay_no_retry_of_the_same_pool() -> None:
    """Partitions are read in order: a record is looked at when the one before it has been and its time has come."""
    log: list[list[tuple[int, int, str]]] = [[] for _ in TIERS_MS]  # of each partition: appended, not before, whose
    due: list[tuple[int, int]] = []  # of B: when, lateness
    for at_ms in range(NOW_MS, NOW_MS + 100_000):
        log[tier_for(86_400_000, TIERS_MS)].append((at_ms, at_ms + 86_400_000, "a"))
        if at_ms % 1000 == 0:
            for wait_ms in (5_000, 300_000, 36_000_000):
                log[tier_for(wait_ms, TIERS_MS)].append((at_ms, at_ms + wait_ms, "b"))
    moved = 0
    for partition, records in enumerate(log):
        read_ms = 0
        for appended_ms, not_before_ms, whose in records:
            at_ms = read_ms = max(read_ms, looked_at_ms(appended_ms, appended_ms, partition, TIERS_MS))
            if whose == "b":
                assert look(not_before_ms, at_ms, True, TIERS_MS) is Look.DUE
                due.append((at_ms, at_ms - not_before_ms))
            else:
                moved += look(not_before_ms, at_ms, True, TIERS_MS) is Look.MOVE
    assert moved == 100_000
    assert len(due) == 300
    assert max(late_ms for _, late_ms in due) <= 1000


def test_control_a_partition_read_by_own_due_time_makes_them_wait_for_the_day() -> None:
    """The same with the head of a partition held until its own time: everyone behind it waits."""
    records = [(NOW_MS, NOW_MS + 86_400_000, "a"), (NOW_MS + 1, NOW_MS + 36_000_001, "b")]
    read_ms = 0
    late = {}
    for _, not_before_ms, whose in records:
        read_ms = max(read_ms, not_before_ms)
        late[whose] = read_ms - not_before_ms
    assert late["b"] > 10 * HOUR_MS


def test_a_full_heap_sends_on_and_still_ends() -> None:
    heap: list[int] = []
    for wait_ms in range(1_000, 120_000, 777):
        writes, late_ms = writes_of(wait_ms, TIERS_MS, room=False)
        heapq.heappush(heap, writes)
        assert late_ms <= 150
    assert max(heap) <= 20
