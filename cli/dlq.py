"""`headgate dlq`: look at the letters of one tenant, or of `dlq.unrouted`; `cli/replay.py` sends or drops them."""

import heapq
from collections.abc import Mapping
from typing import Any, Final

import click
import msgspec
from confluent_kafka import Consumer, Message, TopicPartition

from cli.groups import Group
from cli.letters import (
    WHY_SEALED,
    Which,
    current_tenant,
    owner_of,
    selectors,
    topic_of,
    unrouted_option,
    vault_of,
)
from cli.output import (
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
from cli.replay import drop, replay
from config.kafka import read_to_end
from config.settings import Settings
from config.vault import Unsealable
from schemas.attempt import PURPOSE_DELIVERY
from schemas.dead_letter import Letter, letter_id, matches, read_letter_id, read_mark, readable, text_of
from schemas.ids import ExternalId, TenantRef, Vendor
from streams.replay import headers_of, is_unread, letter_of, messages

DEFAULT_LIMIT: Final = 100


class _Position(click.ParamType):
    """A letter's id, `<partition>/<offset>`."""

    name = "letter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = read_letter_id(str(value))
        if found is None:
            self.fail(f"{value!r} is not <partition>/<offset>, such as 2/17", param, ctx)
        return found


@click.group(cls=Group)
def group() -> None:
    """Look at the dead letters of a tenant, send them again, or drop them.

    A letter is a delivery that will not be tried again by itself; its id is <partition>/<offset> in the tenant's
    dead-letter topic. Once it was replayed or dropped it is marked: it stays until the topic's retention ends, but is
    neither listed nor sent again.
    """


@group.command("list")
@selectors
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=DEFAULT_LIMIT, show_default=True, help="The newest so many."
)
@click.option("--all", "with_marked", is_flag=True, help="Also those that were replayed or dropped.")
@output_option
@told
def list_letters(which: Which, limit: int, with_marked: bool, output: str) -> None:
    """List dead letters, oldest first; replayed and dropped ones are left out.

    \b
      headgate dlq list --tenant acme --since 2h
      headgate dlq list --tenant acme --destination orders-hook --error timeout
      headgate dlq list --unrouted
    """
    settings = load_settings(which.vendor)
    chosen = which.chosen
    topic = topic_of(settings, which.vendor, which.owner)
    # A mark follows its letter, perhaps much later: all marks are read first, so that only what is shown is kept
    marks: dict[str, str] = {}
    for message in messages(settings, topic, chosen.since_ms):
        mark = read_mark(headers_of(message))
        if mark is not None and mark.partition == message.partition():
            marks[letter_id(mark.partition, mark.offset)] = mark.kind
    newest: list[tuple[int, int, Letter]] = []
    matched = unread = done = 0
    for message in messages(settings, topic, chosen.since_ms):
        letter = letter_of(message, which.owner)
        unread += letter is None and is_unread(message, which.owner)
        at_ms = message.timestamp()[1]
        if letter is None or not matches(letter, chosen, at_ms):
            continue
        if (mark_kind := marks.get(letter.letter, "")) and not with_marked:
            done += 1
            continue
        letter = msgspec.structs.replace(letter, mark=mark_kind)
        matched += 1
        heapq.heappush(newest, (at_ms, matched, letter))
        if len(newest) > limit:
            heapq.heappop(newest)
    letters = [letter for _, _, letter in sorted(newest)]
    if output == "json":
        show_json(letters)
    elif not letters:
        say("there are no such letters" + (f" but {done} that were replayed or dropped (--all)" if done else ""))
    else:
        _table(letters, which.owner is None, with_marked)
    if matched > len(letters):
        say(f"the newest {len(letters)} of {matched} (--limit)")
    if unread:
        say(f"left out: {unread} of a form that this version of headgate does not read; use the one that wrote them")


@group.command("show")
@click.argument("letter", type=_Position(), metavar="LETTER")
@tenant_option("Whose letter.")
@vendor_option
@unrouted_option
@output_option
@told
def show(letter: tuple[int, int], tenant: ExternalId | None, vendor: Vendor, unrouted: bool, output: str) -> None:
    """Show one dead letter: its headers, and its event opened with the tenant's key.

    \b
      headgate dlq show 2/17 --tenant acme
      headgate dlq show 0/3 --unrouted
    """
    owner = owner_of(vendor, tenant, unrouted)
    settings = load_settings(vendor)
    partition, offset = letter
    topic = topic_of(settings, vendor, owner)
    message = _message_at(settings, topic, partition, offset)
    headers = {} if message is None else headers_of(message)
    found = None if message is None else letter_of(message, owner)
    if message is not None and is_unread(message, owner):
        raise click.ClickException(
            f"letter {partition}/{offset} has a form (version {text_of(headers, 'hg-v')}) that this version of "
            "headgate does not read; use the one that wrote it"
        )
    if message is None or found is None:
        whose = f"of tenant {owner.tenant!r} " if owner is not None else ""
        raise click.ClickException(f"there is no letter {partition}/{offset} {whose}in {topic}")
    shown = msgspec.to_builtins(found)
    if owner is None:
        shown["headers"] = {name: readable(value) for name, value in headers.items()}
        shown["value"] = readable(message.value() or b"")
    else:
        shown["content"] = _opened(settings, owner, message)
    show_json(shown) if output == "json" else _show_text(shown)


def _message_at(settings: Settings, topic: str, partition: int, offset: int) -> Message | None:
    def at(_: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [TopicPartition(topic, partition, offset)] if partition < len(partitions) else []

    for message in read_to_end(settings.kafka.confluent(), [topic], settings.topics.group("cli"), at):
        return message if message.offset() == offset else None
    return None


def _opened(settings: Settings, tenant: TenantRef, message: Message) -> msgspec.Raw:
    """The event inside a letter, in its published form. Opens with the keys of this tenant alone."""
    value = message.value() or b""
    headers = headers_of(message)
    if "hg-truncated" in headers:
        raise click.ClickException(
            f"the letter was too large to keep whole: {len(value)} of {text_of(headers, 'hg-truncated')} bytes are "
            "left, which do not open"
        )
    vault = vault_of(settings, tenant, current_tenant(settings, tenant))
    try:
        sealed_for = text_of(headers, "hg-destination"), text_of(headers, "hg-delivery")
        plaintext = vault.open(PURPOSE_DELIVERY, *sealed_for, value)
    except Unsealable as fault:
        raise click.ClickException(f"the letter does not open: {WHY_SEALED[fault.code]}") from None
    return msgspec.Raw(plaintext)


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


group.add_command(replay)
group.add_command(drop)
