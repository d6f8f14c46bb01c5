"""Whether a destination keeps up: told early, kept while it is turned away, and not said of a busy worker."""

from collections.abc import Iterator

import pytest

from routing.pace import SMALL, Pace

MOST = 4096
LOOK_S = 0.1
PRESSED = {"at_its_limits": True, "pressed": True}
ALONE = {"at_its_limits": True, "pressed": False}


def looks(
    pace: Pace, per_s: float, waiting: int, *, at_its_limits: bool = True, pressed: bool = True
) -> Iterator[float]:
    """Looks every 100 ms at one that ends `per_s` attempts a second while `waiting` wait, none of them long."""
    now, owed = 100.0, 0.0
    while True:
        pace.look(now, now - LOOK_S, waiting, 0.05, at_its_limits=at_its_limits, pressed=pressed)
        yield now
        owed += per_s * LOOK_S
        while owed >= 1.0:
            pace.completed(now)
            owed -= 1.0
        now += LOOK_S


def after(count: int, found: Iterator[float]) -> float:
    return [next(found) for _ in range(count)][-1]


@pytest.mark.parametrize(("per_s", "waiting"), [(0, SMALL + 1), (300, 500), (5_000, 6_000)])
def test_a_flooded_destination_is_behind_at_the_second_look_and_not_only_when_a_second_has_passed(
    per_s: float, waiting: int
) -> None:
    pace = Pace()
    found = looks(pace, per_s, waiting)
    after(1, found)
    assert not pace.behind  # one look says nothing of its pace
    after(1, found)
    assert pace.behind


@pytest.mark.parametrize(("per_s", "waiting"), [(0, SMALL), (300, 250), (5_000, 4_000)])
def test_what_will_be_started_within_a_second_is_no_backlog(per_s: float, waiting: int) -> None:
    pace = Pace()
    after(50, looks(pace, per_s, waiting))
    assert not pace.behind


def test_one_that_was_quick_and_ends_nothing_any_more_is_behind_before_its_old_pace_would_say() -> None:
    pace = Pace()
    now = after(50, looks(pace, 1_000, 20))
    for step in range(1, 21):
        pace.look(now + step * LOOK_S, now + (step - 1) * LOOK_S, 500, 0.05, **PRESSED)
    assert pace.behind


def test_what_waits_for_its_turn_is_not_behind() -> None:
    pace = Pace()
    after(50, looks(pace, 10, 3_000, at_its_limits=False))
    assert not pace.behind


def test_while_the_worker_has_room_for_all_a_burst_is_not_judged_by_its_pace() -> None:
    pace = Pace()
    after(50, looks(pace, 10, 3_000, pressed=False))
    assert not pace.behind


def test_answers_that_come_in_bursts_are_no_slow_destination() -> None:
    """64 in flight, each answered after 300 ms: of three looks two see none end."""
    pace = Pace()
    for step in range(100):
        now = 100.0 + step * LOOK_S
        if step % 3 == 0:
            for _ in range(64):
                pace.completed(now)
        pace.look(now, now - LOOK_S, 150, 0.5, at_its_limits=True, pressed=step > 20)
        assert not pace.behind


def test_at_its_limits_it_is_behind_once_the_oldest_has_waited_a_second() -> None:
    pace = Pace()
    pace.look(100.0, 99.9, 1, 0.9, **ALONE)
    assert not pace.behind
    pace.look(100.1, 100.0, 1, 1.1, **ALONE)
    assert pace.behind


def test_a_look_that_was_missed_says_nothing_of_the_pace() -> None:
    pace = Pace()
    after(1, looks(pace, 0, 500))
    pace.look(100.5, 100.4, 500, 0.5, **PRESSED)
    assert not pace.behind


def test_it_stays_behind_while_it_is_turned_away_and_until_a_second_after() -> None:
    pace = Pace()
    now = after(2, looks(pace, 0, 500))
    assert pace.behind
    pace.full_at = now
    for step in range(1, 10):  # what is kept small looks like what keeps up
        pace.look(now + step * LOOK_S, now + (step - 1) * LOOK_S, 1, 0.01, **PRESSED)
        assert pace.behind
    pace.look(now + 1.1, now + 1.0, 1, 0.01, **PRESSED)
    assert not pace.behind


def test_while_behind_no_more_may_wait_than_will_be_started_in_time() -> None:
    pace = Pace()
    after(21, looks(pace, 200, 500))
    assert pace.behind
    assert pace.bound(MOST) == pytest.approx(4 * 200, rel=0.1)
    assert pace.bound(300) == 300
    idle = Pace()
    assert idle.bound(MOST) == MOST
    after(2, looks(idle, 0, 500))
    assert idle.bound(MOST) == SMALL


def test_what_waits_for_room_is_planned_by_the_recent_pace_but_for_five_minutes_at_most() -> None:
    """A worker that got no processor for a while has seen one delivery end in two seconds of it."""
    pace = Pace()
    assert pace.through_s(1000) == 0  # nothing is known yet
    pace.completed(100.0)
    pace.completed(102.0)
    assert pace.per_s == 0.5
    assert pace.through_s(10) == 20
    assert pace.through_s(1000) == 300
