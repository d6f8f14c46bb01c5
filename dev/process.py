"""Background processes that outlive the command that started them, found again without ever mistaking another's.

A process is a pid together with the moment it started: the kernel hands pids out again, and a signal must never reach
the process of somebody else.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

from dev import wait

REAPED_WITHIN_S: Final = 1.0


class Proc(Struct, frozen=True):
    pid: int
    started: str
    """What the system says of its start: boot and clock ticks on Linux, the time as text elsewhere."""


class Condition(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    GONE = "gone"


# Children of this very process: they stay as zombies until somebody asks for their exit status.
_children: dict[int, subprocess.Popen[bytes]] = {}


def spawn(command: Sequence[str], *, cwd: Path, log: Path, environ: Mapping[str, str]) -> Proc:
    """Start a process in a session of its own (Ctrl-C does not reach it); its output is appended to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    _children[child.pid] = child
    # a child that died at once is a zombie until it is reaped, so its start can be read all the same
    started = _start_and_state(child.pid)
    return Proc(child.pid, started[0] if started else "gone")


def condition(proc: Proc) -> Condition:
    if (child := _children.get(proc.pid)) is not None and child.poll() is not None:
        del _children[proc.pid]
    found = _start_and_state(proc.pid)
    if found is None or found[0] != proc.started or (found[1] in "ZX" and not _threads_left(proc.pid)):
        return Condition.GONE
    return Condition.PAUSED if found[1] in "Tt" else Condition.RUNNING


def send(proc: Proc, signum: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    if condition(proc) is Condition.GONE:
        return False
    try:
        os.kill(proc.pid, signum)
    except ProcessLookupError:
        return False
    return True


def end(proc: Proc, *, grace_s: float) -> None:
    """SIGTERM, and SIGKILL after `grace_s`; returns when the process is gone. A grace of 0 kills at once."""
    if grace_s > 0 and send(proc, signal.SIGTERM):
        send(proc, signal.SIGCONT)  # a paused process would take its SIGTERM only when it goes on
        if _gone_within(proc, grace_s):
            return
    if send(proc, signal.SIGKILL) and not _gone_within(proc, 10):
        raise TimeoutError(f"process {proc.pid} does not end, not even by SIGKILL")


def _gone_within(proc: Proc, seconds: float) -> bool:
    if not wait.until(lambda: condition(proc) is Condition.GONE, seconds):
        return False
    # What is left of it in the table of processes looks alive to a careless eye. Its parent removes that, usually at
    # once; there are parents that never do.
    wait.until(lambda: not _listed(proc), REAPED_WITHIN_S)
    return True


def _listed(proc: Proc) -> bool:
    found = _start_and_state(proc.pid)
    return found is not None and found[0] == proc.started


def _threads_left(pid: int) -> bool:
    """Whether a zombie's other threads still end: until they have, its ports and files are open."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def _start_and_state(pid: int) -> tuple[str, str] | None:
    """When a process started, and its state letter (`T` stopped, `Z` zombie, …); None if there is none."""
    if not sys.platform.startswith("linux"):
        ps = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
        state, _, started = subprocess.run(ps, capture_output=True, text=True, check=False).stdout.partition(" ")
        return (started.strip(), state[0]) if started else None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name in parentheses may itself hold spaces and parentheses
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{fields[19]}", fields[0]
