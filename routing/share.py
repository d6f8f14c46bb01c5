"""Who may start an attempt: the fair share of a worker's IN_FLIGHT, and the rate of one destination.

Pure: the clock is an argument, in monotonic seconds. The caller goes round robin over the lanes that wait, and asks
here before each start; the lane's own `in_flight` and rate are limits beside these. A lane that is refused waits for
the end of one of its own or, if it has none in flight, for its turn among the refused: one of them at each end of any
attempt, all at each tick.

**The rule.** An attempt is *young* until it is `SLOW_S` old, then *slow*. A lane is *fast* when its last attempt to end
ended young, *suspect* when it ended slow or one in flight is slow, *unknown* before its first end. With N the total:

1. Young attempts take at most half of what slow ones leave: `young <= (N - slow) / 2`. So however many lanes begin to
   hang, and however fast: what they hold becomes slow within `SLOW_S`, and half of the rest is there for others. The
   total never passes N, and what hangs never has all of it.
2. Of the young half, lanes that are not fast take at most a half: a lane that answers always finds slots.
3. An unknown lane has one attempt in flight. Its end, milliseconds later, makes it fast, or `SLOW_S` make it suspect.
4. Suspect lanes together have at most N/4 in flight; each has less than what is left of that, or one.
5. A fast lane has less than what is left of the young half, or one: no lane takes all, and what many lanes share
   shrinks evenly for all of them (dynamic thresholds: Choudhury and Hahne, 1998).

The bytes of attempts in flight follow rules 1 and 2 in the same way, out of `max_bytes`: small events find room when
what hangs is large. An attempt may always start when nothing else is in flight.

What it gives: a fast lane does not wait for hanging ones once they are suspect, and `SLOW_S` at most for each round in
which fast lanes that begin to hang fill the young half. An unknown lane waits `SLOW_S` for each round in which unknown
lanes that hang fill their part of it, a quarter of what is left of N. So N should be some 4 times the number of
destinations that may hang at the same time.
"""

from math import ceil
from typing import Final

SLOW_S: Final = 0.5
BURST_S: Final = 0.15
LEASE_S: Final = 0.2  # so much of a shared rate is leased ahead


class Seat:
    """A lane's part of the share: what it has in flight, and what is known of it. Written by `Share` alone."""

    __slots__ = ("in_flight", "last_was_fast", "slow", "young_bytes")

    def __init__(self) -> None:
        self.in_flight = 0
        self.slow = 0  # of those in flight, how many are slow
        self.young_bytes = 0
        self.last_was_fast: bool | None = None  # None: no attempt has ended yet


class Share:
    """A worker's attempts in flight. Every call is O(1)."""

    __slots__ = (
        "_doubtful_young",
        "_doubtful_young_bytes",
        "_max_bytes",
        "_slow_bytes",
        "_suspect_in_flight",
        "_young_bytes",
        "_young_bytes_limit",
        "_young_limit",
        "slow",
        "total",
        "young",
    )

    def __init__(self, total: int, max_bytes: int) -> None:
        self.total = total
        self._max_bytes = max_bytes
        self.young = 0
        self.slow = 0
        self._young_bytes = 0
        self._slow_bytes = 0
        self._doubtful_young = 0  # young ones of lanes that are not fast
        self._doubtful_young_bytes = 0
        self._suspect_in_flight = 0
        self._young_limit = (total + 1) // 2
        self._young_bytes_limit = max_bytes // 2

    @property
    def in_flight(self) -> int:
        return self.young + self.slow

    def has_room(self) -> bool:
        """Whether any lane at all might start an attempt."""
        return self.young < self._young_limit

    def may_start(self, seat: Seat, size: int) -> bool:
        """Whether the lane may start one more attempt, that holds `size` bytes."""
        young, limit = self.young, self._young_limit
        if young >= limit:
            return False
        if not young and not self.slow:
            return True
        room = self._young_bytes_limit
        if self._young_bytes + size > room:
            return False
        if seat.last_was_fast and not seat.slow:
            return not seat.in_flight or seat.in_flight < limit - young
        if self._doubtful_young >= (limit + 1) // 2 or self._doubtful_young_bytes + size > room // 2:
            return False
        if seat.last_was_fast is None and not seat.slow:
            return not seat.in_flight
        left = max(1, self.total // 4) - self._suspect_in_flight
        return seat.in_flight < left or (left > 0 and not seat.in_flight)

    def started(self, seat: Seat, size: int) -> None:
        """The lane started an attempt. (Whether it might is the caller's to have asked.)"""
        seat.in_flight += 1
        seat.young_bytes += size
        self.young += 1
        self._young_bytes += size
        if not seat.last_was_fast or seat.slow:
            self._doubtful_young += 1
            self._doubtful_young_bytes += size
            if seat.slow or seat.last_was_fast is False:
                self._suspect_in_flight += 1

    def aged(self, seat: Seat, size: int) -> None:
        """An attempt of the lane has become `SLOW_S` old. Told once of each, within a tick."""
        self._leave(seat)
        seat.slow += 1
        seat.young_bytes -= size
        self.young -= 1
        self._young_bytes -= size
        self.slow += 1
        self._slow_bytes += size
        self._enter(seat)
        self._limit()

    def finished(self, seat: Seat, slow: bool, size: int) -> None:
        """An attempt of the lane ended; `slow` if `aged` was told of it."""
        if slow:
            self._leave(seat)
            seat.in_flight -= 1
            seat.slow -= 1
            seat.last_was_fast = False
            self.slow -= 1
            self._slow_bytes -= size
            self._enter(seat)
            self._limit()
            return
        if not seat.last_was_fast or seat.slow:
            self._leave(seat)
            seat.in_flight -= 1
            seat.young_bytes -= size
            seat.last_was_fast = True
            self._enter(seat)
        else:
            seat.in_flight -= 1
            seat.young_bytes -= size
        self.young -= 1
        self._young_bytes -= size

    def _leave(self, seat: Seat) -> None:
        """Take the lane's attempts out of the sums that depend on what is known of it, before that changes."""
        if not seat.last_was_fast or seat.slow:
            self._doubtful_young -= seat.in_flight - seat.slow
            self._doubtful_young_bytes -= seat.young_bytes
            if seat.slow or seat.last_was_fast is False:
                self._suspect_in_flight -= seat.in_flight

    def _enter(self, seat: Seat) -> None:
        if not seat.last_was_fast or seat.slow:
            self._doubtful_young += seat.in_flight - seat.slow
            self._doubtful_young_bytes += seat.young_bytes
            if seat.slow or seat.last_was_fast is False:
                self._suspect_in_flight += seat.in_flight

    def _limit(self) -> None:
        self._young_limit = (max(0, self.total - self.slow) + 1) // 2
        self._young_bytes_limit = max(0, self._max_bytes - self._slow_bytes) // 2


class Rate:
    """A destination's rate in this worker, as GCRA (the generic cell rate algorithm): one number of state.

    In any t seconds it lets through at most `rate * (t + 0.15) + 1`: so much at once that a caller who comes by every
    100 ms uses the rate in full.
    """

    __slots__ = ("_interval_s", "_paid_at")

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1.0 / per_s
        self._paid_at = float("-inf")  # when all that was let through has been paid for

    def take(self, now: float) -> bool:
        """Whether one more may start now; takes it if so."""
        paid_at = self._paid_at
        if paid_at < now:
            paid_at = now
        elif paid_at - now > BURST_S:
            return False
        self._paid_at = paid_at + self._interval_s
        return True

    def ready_at(self, now: float) -> float:
        """When the next one may start: `now` or later."""
        return max(now, self._paid_at - BURST_S)


class SharedRate:
    """A destination's rate across workers: starts are paid for with tokens that were leased ahead.

    Who leases is not here: `wanted` says how many tokens would do, `grant` brings some, and `alone` says that nobody
    can be asked: then this worker keeps to its part of the rate by itself, until tokens come again.
    """

    __slots__ = ("_alone", "_most", "_tokens", "per_s")

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._tokens = 1  # so that the first one waits for no lease
        self._most = ceil(per_s * LEASE_S)
        self._alone: Rate | None = None

    def take(self, now: float) -> bool:
        """Whether one more may start now; takes it if so."""
        if self._alone is not None:
            return self._alone.take(now)
        if not self._tokens:
            return False
        self._tokens -= 1
        return True

    @property
    def wanted(self) -> int:
        return self._most - self._tokens

    def grant(self, tokens: int) -> None:
        self._alone = None
        self._tokens = min(self._most, self._tokens + tokens)

    def alone(self, workers: int) -> None:
        """One of so many workers that share the rate without asking."""
        if self._alone is None:
            self._alone = Rate(self.per_s / max(1, workers))
            self._tokens = 0
