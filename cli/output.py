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

from config.acls import Role, acls_of
from config.document import DocumentError
from config.kafka import Denied, KafkaFault
from config.rights import lack_of, lacks
from config.rotation import Refusal
from config.settings import Settings, SettingsError, parse_duration_s
from config.vault import MasterKeys
from config.writer import Fenced
from schemas.ids import DEFAULT_VENDOR, ExternalId, TenantRef, Vendor, external_id_problem, name_problem

P = ParamSpec("P")
R = TypeVar("R")

output_option = click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the result."
)


_ROLES: Final[dict[str, Role]] = {
    "worker": "worker",
    "publish": "producer",
    **dict.fromkeys(("get", "trace", "dlq", "doctor"), "operator"),
    **dict.fromkeys(("apply", "secrets", "keys", "destinations"), "control"),
}
"""By command: whose rights it needs in Kafka."""


def vendor_of(_context: click.Context, _option: click.Parameter, value: str | None) -> Vendor | None:
    if value is None:
        return None
    if (problem := name_problem(value)) is not None:
        raise click.BadParameter(f"{value!r} {problem}")
    return Vendor(value)


def _tenant(_context: click.Context, _option: click.Parameter, value: str | None) -> ExternalId | None:
    if value is not None and (problem := external_id_problem(value)) is not None:
        raise click.BadParameter(problem)
    return None if value is None else ExternalId(value)


vendor_option = click.option(
    "--vendor", default=DEFAULT_VENDOR, show_default=True, callback=vendor_of, help="Whose tenants."
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
        except Denied as fault:
            raise click.ClickException("\n".join([str(fault), *_what_is_lacking()])) from None
        except (SettingsError, DocumentError, KafkaFault, Fenced, Refusal) as fault:
            raise click.ClickException(str(fault)) from None

    return wrapped


def _what_is_lacking() -> list[str]:
    """All that the user of the command that runs lacks for it in Kafka, and how it gets that."""
    context = click.get_current_context()
    settings = context.find_object(Settings)
    vendor: Vendor | None = context.params.get("vendor")
    while context.parent is not None and context.parent.parent is not None:
        context = context.parent
    role = _ROLES.get(context.info_name or "")
    if role is None or settings is None:
        return ["it takes an administrator of Kafka, who may alter the cluster"]
    kafka = settings.kafka.confluent()
    try:
        lacking = lacks(kafka, acls_of(role, settings.topics, (vendor,) if vendor else settings.vendors))
    except KafkaFault:  # it went away meanwhile; the fault itself is told
        return []
    return [lack_of(kafka, lacking, role, vendor if len(settings.vendors) > 1 else None)]


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
    if settings.env == "production" and (settings.keys.master_key or settings.keys.master_key_file):
        MasterKeys.load(settings.keys)  # refuses a development key, also where a command needs no key
    for warning in settings.warnings:
        say(f"warning: {warning}")
    if (context := click.get_current_context(silent=True)) is not None:
        context.obj = settings
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


def agrees(question: str) -> bool:
    """What the one at the terminal answers; an empty line is a no. Click's own puts a part of it on stdout."""
    while True:
        click.echo(f"{question} [y/N]: ", nl=False, err=True)
        try:
            answer = input().strip().lower()
        except EOFError:
            raise click.Abort from None
        if answer in ("y", "yes"):
            return True
        if answer in ("", "n", "no"):
            return False
        say("answer y or n")
