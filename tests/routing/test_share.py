"""The fair share, in virtual time: whatever hangs, what answers is delivered."""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from routing.share import LEASE_S, SLOW_S, Rate, Seat, Share, SharedRate

KIB = 1024
MIB = 1024 * KIB
TIMEOUT_S = 15.0
ANSWER_S = 0.01
TICK_S = 0.1


class Greedy(Share):
    """The control: a total and nothing else, as a semaphore would have it."""

    def has_room(self) -> bool:
        return self.in_flight < self.total

    def may_start(self, seat: Seat, size: int) -> bool:
        return self.in_flight < self.total


class SimLane:
    def __init__(self, name: int, takes_s: Callable[[float], float], cap: int = 16) -> None:
        self.name = name
        self.takes_s = takes_s
        self.cap = cap
        self.seat = Seat()
        self.queue: deque[tuple[float, int]] = deque()  # arrived, size
        self.ready = False
        self.waits_s: list[float] = []  # from arrival to the end, of what has ended


class Sim:
    """A worker in virtual time: round robin over lanes that wait, a tick of 100 ms, ends that start what may start."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.now = 0.0
        self.ring: deque[SimLane] = deque()
        self.denied: deque[SimLane] = deque()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = count()
        self.young: dict[int, tuple[float, SimLane, int]] = {}
        self.most = 0
        self.at(TICK_S, self.tick)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.number), what))

    def admit(self, lane: SimLane, size: int = KIB) -> None:
        lane.queue.append((self.now, size))
        self.make_ready(lane)

    def make_ready(self, lane: SimLane) -> None:
        if lane.queue and not lane.ready:
            lane.ready = True
            self.ring.append(lane)

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
            self.pump()
        self.now = until

    def pump(self) -> None:
        while self.ring and self.share.has_room():
            lane = self.ring.popleft()
            if not lane.queue or lane.seat.in_flight >= lane.cap:
                lane.ready = False
                continue
            if not self.share.may_start(lane.seat, lane.queue[0][1]):
                if lane.seat.in_flight:
                    lane.ready = False
                else:
                    self.denied.append(lane)
                continue
            self.start(lane)
            self.ring.append(lane)

    def start(self, lane: SimLane) -> None:
        arrived, size = lane.queue.popleft()
        self.share.started(lane.seat, size)
        self.most = max(self.most, self.share.in_flight)
        ticket = next(self.number)
        self.young[ticket] = (self.now, lane, size)
        self.at(self.now + lane.takes_s(self.now), lambda: self.end(ticket, lane, arrived, size))

    def end(self, ticket: int, lane: SimLane, arrived: float, size: int) -> None:
        self.share.finished(lane.seat, ticket not in self.young, size)
        self.young.pop(ticket, None)
        lane.waits_s.append(self.now - arrived)
        self.make_ready(lane)
        if self.denied:
            self.ring.append(self.denied.popleft())

    def tick(self) -> None:
        old = [ticket for ticket, (started, _, _) in self.young.items() if started <= self.now - SLOW_S]
        for ticket in old:
            _, lane, size = self.young.pop(ticket)
            self.share.aged(lane.seat, size)
        self.ring.extend(self.denied)
        self.denied.clear()
        self.at(self.now + TICK_S, self.tick)


def answers(_: float) -> float:
    return ANSWER_S


def hangs(_: float) -> float:
    return TIMEOUT_S


def spread(lanes: Iterable[SimLane], seed: int = 7) -> list[SimLane]:
    shuffled = list(lanes)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def trickle(sim: Sim, lanes: list[SimLane], *, per_s: float, until: float, size: int = KIB) -> None:
    """Each lane gets one delivery every 1/per_s seconds."""
    for place, lane in enumerate(lanes):
        for k in range(int(until * per_s)):
            sim.at((k + place / len(lanes)) / per_s, lambda lane=lane: sim.admit(lane, size))  # type: ignore[misc]


def longest(lanes: Iterable[SimLane]) -> float:
    return max(wait for lane in lanes for wait in lane.waits_s)


def ended(lanes: Iterable[SimLane]) -> int:
    return sum(len(lane.waits_s) for lane in lanes)


def one_of_fifty(share: Share, cap: int) -> tuple[float, int]:
    """One of 50 tenants hangs, and gets twice what the whole share could hold for its timeout. The others' waits."""
    sim = Sim(share)
    hung = SimLane(0, hangs, cap)
    good = [SimLane(name, answers) for name in range(1, 50)]
    trickle(sim, good, per_s=10, until=10)
    for k in range(2 * 64):
        sim.at(k * TIMEOUT_S / 128, lambda: sim.admit(hung))
    sim.run(10.5)
    assert ended([hung]) == 0
    return longest(good), ended(good)


@pytest.mark.parametrize("cap", [16, 64, 1000])
def test_one_tenant_of_fifty_that_hangs_does_not_delay_the_others(cap: int) -> None:
    wait_s, done = one_of_fifty(Share(64, 64 * MIB), cap)
    assert done == 49 * 100
    assert wait_s <= 0.05


def test_control_with_a_total_alone_one_that_hangs_stops_everyone() -> None:
    wait_s, done = one_of_fifty(Greedy(64, 64 * MIB), 1000)
    assert done < 49 * 100 or wait_s > 1


def ten_thousand(share: Share) -> tuple[float, int]:
    """10,000 destinations of which 1,000 hang, all with deliveries at once. Longest wait and number of the healthy."""
    sim = Sim(share)
    lanes = [SimLane(name, hangs if name < 1000 else answers) for name in range(10_000)]
    for lane in spread(lanes):
        for _ in range(3):
            sim.admit(lane)
    sim.run(TIMEOUT_S - 0.5)  # not one of the hanging attempts has ended
    good = [lane for lane in lanes if lane.name >= 1000]
    assert sim.most <= share.total
    return longest(good), ended(good)


def test_a_thousand_hanging_destinations_of_ten_thousand_that_nobody_knows_yet_delay_the_others_by_a_second() -> None:
    wait_s, done = ten_thousand(Share(4096, 256 * MIB))
    assert done == 27_000
    assert wait_s <= 1.5


def test_even_a_share_barely_larger_than_what_hangs_delivers_all_others_before_the_first_timeout() -> None:
    _, done = ten_thousand(Share(1024, 256 * MIB))
    assert done == 27_000


def test_control_with_a_total_alone_a_thousand_that_hang_stop_the_others() -> None:
    _, done = ten_thousand(Greedy(1024, 256 * MIB))
    assert done < 27_000


def steady(share: Share) -> tuple[float, int]:
    """200 of 2,000 known lanes, the busiest, hang from the tenth second on. What others wait from the twelfth on."""
    sim = Sim(share)
    bad = [SimLane(name, lambda now: TIMEOUT_S if now > 10 else ANSWER_S) for name in range(200)]
    good = [SimLane(name, answers) for name in range(200, 2000)]
    trickle(sim, good, per_s=1, until=60)
    trickle(sim, bad, per_s=4, until=60)
    sim.run(12)
    for lane in good:
        lane.waits_s.clear()
    sim.run(60.5)
    assert sim.most <= share.total
    return longest(good), ended(good)


def test_lanes_that_begin_to_hang_delay_lanes_that_answer_no_longer_than_it_takes_to_notice() -> None:
    wait_s, done = steady(Share(512, 64 * MIB))
    assert done >= 1800 * 48
    assert wait_s <= 2 * ANSWER_S


def test_control_with_a_total_alone_they_wait_for_the_timeouts() -> None:
    wait_s, _ = steady(Greedy(512, 64 * MIB))
    assert wait_s > 1


def large_events(share: Share) -> tuple[float, int]:
    """200 hanging lanes with 1 MiB events among 500 with 1 KiB ones, and 64 MiB for all."""
    sim = Sim(share)
    bad = [SimLane(name, hangs) for name in range(200)]
    good = [SimLane(name, answers) for name in range(200, 700)]
    trickle(sim, bad, per_s=1, until=12, size=MIB)
    trickle(sim, good, per_s=2, until=12)
    sim.run(12.5)
    return longest(good), ended(good)


def test_large_events_that_hang_leave_room_for_small_ones() -> None:
    wait_s, done = large_events(Share(2048, 64 * MIB))
    assert done == 500 * 24
    assert wait_s <= 1


def test_a_lane_alone_may_use_a_quarter_of_the_share_at_once() -> None:
    share, seat = Share(1024, 64 * MIB), Seat()
    share.started(seat, KIB)
    share.finished(seat, False, KIB)
    while share.may_start(seat, KIB):
        share.started(seat, KIB)
    assert seat.in_flight == 256


def test_slow_destinations_are_slow_and_not_stopped() -> None:
    """20 destinations that take two seconds each, nothing else: each has several in flight."""
    sim = Sim(Share(512, 64 * MIB))
    lanes = [SimLane(name, lambda _: 2.0) for name in range(20)]
    for lane in lanes:
        for _ in range(100):
            sim.admit(lane)
    sim.run(60)
    assert all(len(lane.waits_s) >= 60 for lane in lanes)


def test_an_event_larger_than_the_budget_goes_when_nothing_else_is_in_flight() -> None:
    share, seat = Share(16, MIB), Seat()
    assert share.may_start(seat, 5 * MIB)
    share.started(seat, 5 * MIB)
    assert not share.may_start(Seat(), 5 * MIB)


@given(st.integers(1, 8))
def test_a_tiny_share_still_delivers(total: int) -> None:
    sim = Sim(Share(total, MIB))
    lanes = [SimLane(name, answers) for name in range(20)]
    for lane in lanes:
        for _ in range(5):
            sim.admit(lane)
    sim.run(5)
    assert ended(lanes) == 100
    assert sim.most <= total


class Written(RuleBasedStateMachine):
    """Whatever happens in whatever order: the share answers as its rule is written, worked out anew each time."""

    total = 12
    max_bytes = MIB

    def __init__(self) -> None:
        super().__init__()
        self.share = Share(self.total, self.max_bytes)
        self.seats = [Seat() for _ in range(4)]
        self.known: list[bool | None] = [None] * 4  # whether the last to end ended young
        self.flying: list[tuple[int, int, bool]] = []  # whose, bytes, slow

    @rule(place=st.integers(0, 3), size=st.integers(0, MIB // 3))
    def start(self, place: int, size: int) -> None:
        if self.share.may_start(self.seats[place], size):
            self.share.started(self.seats[place], size)
            self.flying.append((place, size, False))

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0))
    def age(self, which: int) -> None:
        place, size, slow = self.flying.pop(which % len(self.flying))
        if not slow:
            self.share.aged(self.seats[place], size)
        self.flying.append((place, size, True))

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0))
    def finish(self, which: int) -> None:
        place, size, slow = self.flying.pop(which % len(self.flying))
        self.share.finished(self.seats[place], slow, size)
        self.known[place] = not slow

    def standing(self, place: int) -> str:
        if any(slow for whose, _, slow in self.flying if whose == place) or self.known[place] is False:
            return "suspect"
        return "fast" if self.known[place] else "unknown"

    def may(self, place: int, size: int) -> bool:
        if not self.flying:
            return True
        young = [(whose, size) for whose, size, slow in self.flying if not slow]
        slow = [(whose, size) for whose, size, slow in self.flying if slow]
        limit = (self.total - len(slow) + 1) // 2
        room = max(0, self.max_bytes - sum(size for _, size in slow)) // 2
        mine = sum(whose == place for whose, _, _ in self.flying)
        doubtful = [(whose, size) for whose, size in young if self.standing(whose) != "fast"]
        fits = len(young) < limit and sum(size for _, size in young) + size <= room
        if self.standing(place) == "fast":
            return fits and mine < max(1, limit - len(young))
        fits = fits and len(doubtful) < (limit + 1) // 2 and sum(size for _, size in doubtful) + size <= room // 2
        if self.standing(place) == "unknown":
            return fits and not mine
        left = self.total // 4 - sum(self.standing(whose) == "suspect" for whose, _, _ in self.flying)
        return fits and left > 0 and mine < max(1, left)

    @invariant()
    def it_answers_as_written(self) -> None:
        for place in range(4):
            for size in (0, KIB, MIB // 8, MIB // 3):
                assert self.share.may_start(self.seats[place], size) == self.may(place, size)

    @invariant()
    def the_total_is_never_passed(self) -> None:
        assert self.share.in_flight == len(self.flying) <= self.total


Written.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_share_answers_as_its_rule_is_written_and_never_passes_its_total = Written.TestCase


# ----------------------------------------------------------------------------------------------------------------- rate


@settings(deadline=None)
@given(st.floats(0.1, 5000), st.lists(st.floats(0, 0.5), min_size=1, max_size=300))
def test_no_stretch_of_time_lets_more_through_than_the_rate_and_its_burst(per_s: float, pauses: list[float]) -> None:
    rate, now, taken = Rate(per_s), 100.0, []
    for pause_s in pauses:
        now += pause_s
        while len(taken) < 5000 and rate.take(now):
            taken.append(now)
    for first, start in enumerate(taken[:50]):
        for last in range(first, len(taken), 7):
            assert last - first + 1 <= per_s * (taken[last] - start + 0.15) + 1.001


@pytest.mark.parametrize("per_s", [0.5, 1, 3, 10, 200, 1000])
def test_a_caller_who_comes_every_tenth_of_a_second_uses_the_rate_in_full(per_s: float) -> None:
    rate, taken = Rate(per_s), 0
    for tick in range(600):
        while rate.take(tick * 0.1):
            taken += 1
    assert per_s * 60 * 0.99 <= taken <= per_s * 60.15 + 1


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 2), max_size=50))
def test_what_is_refused_may_go_when_the_rate_says_so(per_s: float, pauses: list[float]) -> None:
    rate, now = Rate(per_s), 5.0
    for pause_s in pauses:
        now += pause_s
        if not rate.take(now):
            at = rate.ready_at(now)
            assert at > now
            assert rate.take(at + 1e-6)
            now = at


@given(st.floats(0.1, 1000), st.lists(st.integers(0, 20), max_size=50))
def test_a_shared_rate_lets_through_what_was_granted_and_never_hoards(per_s: float, grants: list[int]) -> None:
    rate, taken, granted = SharedRate(per_s), 0, 1
    for tokens in grants:
        rate.grant(tokens)
        granted += tokens
        at_once = 0
        while rate.take(0.0):
            at_once += 1
        assert at_once <= max(1, per_s * LEASE_S + 1)
        taken += at_once
    assert taken <= granted


@pytest.mark.parametrize(("workers", "part"), [(1, 1.0), (4, 0.25)])
def test_alone_a_worker_keeps_to_its_part_of_the_rate_until_tokens_come_again(workers: int, part: float) -> None:
    rate, taken = SharedRate(100.0), 0
    for tick in range(100):
        rate.alone(workers)  # it is told so again and again
        while rate.take(tick * 0.1):
            taken += 1
    assert 100 * 10 * part * 0.95 <= taken <= 100 * 10.2 * part + 1
    rate.grant(0)
    assert not rate.take(11.0)
    rate.grant(1)
    assert rate.take(11.0)
