"""What becomes of a delivery after an attempt, how long a parked one waits, and when a waiting record is looked at.

Pure: clock and dice are arguments. Times are epoch milliseconds. Owns the rules of design sections 3 (5) and 5 (Retry
time, Webhook); `streams/settle.py` writes what is decided here, `streams/pump.py` does the waiting. The tiers and why a
partition waits the same for all its records: ADR 0008.
"""

from collections.abc import Sequence
from enum import Enum
from math import ceil
from typing import Final, TypeAlias

from msgspec import Struct

from routing.backoff import jitter_s, own_wait_s
from schemas.control import RetrySpec
from schemas.outcome import Outcome

EXPIRED: Final = "expired"
MAX_PARK_S: Final = 300.0
HEAP_MS: Final = 60_000  # a rest of at most that waits in memory
TIER_SLACK: Final = 0.1  # of a tier, and at most
MAX_TIER_SLACK_MS: Final = 100


class Finished(Struct, frozen=True, gc=False):
    """Delivered."""


class Again(Struct, frozen=True, gc=False):
    """Not before `at_ms`; `attempt` have been made so far."""

    at_ms: int
    attempt: int


class Dead(Struct, frozen=True, gc=False):
    """A dead letter. `code` is its `hg-error`, `detail` its `hg-detail` (the outcome's own where empty).

    `code` is the last outcome's, so that letters can be found by what went wrong, and `detail` says that the attempts
    were used up; where age ended it, `code` is `expired` and `detail` names the last outcome's code.
    """

    code: str
    detail: str = ""


NextStep: TypeAlias = Finished | Again | Dead


def next_step(
    outcome: Outcome, attempt: int, first_failed_ms: int, spec: RetrySpec, now_ms: int, dice: float
) -> NextStep:
    """What becomes of a delivery after an attempt that ended at `now_ms` with `outcome`.

    `attempt` counts the attempts made: with this one, unless it ended in a platform fault, which costs none and is
    bounded by age alone. `first_failed_ms` 0 means that this is the first failure. `schedule_s[k]` is the wait before
    attempt k+1: as many attempts as it has entries. A Retry-After is a floor, never a ceiling (RFC 9110, 10.2.3).
    Nothing is planned past `max_age_s` after the first failure; jitter alone carries no attempt over that end.
    """
    match outcome.verdict:
        case "delivered":
            return Finished()
        case "reject":
            return Dead(outcome.code)
        case "retry":
            pass
    first_failed_ms = first_failed_ms or now_ms
    if outcome.fault == "platform":
        wait_s = own_wait_s((now_ms - first_failed_ms) / 1000)
    elif attempt < len(spec.schedule_s):
        wait_s = spec.schedule_s[attempt]
    else:
        return Dead(outcome.code, f"exhausted: {attempt} of {len(spec.schedule_s)} attempts made. {outcome.detail}")
    wait_s = max(wait_s, outcome.retry_after_s)
    ends_ms = first_failed_ms + spec.max_age_s * 1000
    at_ms = now_ms + wait_s * 1000
    if at_ms > ends_ms:
        why = "Retry-After" if outcome.retry_after_s == wait_s else "the next attempt"
        return Dead(EXPIRED, f"{why} is later than max_age ({spec.max_age_s:g} s) allows; last: {outcome.code}")
    later_ms = at_ms + jitter_s(wait_s, dice) * 1000
    return Again(ceil(later_ms if later_ms <= ends_ms else at_ms), attempt)


def park_until(parks: int, now_ms: int, own_until_ms: int, tiers_s: Sequence[float]) -> int:
    """When a delivery that found no room is due again. This is its `parks`-th park (from 1) since its last attempt.

    The k-th park waits tier k whole, at most 5 min. Where its reason lasts longer (`own_until_ms`, 0 if it has no end
    of its own), that rules, rounded up to a tier while that is one of at most 5 min: a whole tier costs one write. A
    still longer reason is kept to its end, not to the end of the next tier, which might be hours later; that costs a
    handful of writes.
    """
    ladder = [tier_s for tier_s in tiers_s if tier_s <= MAX_PARK_S] or [MAX_PARK_S]
    wait_ms = ladder[min(parks, len(ladder)) - 1] * 1000
    own_ms = own_until_ms - now_ms
    if own_ms > wait_ms:
        wait_ms = next((tier_s * 1000 for tier_s in ladder if tier_s * 1000 >= own_ms), own_ms)
    return now_ms + ceil(wait_ms)


def tier_for(left_ms: int, tiers_ms: Sequence[int]) -> int:
    """The partition for a record that has `left_ms` to wait: the largest tier not longer, 0 if all are.

    `left_ms` is counted from the decision, not from the write: a park of tier k would else just miss its tier. A tier
    longer by up to 100 ms (and a tenth) counts as not longer.
    """
    for tier in range(len(tiers_ms) - 1, 0, -1):
        tier_ms = tiers_ms[tier]
        if left_ms + min(tier_ms * TIER_SLACK, MAX_TIER_SLACK_MS) >= tier_ms:
            return tier
    return 0


def looked_at_ms(appended_ms: int, fetched_ms: int, partition: int, tiers_ms: Sequence[int]) -> int:
    """When a record is looked at: the same wait after its append for all records of a partition.

    Partitions beyond a shortened list of tiers count as tier 0. A broker's clock that is ahead of ours would lengthen
    the wait: what has been fetched was appended before.
    """
    tier_ms = tiers_ms[partition] if partition < len(tiers_ms) else tiers_ms[0]
    return min(appended_ms, fetched_ms) + tier_ms


class Look(Enum):
    """What to do with a record of the retry topic whose tier's time has come."""

    DUE = "due"
    HEAP = "heap"  # wait in memory for what is left
    MOVE = "move"  # send it on to the tier of what is left
    PAUSE = "pause"  # neither is possible: wait with the whole partition


def look(not_before_ms: int, now_ms: int, heap_has_room: bool, tiers_ms: Sequence[int]) -> Look:
    """A rest of at most 60 s waits in memory if there is room, every other goes on to the tier of the rest.

    A rest shorter than the smallest tier has no such tier: with the heap full its partition waits.
    """
    rest_ms = not_before_ms - now_ms
    if rest_ms <= 0:
        return Look.DUE
    if rest_ms <= HEAP_MS and heap_has_room:
        return Look.HEAP
    return Look.MOVE if rest_ms >= tiers_ms[0] else Look.PAUSE
