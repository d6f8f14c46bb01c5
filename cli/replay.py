"""`headgate dlq replay` and `headgate dlq drop`: letters are sent again, or marked as done.

What is written, in which order, and what survives a kill is `streams/replay.py`'s.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from time import monotonic
from typing import Any, Final, Literal

import click
from confluent_kafka import Message

from cli.letters import Which, current_tenant, selectors, topic_of, vault_of
from cli.output import agrees, asks, counted, load_settings, output_option, say, show_json, told
from config.document import parse_rate_per_s
from config.kafka import KafkaFault
from config.provision import topic_ids
from config.settings import Settings, parse_duration_s
from schemas.dead_letter import UNKNOWN_OUTCOME, replay_job, text_of
from schemas.ids import TenantRef
from streams.replay import Replay, Sent, Survey, TenantPost, UnroutedPost, Watch, headers_of, survey, until_committed
from streams.replay import drop as drop_letters

PROGRESS_EVERY_S: Final = 2.0
SHOWN_OPEN: Final = 5
MAY_BE_THERE: Final = f"its destination may hold it already ({UNKNOWN_OUTCOME}); --force sends it all the same"
_JOB: Final = re.compile(r"[0-9a-f]{24}")  # 16 are dice, 8 say which letters are meant


class _Rate(click.ParamType):
    """`100/s` as a number a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_rate_per_s(str(value))
        except ValueError as fault:
            self.fail(str(fault), param, ctx)


class _Job(click.ParamType):
    name = "job"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _JOB.fullmatch(str(value)):
            self.fail(f"{value!r} is no job: 24 hexadecimal digits, as the forced replay told", param, ctx)
        return str(value)


class _Timeout(click.ParamType):
    """A duration, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration_s(str(value))
        except ValueError as fault:
            self.fail(f"{value!r}: {fault}", param, ctx)


class _Progress:
    """Says a sentence on stderr, at most every two seconds."""

    def __init__(self) -> None:
        self._told = monotonic()

    def tell(self, sentence: Callable[[], str]) -> None:
        now = monotonic()
        if now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            say(sentence())


@click.command()
@selectors
@click.option("--rate", type=_Rate(), metavar="RATE", default=0.0, show_default=False, help="At most so many: 100/s.")
@click.option("--dry-run", is_flag=True, help="Count, and send nothing.")
@click.option("--wait", is_flag=True, help="End when all are settled: delivered, or dead letters again.")
@click.option(
    "--timeout", "timeout_s", type=_Timeout(), metavar="TIME", help="With --wait: at most so long, then exit 1."
)
@click.option("--force", is_flag=True, help="Also those that were replayed or dropped before, or may have arrived.")
@click.option("--resume", type=_Job(), metavar="JOB", help="Go on with a forced replay that was interrupted.")
@output_option
@told
def replay(
    which: Which,
    rate: float,
    dry_run: bool,
    wait: bool,
    timeout_s: float | None,
    force: bool,
    resume: str | None,
    output: str,
) -> None:
    """Send dead letters again.

    \b
      headgate dlq replay --tenant acme --dry-run
      headgate dlq replay --tenant acme --destination orders-hook --error timeout --since 2h
      headgate dlq replay --tenant acme --rate 100/s --wait
      headgate dlq replay --unrouted --error unknown_tenant --key acme

    A letter goes to the destination that it was for, under the same webhook-id, with today's options and secrets and a
    retry schedule that starts anew. A letter whose destination is gone is skipped. Each letter is sent once: a replay
    that was interrupted goes on where it was when it is run again, and what was replayed or dropped before is skipped,
    and so is a letter that its destination may hold already (unknown_outcome). With --force they are not; such a replay
    has a job, by which --resume goes on with it: it tells the command when it starts.

    Unrouted records go back through ingress with their bytes, headers and first position, as the same event as before:
    mend first what they were refused for.

    Counts, then starts; asks before it does on a terminal. Ends when the last letter is acknowledged by Kafka: delivery
    is the workers'. Result: how many matched, were replayed, were skipped.
    """
    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    if resume is not None and not resume.endswith(which.hash()):
        raise click.UsageError(
            f"job {resume} was begun for other letters: repeat the command that it told when it started, with the same "
            "--tenant, --destination, --error, --since, --until and --key (a time such as 2h is another one now)"
        )
    settings = load_settings(which.vendor)
    job = resume or (secrets.token_hex(8) + which.hash() if force else "")
    unsettled = ""
    if which.owner is None:
        unrouted = UnroutedPost(settings, which.vendor)
        found, sent = _replayed(settings, which, unrouted, job, rate, dry_run, keep_jobs=False)
        if wait and sent.count:
            unsettled = _until_routed(settings, unrouted.ingress, sent, timeout_s)
    else:
        post = _tenant_post(settings, which.owner)
        if wait and not dry_run:
            with closing(Watch(settings, which.owner, post.topic)) as watch:
                found, sent = _replayed(settings, which, post, job, rate, dry_run, keep_jobs=True)
                unsettled = _until_ended(watch, found, sent, timeout_s)
        else:
            found, sent = _replayed(settings, which, post, job, rate, dry_run, keep_jobs=False)
    _show(found, "replayed", sent.count, output)
    if unsettled:
        raise click.ClickException(f"not settled within {timeout_s:g} s: {unsettled}")


@click.command()
@selectors
@click.option("--dry-run", is_flag=True, help="Count, and mark nothing.")
@output_option
@told
def drop(which: Which, dry_run: bool, output: str) -> None:
    """Mark dead letters as done, without sending them.

    \b
      headgate dlq drop --tenant acme --error egress_blocked --dry-run
      headgate dlq drop --tenant acme --error egress_blocked
      headgate dlq drop --unrouted --until 2d

    They are neither listed nor replayed any more, and are deleted when the topic's retention ends. Until then `headgate
    dlq list --all` shows them, and a forced replay sends them. Counts, then starts; asks before it does on a terminal.
    Result: how many matched, were dropped, were skipped since they were done before.
    """
    settings = load_settings(which.vendor)
    topic = topic_of(settings, which.vendor, which.owner)
    found = _surveyed(settings, which, topic, lambda _: "", "")
    dropped = 0
    if not dry_run and _agreed(found, which, "Drop"):
        progress = _Progress()
        dropped = drop_letters(
            settings,
            topic,
            found,
            secrets.token_hex(8),
            lambda done: progress.tell(lambda: f"{done} of {counted(found.open, 'letter')} dropped"),
        )
    _show(found, "dropped", dropped, output)


def _tenant_post(settings: Settings, owner: TenantRef) -> TenantPost:
    current = current_tenant(settings, owner)
    if current.record.state != "active":
        raise click.ClickException(
            f"tenant {owner.tenant!r} is {current.record.state}: nothing is delivered for it; apply it again first"
        )
    return TenantPost(settings, owner, current, vault_of(settings, owner, current))


def _replayed(
    settings: Settings,
    which: Which,
    post: TenantPost | UnroutedPost,
    job: str,
    rate_per_s: float,
    dry_run: bool,
    *,
    keep_jobs: bool,
) -> tuple[Survey, Sent]:
    found = _surveyed(settings, which, post.topic, post.objection if job else _unless_there(post.objection), job)
    if dry_run or not _agreed(found, which, "Send"):
        return found, Sent()
    pace = f" --rate {f'{rate_per_s:.9f}'.rstrip('0').rstrip('.')}/s" if rate_per_s else ""
    resumed = f"headgate dlq replay {which.spelled()}{pace} --resume {job}"
    if job:
        say(f"forced replay: if it is interrupted, go on with `{resumed}`")
        job_of: Callable[[int, int], str] = lambda partition, offset: job  # noqa: E731
    else:
        job_of = partial(replay_job, topic_ids(settings.kafka.confluent(), [post.topic])[post.topic])
    progress = _Progress()
    replay = Replay(
        settings,
        post,
        found,
        job_of=job_of,
        rate_per_s=rate_per_s,
        keep_jobs=keep_jobs,
        told=lambda done: progress.tell(lambda: f"{done} of {counted(found.open, 'letter')} sent"),
    )
    before = found.skipped.copy()
    try:
        sent = replay.run()
    except (KafkaFault, KeyboardInterrupt):
        again = f"with `{resumed}`" if job else "by the same command"
        say(f"interrupted: {replay.sent.count} of {counted(found.open, 'letter')} sent; go on {again}")
        raise
    _say_skipped(found.skipped - before)
    return found, sent


def _unless_there(objection: Callable[[Message], str]) -> Callable[[Message], str]:
    """Objects also to a letter that may have arrived: sent again, its destination would hold it twice."""

    def asked(message: Message) -> str:
        unknown = text_of(headers_of(message), "hg-error") == UNKNOWN_OUTCOME
        return objection(message) or (MAY_BE_THERE if unknown else "")

    return asked


def _surveyed(settings: Settings, which: Which, topic: str, objection: Callable[[Message], str], job: str) -> Survey:
    progress = _Progress()
    found = survey(
        settings,
        topic,
        which.owner,
        which.chosen,
        objection=objection,
        job=job,
        told=lambda read: progress.tell(lambda: f"counting: {counted(read, 'record')} of {topic} read"),
    )
    say(f"matched: {counted(found.matched, 'letter')} {which.of_whom()}")
    _say_skipped(found.skipped)
    return found


def _say_skipped(skipped: Counter[str]) -> None:
    for why, count in skipped.items():
        say(f"skipped: {counted(count, 'letter')}: {why}")


def _agreed(found: Survey, which: Which, doing: Literal["Send", "Drop"]) -> bool:
    """Whether there is something to do and nobody at the terminal objects."""
    if not found.open:
        return False
    if asks() and not agrees(f"{doing} {counted(found.open, 'letter')} {which.of_whom()}?"):
        raise click.ClickException("nothing was changed")
    return True


def _until_ended(watch: Watch, found: Survey, sent: Sent, timeout_s: float | None) -> str:
    """What is open when the time is over; empty if nothing is."""
    progress = _Progress()
    ended = watch.until_all_ended(
        sent.jobs,
        found.ended,
        lambda done: progress.tell(lambda: f"{done} of {counted(sent.count, 'letter')} settled"),
        timeout_s,
    )
    say(f"settled: {ended.delivered} delivered, {counted(ended.dead, 'dead letter')} again")
    some = ", ".join(ended.open[:SHOWN_OPEN])
    return f"{counted(len(ended.open), 'letter')}, such as {some}: `headgate trace` tells where it is" if some else ""


def _until_routed(settings: Settings, ingress: str, sent: Sent, timeout_s: float | None) -> str:
    """As `_until_ended`."""
    progress = _Progress()
    left = until_committed(
        settings,
        ingress,
        sent.ends,
        lambda: progress.tell(lambda: f"waiting until the workers have settled what was sent to {ingress}"),
        timeout_s,
    )
    if not left:
        say("settled; what was refused again is listed by `headgate dlq list --unrouted`")
    where = ", ".join(f"{ingress}/{partition} up to offset {end}" for partition, end in left.items())
    return f"{where}: does a worker run?" if left else ""


def _show(found: Survey, done: Literal["replayed", "dropped"], count: int, output: str) -> None:
    skipped = found.skipped.total()
    if output == "json":
        show_json({"matched": found.matched, done: count, "skipped": skipped})
    else:
        click.echo(f"{found.matched} matched, {count} {done}, {skipped} skipped")
