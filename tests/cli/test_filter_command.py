"""`headgate filter` as a person uses it: what is on stdout, what on stderr, and the exit."""

import json
from pathlib import Path

from click.testing import CliRunner, Result

from cli.filter import command

EVENTS = b"""{"eventId": "evt_1", "eventType": "order.paid", "customerExternalId": "acme", "payload": {"total": 200}}
{"eventId": "evt_2", "eventType": "order.paid", "payload": {"total": 2}}

{"eventId": "evt_3", "eventType": "order.paid", "payload": {"sum": 200}}
"""


def run(*args: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(command, args, input=stdin)


def test_a_sound_expression_says_what_it_reads() -> None:
    result = run('payload.total > 100 && type == "order.paid"')
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ok; reads payload.total, type\n", "")


def test_a_fault_in_the_expression_points_at_its_place_and_exits_1() -> None:
    result = run("payload.total > 100 && total > 1")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: line 1, column 24: there is no variable `total`"
    assert lines[1:3] == ["payload.total > 100 && total > 1", " " * 23 + "^"]
    assert "payload.total" in lines[3]


def test_a_fault_is_json_where_json_was_asked_for() -> None:
    result = run("payload.total >", "--output", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == {
        "line": 1,
        "column": 16,
        "message": "expected a value, found the end",
        "remedy": "",
    }


def test_events_match_or_do_not_or_say_why_they_cannot() -> None:
    result = run("payload.total > 100", "-f", "-", stdin=EVENTS)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "line 1  evt_1  order.paid  match",
        "line 2  evt_2  order.paid  no match",
        "line 4  evt_3  order.paid  error: payload.total is missing",
    ]
    assert result.stderr.splitlines()[-1] == "1 match, 1 no match, 1 error, 0 no event"


def test_events_of_a_file_come_as_json(tmp_path: Path) -> None:
    file = tmp_path / "events.ndjson"
    file.write_bytes(EVENTS)
    result = run("payload.total > 100", "-f", str(file), "--output", "json")
    shown = json.loads(result.stdout)
    assert (result.exit_code, shown["ok"], shown["reads"]) == (0, True, ["payload.total"])
    assert shown["counts"] == {"match": 1, "no match": 1, "error": 1, "no event": 0}
    assert [each["result"] for each in shown["events"]] == ["match", "no match", "error"]


def test_json_of_no_events_is_json_too() -> None:
    result = run("true", "-f", "-", "--output", "json")
    assert json.loads(result.stdout)["events"] == []
    assert result.exit_code == 0


def test_a_wrong_pattern_points_at_its_place() -> None:
    result = run("payload.sku.matches(r'^[A-Z')")
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: line 1, column 24: the pattern has an error: missing ] `[A-Z`"
    assert lines[2] == " " * 23 + "^"


def test_the_help_shows_each_example_on_a_line_of_its_own() -> None:
    lines = [line.strip() for line in run("--help").stdout.splitlines()]
    assert "headgate filter 'has(payload.vip) && payload.vip' -f events.ndjson" in lines


def test_a_line_that_is_no_event_is_named_and_exits_1() -> None:
    result = run("true", "-f", "-", stdin=b'{"eventType": "t", "payload": 1}\nnonsense\n{"eventType": "t"}\n')
    assert result.exit_code == 1
    assert [line.split("  ")[-1].split(":")[0] for line in result.stdout.splitlines()] == [
        "match",
        "no event",
        "no event",
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_event() -> None:
    result = run("true", "-f", "-", stdin=b'\xef\xbb\xbf{"eventType": "t", "payload": 1}\r\n\xef\xbb\xbf{}\n')
    assert [line.split("  ")[-1].split(":")[0] for line in result.stdout.splitlines()] == ["match", "no event"]


def test_the_help_shows_its_examples_a_line_each() -> None:
    lines = run("--help").stdout.splitlines()
    assert "  headgate filter 'has(payload.vip) && payload.vip' -f events.ndjson" in lines


def test_wrong_use_exits_2() -> None:
    assert run().exit_code == 2
    assert run("true", "--file").exit_code == 2
    assert run("true", "--output", "xml").exit_code == 2


def test_what_a_producer_wrote_cannot_move_the_terminal() -> None:
    named = run("true", "-f", "-", stdin=b'{"eventType": "t", "payload": 1, "\\u001b[2J": 1}')
    assert named.exit_code == 1
    assert "\x1b" not in named.stdout + named.stderr
    assert "\x1b" not in run("payload.a == '\x1b[2J").stderr
