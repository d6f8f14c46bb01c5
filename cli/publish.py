"""`headgate publish`: events from a file or from stdin, one JSON object a line, into the ingress topic.

A line is checked as the worker will check it, so that a mistake is shown with its line number now and not as a dead
letter later.
"""

import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping
from time import monotonic, sleep, time
from typing import IO, Final

import click
import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from msgspec import Struct

from cli.completion import files
from cli.letters import Which
from cli.output import (
    counted,
    load_settings,
    opened,
    output_option,
    printable,
    say,
    show_json,
    tenant_option,
    told,
    vendor_option,
)
from config.document import parse_rate_per_s
from config.kafka import KafkaFault, client_config, connected_admin, error_of, explain, read_to_end, refuse_hidden
from config.settings import Settings
from config.upcasters import installed_upcasters
from schemas.control import TenantRecord, decode_control, parse_control_key
from schemas.dead_letter import Selectors
from schemas.event import Problem
from schemas.ids import ExternalId, Vendor, external_id_problem
from schemas.upcast import Upcasters

SHOWN_FAULTS: Final = 20
SHOWN_KEYS: Final = 5
PROGRESS_EVERY_S: Final = 2.0
FLUSH_TIMEOUT_S: Final = 60.0
UNREACHABLE_AFTER_S: Final = 30.0


class Line(Struct, frozen=True):
    number: int
    key: ExternalId
    value: bytes


class BadLine(Struct, frozen=True):
    number: int
    detail: str


class Published(Struct):
    """`unknownTenant`: how many of the published have the key of no active tenant; None where that cannot be known."""

    published: int = 0
    refused: int = 0
    skipped: int = 0
    unknownTenant: int | None = None
    bytes: int = 0
    seconds: float = 0.0


class _Named(Struct):
    customerExternalId: str = ""


_decode_named = msgspec.json.Decoder(_Named).decode


def read_line(
    number: int, raw: bytes, tenant: ExternalId | None, max_bytes: int, upcasters: Upcasters
) -> Line | BadLine | None:
    """The event on a line, why it is none, or None for an empty line.

    The record's key is the line's `customerExternalId`, else `tenant`. The value is the line as it stands.
    """
    value = raw.strip()
    if not value:
        return None
    key = tenant
    if key is None:
        try:
            key = ExternalId(_decode_named(value).customerExternalId)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
            return BadLine(number, _why_no_event(fault))
        if not key:
            return BadLine(number, "field customerExternalId: is missing; add it, or name the tenant with --tenant")
        if (problem := external_id_problem(key)) is not None:
            return BadLine(number, f"field customerExternalId: {problem}")
    event = upcasters.decode(value, key, "line-", number, int(time() * 1000), max_bytes)
    if isinstance(event, Problem):
        if event.code == "key_mismatch":
            return BadLine(number, "field customerExternalId: differs from --tenant")
        return BadLine(number, event.detail)
    return Line(number, key, value)


def _why_no_event(fault: Exception) -> str:
    told = str(fault)[:300]
    if isinstance(fault, msgspec.ValidationError):
        return told
    return f"the line is no JSON object: {told}; write each event on one line, in UTF-8"


def read_lines(
    stream: IO[bytes], tenant: ExternalId | None, max_bytes: int, upcasters: Upcasters
) -> Iterator[Line | BadLine]:
    """Lines may be as long as an event may be; a longer one is read in pieces and refused."""
    limit = max_bytes + 64 * 1024
    number = 0
    while raw := stream.readline(limit):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM_UTF8)  # some editors and shells put it there
        if len(raw) >= limit and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(limit)
            yield BadLine(number, f"has more than {max_bytes} bytes")
            continue
        line = read_line(number, raw, tenant, max_bytes, upcasters)
        if line is not None:
            yield line


class _Publisher:
    """An idempotent producer that keeps to a rate and counts what the broker acknowledged."""

    def __init__(self, settings: Settings, topic: str, rate_per_s: float) -> None:
        self.done = Published()
        self.keys: Counter[ExternalId] = Counter()  # of what was sent
        self._kafka = settings.kafka.confluent()
        self._topic = topic
        self._rate_per_s = rate_per_s
        self._sent = 0
        self._started = monotonic()
        self._told = self._started
        self._faults: list[str] = []
        self._refusal: KafkaError | None = None
        self._producer = Producer(
            client_config(
                {
                    **self._kafka,
                    "acks": "all",
                    "enable.idempotence": True,
                    "partitioner": "murmur2_random",
                    "compression.type": "zstd",
                    "linger.ms": 10,
                    "message.max.bytes": settings.sizes.max_event_bytes + 64 * 1024,
                    "queue.buffering.max.kbytes": 64 * 1024,
                    "delivery.timeout.ms": int(UNREACHABLE_AFTER_S * 1000),
                },
                self._faults,
            )
        )

    def send(self, line: Line) -> None:
        """Raises `KafkaFault` once the broker has refused an event."""
        self._pace()
        while True:
            try:
                self._producer.produce(self._topic, line.value, line.key.encode(), on_delivery=self._acknowledged)
                break
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as exception:
                raise explain(error_of(exception), f"write line {line.number}", self._kafka, self._faults) from None
        self._sent += 1
        self.keys[line.key] += 1
        self._producer.poll(0)
        if self._refusal is not None:
            raise explain(self._refusal, f"write to topic {self._topic}", self._kafka, self._faults)
        self._progress()

    def finish(self) -> Published:
        """Waits until everything sent is acknowledged or refused."""
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        self.done.seconds = round(monotonic() - self._started, 3)
        self.done.refused += left
        return self.done

    def fault(self) -> KafkaFault | None:
        """Why the broker refused events, if it did."""
        if self._refusal is not None:
            return explain(self._refusal, f"write to topic {self._topic}", self._kafka, self._faults)
        return KafkaFault(f"not acknowledged: {counted(self.done.refused, 'event')}") if self.done.refused else None

    def _pace(self) -> None:
        if self._rate_per_s:
            while (due := self._started + self._sent / self._rate_per_s - monotonic()) > 0:
                self._producer.poll(0)
                self._progress()
                sleep(min(due, 0.5))

    def _acknowledged(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.done.published += 1
            self.done.bytes += len(message.value() or b"")
        else:
            self.done.refused += 1
            self._refusal = self._refusal or error

    def _progress(self) -> None:
        now = monotonic()
        if now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            say(f"{counted(self.done.published, 'event')} published")


@click.command()
@click.option(
    "-f",
    "--file",
    "file",
    required=True,
    metavar="FILE",
    shell_complete=files,
    help="One JSON event a line; - for stdin.",
)
@click.option("--rate", metavar="RATE", help="At most so many: 100/s, 600/m.")
@tenant_option("Whose events, where the lines do not say it (customerExternalId).")
@vendor_option
@click.option("--skip-bad", is_flag=True, help="Send the good lines although there are bad ones.")
@output_option
@told
def command(
    file: str, rate: str | None, tenant: ExternalId | None, vendor: Vendor, skip_bad: bool, output: str
) -> None:
    """Publish events from a file or from stdin.

    \b
    A line, at its shortest:
      {"customerExternalId": "acme", "eventType": "invoice.paid", "payload": {"total": 12}}

    Also: eventId, occurredAt, schemaVersion, idempotencyKey, source, aggregateId, metadata. The record's key is the
    customerExternalId, its value the line as it stands.

    A file is checked whole before anything is sent: with a bad line in it nothing is, unless --skip-bad. A stream from
    stdin is sent as it comes, up to the first bad line.
    """
    try:
        rate_per_s = parse_rate_per_s(rate) if rate else 0.0
    except ValueError as fault:
        raise click.BadParameter(str(fault), param_hint="--rate") from None
    settings = load_settings(vendor)
    max_bytes = settings.sizes.max_event_bytes
    upcasters = installed_upcasters()
    streaming = file == "-" or not os.path.isfile(file)
    if not streaming:
        _refuse_bad_file(file, tenant, max_bytes, upcasters, skip_bad)
    source = opened(file)
    topic = settings.topics.ingress(vendor)
    visible = _visible_topics(settings, topic, vendor)
    publisher = _Publisher(settings, topic, rate_per_s)
    stopped: str | None = None
    try:
        with source as stream:
            for line in read_lines(stream, tenant, max_bytes, upcasters):
                if isinstance(line, Line):
                    publisher.send(line)
                    continue
                if not skip_bad:
                    stopped = f"{_shown(file)}:{line.number}: {line.detail}"
                    break
                publisher.done.skipped += 1
                if streaming:
                    say(f"skipped: {_shown(file)}:{line.number}: {line.detail}")
    finally:
        done = publisher.finish()
        unknown: Counter[ExternalId] | None = None
        if publisher.fault() is None and settings.topics.control in visible:
            unknown = _of_no_tenant(settings, vendor, publisher.keys)
        if unknown is not None:
            done.unknownTenant = unknown.total()
        _report(done, output)
        if unknown:
            _say_unknown(unknown, vendor)
    if (refusal := publisher.fault()) is not None:
        raise refusal
    if stopped is not None:
        raise click.ClickException(f"{stopped}\nstopped there; published before it: {counted(done.published, 'event')}")


def _report(done: Published, output: str) -> None:
    if output == "json":
        show_json(done)
        return
    more = "".join(
        f", {count} {what}" for count, what in ((done.skipped, "skipped"), (done.refused, "refused")) if count
    )
    click.echo(
        f"{counted(done.published, 'event')} published{more} ({counted(done.bytes, 'byte')}, {done.seconds:.1f} s)"
    )


def _shown(file: str) -> str:
    return "stdin" if file == "-" else file


def _refuse_bad_file(
    file: str, tenant: ExternalId | None, max_bytes: int, upcasters: Upcasters, skip_bad: bool
) -> None:
    bad = 0
    with opened(file) as stream:
        for line in read_lines(stream, tenant, max_bytes, upcasters):
            if isinstance(line, BadLine):
                bad += 1
                if bad <= SHOWN_FAULTS:
                    say(f"{file}:{line.number}: {line.detail}")
    if bad > SHOWN_FAULTS:
        say(f"… and {bad - SHOWN_FAULTS} more")
    if bad and not skip_bad:
        raise click.ClickException(f"{counted(bad, 'bad line')}: nothing was sent (--skip-bad sends the others)")


def _of_no_tenant(settings: Settings, vendor: Vendor, sent: Counter[ExternalId]) -> Counter[ExternalId] | None:
    """Those of the keys that no active tenant has; None where this user may not read which there are."""
    active: dict[ExternalId, bool] = {}
    try:
        for message in read_to_end(settings.kafka.confluent(), [settings.topics.control], settings.topics.group("cli")):
            key = parse_control_key(message.key() or b"")
            if key is not None and (key.kind, key.vendor) == ("tenant", vendor) and key.tenant in sent:
                value = message.value()
                record = None if value is None else decode_control(value)
                active[key.tenant] = isinstance(record, TenantRecord) and record.state == "active"
    except (KafkaFault, msgspec.DecodeError):
        return None
    return Counter({key: count for key, count in sent.items() if not active.get(key, False)})


def _say_unknown(unknown: Counter[ExternalId], vendor: Vendor) -> None:
    named = ", ".join(printable(key) for key in list(unknown)[:SHOWN_KEYS])
    more = f" and {len(unknown) - SHOWN_KEYS} more" if len(unknown) > SHOWN_KEYS else ""
    theirs = Which(vendor, None, Selectors(error="unknown_tenant")).spelled()
    say(
        f"warning: vendor {vendor} has no active tenant {named}{more}: {counted(unknown.total(), 'event')} will not be "
        "delivered (dead letters unknown_tenant); if that is no slip, `headgate apply` the tenant, then "
        f"`headgate dlq replay {theirs}`"
    )


def _visible_topics(settings: Settings, topic: str, vendor: Vendor) -> Mapping[str, int]:
    """The topics that this user may see. Raises KafkaFault where ingress is not among them."""
    _, partitions = connected_admin(settings.kafka.confluent())
    if topic not in partitions:
        refuse_hidden(settings.kafka.confluent(), [topic])
        raise KafkaFault(
            f"topic {topic} does not exist: vendor {vendor} has no configuration yet; run `headgate apply` first"
        )
    return partitions
