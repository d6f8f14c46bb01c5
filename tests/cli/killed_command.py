"""`headgate`, which kills itself (SIGKILL) at one named point of a rotation, a shredding or a deletion.

`python -m tests.cli.killed_command POINT ARGS…`. What is wrapped does what it always did; at the point the process is
gone.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import cli.keys
import config.erasure
from cli.main import main
from config.writer import Writer


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def taken() -> None:
    """The right to write is taken, nothing is read."""
    enter = Writer.__enter__

    def look(writer: Writer) -> Writer:
        enter(writer)
        die()

    Writer.__enter__ = look  # type: ignore[method-assign]


def produced() -> None:
    """The records of the first transaction are written, it is not committed."""

    def look(_writer: Writer, producer: Any) -> None:
        producer.flush(10)
        die()

    Writer._commit = look  # type: ignore[method-assign]


def committed() -> None:
    """The first transaction is committed, nothing after it is done or shown."""
    commit = Writer._commit

    def look(writer: Writer, producer: Any) -> None:
        commit(writer, producer)
        die()

    Writer._commit = look  # type: ignore[method-assign]


def one_topic() -> None:
    """One of the tenant's topics is deleted, the other is not."""
    delete = cli.keys.delete_topics

    def look(kafka: Mapping[str, Any], names: Sequence[str]) -> NoReturn:
        delete(kafka, names[:1])
        die()

    cli.keys.delete_topics = look  # type: ignore[assignment]


def topics() -> None:
    """The tenant's topics are deleted, its key is there."""
    delete = cli.keys.delete_topics

    def look(kafka: Mapping[str, Any], names: Sequence[str]) -> NoReturn:
        delete(kafka, names)
        die()

    cli.keys.delete_topics = look  # type: ignore[assignment]


def watching() -> None:
    """All is written; whether it is gone from the topic was not looked at."""
    cli.keys.erase = lambda *_: die()  # type: ignore[assignment]


def ticked() -> None:
    """The segment has rolled; nothing has been seen to be gone."""
    tick = config.erasure._tick

    def look(*args: Any) -> None:
        tick(*args)
        die()

    config.erasure._tick = look


POINTS: Final[Mapping[str, Callable[[], None]]] = {
    each.__name__: each for each in (taken, produced, committed, one_topic, topics, watching, ticked)
}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    main(sys.argv[2:])
