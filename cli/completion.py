"""`headgate completion`: the script that makes a shell complete our commands and options.

click's own: the shell calls `headgate` with `_HEADGATE_COMPLETE` set, which answers from the command tree alone.
Names of tenants and destinations are not completed: they are in Kafka, which a key press should not ask.
"""

from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

VARIABLE: Final = "_HEADGATE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and files.

    \b
      bash:  headgate completion bash > ~/.local/share/bash-completion/completions/headgate
      zsh:   headgate completion zsh > ~/.zfunc/_headgate      # a folder of $fpath, before compinit
      fish:  headgate completion fish > ~/.config/fish/completions/headgate.fish

    Or for one session of bash: eval "$(headgate completion bash)". Needs bash 4.4, any zsh with compinit, or fish.
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "headgate", VARIABLE).source().strip())


def files(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For options that name a file."""
    return [CompletionItem(incomplete, type="file")]
