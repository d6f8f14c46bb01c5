"""The arithmetic of commits: never past what is not settled, never held up by a hole in the numbers."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from streams.offsets import Carry, Tracker, Unsettled

dices = st.integers(0, 2**32).map(Random)


@st.composite
def logs(draw: st.DrawFn) -> list[list[int]]:
    """Ascending offsets with holes (compaction, aborted transactions, markers), cut into fetches."""
    at = draw(st.integers(0, 10_000))
    fetches = []
    for size in draw(st.lists(st.integers(1, 12), min_size=1, max_size=8)):
        fetch = []
        for _ in range(size):
            at += draw(st.sampled_from([1, 1, 1, 2, 7]))
            fetch.append(at)
        fetches.append(fetch)
    return fetches


@given(logs(), dices)
def test_the_commit_never_passes_a_record_that_is_not_settled_and_always_reaches_it(
    log: list[list[int]], dice: Random
) -> None:
    tracker = Tracker(1)
    ahead, fetched, settled = list(log), [], set()
    while ahead or len(settled) < len(fetched):
        if ahead and dice.random() < 0.4:
            fetched += ahead[0]
            assert tracker.fetched(ahead.pop(0)) == frozenset()
        else:
            some = dice.sample(fetched, dice.randint(0, len(fetched)))
            tracker.settled(some)
            settled.update(some)
        open_ones = [offset for offset in fetched if offset not in settled]
        done_before = fetched[: fetched.index(open_ones[0])] if open_ones else fetched
        assert tracker.committable() == (done_before[-1] + 1 if done_before else None)
        assert tracker.pending == len(open_ones)
        oldest = tracker.oldest_unsettled
        assert (oldest and oldest.offset) == (open_ones[0] if open_ones else None)
    assert tracker.committable() == log[-1][-1] + 1


@given(logs(), dices)
def test_a_redelivery_does_not_bring_back_what_was_settled_and_loses_nothing_else(
    log: list[list[int]], dice: Random
) -> None:
    everything = [offset for fetch in log for offset in fetch]
    before = Tracker(1)
    for fetch in log:
        before.fetched(fetch)
    settled = set(dice.sample(everything, dice.randint(0, len(everything))))
    before.settled(settled)
    committed = before.committable()
    carry = before.finished()
    late = set(dice.sample(everything, dice.randint(0, len(everything))))

    after = Tracker(2, carry.plus(late))
    again = [offset for offset in everything if committed is None or offset >= committed]
    size = dice.randint(1, max(1, len(again)))
    to_do = []
    for start in range(0, len(again), size):
        fetch = again[start : start + size]
        known = after.fetched(fetch)
        to_do += [offset for offset in fetch if offset not in known]
    assert to_do == [offset for offset in again if offset not in settled | late]
    after.settled(to_do)
    assert after.pending == 0
    if again:
        assert after.committable() == everything[-1] + 1


@given(logs(), dices)
def test_what_is_given_up_is_fetched_again_and_what_was_settled_of_it_stays_settled(
    log: list[list[int]], dice: Random
) -> None:
    everything = [offset for fetch in log for offset in fetch]
    tracker = Tracker(1)
    for fetch in log:
        tracker.fetched(fetch)
    settled = set(dice.sample(everything, dice.randint(0, len(everything))))
    tracker.settled(settled)
    committed = tracker.committable()
    cut = dice.choice(everything)
    tracker.forget_from(cut)
    kept = [offset for offset in everything if offset < cut]
    assert tracker.committable() == committed
    if committed is None or cut >= committed:
        assert tracker.pending == len([offset for offset in kept if offset not in settled])
        again = everything[len(kept) :]
        assert tracker.fetched(again) == frozenset(settled & set(again))
        tracker.settled(everything)
        assert tracker.committable() == everything[-1] + 1
    assert tracker.pending == 0 or committed is None or cut >= committed


def test_settling_twice_or_before_the_prefix_changes_nothing() -> None:
    tracker = Tracker(1)
    tracker.fetched([5, 6, 9])
    for _ in range(3):
        tracker.settled([5])
        assert (tracker.committable(), tracker.pending) == (6, 2)
    tracker.settled([3, 5, 6, 9])
    assert (tracker.committable(), tracker.pending) == (10, 0)
    assert tracker.finished() == Carry(10, frozenset())


def test_the_age_of_the_oldest_open_record_is_its_append_time() -> None:
    tracker = Tracker(1)
    assert tracker.oldest_unsettled is None
    tracker.fetched([5, 6], [50, 60])
    tracker.fetched([9], [90])
    tracker.settled([5, 9])
    assert tracker.oldest_unsettled == Unsettled(6, 60)
    tracker.settled([6])
    assert tracker.oldest_unsettled is None


def test_a_log_that_began_anew_is_not_mistaken_for_the_old_one() -> None:
    old = Tracker(1)
    old.fetched([100, 101, 102])
    old.settled([100, 102])
    carry = old.finished()
    assert carry == Carry(101, frozenset({102}))
    assert Tracker(2, carry).fetched([101, 102]) == {102}
    anew = Tracker(2, carry)
    assert anew.fetched([0, 1]) == frozenset()
    assert anew.fetched([101, 102]) == frozenset()


def test_a_fetch_out_of_order_is_refused() -> None:
    tracker = Tracker(1)
    tracker.fetched([5, 6])
    try:
        tracker.fetched([6, 7])
    except ValueError as fault:
        assert "6" in str(fault)
    else:
        raise AssertionError("a record was taken in twice")
