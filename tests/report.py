"""The report of `make chaos`: what each test of the scoreboard measured and whether it held, in docs/benchmarks.md.

A test's number stands in its mark (`chaos` or `scoreboard`), its figures it says through the `report` fixture, its
result is pytest's. The row of a test that was run replaces its older one; the others stay, since each row has a date
and a commit of its own. With `--report` only, and also if the run is broken off.
"""

import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from msgspec import Struct

from bench.report import PAGE, machine

BEGIN: Final = "<!-- scoreboard: written by `make chaos` -->"
END: Final = "<!-- end of scoreboard -->"
HEAD: Final = ("", "test", "figures", "", "when")


class Row(Struct):
    """All cases of one test function."""

    cases: int = 0
    failed: bool = False
    figures: list[str] = []


class Writer:
    """The hooks that collect the rows."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.rows: dict[tuple[str, str], Row] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        mark = item.get_closest_marker("chaos") or item.get_closest_marker("scoreboard")
        if mark is not None:
            item.user_properties.append(("number", mark.args[0] if mark.args else "other"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = [(name, str(text).replace("|", "/")) for name, text in report.user_properties]
        number = dict(said).get("number")
        if number is None or not (report.when == "call" or report.failed):
            return
        test = report.nodeid.partition("[")[0].rpartition("::")[2]  # the case may hold colons
        name = test.removeprefix("test_").replace("_", " ")
        row = self.rows.setdefault((number, name), Row())
        row.cases += report.when == "call"
        row.failed |= report.failed
        row.figures += [text for kind, text in said if kind == "figures"]

    def pytest_sessionfinish(self) -> None:
        if self.rows:
            write(self.page, self.rows)


def write(page: Path, rows: dict[tuple[str, str], Row]) -> None:
    head, _, rest = page.read_text().partition(BEGIN)
    old, _, tail = rest.partition(END)
    cells = [tuple(line.strip("| ").split(" | ")) for line in old.splitlines() if line.startswith("| ")]
    table = [row for row in cells if len(row) == len(HEAD) and row[:2] not in rows]
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M}, {_commit()}"
    for (number, name), row in rows.items():
        figures = "; ".join(row.figures) or f"{row.cases} case{'s' * (row.cases != 1)}"
        table.append((number, name, figures, "FAILED" if row.failed else "holds", when))
    table.sort(key=lambda row: re.sub(r"\d+", lambda digits: digits[0].zfill(3), row[0]))
    lines = ["| " + " | ".join(row) + " |" for row in table]
    body = [BEGIN, f"{machine()}.", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *lines, END]
    page.write_text(head + "\n".join(body) + tail)


def _commit() -> str:
    """The commit that was run, with a `+` if something but the page was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PAGE.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", f":(exclude){PAGE}")
    return (git("rev-parse", "--short", "HEAD") or "no commit") + ("+" if changed else "")


# ---------------------------------------------------------------- taken into conftest.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", action="store_true", help="write the scoreboard into docs/benchmarks.md at the end")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--report"):
        config.pluginmanager.register(Writer(PAGE))


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes down what a test measured, before it is asserted."""

    def say(figures: str) -> None:
        print(figures)
        record_property("figures", figures)

    return say
