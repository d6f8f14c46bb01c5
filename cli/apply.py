"""`headgate apply`: makes the tenants what a file says.

Validates, plans, makes topics, writes one transaction, waits until it is seen; in that order, so that nothing is half
applied. `apply_document` is the same for programs.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from time import time
from typing import Final

import click
import msgspec
from msgspec import Struct

from cli.completion import files
from cli.output import agrees, asks, counted, load_settings, opened, output_option, printable, say, show_json, told
from config.document import Document, Objection, Rules, parse_document
from config.plan import Creation, Plan, make_plan
from config.provision import provision
from config.settings import Settings
from config.vault import MasterKeys
from config.writer import Writer, read_current
from connectors.egress import Egress
from connectors.registry import KINDS, any_staged
from routing.filters import Filter, FilterError, compile_filter, compile_text
from routing.match import PatternError, parse_pattern
from routing.redact import PathError, parse_path
from schemas.topics import TopicSpec, base_topics, record_bytes, tenant_topics

MAX_FILE_BYTES: Final = 16 * 1024 * 1024


class Applied(Struct, frozen=True):
    """What an apply did, or would do. `written` is False for a dry run and where nothing changed."""

    plan: Plan
    document: Document
    written: bool
    took_s: float


def apply_document(
    settings: Settings,
    text: str,
    file: str = "headgate.yaml",
    *,
    env: Mapping[str, str] | None = None,
    dry_run: bool = False,
    prune: bool = False,
    say: Callable[[str], None] = lambda line: None,
    agreed: Callable[[Plan], bool] = lambda plan: True,
) -> Applied:
    """Applies a configuration; on return every process that reads the topics can see it.

    `env` is where `{env: NAME}` secrets come from, this process's environment if None. `agreed` is asked once the plan
    is known, before anything is touched; if it says no, nothing is. Raises SettingsError, DocumentError, KafkaFault and
    Fenced.
    """
    started = time()
    document = parse_document(
        text,
        file=file,
        rules=msgspec.structs.replace(RULES, check_dial=partial(_check_dial, Egress(settings.egress_allow))),
        env=os.environ if env is None else env,
        vendors=settings.vendors,
    )
    for warning in document.warnings:
        say(f"warning: {warning}")
    master = MasterKeys.load(settings.keys)
    kafka = settings.kafka.confluent()
    topics = settings.topics
    # Taken before the state is read: an apply that runs meanwhile either is seen here, or notices us (ADR 0007)
    with nullcontext() if dry_run else Writer(kafka, topics, document.vendor) as writer:
        current = read_current(kafka, topics, document.vendor) if writer is None else writer.current()
        plan = make_plan(
            document,
            current,
            kinds=KINDS,
            master=master,
            creation=Creation(settings.tenants.default_topics, settings.tenants.pools),
            prune=prune,
            now_ms=int(time() * 1000),
        )
        if plan.warning:
            say(f"warning: {plan.warning}")
        if writer is None or not agreed(plan):
            return Applied(plan, document, False, time() - started)
        provision_topics(settings, plan, say)
        writer.write(plan.writes, record_bytes(settings.sizes.max_event_bytes))
    return Applied(plan, document, bool(plan.writes), time() - started)


def provision_topics(settings: Settings, plan: Plan, say: Callable[[str], None] = lambda line: None) -> None:
    """The base topics, and those of every tag that the plan needs."""
    topics = settings.topics
    longest_ms = max(settings.sizes.longest_max_age_ms, int(plan.longest_max_age_s * 1000))
    sizes = msgspec.structs.replace(settings.sizes, longest_max_age_ms=longest_ms)
    specs: list[TopicSpec] = list(base_topics(topics, settings.vendors, sizes))
    for tag, kinds in plan.tags.items():
        specs += tenant_topics(topics, plan.vendor, tag, sizes, staged=any_staged(kinds))
    provision(
        settings.kafka.confluent(),
        specs,
        replication_factor=settings.replication_factor,
        grow=frozenset(topics.retry(plan.vendor, tag) for tag in plan.tags),
        say=say,
    )


def _check_expression(compiled: Callable[[str], Filter], text: str) -> Objection | None:
    try:
        compiled(text)
    except FilterError as fault:
        at = f"line {fault.line}, column {fault.column}" if fault.line > 1 else f"column {fault.column}"
        return Objection(f"{at}: {fault.message}", fault.remedy, fault.column if fault.line == 1 else 0)
    return None


def _check_pattern(text: str) -> Objection | None:
    try:
        parse_pattern(text)
    except PatternError as fault:
        return Objection(str(fault))
    return None


def _check_redact(text: str) -> Objection | None:
    try:
        parse_path(text)
    except PathError as fault:
        return Objection(str(fault))
    return None


def _check_dial(egress: Egress, host: str, tls: bool) -> Objection | None:
    if not (why := egress.foreseen(host, tls=tls)):
        return None
    remedy = "what is sent there becomes a dead letter (egress_blocked), unless HEADGATE_EGRESS_ALLOW of the workers, "
    return Objection(why, f"{remedy}unlike the one here, covers it")


RULES: Final = Rules(
    KINDS,
    check_where=partial(_check_expression, compile_filter),
    check_pattern=_check_pattern,
    check_redact=_check_redact,
    check_text=partial(_check_expression, compile_text),
)


@click.command()
@click.option(
    "-f",
    "--file",
    "file",
    required=True,
    metavar="FILE",
    shell_complete=files,
    help="The configuration, YAML; - for stdin.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and touch nothing.")
@click.option("--prune", is_flag=True, help="Remove the vendor's tenants that are not in the file.")
@click.option("--yes", is_flag=True, help="Do not ask before tenants are removed, or a new master key is used.")
@output_option
@told
def command(file: str, dry_run: bool, prune: bool, yes: bool, output: str) -> None:
    """Make the tenants what a file says, all or nothing.

    \b
    vendor: default
    tenants:
      - externalId: acme
        destinations:
          - id: orders-hook
            type: webhook
            options: {url: "https://hooks.acme.example/in"}
            secrets: {signing: {env: ACME_SIGNING_SECRET}}
        routes:
          - id: orders
            match: {types: ["order.*"], where: 'payload.total > 100'}
            to: [orders-hook]

    Prints what changes (+ new, ~ changed, - removed) and takes effect in every worker within 2 s. Tenants that are not
    in the file are left alone; of one that is, the file holds all destinations and routes. Signing secrets that are
    not given are made and shown once, here.
    """
    text = _read(file)
    shown = "stdin" if file == "-" else file

    def agreed(plan: Plan) -> bool:
        if yes:
            return True
        if plan.warning and asks() and file != "-" and not agrees("Do all workers have it?"):
            return False
        if not plan.removed:
            return True
        count = counted(len(plan.removed), "tenant")
        if not asks() or file == "-":
            raise click.ClickException(f"this removes {count}: {_some(plan.removed)}; add --yes to do it")
        for line in plan.lines:
            say(printable(str(line)))
        return agrees(f"Remove {count}?")

    applied = apply_document(load_settings(), text, shown, dry_run=dry_run, prune=prune, say=say, agreed=agreed)
    _show(applied, dry_run, output)
    if applied.plan.writes and not applied.written and not dry_run:
        raise click.ClickException("nothing was changed")


def _read(file: str) -> str:
    shown = "stdin" if file == "-" else file
    with opened(file) as stream:
        raw = stream.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise click.ClickException(f"{shown} has more than {MAX_FILE_BYTES >> 20} MiB; split it by tenants")
    try:
        return str(raw, "utf-8-sig")
    except UnicodeDecodeError as fault:
        raise click.ClickException(f"{shown}: not UTF-8 at byte {fault.start}; save it as UTF-8") from None


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(printable(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _show(applied: Applied, dry_run: bool, output: str) -> None:
    """Made secrets are shown only once they are in force."""
    plan = applied.plan
    made = plan.made if applied.written else ()
    if output == "json":
        show_json(
            {
                "vendor": plan.vendor,
                "applied": applied.written,
                "changes": [
                    {"sign": line.sign, "what": line.what, "tenant": line.tenant, "name": line.name, "note": line.note}
                    for line in plan.lines
                ],
                "secrets": [
                    {
                        "tenant": each.tenant,
                        "destination": each.destination,
                        "field": each.field,
                        "value": each.value.get_secret_value(),
                    }
                    for each in made
                ],
            }
        )
        return
    for line in plan.lines:
        click.echo(printable(str(line)))
    for each in made:
        click.echo(f"{each.tenant}/{each.destination}/{each.field}: {each.value.get_secret_value()}")
    if made:
        say("secrets are shown this once: hand them to the receivers now")
    count = counted(len(plan.lines), "change")
    if not plan.lines:
        say("no changes")
    elif dry_run:
        say(f"{count} planned; nothing was touched (--dry-run)")
    elif applied.written:
        say(f"{count} applied in {applied.took_s:.1f} s")
