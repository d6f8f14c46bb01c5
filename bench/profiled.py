"""Where a worker's CPU time goes: `python -m bench.profiled OUT.txt worker` is `headgate worker`, sampled.

Every 5 ms of CPU time the main thread's stack is taken down; at the end the functions, lines and threads that used it
are written to OUT.txt. A sample in C code (a system call, a codec) counts for the Python line that called it. What
native threads use (librdkafka's) is told by thread at the end, from the system's own account.
"""

import atexit
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

INTERVAL_S: Final = 0.005
TOP: Final = 40
ROOT: Final = str(Path(__file__).resolve().parent.parent) + "/"


class Samples:
    """Counts of stacks: by the function and line at their top, and by every function in them."""

    def __init__(self) -> None:
        self.taken = 0
        self.own: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self.within: Counter[str] = Counter()

    def take(self, _signum: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        seen: set[str] = set()
        where = _where(frame)
        line = f"{where}:{frame.f_lineno}"
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return  # starting up is not delivering
            seen.add(_where(frame))
            frame = frame.f_back
        self.taken += 1
        self.own[where] += 1
        self.lines[line] += 1
        self.files[where.partition(" ")[0]] += 1
        self.within.update(seen)

    def report(self) -> str:
        parts = [f"{self.taken} samples of {INTERVAL_S * 1000:.0f} ms CPU\n"]
        for title, counter in (
            ("by file", self.files),
            ("itself", self.own),
            ("itself, by line", self.lines),
            ("with all it calls", self.within),
        ):
            parts.append(f"\n{title}\n")
            parts += [f"{count / max(1, self.taken):7.1%}  {name}\n" for name, count in counter.most_common(TOP)]
        return "".join(parts)


def _where(frame: FrameType) -> str:
    code = frame.f_code
    file = code.co_filename
    short = file[len(ROOT) :] if file.startswith(ROOT) else file.rpartition("site-packages/")[2]
    return f"{short} {code.co_qualname}"


def threads() -> str:
    """CPU seconds of each thread of this process that used any."""
    tick = os.sysconf("SC_CLK_TCK")
    used = []
    for task in Path("/proc/self/task").iterdir():
        stat = (task / "stat").read_text()
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        fields = stat[stat.rindex(")") + 2 :].split()
        used.append(((int(fields[11]) + int(fields[12])) / tick, int(fields[11]) / tick, name))
    lines = [f"{both:7.2f} s ({user:.2f} user)  {name}\n" for both, user, name in sorted(used, reverse=True) if both]
    return "\nthreads\n" + "".join(lines)


def main() -> None:
    out = Path(sys.argv[1])
    samples = Samples()
    began = time.process_time()

    def write() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write_text(f"{time.process_time() - began:.2f} CPU-s in all\n{samples.report()}{threads()}")

    atexit.register(write)
    signal.signal(signal.SIGPROF, samples.take)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
    from cli.main import main as headgate

    headgate(sys.argv[2:])


if __name__ == "__main__":
    main()
