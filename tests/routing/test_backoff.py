"""Delays: the schedule is never undercut, and never lengthened by more than is promised."""

from hypothesis import given
from hypothesis import strategies as st

from routing.backoff import MAX_OWN_WAIT_S, jitter_s, own_wait_s

DICE = st.floats(0, 1, exclude_max=True)


@given(st.floats(0, 10**7), DICE)
def test_jitter_only_lengthens_by_at_most_a_fifth_and_a_minute(wait_s: float, dice: float) -> None:
    assert 0 <= jitter_s(wait_s, dice) <= min(wait_s * 0.2, 60)


def test_jitter_uses_the_whole_of_its_range() -> None:
    assert jitter_s(100, 0) == 0
    assert jitter_s(100, 0.5) == 10
    assert jitter_s(86_400, 0.999) > 59


def test_waits_after_our_own_faults_double_from_a_second_to_five_minutes() -> None:
    now_s = 0.0
    waits = []
    for _ in range(14):
        waits.append(own_wait_s(now_s))
        now_s += waits[-1]
    assert waits == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]


@given(st.floats(0, 10**9))
def test_waits_after_our_own_faults_are_bounded(age_s: float) -> None:
    assert 1 <= own_wait_s(age_s) <= MAX_OWN_WAIT_S
