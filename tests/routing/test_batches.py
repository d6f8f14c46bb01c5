"""Where batches begin and end: the same for whoever reads the log, from wherever it had to begin again."""

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from routing.batches import Boundaries, Closed, Limits


class Record(Struct, frozen=True):
    of: str  # empty: it only says what time it is
    at_ms: int
    size: int = 10


class Reader:
    """Reads one partition; what is settled of it survives a crash, as cursors and the committed offset do."""

    def __init__(self, log: Sequence[Record], limits: Limits) -> None:
        self.log = log
        self.limits = limits
        self.covered: dict[str, int] = {}
        self.committed = 0
        self.settled: list[Closed[str]] = []

    def run(self, upto: int, dice: random.Random, settles: float = 0.5) -> None:
        """From the committed offset to `upto`; what was closed is settled, or is lost in the crash at its end."""
        boundaries = Boundaries(dict(self.covered))
        unsettled: list[Closed[str]] = []
        firsts: dict[str, int] = {}  # of what is open
        for offset in range(self.committed, upto):
            record = self.log[offset]
            closed = boundaries.pass_by(record.at_ms)
            for one in closed:
                del firsts[one.of]
            unsettled += closed
            if record.of and boundaries.takes(record.of, offset):
                firsts.setdefault(record.of, offset)
                filled = boundaries.take(record.of, offset, record.at_ms, record.size, self.limits)
                if filled is not None:
                    del firsts[record.of]
                    unsettled.append(filled)
            while unsettled and dice.random() < settles:
                # of one destination in the order of the log, of several in any
                of = dice.choice([one.of for one in unsettled])
                done = next(one for one in unsettled if one.of == of)
                unsettled.remove(done)
                self.settled.append(done)
                self.covered[done.of] = done.last
            waiting = [*firsts.values(), *(one.first for one in unsettled)]
            self.committed = min(waiting, default=offset + 1)


def by_first(one: Closed[str]) -> int:
    return one.first


logs = st.lists(
    st.builds(
        Record,
        st.sampled_from(["a", "b", "c", ""]),
        st.integers(0, 40),  # the broker's clock may go back
        st.integers(1, 30),
    ),
    max_size=60,
)
limits_of = st.builds(Limits, st.integers(0, 20), st.integers(1, 6), st.integers(1, 80))


def batches(log: Sequence[Record], limits: Limits) -> list[Closed[str]]:
    """Of a reader that never crashes."""
    reader = Reader(log, limits)
    boundaries: Boundaries[str] = Boundaries({})
    found: list[Closed[str]] = []
    for offset, record in enumerate(reader.log):
        found += boundaries.pass_by(record.at_ms)
        if record.of:
            filled = boundaries.take(record.of, offset, record.at_ms, record.size, limits)
            found += [filled] if filled is not None else []
    return found


@settings(max_examples=300)
@given(logs, limits_of, st.integers(0, 2**32))
def test_readers_that_crash_anywhere_settle_the_batches_of_one_that_never_does(
    log: list[Record], limits: Limits, seed: int
) -> None:
    dice = random.Random(seed)
    reader = Reader(log, limits)
    for _ in range(4):
        reader.run(dice.randint(reader.committed, len(log)), dice)
    reader.run(len(log), dice, settles=1.0)
    assert sorted(set(reader.settled), key=by_first) == sorted(batches(log, limits), key=by_first)


@given(logs, limits_of)
def test_a_batch_holds_its_destinations_records_up_to_its_limits_and_no_record_is_in_two(
    log: list[Record], limits: Limits
) -> None:
    seen: dict[str, int] = {}
    for one in batches(log, limits):
        own = [offset for offset in range(one.first, one.last + 1) if log[offset].of == one.of]
        assert (one.count, one.size) == (len(own), sum(log[offset].size for offset in own))
        assert own[0] == one.first > seen.get(one.of, -1)
        assert one.count <= limits.max_events
        assert one.size - log[one.last].size < limits.max_bytes
        seen[one.of] = one.last


def test_a_window_ends_with_the_first_later_record_whosever_it_is() -> None:
    boundaries: Boundaries[str] = Boundaries({})
    limits = Limits(window_ms=10, max_events=100, max_bytes=1000)
    assert boundaries.take("a", 0, 100, 5, limits) is None
    assert boundaries.next_end_ms() == 110
    assert boundaries.pass_by(110) == []
    assert boundaries.take("a", 1, 110, 5, limits) is None
    assert boundaries.pass_by(111) == [Closed("a", 0, 1, 2, 10)]
    assert boundaries.next_end_ms() is None
    assert boundaries.take("b", 2, 111, 5, limits) is None
    assert boundaries.next_end_ms() == 121


def test_what_is_covered_is_in_no_batch_again() -> None:
    boundaries = Boundaries({"a": 4})
    assert not boundaries.takes("a", 4)
    assert boundaries.takes("a", 5)
    assert boundaries.takes("b", 4)
