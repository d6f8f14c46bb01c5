"""The breaker of one destination in one worker: no attempts at what fails most of the time (design, section 3, rule 6).

Pure: the clock is an argument, in seconds, from whatever monotonic clock the caller uses throughout. What happens to
deliveries meanwhile is the lane's: they park.
"""

from typing import Final

WINDOW_S: Final = 60.0
BUCKETS: Final = 6
BUCKET_S: Final = WINDOW_S / BUCKETS
MIN_ATTEMPTS: Final = 10
OPEN_S: Final = 30.0
MAX_OPEN_S: Final = 300.0
PROBE_S: Final = 30.0  # longer than any attempt may take: a probe that never reports does not close a lane for ever

_SLOW_PATH: Final = float("-inf")


class Breaker:
    """Closed, open until `open_until`, then half open: one attempt goes through, and its end decides.

    Counts attempts whose end says something of the destination, in buckets of 10 s: the window reaches back 50 to 60 s.
    Whether to open is asked at each failure. What is recorded while it is open (attempts begun before) changes nothing:
    an attempt ends within 25 s, so that what ends after the 30 s of being open is the probe.

    Cost: a success 0.1 us while closed. Memory: one small object; a list of at most 6 buckets once there was traffic.
    """

    __slots__ = ("_bucket_ends", "_failed", "_ok", "_older", "_open_s", "_probe_until", "open_until")

    def __init__(self) -> None:
        self.open_until = 0.0  # 0 while closed; past while half open
        self._open_s = 0.0  # how long it was opened for last; 0 while closed
        self._probe_until = 0.0
        self._bucket_ends = _SLOW_PATH  # of the newest bucket; never in the future unless closed
        self._ok = 0
        self._failed = 0
        self._older: list[tuple[float, int, int]] | None = None  # (end of the bucket, attempts that held, that failed)

    def allows(self, now: float) -> bool:
        """Whether an attempt could start now. Takes nothing: ask at admission, and `take` at the start."""
        return not self._open_s or (now >= self.open_until and now >= self._probe_until)

    def take(self, now: float) -> bool:
        """Whether this attempt may start now. While half open the one that is let through is the probe."""
        if not self._open_s:
            return True
        if now < self.open_until or now < self._probe_until:
            return False
        self._probe_until = now + PROBE_S
        return True

    def record(self, now: float, ok: bool) -> None:
        """An attempt ended: with a fault of the destination (`ok` False), or with an answer that shows it works."""
        if ok and now < self._bucket_ends:
            self._ok += 1
            return
        if self._open_s:
            self._probed(now, ok)
            return
        if now >= self._bucket_ends:
            self._roll(now)
        if ok:
            self._ok += 1
            return
        self._failed += 1
        if self._too_many():
            self._open(now, OPEN_S)

    def unmoved(self) -> None:
        """An attempt ended that says nothing of the destination (event or platform fault): another may probe."""
        self._probe_until = 0.0

    def _probed(self, now: float, ok: bool) -> None:
        if now < self.open_until:
            return
        if not ok:
            self._open(now, min(2 * self._open_s, MAX_OPEN_S))
            return
        self.open_until = self._open_s = self._probe_until = 0.0
        self._roll(now)
        self._ok = 1

    def _open(self, now: float, open_s: float) -> None:
        self._open_s = open_s
        self.open_until = now + open_s
        self._probe_until = 0.0
        self._bucket_ends = _SLOW_PATH
        self._ok = self._failed = 0
        self._older = None

    def _roll(self, now: float) -> None:
        """Begin the bucket that `now` is in, and forget those that the window has left behind."""
        ends = (now // BUCKET_S + 1.0) * BUCKET_S
        older = self._older
        if self._ok or self._failed:
            if older is None:
                older = []
            older.append((self._bucket_ends, self._ok, self._failed))
            self._ok = self._failed = 0
        if older:
            alive = ends - WINDOW_S
            older = [bucket for bucket in older if bucket[0] > alive + 1e-6]
        self._older = older or None
        self._bucket_ends = ends

    def _too_many(self) -> bool:
        ok, failed = self._ok, self._failed
        for _, more_ok, more_failed in self._older or ():
            ok += more_ok
            failed += more_failed
        return ok + failed >= MIN_ATTEMPTS and failed >= ok
