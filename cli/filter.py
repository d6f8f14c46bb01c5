"""`headgate filter`: checks an expression as `apply` will, tries it on events as the worker will. Needs no broker."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from time import monotonic, time
from typing import IO, Any, Final

import click
import msgspec
from msgspec import Struct

from cli.completion import files
from cli.output import counted, opened, output_option, printable, say, show_json, told
from config.upcasters import installed_upcasters
from routing.filters import FilterError, FilterFault, compile_filter
from schemas.event import Event, Problem
from schemas.ids import ExternalId
from schemas.upcast import Upcasters

# the longest event that any setting lets through, and its envelope
_MAX_LINE_BYTES: Final = 16 * 1024 * 1024
PROGRESS_EVERY_S: Final = 2.0


class Tried(Struct):
    """What the expression makes of one line. `result`: match, no match, error (of the expression) or no event."""

    line: int
    result: str
    id: str = ""
    type: str = ""
    why: str = ""


class _Named(Struct):
    customerExternalId: str = "-"


_decode_named = msgspec.json.Decoder(_Named).decode


def _event(number: int, raw: bytes, upcasters: Upcasters) -> Event | str:
    """The event on a line, whosever it is, or why it is none."""
    try:
        tenant = ExternalId(_decode_named(raw).customerExternalId)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        return str(fault)[:300]
    event = upcasters.decode(raw, tenant, "line-", number, int(time() * 1000), _MAX_LINE_BYTES)
    return event.detail if isinstance(event, Problem) else event


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while raw := stream.readline(_MAX_LINE_BYTES):
        number += 1
        line = (raw.removeprefix(BOM_UTF8) if number == 1 else raw).strip()
        if line:
            yield number, line


@click.command()
@click.argument("expression", metavar="EXPR")
@click.option("-f", "--file", "file", metavar="FILE", shell_complete=files, help="One JSON event a line; - for stdin.")
@output_option
@told
def command(expression: str, file: str | None, output: str) -> None:
    """Check a filter (the `where` of a route), and try it on events.

    \b
    headgate filter 'payload.total > 100 && payload.country in ["CH", "DE"]'
    headgate filter 'has(payload.vip) && payload.vip' -f events.ndjson
    headgate filter "payload.sku.matches(r'^[A-Z]{2}-[0-9]+$')" -f - < events.ndjson

    Variables: id type source aggregateId occurredAt schemaVersion metadata payload. A missing field is an error, and an
    expression that errors on an event does not match it; has(payload.field) asks.

    Exit 1 if the expression is at fault, or a line holds no event.
    """
    try:
        found = compile_filter(expression)
    except FilterError as fault:
        if output == "json":
            error = {"line": fault.line, "column": fault.column, "message": fault.message, "remedy": fault.remedy}
            show_json({"expression": expression, "ok": False, "error": error})
            raise click.exceptions.Exit(1) from None
        raise click.ClickException(str(fault)) from None
    shown: dict[str, Any] = {"expression": expression, "ok": True, "reads": list(found.fields)}
    reads = f"ok; reads {', '.join(map(printable, found.fields)) or 'nothing of the event'}"
    if file is None:
        if output == "json":
            show_json(shown)
        else:
            click.echo(reads)
        return
    upcasters = installed_upcasters()
    source = _lines(opened(file))
    say(reads)

    counts = {"match": 0, "no match": 0, "error": 0, "no event": 0}
    between = ""
    told_at = monotonic()
    if output == "json":
        # written as it goes: the file may be larger than memory
        click.echo(msgspec.json.encode(shown).decode()[:-1] + ',"events":[', nl=False)
    for number, raw in source:
        each = Tried(number, "no event")
        event = _event(number, raw, upcasters)
        if isinstance(event, str):
            each.why = event
        else:
            each.id, each.type = event.eventId, event.eventType
            try:
                each.result = "match" if found.matches(event) else "no match"
            except FilterFault as fault:
                each.result, each.why = "error", str(fault)
        counts[each.result] += 1
        if output == "json":
            click.echo(f"{between}\n{msgspec.json.encode(each).decode()}", nl=False)
            between = ","
            if monotonic() - told_at >= PROGRESS_EVERY_S:
                told_at = monotonic()
                say(f"{counted(sum(counts.values()), 'line')} tried")
        else:
            parts = (f"line {each.line}", each.id, each.type, f"{each.result}{': ' if each.why else ''}{each.why}")
            click.echo("  ".join(printable(part) for part in parts if part))
    if output == "json":
        click.echo(f'\n],"counts":{msgspec.json.encode(counts).decode()}}}')
    else:
        say(", ".join(f"{count} {result}" for result, count in counts.items()))
    if counts["no event"]:
        raise click.exceptions.Exit(1)
