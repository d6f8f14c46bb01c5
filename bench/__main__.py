"""`make bench`: how fast, how soon, how large. `python -m bench --help`."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from bench import headgate, measures, report, scaling, sinks
from bench import rig as bench
from bench.measures import Figure
from bench.rig import BenchError, Rig
from dev.stack import StackError

COUNT = 100_000
QUICK_COUNT = 30_000


class Run:
    """The options that all subcommands share, and how their figures are told."""

    def __init__(self, folder: Path | None, quick: bool, check: bool, count: int | None, rounds: int | None) -> None:
        self.folder = folder
        self.check = check
        self.quick = quick
        self.count = count or (QUICK_COUNT if quick else COUNT)
        self.rounds = rounds or (1 if quick else 5)
        self.seconds = 5.0 if quick else 20.0

    def measure(self, *parts: Callable[[Rig], Sequence[Figure]], page: bool = False) -> None:
        """Runs the parts on one rig, shows their figures; exits 1 with `--check` if a bar was missed."""
        load = os.getloadavg()[0]
        figures: list[Figure] = []
        try:
            with bench.rig(self.folder) as rig:
                for part in parts:
                    figures += part(rig)
        except (BenchError, StackError) as fault:
            raise click.ClickException(str(fault)) from fault
        click.echo(report.text(figures))
        if page:
            report.write(
                figures,
                f"{self.count:,} events a run, {self.rounds} interleaved rounds, load average before: {load:.1f}"
                + (" (quick run)" if self.quick else "")
                + ".",
            )
        if self.check and not all(figure.holds for figure in figures):
            sys.exit(1)


def say(line: str) -> None:
    click.echo(line, err=True)


@click.group(invoke_without_command=True)
@click.option(
    "--stack",
    "folder",
    type=click.Path(path_type=Path),
    help="Use the stack that runs in this folder; else one is made.",
)
@click.option("--quick", is_flag=True, help=f"{QUICK_COUNT:,} events and one round: a glance, no verdict.")
@click.option("--check", is_flag=True, help="Exit 1 if a bar is missed.")
@click.option("--count", type=click.IntRange(1000), help=f"Events in a speed run (default {COUNT:,}).")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved rounds of floor, naive, headgate (default 5).")
@click.pass_context
def main(
    context: click.Context, folder: Path | None, quick: bool, check: bool, count: int | None, rounds: int | None
) -> None:
    """Measure Headgate on a real broker. Without a command: all of it, and the figures go to docs/benchmarks.md.

    Deliveries per CPU-second are those of the worker process alone, with everything on, beside two baselines in the
    same rounds: floor (consume, sign, POST with a minimal client) and naive (confluent-kafka, aiohttp).
    """
    context.obj = run = Run(folder, quick, check, count, rounds)
    if context.invoked_subcommand is not None:
        return
    run.measure(
        lambda rig: measures.speed(rig, run.count, run.rounds, say),
        lambda rig: measures.allowed(rig, say),
        lambda rig: measures.speed(rig, run.count, run.rounds, say, tls=True),
        lambda rig: sinks.measure(rig, run.count, run.rounds, say),
        lambda rig: measures.latency(rig, run.seconds, say),
        lambda rig: measures.memory(rig, say),
        lambda rig: measures.applying(rig, say),
        lambda rig: measures.starting(rig, run.rounds, say),
        page=True,
    )


@main.command()
@click.pass_obj
def speed(run: Run) -> None:
    """Deliveries per CPU-second over plain HTTP, beside floor and naive."""
    run.measure(lambda rig: measures.speed(rig, run.count, run.rounds, say))


@main.command()
@click.pass_obj
def tls(run: Run) -> None:
    """The same over TLS, and the share of deliveries on reused connections."""
    run.measure(lambda rig: measures.speed(rig, run.count, run.rounds, say, tls=True))


@main.command("sinks")
@click.pass_obj
def whole_way_of_sinks(run: Run) -> None:
    """S3, BigQuery and Kafka: events per CPU-second from ingress to settled."""
    run.measure(lambda rig: sinks.measure(rig, run.count, run.rounds, say))


@main.command()
@click.pass_obj
def latency(run: Run) -> None:
    """From append to the first byte at the receiver, at 2,000 events a second."""
    run.measure(lambda rig: measures.latency(rig, run.seconds, say))


@main.command()
@click.pass_obj
def memory(run: Run) -> None:
    """Resident memory with 10,000 idle destinations."""
    run.measure(lambda rig: measures.memory(rig, say))


@main.command()
@click.pass_obj
def apply(run: Run) -> None:
    """Time to apply 1,000 pooled tenants."""
    run.measure(lambda rig: measures.applying(rig, say))


@main.command()
@click.pass_obj
def start(run: Run) -> None:
    """Time from start to ready."""
    run.measure(lambda rig: measures.starting(rig, run.rounds, say))


@main.command("scaling")
@click.pass_obj
def scaling_out_and_in(run: Run) -> None:
    """How long deliveries pause, and what comes twice, when a worker joins, leaves or restarts."""
    run.measure(lambda rig: scaling.measure(rig, run.rounds, say))


@main.command()
@click.pass_obj
def parts(run: Run) -> None:
    """What the floor leaves out, as single calls: how low the cost of a delivery could be."""
    run.measure(lambda rig: measures.allowed(rig, say))


@main.command()
@click.option("--tls", "over_tls", is_flag=True, help="Deliver over TLS.")
@click.pass_obj
def profile(run: Run, over_tls: bool) -> None:
    """Where a worker's CPU time goes: functions, lines, threads."""
    try:
        with bench.rig(run.folder) as rig:
            certificates = bench.certificates(rig.folder) if over_tls else None
            env = headgate.environ(rig, certificates)
            out = rig.folder / "profile.txt"
            bench.make_topic(rig, rig.ingress)
            with bench.receiver(certificates) as inbox:
                headgate.apply_load_tenants(env, inbox)
                load = bench.load(rig, "profile", run.count)
                command = (sys.executable, "-m", "bench.profiled", str(out), "worker")
                taken = headgate.run(rig, load, inbox, env, command)
            click.echo(f"{taken.per_cpu_s:.0f} deliveries per CPU-second while sampled")
            click.echo(out.read_text())
    except (BenchError, StackError) as fault:
        raise click.ClickException(str(fault)) from fault


if __name__ == "__main__":
    main(prog_name="python -m bench")
