"""`headgate dlq`: the letters of one tenant, or of `dlq.unrouted`.

A topic of a pool holds the letters of several tenants: only those whose headers name the tenant are looked at, and the
tenant's own key is the only one that opens them.
"""

import base64
import heapq
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
import msgspec
from confluent_kafka import Consumer, Message, TopicPartition
from msgspec import Struct

from cli.groups import Group
from cli.later import later
from cli.output import (
    Moment,
    load_settings,
    output_option,
    printable,
    say,
    show_json,
    show_table,
    tenant_option,
    told,
    vendor_option,
)
from config.kafka import read_to_end
from config.plan import CurrentTenant
from config.settings import Settings
from config.vault import MasterKeys, Unsealable, Vault
from config.writer import read_current
from schemas.attempt import PURPOSE_DELIVERY
from schemas.event import rfc3339
from schemas.ids import ExternalId, Tag, TenantRef, Vendor
from schemas.wire import read_parked

DEFAULT_LIMIT: Final = 100


class Selectors(Struct, frozen=True):
    """Which letters; None and empty choose all. Times are those of the letters, in ms."""

    destination: str | None = None
    error: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    key: str | None = None


class Letter(Struct, frozen=True, omit_defaults=True):
    """A dead letter as it may be listed: nothing of its event's content."""

    letter: str
    at: str
    error: str
    tenant: str = ""
    destination: str = ""
    type: str = ""
    event: str = ""
    delivery: str = ""
    attempts: int = 0
    fault: str = ""
    detail: str = ""
    origin: str = ""
    firstFailed: str = ""
    key: str = ""
    bytes: int = 0
    mark: str = ""


class _Position(click.ParamType):
    """A letter's id, `<partition>/<offset>`."""

    name = "letter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        partition, _, offset = str(value).partition("/")
        if not (partition.isdecimal() and offset.isdecimal() and len(partition) < 10 and len(offset) < 19):
            self.fail(f"{value!r} is not <partition>/<offset>, such as 2/17", param, ctx)
        return int(partition), int(offset)


_unrouted = click.option(
    "--unrouted", is_flag=True, help="Instead of a tenant's: records that were no event, or of no tenant."
)


@click.group(cls=Group)
def group() -> None:
    """Look at the dead letters of a tenant.

    A letter is a delivery that will not be tried again by itself; its id is <partition>/<offset> in the tenant's
    dead-letter topic.
    """


@group.command("list")
@tenant_option("Whose letters.")
@vendor_option
@_unrouted
@click.option("--destination", metavar="ID", help="Only those for this destination.")
@click.option("--error", metavar="CODE", help="Only those that ended with this code.")
@click.option("--since", type=Moment(), metavar="TIME", help="Not older: 2h (ago), or 2026-11-21T09:30:00Z.")
@click.option("--until", type=Moment(), metavar="TIME", help="Not newer.")
@click.option("--key", metavar="KEY", help="With --unrouted: only those with this record key.")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=DEFAULT_LIMIT, show_default=True, help="The newest so many."
)
@click.option("--all", "with_marked", is_flag=True, help="Also those that were replayed or dropped.")
@output_option
@told
def list_letters(
    tenant: ExternalId | None,
    vendor: Vendor,
    unrouted: bool,
    destination: str | None,
    error: str | None,
    since: int | None,
    until: int | None,
    key: str | None,
    limit: int,
    with_marked: bool,
    output: str,
) -> None:
    """List dead letters, oldest first; replayed and dropped ones are left out.

    \b
      headgate dlq list --tenant acme --since 2h
      headgate dlq list --tenant acme --destination orders-hook --error timeout
      headgate dlq list --unrouted
    """
    owner = _owner(vendor, tenant, unrouted)
    if unrouted and destination is not None:
        raise click.UsageError("--destination goes with --tenant")
    if key is not None and not unrouted:
        raise click.UsageError("--key goes with --unrouted")
    settings = load_settings()
    topic = _topic(settings, vendor, owner)
    chosen = Selectors(destination, error, since, until, key)
    # A mark follows its letter, perhaps much later: all marks are read first, so that only what is shown is kept
    marks = {
        _text(headers, "hg-letter"): _text(headers, "hg-mark")
        for headers in map(_headers, _messages(settings, topic, since))
        if "hg-mark" in headers
    }
    newest: list[tuple[int, int, Letter]] = []
    matched = 0
    for message in _messages(settings, topic, since):
        headers = _headers(message)
        letter = None if "hg-mark" in headers else _letter(message, headers, owner, marks)
        at_ms = message.timestamp()[1]
        if letter is None or (letter.mark and not with_marked) or not _matches(letter, chosen, at_ms):
            continue
        matched += 1
        heapq.heappush(newest, (at_ms, matched, letter))
        if len(newest) > limit:
            heapq.heappop(newest)
    letters = [letter for _, _, letter in sorted(newest)]
    if output == "json":
        show_json(letters)
    elif not letters:
        say("there are no such letters")
    else:
        _table(letters, unrouted, with_marked)
    if matched > len(letters):
        say(f"the newest {len(letters)} of {matched} (--limit)")


@group.command("show")
@click.argument("letter", type=_Position(), metavar="LETTER")
@tenant_option("Whose letter.")
@vendor_option
@_unrouted
@output_option
@told
def show(letter: tuple[int, int], tenant: ExternalId | None, vendor: Vendor, unrouted: bool, output: str) -> None:
    """Show one dead letter: its headers, and its event opened with the tenant's key.

    \b
      headgate dlq show 2/17 --tenant acme
      headgate dlq show 0/3 --unrouted
    """
    owner = _owner(vendor, tenant, unrouted)
    settings = load_settings()
    partition, offset = letter
    topic = _topic(settings, vendor, owner)
    message = _message_at(settings, topic, partition, offset)
    headers = {} if message is None else _headers(message)
    found = None if message is None or "hg-mark" in headers else _letter(message, headers, owner, {})
    if message is None or found is None:
        whose = f"of tenant {owner.tenant!r} " if owner is not None else ""
        raise click.ClickException(f"there is no letter {partition}/{offset} {whose}in {topic}")
    shown = msgspec.to_builtins(found)
    if owner is None:
        shown["headers"] = {name: _readable(value) for name, value in headers.items()}
        shown["value"] = _readable(message.value() or b"")
    else:
        shown["content"] = _opened(settings, owner, message)
    show_json(shown) if output == "json" else _show_text(shown)


def _owner(vendor: Vendor, tenant: ExternalId | None, unrouted: bool) -> TenantRef | None:
    """Whose letters are meant; None for unrouted ones."""
    if unrouted == (tenant is not None):
        raise click.UsageError("name a tenant with --tenant, or give --unrouted")
    return None if tenant is None else TenantRef(vendor, tenant)


def _current(settings: Settings, tenant: TenantRef) -> CurrentTenant:
    found = read_current(settings.kafka.confluent(), settings.topics, tenant.vendor).tenants.get(tenant.tenant)
    if found is None:
        raise click.ClickException(f"vendor {tenant.vendor} has no tenant {tenant.tenant!r}")
    return found


def _topic(settings: Settings, vendor: Vendor, owner: TenantRef | None) -> str:
    if owner is None:
        return settings.topics.unrouted(vendor)
    return settings.topics.dead_letters(vendor, Tag(_current(settings, owner).record.tag))


def _messages(settings: Settings, topic: str, since_ms: int | None) -> Iterator[Message]:
    def from_time(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        if since_ms is None:
            return partitions
        asked = [TopicPartition(part.topic, part.partition, max(0, since_ms)) for part in partitions]
        return list(consumer.offsets_for_times(asked, timeout=10))

    return read_to_end(settings.kafka.confluent(), [topic], settings.topics.group("cli"), from_time)


def _message_at(settings: Settings, topic: str, partition: int, offset: int) -> Message | None:
    def at(_: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [TopicPartition(topic, partition, offset)] if partition < len(partitions) else []

    for message in read_to_end(settings.kafka.confluent(), [topic], settings.topics.group("cli"), at):
        return message if message.offset() == offset else None
    return None


def _headers(message: Message) -> dict[str, bytes]:
    return {name: value or b"" for name, value in message.headers() or []}


def _text(headers: Mapping[str, bytes], name: str) -> str:
    return headers.get(name, b"").decode("utf-8", "replace")


def _letter(
    message: Message, headers: Mapping[str, bytes], owner: TenantRef | None, marks: Mapping[str, str]
) -> Letter | None:
    """The letter that a record is; None if it is not the owner's."""
    name = f"{message.partition()}/{message.offset()}"
    at = rfc3339(message.timestamp()[1])
    size = len(message.value() or b"")
    if owner is None:
        return Letter(
            letter=name,
            at=at,
            error=_text(headers, "hg-error"),
            detail=_text(headers, "hg-detail"),
            origin=_text(headers, "hg-origin"),
            key=_readable(message.key() or b""),
            bytes=size,
            mark=marks.get(name, ""),
        )
    parked = read_parked(list(headers.items()))
    if parked is None or parked.tenant != owner:
        return None
    return Letter(
        letter=name,
        at=at,
        error=parked.error,
        tenant=parked.tenant.tenant,
        destination=parked.destination,
        type=parked.event_type,
        event=parked.event,
        delivery=parked.delivery,
        attempts=parked.attempt,
        fault=parked.fault,
        detail=parked.detail,
        origin=parked.origin,
        firstFailed=rfc3339(parked.first_failed_ms) if parked.first_failed_ms else "",
        bytes=size,
        mark=marks.get(name, ""),
    )


def _matches(letter: Letter, chosen: Selectors, at_ms: int) -> bool:
    return (
        (chosen.destination is None or letter.destination == chosen.destination)
        and (chosen.error is None or letter.error == chosen.error)
        and (chosen.since_ms is None or at_ms >= chosen.since_ms)
        and (chosen.until_ms is None or at_ms <= chosen.until_ms)
        and (chosen.key is None or letter.key == chosen.key)
    )


def _opened(settings: Settings, tenant: TenantRef, message: Message) -> msgspec.Raw:
    """The event inside a letter, in its published form. Opens with the keys of this tenant alone."""
    value = message.value() or b""
    headers = _headers(message)
    if "hg-truncated" in headers:
        raise click.ClickException(
            f"the letter was too large to keep whole: {len(value)} of {_text(headers, 'hg-truncated')} bytes are left, "
            "which do not open"
        )
    current = _current(settings, tenant)
    master = MasterKeys.load(settings.keys)
    try:
        keys = {version: master.unwrap(tenant, key) for version, key in current.keys.items()}
        vault = Vault(tenant, keys, current.record.keyVersion, current.shredded_through)
        plaintext = vault.open(PURPOSE_DELIVERY, _text(headers, "hg-destination"), _text(headers, "hg-delivery"), value)
    except Unsealable as fault:
        raise click.ClickException(f"the letter does not open: {_WHY_SEALED[fault.code]}") from None
    return msgspec.Raw(plaintext)


_WHY_SEALED: Final = {
    "unknown_key": "its key is not in the keys topic",
    "shredded": "its key was shredded",
    "unknown_master": "its key is wrapped by a master key that is not given; see HEADGATE_MASTER_KEY_FILE",
    "unsealable": "it was not sealed for this tenant, destination and delivery",
}


def _readable(value: bytes) -> str:
    """UTF-8 text as it is, other bytes as `base64:…`."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(value).decode("ascii")


def _table(letters: list[Letter], unrouted: bool, with_marked: bool) -> None:
    if unrouted:
        header = ["LETTER", "AT", "KEY", "ERROR", "BYTES", "ORIGIN", "DETAIL"]
        rows = [[e.letter, e.at, e.key[:60], e.error, str(e.bytes), e.origin, e.detail] for e in letters]
    else:
        header = ["LETTER", "AT", "DESTINATION", "TYPE", "EVENT", "ERROR", "ATTEMPTS", "DETAIL"]
        rows = [[e.letter, e.at, e.destination, e.type, e.event, e.error, str(e.attempts), e.detail] for e in letters]
    if with_marked:
        header.append("MARK")
        rows = [[*row, letter.mark] for row, letter in zip(rows, letters, strict=True)]
    show_table(header, rows)


def _show_text(shown: Mapping[str, Any]) -> None:
    for name, value in shown.items():
        if name not in ("content", "value", "headers"):
            click.echo(f"{name}: {printable(str(value))}")
    for name, value in shown.get("headers", {}).items():
        click.echo(f"header {printable(name)}: {printable(value)}")
    click.echo()
    if "value" in shown:
        click.echo("\n".join(printable(line) for line in shown["value"].split("\n")))
    else:
        click.echo(msgspec.json.format(bytes(shown["content"]), indent=2).decode())


group.add_command(later("dlq replay", "sending letters again"))
group.add_command(later("dlq drop", "marking letters as done"))
