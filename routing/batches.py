"""Where batches of a stage partition begin and end: a function of the log alone (design, sections 3 and 5).

A batch belongs to one destination. Its first record fixes its window and its limits; it ends after the record that
fills it, or before the first later record of the partition, whosever that is, that was appended after the window's end.
So whoever reads the log again from a batch's first record on finds the same batch, wherever it began to read.

`Boundaries` are those of one partition. They know offsets, append times and sizes, and nothing of what the records say.
"""

import heapq
from collections.abc import Mapping
from typing import Generic, TypeVar

from msgspec import Struct

K = TypeVar("K")


class Limits(Struct, frozen=True, gc=False):
    """Of a batch, as its first record carries them."""

    window_ms: int
    max_events: int
    max_bytes: int


class Closed(Struct, Generic[K], frozen=True):
    """A whole batch: the records of its destination from `first` to `last`."""

    of: K
    first: int
    last: int
    count: int
    size: int


class _Open(Struct, gc=False):
    first: int
    last: int
    count: int
    size: int
    limits: Limits


class Boundaries(Generic[K]):
    """The open batches of one partition, from where its reader began.

    `covered`: by destination the last offset that earlier batches have taken care of.
    """

    def __init__(self, covered: Mapping[K, int]) -> None:
        self._covered = covered
        self._open: dict[K, _Open] = {}
        self._ends: list[tuple[int, int, K]] = []  # the window's end, the first offset, whose

    def takes(self, of: K, offset: int) -> bool:
        """Whether a record is still to be put into a batch."""
        return offset > self._covered.get(of, -1)

    def pass_by(self, at_ms: int) -> list[Closed[K]]:
        """A record was appended at `at_ms`, whosever it is: what its coming ends. Called for every record, before
        `take`; a record that only says what time it is gets no further."""
        closed: list[Closed[K]] = []
        ends = self._ends
        while ends and ends[0][0] < at_ms:
            _, first, of = heapq.heappop(ends)
            batch = self._open.get(of)
            if batch is not None and batch.first == first:
                closed.append(self._close(of, batch))
        return closed

    def take(self, of: K, offset: int, at_ms: int, size: int, limits: Limits) -> Closed[K] | None:
        """Puts a record into the batch of its destination; the batch, if that has filled it."""
        batch = self._open.get(of)
        if batch is None:
            batch = self._open[of] = _Open(offset, offset, 1, size, limits)
            heapq.heappush(self._ends, (at_ms + limits.window_ms, offset, of))
        else:
            batch.last = offset
            batch.count += 1
            batch.size += size
        if batch.count >= batch.limits.max_events or batch.size >= batch.limits.max_bytes:
            return self._close(of, batch)
        return None

    def next_end_ms(self) -> int | None:
        """The first window that ends: from then on a record must come by, or its batch stays open."""
        ends = self._ends
        while ends:
            _, first, of = ends[0]
            batch = self._open.get(of)
            if batch is not None and batch.first == first:
                return ends[0][0]
            heapq.heappop(ends)
        return None

    def oldest(self, none: int) -> int:
        """The first record that an open batch holds; `none` where none is open."""
        return min([batch.first for batch in self._open.values()], default=none)

    def _close(self, of: K, batch: _Open) -> Closed[K]:
        del self._open[of]
        return Closed(of, batch.first, batch.last, batch.count, batch.size)
