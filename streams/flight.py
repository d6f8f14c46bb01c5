"""One delivery while this worker has it: where it came from, where it waits, how its last attempt ended."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from schemas.delivery import Delivery
from schemas.outcome import Outcome

if TYPE_CHECKING:
    from schemas.staged import Place
    from streams.batch import StagedBatch
    from streams.lanes import Lane


class Source(Protocol):
    """A partition, during one assignment, that records were taken from."""

    def settled(self, offsets: Sequence[int]) -> None:
        """Their records need nothing more from this worker: the commit may pass them."""
        ...


class Shared(Struct, gc=False):
    """An event that several deliveries hold together: its bytes count once, until the last of them lets go."""

    holders: int = 0


class Flight(Struct, gc=False):
    """A delivery between its admission and its settling. Times are monotonic seconds unless named otherwise.

    `key` names (delivery, replay job) among what is in flight here; `ledger_key` names it in Redis. `ended_ms` is the
    wall clock at the end of the attempt, `next_ms` when another one follows (0: none). `end` says how it ended here
    (delivered, again, dead, recovered, stale, staged) and `code` why, where it did not deliver.

    `batch`: what flies is a batch of a stage kind; `delivery` then stands for all of it, under the batch's id, and
    without an event. `place`: of a delivery on its way into the stage, where it was read.
    """

    delivery: Delivery
    lane: "Lane"
    source: Source
    offset: int
    key: str
    ledger_key: str
    weight: int  # bytes; its part of an event that several deliveries hold together
    queued_at: float = 0.0
    started_at: float = 0.0
    duration_s: float = 0.0
    ended_ms: int = 0
    slow: bool = False
    version: int = 0  # of the destination's record, when the attempt began
    outcome: Outcome | None = None
    next_ms: int = 0
    end: str = ""
    code: str = ""
    joined: list[tuple[Source, int]] | None = None
    shared: Shared | None = None
    batch: "StagedBatch | None" = None
    place: "Place | None" = None


class Fan:
    """The deliveries of each record of one fetched run: a record is settled when the last of them is.

    `left` holds only the records that wait for more than one settling.
    """

    __slots__ = ("_settle", "left")

    def __init__(self, settle: Callable[[Sequence[int]], None]) -> None:
        self._settle = settle
        self.left: dict[int, int] = {}

    def expect(self, offset: int, settlings: int) -> None:
        if settlings > 1:
            self.left[offset] = settlings

    def settled(self, offsets: Sequence[int]) -> None:
        left = self.left
        if not left:
            self._settle(offsets)
            return
        through: list[int] = []
        for offset in offsets:
            waiting = left.get(offset)
            if waiting is None:
                through.append(offset)
            elif waiting == 1:
                del left[offset]
                through.append(offset)
            else:
                left[offset] = waiting - 1
        if through:
            self._settle(through)
