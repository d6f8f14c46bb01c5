"""The breaker against a naive one that remembers every attempt."""

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.breaker import BUCKET_S, BUCKETS, MIN_ATTEMPTS, Breaker


class Naive:
    """The rule as it is written, with every attempt of its life in a list."""

    def __init__(self) -> None:
        self.attempts: list[tuple[float, bool]] = []
        self.open_until = 0.0
        self.open_s = 0.0
        self.probe_until = 0.0

    def take(self, now: float) -> bool:
        if not self.open_s:
            return True
        if now < self.open_until or now < self.probe_until:
            return False
        self.probe_until = now + 30
        return True

    def record(self, now: float, ok: bool) -> None:
        if self.open_s:
            if now < self.open_until:
                return
            if ok:
                self.open_s = self.open_until = 0.0
                self.attempts = [(now, True)]
            else:
                self.open(now, min(300, 2 * self.open_s))
            return
        self.attempts.append((now, ok))
        first = now // BUCKET_S - (BUCKETS - 1)
        recent = [ok for at, ok in self.attempts if at // BUCKET_S >= first]
        if not ok and len(recent) >= 10 and recent.count(False) * 2 >= len(recent):
            self.open(now, 30)

    def open(self, now: float, for_s: float) -> None:
        self.open_s, self.open_until, self.probe_until = for_s, now + for_s, 0.0
        self.attempts = []


steps = st.lists(
    st.tuples(st.one_of(st.floats(0, 2), st.floats(0, 40), st.floats(0, 400)), st.sampled_from("offfx")), max_size=120
)


@settings(max_examples=400, deadline=None)
@given(st.floats(0, 10**6), steps)
def test_the_breaker_decides_as_one_that_remembers_every_attempt(now: float, steps: list[tuple[float, str]]) -> None:
    breaker, naive = Breaker(), Naive()
    for pause_s, what in steps:
        now += pause_s
        assert breaker.allows(now) == (not naive.open_s or now >= max(naive.open_until, naive.probe_until))
        started = naive.take(now)
        assert breaker.take(now) == started
        if not started and what != "f":
            continue  # ends of attempts begun before it opened are heard all the same
        if what == "x":
            breaker.unmoved()
            naive.probe_until = 0.0
        else:
            breaker.record(now, what == "o")
            naive.record(now, what == "o")
        assert breaker.open_until == naive.open_until


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=200))
def test_it_never_opens_on_fewer_than_ten_attempts_of_the_last_minute_nor_on_fewer_than_half_failed(
    steps: list[tuple[float, bool]],
) -> None:
    breaker, now, seen = Breaker(), 1000.0, []
    for pause_s, ok in steps:
        now += pause_s
        seen.append((now, ok))
        breaker.record(now, ok)
        if breaker.open_until:
            recent = [ok for at, ok in seen if at > now - 60]
            assert len(recent) >= MIN_ATTEMPTS
            for window_s in (50, 60):
                recent = [ok for at, ok in seen if at > now - window_s]
            assert not ok
            return


def test_nine_failures_leave_it_closed_and_the_tenth_opens_it() -> None:
    breaker = Breaker()
    for _ in range(9):
        breaker.record(5.0, False)
    assert breaker.allows(5.0)
    breaker.record(5.0, False)
    assert not breaker.allows(5.0)
    assert breaker.open_until == 35.0


def test_half_of_the_attempts_failing_opens_it_and_fewer_do_not() -> None:
    breaker = Breaker()
    for _ in range(11):
        breaker.record(5.0, True)
    for _ in range(10):
        breaker.record(5.0, False)
    assert breaker.allows(5.0)
    breaker.record(5.0, False)
    assert not breaker.allows(5.0)


def test_failures_of_more_than_a_minute_ago_do_not_count() -> None:
    breaker = Breaker()
    for _ in range(9):
        breaker.record(5.0, False)
    breaker.record(66.0, False)
    assert breaker.allows(66.0)


def open_breaker(now: float) -> Breaker:
    breaker = Breaker()
    for _ in range(10):
        breaker.record(now, False)
    return breaker


def test_it_stays_open_30_seconds_doubling_to_five_minutes_and_a_success_resets_that() -> None:
    breaker, now = open_breaker(100.0), 100.0
    waits = []
    for _ in range(6):
        waits.append(breaker.open_until - now)
        assert not breaker.take(breaker.open_until - 0.001)
        now = breaker.open_until
        assert breaker.take(now)
        breaker.record(now, False)
    assert waits == [30, 60, 120, 240, 300, 300]
    now = breaker.open_until
    assert breaker.take(now)
    breaker.record(now, True)
    assert breaker.open_until == 0.0
    for _ in range(10):
        breaker.record(now, False)
    assert breaker.open_until == now + 30


def test_half_open_lets_one_through_and_only_one() -> None:
    breaker = open_breaker(0.0)
    assert [breaker.take(30.0) for _ in range(5)] == [True, False, False, False, False]
    assert not breaker.allows(31.0)


def test_asking_whether_it_allows_does_not_use_up_the_one_that_is_let_through() -> None:
    breaker = open_breaker(0.0)
    assert all(breaker.allows(30.0) for _ in range(5))
    assert breaker.take(30.0)


def test_a_fault_of_ours_neither_closes_a_half_open_breaker_nor_blocks_it() -> None:
    breaker = open_breaker(0.0)
    assert breaker.take(30.0)
    breaker.unmoved()
    assert breaker.open_until == 30.0
    assert breaker.take(30.1)
    assert not breaker.take(30.2)


def test_a_probe_whose_end_nobody_tells_does_not_close_the_lane_for_ever() -> None:
    breaker = open_breaker(0.0)
    assert breaker.take(30.0)
    assert breaker.take(61.0)


def test_ten_thousand_idle_breakers_take_little_memory() -> None:
    tracemalloc.start()
    breakers = [Breaker() for _ in range(10_000)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(breakers) == 10_000
    assert size < 3_000_000


def test_a_busy_breaker_remembers_a_minute_and_no_more() -> None:
    breaker = Breaker()
    tracemalloc.start()
    for tick in range(100_000):
        breaker.record(tick * 0.1, tick % 3 != 0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 5_000
