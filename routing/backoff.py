"""How long to wait: the arithmetic of delays, in seconds. Pure: the dice are an argument in [0, 1)."""

from typing import Final

JITTER_SHARE: Final = 0.2
MAX_JITTER_S: Final = 60.0
FIRST_OWN_WAIT_S: Final = 1.0
MAX_OWN_WAIT_S: Final = 300.0


def jitter_s(wait_s: float, dice: float) -> float:
    """What lengthens a wait, so that what failed together does not come back together: up to 20 %, at most 60 s."""
    return dice * min(wait_s * JITTER_SHARE, MAX_JITTER_S)


def own_wait_s(age_s: float) -> float:
    """The wait after a fault of ours: 1 s, doubling to 5 min. `age_s` is how long the delivery has been failing.

    To wait once more what was waited so far is to double, and needs no count of the faults, which no record carries.
    """
    return min(max(age_s, FIRST_OWN_WAIT_S), MAX_OWN_WAIT_S)
