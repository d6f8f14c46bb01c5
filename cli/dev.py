"""`headgate dev`: the embedded Kafka and Redis, for trying Headgate and for its tests."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from cli.groups import Group
from dev import stack as embedded
from dev.stack import ServiceName

_dir = click.option(
    "--dir",
    "folder",
    envvar="HEADGATE_DEV_DIR",
    default=".headgate",
    show_default=True,
    show_envvar=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the stack's data, logs and master key lie.",
)
_output = click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the result."
)


def _services(_context: click.Context, _option: click.Parameter, value: str) -> tuple[ServiceName, ...]:
    wanted = tuple(filter(None, value.split(",")))
    for name in wanted:
        if name not in embedded.EXTRA:
            known = ", ".join(embedded.EXTRA)
            raise click.BadParameter(f"unknown service {name!r}; known are {known}; Kafka and Redis need no --with")
    return tuple(map(ServiceName, wanted))


@click.group(cls=Group)
def group() -> None:
    """A real Kafka and Redis as background processes, without Docker.

    For development and tests: one node, no passwords, reachable from this machine only. Several stacks can run side by
    side, each in a folder of its own (HEADGATE_DEV_DIR).
    """


@group.command()
@_dir
@click.option(
    "--with",
    "extra",
    default="",
    metavar="NAMES",
    callback=_services,
    help="More services, separated by commas: s3, bigquery. A stack that has them keeps them.",
)
@_output
def up(folder: Path, extra: tuple[ServiceName, ...], output: str) -> None:
    """Start the stack, wait until it is ready, print its settings.

    Running it again is harmless: what runs is left alone, what has died is started on its old port and data. The first
    start fetches the broker (44 MB, checksums pinned) into a cache that all stacks share.

    Standard output holds nothing but the settings, one NAME=value a line, quoted for a shell where necessary:

    \b
        set -a; eval "$(headgate dev up)"; set +a
    """
    with _told_to_the_user():
        settings = embedded.up(folder, extra=extra, say=_say).settings()
    if output == "json":
        click.echo(_json(settings))
        return
    for name, value in settings.items():
        click.echo(f"{name}={shlex.quote(value)}")


@group.command()
@_dir
@click.option("--keep", is_flag=True, help="Keep data, ports and master key for the next `dev up`.")
@_output
def down(folder: Path, keep: bool, output: str) -> None:
    """End the stack's processes and delete its folder.

    Nothing is left behind but the cache of downloads. A folder that `dev up` did not make is never touched.
    """
    with _told_to_the_user():
        existed = embedded.down(folder, keep=keep, say=_say)
    if output == "json":
        click.echo(_json({"dir": str(folder.resolve()), "existed": existed, "kept": existed and keep}))
    elif not existed:
        _say(f"there is no stack in {folder}")
    else:
        _say(f"{folder} is kept" if keep else f"{folder} is deleted")


@group.command()
@_dir
@_output
def status(folder: Path, output: str) -> None:
    """Show what runs. Exits 0 if all of it is ready, 1 if not."""
    with _told_to_the_user():
        found = embedded.status(folder)
    if output == "json":
        click.echo(_json(found))
    elif not found.exists:
        _say(f"there is no stack in {folder}; `headgate dev up` starts one")
    else:
        for one in found.services:
            pid = f"pid {one.pid}" if one.pid is not None else "-"
            click.echo(f"{one.name:<8} {one.condition:<9} {one.address:<16} {pid:<12} {one.version:<8} {one.log}")
    sys.exit(0 if found.ready else 1)


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """Faults that a user can mend become a message: 2 for a folder that is none of ours, 1 for the rest."""
    try:
        yield
    except embedded.NotAStack as wrong:
        raise click.UsageError(str(wrong)) from wrong
    except embedded.StackError as fault:
        raise click.ClickException(str(fault)) from fault
    except OSError as fault:
        raise click.ClickException(f"{fault.filename or 'the system refused'}: {fault.strerror or fault}") from fault


def _say(line: str) -> None:
    click.echo(line, err=True)


def _json(value: object) -> str:
    # paths are the one type here that msgspec does not know
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()
