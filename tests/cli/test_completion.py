"""Shell completion: the printed script, and what it is answered."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cli.main import command


def completed(words: str) -> list[str]:
    """What a bash would offer for the last word."""
    given = words.split(" ")
    found = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.getcwd(),
            "_HEADGATE_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(given) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stderr == ""
    return found.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("headgate do", ["plain,doctor"]),
        ("headgate destinations en", ["plain,enable"]),
        ("headgate trace --con", ["plain,--content"]),
        ("headgate get tenants --output j", ["plain,json"]),
        ("headgate apply -f tena", ["file,tena"]),
        ("headgate nosuch x", []),
        ("headgate dlq nosuch x", []),
    ],
)
def test_a_word_is_completed_by_commands_options_and_files(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_this_command(shell: str) -> None:
    found = CliRunner().invoke(command, ["completion", shell])
    assert found.exit_code == 0
    assert f"_HEADGATE_COMPLETE={shell}_complete" in found.stdout


def test_bash_takes_the_script() -> None:
    script = CliRunner().invoke(command, ["completion", "bash"]).stdout
    ran = subprocess.run(["bash", "-c", f"{script}\ncomplete -p headgate"], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "_headgate_completion headgate" in ran.stdout


def test_another_shell_is_refused_with_those_that_there_are() -> None:
    found = CliRunner().invoke(command, ["completion", "tcsh"])
    assert found.exit_code == 2
    assert "bash" in found.stderr
