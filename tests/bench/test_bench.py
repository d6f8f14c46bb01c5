"""A benchmark misleads when its parts do not do what they say: so they are held to it, on few events."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import events, floor, report
from bench.measures import Figure
from dev.inbox import signature_ok
from dev.stack import Stack
from schemas.event import Event, decode_event
from schemas.ids import ExternalId


def test_events_have_one_kilobyte_are_valid_and_spread_over_all_tenants() -> None:
    made = [events.event("r1", number) for number in range(200)]
    assert {len(value) for _, value in made} == {events.EVENT_BYTES}
    assert len({key for key, _ in made}) == events.TENANTS
    decoded = [decode_event(value, ExternalId(key), "p-", 0, 0, 2**20) for key, value in made]
    ids = {event.eventId for event in decoded if isinstance(event, Event)}
    assert len(ids) == 200
    assert not ids & {event_id.replace("r1", "r2") for event_id in ids}


def test_the_floor_really_signs() -> None:
    stamp = str(int(time.time()))
    signature = floor.Signer(floor.KEY).sign(f"id.{stamp}.body".encode()).decode()
    secret = "whsec_" + floor.base64.b64encode(floor.KEY).decode()
    assert signature_ok([secret], "id", stamp, b"body", f"v1,{signature}", time.time())


def test_a_bar_is_judged_by_the_median() -> None:
    assert Figure("speed", "", (1.0, 20.0, 30.0), at_least=15).holds
    assert not Figure("speed", "", (14.0, 14.0, 30.0), at_least=15).holds
    assert not Figure("age", "ms", (16.0,), at_most=15).holds
    assert Figure("shown only", "", (0.0,)).holds


def test_figures_replace_those_of_the_last_run_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Before\n{report.BEGIN}\nlast run\n{report.END}\nafter\n")
    for speed in (1234.4, 5678.0):
        report.write([Figure("speed", "per s", (speed,), at_least=2000)], "few events.", page)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nafter\n")
    assert "| speed | 5,678 per s |  | >= 2,000 | holds |" in text
    assert "last run" not in text
    assert "1,234" not in text


@pytest.mark.broker
def test_all_three_deliver_every_event_of_a_round(stack: Stack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--stack", str(stack.dir), "--count", "10000", "--rounds", "1", "speed"],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    # a run that did not deliver all of them is an error, not a figure
    assert done.returncode == 0, done.stderr
    assert re.findall(r"round 1/1  (\w+)", done.stderr) == ["floor", "naive", "headgate"]
    assert re.search(r"headgate / floor +0\.\d\d", done.stdout)
