"""Figures as text: for the terminal, and for the part of docs/benchmarks.md that `make bench` writes."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psutil

from bench.measures import Figure
from bench.rig import ROOT, BenchError

PAGE: Final = ROOT / "docs" / "benchmarks.md"
BEGIN: Final = "<!-- figures: written by `make bench` -->"
END: Final = "<!-- end of figures -->"


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def bar(figure: Figure) -> str:
    if figure.at_least is not None:
        return f">= {number(figure.at_least, figure.digits)}"
    return f"<= {number(figure.at_most, figure.digits)}" if figure.at_most is not None else ""


def row(figure: Figure) -> tuple[str, str, str, str, str]:
    """Name, median with unit, spread, bar, verdict."""
    low, high = min(figure.samples), max(figure.samples)
    spread = f"{number(low, figure.digits)} - {number(high, figure.digits)}" if len(figure.samples) > 1 else ""
    verdict = ("holds" if figure.holds else "missed") if bar(figure) else ""
    return figure.name, f"{number(figure.median, figure.digits)} {figure.unit}".rstrip(), spread, bar(figure), verdict


def text(figures: Sequence[Figure]) -> str:
    rows = [("", "median", "spread", "bar", ""), *map(row, figures)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows)
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def write(figures: Sequence[Figure], conditions: str, file: Path = PAGE) -> None:
    """Put the figures into the page, in place of those of the last run."""
    page = file.read_text()
    if BEGIN not in page or END not in page:
        raise BenchError(f"{file} has no place for figures ({BEGIN} ... {END})")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    table = ["| | median | spread | bar | |", "|---|---|---|---|---|"]
    table += ["| " + " | ".join(cells) + " |" for cells in map(row, figures)]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join([BEGIN, f"{when}. {machine()}.", conditions, "", *table, END])
    file.write_text(head + body + tail)
