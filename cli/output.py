"""What every command shares: results on stdout, all else on stderr, faults without a traceback, the settings."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from time import time
from typing import IO, Any, Final, ParamSpec, TypeVar

import click
import msgspec

from config.document import DocumentError
from config.kafka import KafkaFault
from config.rotation import Refusal
from config.settings import Settings, SettingsError, parse_duration_s
from config.writer import Fenced
from schemas.ids import DEFAULT_VENDOR, ExternalId, TenantRef, Vendor, external_id_problem, name_problem

P = ParamSpec("P")
R = TypeVar("R")

output_option = click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the result."
)


def _vendor(_context: click.Context, _option: click.Parameter, value: str) -> Vendor:
    if (problem := name_problem(value)) is not None:
        raise click.BadParameter(f"{value!r} {problem}")
    return Vendor(value)


def _tenant(_context: click.Context, _option: click.Parameter, value: str | None) -> ExternalId | None:
    if value is not None and (problem := external_id_problem(value)) is not None:
        raise click.BadParameter(problem)
    return None if value is None else ExternalId(value)


vendor_option = click.option(
    "--vendor", default=DEFAULT_VENDOR, show_default=True, callback=_vendor, help="Whose tenants."
)


def tenant_option(help_text: str, *, required: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return click.option("--tenant", metavar="ID", callback=_tenant, required=required, help=help_text)


def say(text: str) -> None:
    click.echo(text, err=True)


def show_json(value: object) -> None:
    """JSON on stdout. `msgspec.Raw` goes out in its own bytes, so numbers of a payload keep their digits."""
    click.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode())


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns on stdout. Control characters of what others wrote do not reach the terminal."""
    lines = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def told(command: Callable[P, R]) -> Callable[P, R]:
    """Faults that a person can mend become a message and exit 1; bugs stay bugs."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (SettingsError, DocumentError, KafkaFault, Fenced, Refusal) as fault:
            raise click.ClickException(str(fault)) from None

    return wrapped


def load_settings(vendor: Vendor | None = None) -> Settings:
    """The settings of the environment, or those of the embedded stack where the environment names no broker.

    `vendor` is whose tenants the command is about. One that this deployment does not have is refused: it is a slip, and
    nothing found would look like an answer.
    """
    env = dict(os.environ)
    if not env.get("HEADGATE_KAFKA_BOOTSTRAP"):
        folder = Path(env.get("HEADGATE_DEV_DIR") or ".headgate")
        running = None
        if folder.is_dir():
            from dev.stack import stack

            running = stack(folder)
        if running is not None:
            say(f"HEADGATE_KAFKA_BOOTSTRAP is not set: using the embedded stack in {folder}")
            given = running.settings()
            for name in ("HEADGATE_REDIS_URL", "HEADGATE_MASTER_KEY_FILE"):
                if env.get(name) not in (None, "", given[name]):
                    say(f"warning: {name} of the environment is not used but the stack's; set HEADGATE_KAFKA_BOOTSTRAP")
            env = {**env, **given}
        else:
            say(f"HEADGATE_KAFKA_BOOTSTRAP is not set, and no embedded stack runs in {folder} (`headgate dev up`)")
    settings = Settings.load(env)
    for warning in settings.warnings:
        say(f"warning: {warning}")
    if vendor is not None and vendor not in settings.vendors:
        raise click.BadParameter(
            f"{vendor!r} is no vendor of this deployment ({', '.join(settings.vendors)}); add it to HEADGATE_VENDORS",
            param_hint="'--vendor'",
        )
    return settings


_AGO: Final = re.compile(r"[0-9.]+(ms|s|m|h|d)([0-9.]+(ms|s|m|h|d))*")


class Moment(click.ParamType):
    """A time as `2h` (ago) or RFC 3339, in milliseconds since the epoch."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        if _AGO.fullmatch(text):
            try:
                return int((time() - parse_duration_s(text)) * 1000)
            except ValueError as fault:
                self.fail(f"{text!r}: {fault}", param, ctx)
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{text!r} is neither a duration such as 2h nor a time such as 2026-11-21T09:30:00Z", param, ctx)
        if at.tzinfo is None:
            self.fail(f"{text!r} has no zone; write 2026-11-21T09:30:00Z", param, ctx)
        return round(at.timestamp() * 1000)


def tenant_ref(vendor: Vendor, tenant: ExternalId) -> TenantRef:
    return TenantRef(vendor, tenant)


def opened(file: str) -> IO[bytes]:
    """A file to read, `-` for stdin; a fault is a message."""
    if file == "-" and sys.stdin is None:
        raise click.ClickException("cannot read stdin: it is closed")
    try:
        return click.open_file(file, "rb")
    except OSError as fault:
        raise click.ClickException(f"cannot read {file!r}: {fault.strerror}") from None


def asks() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()
