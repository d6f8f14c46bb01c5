"""The real command, which kills itself (SIGKILL) where the nth letter of a replay or a drop passes a named point.

`python -m tests.streams.killed_replay POINT NTH SAFEGUARD ARGUMENTS…` is `headgate ARGUMENTS…`, with what is wrapped
doing what it always did. SAFEGUARD names what is taken out, for a control; `-` takes nothing out.
"""

import os
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import cli.replay
import streams.replay
from cli.main import main
from streams.replay import Outgoing, Replay, Scribe


class Count:
    def __init__(self, nth: int) -> None:
        self._left = nth

    def one(self) -> None:
        """Dies at the nth call."""
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


def counted(count: Count) -> None:
    """The letters are counted, nothing is written. Of a drop too."""
    survey = cli.replay.survey

    def look(*args: Any, **kwargs: Any) -> Any:
        survey(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    cli.replay.survey = look


def sent(count: Count) -> None:
    """What is sent for a letter is with the producer: it may be written or not."""
    send = Replay.send

    def look(replay: Replay, message: Any) -> None:
        send(replay, message)
        count.one()

    Replay.send = look  # type: ignore[method-assign]


def acknowledged(count: Count) -> None:
    """What was sent for so many letters is acknowledged, and none of them is marked."""

    def hold(*_: Any) -> None:
        count.one()

    Replay.acknowledged = hold  # type: ignore[method-assign]


def mark_sent(count: Count) -> None:
    """The mark is with the producer: it may be written or not. Of a drop too."""
    write = Scribe.write

    def look(scribe: Scribe, record: Outgoing, then: Any) -> None:
        write(scribe, record, then)
        if any(name == "hg-mark" for name, _ in record.headers):
            count.one()

    Scribe.write = look  # type: ignore[method-assign]


def marked(count: Count) -> None:
    """The mark is acknowledged."""

    def look(*_: Any) -> None:
        count.one()

    Replay.marked = look  # type: ignore[method-assign]


POINTS: Final[dict[str, Callable[[Count], None]]] = {
    point.__name__: point for point in (counted, sent, acknowledged, mark_sent, marked)
}


def dropped(count: Count) -> None:
    """The mark of a drop is acknowledged."""
    drop = cli.replay.drop_letters

    def look(settings: Any, topic: str, found: Any, job: str, told: Any) -> int:
        return drop(settings, topic, found, job, lambda _: count.one())

    cli.replay.drop_letters = look


DROP_POINTS: Final[dict[str, Callable[[Count], None]]] = {
    point.__name__: point for point in (counted, mark_sent, dropped)
}


def jobs() -> None:
    """The job of a letter is another one each time."""
    cli.replay.replay_job = lambda *_: secrets.token_hex(8)


def origin() -> None:
    """Nothing says where a record that goes back through ingress was at first."""
    returned = streams.replay.returned_headers

    def without(headers: Any) -> Any:
        return [one for one in returned(headers) or [] if one[0] != "hg-origin"]

    streams.replay.returned_headers = without


SAFEGUARDS: Final = {"-": lambda: None, "jobs": jobs, "origin": origin}

if __name__ == "__main__":
    named, nth, without, *arguments = sys.argv[1:]
    if named != "-":
        {**POINTS, **DROP_POINTS}[named](Count(int(nth)))
    SAFEGUARDS[without]()
    main(arguments)
