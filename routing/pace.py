"""Whether a destination keeps up with what comes for it. Pure: the time is an argument, in seconds of one clock."""

from typing import Final

from routing.policy import MAX_PARK_S

BEHIND_S: Final = 1.0  # what waits longer than this, or at its pace will, is behind
SMALL: Final = 64  # so few waiting are no backlog, however slow the destination
STARTED_IN_TIME_S: Final = 4.0  # of its recent work may wait: nothing waits longer than 5 s (design, section 3, rule 5)


class Pace:
    """What a destination has ended of late, and whether it is behind."""

    __slots__ = ("_looked_at", "_looked_ended", "_since", "_until", "behind", "ended", "full_at", "per_s")

    def __init__(self) -> None:
        self.ended = 0  # attempts, ever
        self.per_s = 0.0  # ended attempts, over the last second or more
        self.behind = False
        self.full_at = 0.0  # when it last had to be turned away for want of room
        self._since = 0.0
        self._until = 0  # how many had ended at `_since`
        self._looked_at = 0.0
        self._looked_ended = 0

    def completed(self, now: float) -> None:
        self.ended += 1
        elapsed = now - self._since
        if elapsed >= 1.0:
            self.per_s = (self.ended - self._until) / elapsed if elapsed < 10.0 else 0.0
            self._until = self.ended
            self._since = now

    def look(
        self, now: float, last_look: float, waiting: int, waited_s: float, *, at_its_limits: bool, pressed: bool
    ) -> None:
        """Decides `behind` anew, at a look at all that wait; `last_look` was the one before, `waited_s` the oldest's.

        What waits below its limits waits for its turn: that is this worker being busy. At its limits a destination is
        behind once the oldest is a second old. Where the worker is `pressed`, because too much waits in all, it is
        already when at the pace since the last look what waits would take a second: a flood must not hold up what
        comes for others until it shows in the age. Once behind it stays so while it has to be turned away: what is
        kept small would look like what keeps up.
        """
        whole = self._looked_at == last_look
        lately = self.per_s if now - self._since < 2 * BEHIND_S else 0.0
        pace = max(lately, (self.ended - self._looked_ended) / (now - last_look))
        self._looked_at = now
        self._looked_ended = self.ended
        too_much = (pressed or self.behind) and whole and waiting > max(SMALL, pace * BEHIND_S)
        turned_away = self.behind and not self.rested(now)
        self.behind = turned_away or (at_its_limits and (waited_s > BEHIND_S or too_much))

    def rested(self, now: float) -> bool:
        """Nothing had to be turned away of late."""
        return self.full_at < now - BEHIND_S

    def through_s(self, parked: int) -> float:
        """How long until so many have gone through at its recent pace, 0 where that is not known; at most 5 min.

        A second in which the worker got no processor makes hours of a second's backlog: what is due too early costs a
        write, what is due too late is late.
        """
        return min(parked / self.per_s, MAX_PARK_S) if self.per_s else 0.0

    def bound(self, most: int) -> int:
        """How many may wait: while behind, no more than will have been started in time."""
        return min(most, max(SMALL, int(self.per_s * STARTED_IN_TIME_S))) if self.behind else most
