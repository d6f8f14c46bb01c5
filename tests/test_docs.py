"""The documentation is held against the tree: links lead somewhere, commands exist, the README's first steps work."""

import ast
import itertools
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from cli.main import command
from config.settings import settings_page
from dev.stack import Stack
from streams.metrics import GAUGES, Metrics, Scrape
from tests.deployment import free_port

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NO_METRICS = {"headgate_check"}  # a table that the check of a BigQuery destination makes, and deletes
RUNBOOK = ROOT / "docs" / "runbook.md"
FIRST_STEPS = "## Five minutes to a first delivery of your own"
DEADLINE_S = 60.0

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE_COMMAND = re.compile(r"(?<!`)`headgate ([^`\n]+)`(?!`)")


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("helm/**/*.md"))]


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return {anchor(heading) for heading in headings}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def commands_of(text: str) -> Iterator[list[str]]:
    """The arguments of each `headgate …` in a page: lines of its code blocks, and code in its prose."""
    for _, block in _FENCE.findall(text):
        here_document = ""
        for line in block.replace("\\\n", " ").splitlines():
            if here_document:
                here_document = "" if line == here_document else here_document
                continue
            if (opened := re.search(r"<<'?(\w+)'?$", line)) is not None:
                here_document = opened[1]
            found = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*headgate (.+)", line.strip())
            if found is not None:
                yield _arguments(found[1])
    for found in _INLINE_COMMAND.findall(prose(text)):
        yield _arguments(found)


def _arguments(text: str) -> list[str]:
    """Up to the end of the command, a comment or the first alternative; `[--usage]` stands for `--usage`."""
    words = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    words.whitespace_split = True
    arguments = (word.strip("[]") for word in itertools.takewhile(lambda word: word[0] not in "|&;<>", words))
    return [word for word in arguments if word not in ("", "…", "...")]


def fault_of(arguments: list[str]) -> str:
    """Why the command line does not know these arguments; empty if it does. Values are not looked at."""
    at: click.Command = command
    context = click.Context(command)
    words = iter(arguments)
    for word in words:
        if at.context_settings.get("ignore_unknown_options"):
            break  # a command of a later release, whose options are not there yet
        if word.startswith("-"):
            if word == "--help":
                continue
            name = word.partition("=")[0]
            option = next((each for each in at.params if name in each.opts), None)
            if option is None:
                return f"{at.name} has no option {name}"
            if isinstance(option, click.Option) and not option.is_flag and "=" not in word:
                next(words, None)
        elif isinstance(at, click.Group) and not word.isupper():  # COMMAND stands for any
            below = at.get_command(context, word)
            if below is None:
                return f"{at.name} has no command {word}"
            at = below
    answered = CliRunner().invoke(at, ["--help"])
    return "" if answered.exit_code == 0 or "later release" in answered.output else f"{at.name} --help fails"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_a_broken_link_and_a_broken_anchor_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Some heading, this\n[a](page.md#some-heading-this) [b](page.md#other) [c](gone.md)\n")
    with pytest.raises(AssertionError, match=r"page\.md#other.*gone\.md"):
        test_every_relative_link_leads_to_a_file_and_a_heading_of_it(page)


def test_every_page_of_docs_is_in_its_index() -> None:
    listed = set()
    for index in (ROOT / "docs" / "README.md", ROOT / "docs" / "decisions" / "README.md"):
        for link in _LINK.findall(index.read_text()):
            listed.add((index.parent / link.partition("#")[0]).resolve())
    missing = {page for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in listed}
    assert missing <= {ROOT / "docs" / "README.md"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_shows_is_known_to_the_command_line(page: Path) -> None:
    faults = {" ".join(line): fault for line in commands_of(page.read_text()) if (fault := fault_of(line))}
    assert not faults


def test_the_readme_shows_commands() -> None:
    shown = list(commands_of(README.read_text()))
    assert {line[0] for line in shown} >= {"dev", "apply", "worker", "publish", "dlq"}


@pytest.mark.parametrize("line", ["deliver", "dlq find", "apply --file=x --force", "publish -x events.ndjson"])
def test_a_command_that_does_not_exist_would_be_seen(line: str) -> None:
    assert list(commands_of(f"```\n$ headgate {line} # why\n```")) == [line.split()]
    assert fault_of(line.split())


def series() -> set[str]:
    """The names of all that a worker exposes."""
    metrics = Metrics(tenant_label="tag", type_label=True, version="")
    metrics.gauges.update(dict.fromkeys(GAUGES, lambda: 0.0))
    return {
        family.name + suffix
        for family in Scrape(metrics).collect()
        for suffix in {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum")}.get(family.type, ("",))
    }


def test_every_metric_that_a_page_names_is_one_of_the_workers() -> None:
    known = series()
    named = {name for page in pages() for name in re.findall(r"\bheadgate_\w+", page.read_text())} - NO_METRICS
    assert {"headgate_dead_letters_total", "headgate_retry_lateness_seconds_bucket"} <= named
    assert named <= known


def faults_of_alerts(rules: list[dict[str, Any]]) -> list[str]:
    """What is wrong with alert rules: a metric that there is not, or no runbook entry that has their expression."""
    section = RUNBOOK.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    entries = {anchor(entry.split("\n")[0]): entry for entry in section.split("\n### ")[1:]}
    faults = []
    for rule in rules:
        page, _, at = rule["annotations"]["runbook"].partition("#")
        expression = " ".join(rule["expr"].split())
        if page != "docs/runbook.md" or expression not in entries.get(at, "") or not at:
            faults.append(f"{rule['alert']}: {page}#{at} has no {expression}")
        metrics = set(re.findall(r"\bheadgate_\w+", expression))
        if not metrics or metrics - series():
            faults.append(f"{rule['alert']}: no such metric in {expression}")
    return faults


def test_every_alert_has_its_entry_in_the_runbook_and_asks_for_metrics_that_there_are() -> None:
    file = ROOT / "helm" / "headgate" / "files" / "alerts.yaml"
    rules = [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
    assert faults_of_alerts(rules) == []
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}
    if promtool := shutil.which("promtool"):
        checked = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    # the control
    wrong = {**rules[0], "expr": "absent(headgate_bild_info)"}
    assert len(faults_of_alerts([wrong, {**rules[0], "annotations": {"runbook": "docs/runbook.md#no"}}])) == 3


def logged_events(*levels: str) -> set[str]:
    """The constant events that the worker's own code logs at these levels."""
    events: set[object] = set()
    for path in sorted((ROOT / "streams").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("log" | "self"), attr=level), args=[event, *_]):
                    if level in levels:
                        events |= {part.value for part in ast.walk(event) if isinstance(part, ast.Constant)}
    return {event for event in events if isinstance(event, str)}


def test_the_runbook_has_every_line_that_a_worker_logs_as_a_warning_or_an_error_and_no_other() -> None:
    section = RUNBOOK.read_text().split("\n## Log lines\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section, re.MULTILINE)
    told = {level: {event for event, its in rows if its == level} for level in ("error", "warning", "any")}
    assert told == {
        "error": logged_events("error", "exception"),
        "warning": logged_events("warning", "_say"),
        "any": {"library"},
    }
    life_cycle = re.search(r"^Of the life cycle[^`]*(`[^.]+)\.$", section, re.MULTILINE)
    assert life_cycle is not None
    assert set(re.findall(r"`(\w+)`", life_cycle[1])) == logged_events("info")


def test_every_setting_that_a_page_names_exists() -> None:
    known = set(re.findall(r"HEADGATE_[A-Z_]+", settings_page()))
    for page in pages():
        named = set(re.findall(r"HEADGATE_[A-Z_]+[A-Z]", page.read_text()))
        assert named <= known | {"HEADGATE_TEST_STACK_DIR", "HEADGATE_TEST_SOAK_S"}, page


# ---------------------------------------------------------------- the first steps, run


def first_steps() -> list[str]:
    """The `bash` blocks of the README's first steps, in their order."""
    section = README.read_text().split(FIRST_STEPS)[1].split("\n## ")[0]
    return [block for language, block in _FENCE.findall(section) if language == "bash"]


class Terminal:
    """A block that runs until Ctrl-C, and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self.output = output

    def printed(self) -> str:
        return self.output.read_text()

    def eventually(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not holds():
            assert self.process.poll() is None and time.monotonic() < end, self.printed()
            time.sleep(0.05)


@contextmanager
def in_a_terminal(block: str, folder: Path, env: dict[str, str], output: Path) -> Iterator[Terminal]:
    """Runs a block that does not end by itself, as in a terminal of its own; Ctrl-C at the end."""
    with output.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    terminal = Terminal(process, output)
    try:
        yield terminal
        assert process.poll() is None, terminal.printed()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(40)


@pytest.mark.broker
def test_the_first_steps_of_the_readme_deliver_an_event_and_keep_a_refused_one(stack: Stack, tmp_path: Path) -> None:
    port = str(free_port())
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # where `dev up` finds the stack of this test run already up, as it would on its second run
        "HEADGATE_DEV_DIR": str(stack.dir.resolve()),
        # what keeps apart those who share it
        "HEADGATE_PREFIX": f"d{secrets.token_hex(4)}",
        "HEADGATE_HTTP_PORT": "0",
    }

    def run(block: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    blocks = [block.replace("9000", port) for block in first_steps()]
    up, receive, apply, work, publish, look = blocks
    assert f"HEADGATE_KAFKA_BOOTSTRAP={stack.kafka_bootstrap}" in run(up)
    with in_a_terminal(receive, tmp_path, env, tmp_path / "inbox.log") as inbox:
        inbox.eventually(lambda: f"port={port}" in inbox.printed())
        assert re.findall(r"^acme/(\w+)/signing: whsec_", run(apply), re.MULTILINE) == ["orders", "picky"]
        with in_a_terminal(work, tmp_path, env, tmp_path / "worker.log") as worker:
            assert run(publish).startswith("3 events published")

            def requests() -> dict[str, list[str]]:
                lines = (line.split(maxsplit=5) for line in inbox.printed().splitlines())
                return {words[0]: words[1:] for words in lines if len(words) == 6}

            worker.eventually(lambda: len(requests()) == 2)
            seen = requests()
            assert seen["/orders"][:3] == ["200", "attempt", "1"]
            assert seen["/picky"][:3] == ["400", "attempt", "1"]
            assert '"payload":{"total": 120}' in seen["/orders"][4]

            listing, showing = look.splitlines()
            worker.eventually(lambda: "refund.created" in run(listing))
            assert re.search(r"^2/0 .* picky +refund\.created .* refused +1 ", run(listing), re.MULTILINE)
            assert '"order": 7' in run(showing)
            assert inbox.printed().count("attempt") == 2  # what did not match went nowhere
