"""Groups of commands: a name that is none is answered with those that there are."""

import difflib
from collections.abc import Sequence
from typing import NoReturn

import click


class Group(click.Group):
    """A group whose help has whole sentences, and which knows what a mistyped command was meant to be."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            shown = [name for name, command in self.commands.items() if not command.hidden]
            refuse_command(ctx, args[0], shown)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = [command for command in self.commands.values() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(command.name or "", command.get_short_help_str(200)) for command in shown])


def refuse_command(ctx: click.Context, name: str, known: Sequence[str]) -> NoReturn:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."
    ctx.fail(f"no command {name!r}. {hint}")
