"""A worker of the `files` kind that kills itself (SIGKILL) at one named step of the stage.

`python -m tests.chaos.killed_stage POINT` is `python -m tests.files`, with methods wrapped to look on: what is wrapped
does what it always did, and the second time that the point is passed the process is gone. Two more are no kills but
safeguards taken out: `WITHOUT_CURSORS` and `WITHOUT_PLACES`.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from connectors.contract import Batch
from schemas.staged import Place
from streams.batch import StagedBatch
from streams.cursor import CursorWriter, Entry, Kept
from streams.ingress import Router
from streams.outbox import Letter, Outbox
from streams.settle import Settle
from streams.slots import Slot
from tests import files
from tests.files import FilesConnector


class Point:
    """A step; `passed` is called each time, and dies the second time."""

    def __init__(self) -> None:
        self._times = 0

    def passed(self) -> None:
        self._times += 1
        if self._times == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def staged(point: Point) -> None:
    """In the stage, acknowledged; its ingress record is not settled."""
    write = Outbox.write

    def look(outbox: Outbox, letter: Letter) -> None:
        if ".stage." in letter.topic and letter.key is not None:
            done = letter.done

            def answered(letter: Letter, found: bool) -> None:
                point.passed()
                done(letter, found)

            letter.done = answered
        write(outbox, letter)

    Outbox.write = look  # type: ignore[method-assign]


def gathered(point: Point) -> None:
    """A batch is whole; nothing of it is sent."""
    start = StagedBatch.start

    def look(batch: StagedBatch, *given: Any) -> None:
        point.passed()
        start(batch, *given)

    StagedBatch.start = look  # type: ignore[method-assign]


def stored(point: Point) -> None:
    """The far side has it; nobody here knows."""
    deliver = FilesConnector.deliver

    async def look(connector: FilesConnector, batch: Batch) -> Any:
        outcomes = await deliver(connector, batch)
        point.passed()
        return outcomes

    FilesConnector.deliver = look  # type: ignore[method-assign]


def noted(point: Point) -> None:
    """What it is about to do is noted; nothing is done."""
    note = Slot.note

    async def look(slot: Slot, batch: StagedBatch, text: bytes) -> None:
        await note(slot, batch, text)
        point.passed()

    Slot.note = look  # type: ignore[method-assign]


def _written(point: Point, part: str, header: str = "") -> None:
    write = Outbox.write

    def look(outbox: Outbox, letter: Letter) -> None:
        if part in letter.topic and any(name == header for name, _ in letter.headers):
            done = letter.done

            def answered(letter: Letter, found: bool) -> None:
                point.passed()
                done(letter, found)

            letter.done = answered
        write(outbox, letter)

    Outbox.write = look  # type: ignore[method-assign]


def refused(point: Point) -> None:
    """A dead letter of one event is acknowledged; its batch is not settled."""
    _written(point, ".dlq.", "hg-delivery")


def parked(point: Point) -> None:
    """Its manifest is acknowledged; its batch is not settled."""
    _written(point, ".retry.", "hg-batch")


def relayed(point: Point) -> None:
    """Its manifest is in the stage again, and in the retry topic still."""
    _written(point, ".stage.", "hg-batch")


def recorded(point: Point) -> None:
    """Its attempt record is acknowledged; its batch is not settled."""
    acknowledge = Settle._acknowledge

    def look(settle: Settle, flights: Sequence[Any], records: Sequence[Any]) -> None:
        if any(flight.batch is not None for flight in flights):
            point.passed()
        acknowledge(settle, flights, records)  # type: ignore[arg-type]

    Settle._acknowledge = look  # type: ignore[method-assign,assignment]


def _writing(point: Point, method: str, *, after: bool) -> None:
    """Around one step of a transaction that holds a cursor."""
    write = CursorWriter.write

    class Watched:
        def __init__(self, producer: Any) -> None:
            self._producer = producer

        def __getattr__(self, name: str) -> Any:
            real = getattr(self._producer, name)
            return partial(self._step, real) if name == method else real

        def _step(self, real: Callable[..., Any], *given: Any) -> Any:
            if not after:
                point.passed()
            result = real(*given)
            if after:
                point.passed()
            return result

    def look(writer: CursorWriter, entries: Sequence[Entry], offsets: Sequence[Any], group: Any) -> None:
        if entries and writer._producer is not None and not isinstance(writer._producer, Watched):
            writer._producer = Watched(writer._producer)
        write(writer, entries, offsets, group)

    CursorWriter.write = look  # type: ignore[method-assign]


def without_cursors(_: Point) -> None:
    """The safeguard taken out: what is stored already is forgotten at a restart."""
    take_over = Slot.take_over

    def look(slot: Slot, kept: Kept, name: str) -> None:
        take_over(slot, Kept({}, {}), name)

    Slot.take_over = look  # type: ignore[method-assign]


def without_places(_: Point) -> None:
    """The safeguard taken out: what was staged twice is not told from what was staged once."""

    def nowhere(_router: Router, _lot: Any, _offset: int) -> Place | None:
        return None

    Router._place = nowhere  # type: ignore[method-assign]


def without_notes(_: Point) -> None:
    """The safeguard taken out: a batch that is delivered again knows nothing of the first time."""

    async def forget(_batch: StagedBatch, _noted: bytes) -> None: ...

    StagedBatch._note = forget  # type: ignore[method-assign]


POINTS: Final[Mapping[str, Callable[[Point], None]]] = {
    "staged": staged,
    "gathered": gathered,
    "noted": noted,
    "stored": stored,
    "refused": refused,
    "parked": parked,
    "relayed": relayed,
    "recorded": recorded,
    "cursor_begun": partial(_writing, method="produce", after=False),
    "cursor_flushed": partial(_writing, method="flush", after=True),
    "offsets_sent": partial(_writing, method="send_offsets_to_transaction", after=True),
    "cursor_committed": partial(_writing, method="commit_transaction", after=True),
}
WITHOUT: Final[Mapping[str, Callable[[Point], None]]] = {
    "cursors": without_cursors,
    "places": without_places,
    "notes": without_notes,
}


def main() -> None:
    name, *without = sys.argv[1:]
    for safeguard in without:
        WITHOUT[safeguard](Point())
    if name in POINTS:
        POINTS[name](Point())
    files.main()


if __name__ == "__main__":
    main()
