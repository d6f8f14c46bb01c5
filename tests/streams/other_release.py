"""The command of another release, for tests of upgrades: `python -m tests.streams.other_release WHICH worker`.

`next` writes records of version 2 and reads both; `between` reads both and writes version 1 still, as the release
before a new version does. `blind` is this release without the safeguard: it takes every version for its own. Version 2
is made up: the three counts stand in one header, and the first failure has another name.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Final

from cli.main import main
from schemas import wire
from schemas.wire import Form, Headers, Parked

COUNTS: Final = ("hg-attempt", "hg-hop", "hg-parks")


def write_2(parked: Parked) -> Headers:
    first = wire.FORMS[1]
    kept = [header for header in first.write(parked) if header[0] not in (*COUNTS, "hg-first-failed")]
    counts = f"{parked.attempt}/{parked.hop}/{parked.parks}"
    return [*kept, ("hg-counts", counts.encode()), ("hg-since", b"%d" % parked.first_failed_ms)]


def read_2(text: Mapping[str, str]) -> Parked:
    counts = dict(zip(COUNTS, text["hg-counts"].split("/"), strict=True))
    return wire.FORMS[1].read({**text, **counts, "hg-first-failed": text["hg-since"]})


def between() -> None:
    wire.FORMS[2] = Form(write_2, read_2)


def following() -> None:
    between()
    wire.WRITTEN = 2  # type: ignore[misc]


def blind() -> None:
    for version in range(2, 10):
        wire.FORMS[version] = wire.FORMS[1]


WHICH: Final[dict[str, Callable[[], None]]] = {"next": following, "between": between, "blind": blind}


if __name__ == "__main__":
    WHICH[sys.argv[1]]()
    main(sys.argv[2:])
