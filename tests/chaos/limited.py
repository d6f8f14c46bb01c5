"""Runs `headgate worker` under a hard limit of memory: `python -m tests.chaos.limited MIB`.

The limit is RLIMIT_DATA: the kernel refuses a process more private writable memory than that, whoever runs it and
without a container. It counts what is mapped, not what is touched, so it is stricter than a limit of resident memory.
The stacks of threads count in full: they get 1 MiB each instead of 8.
"""

import os
import resource
import sys

MIB = 2**20


def main() -> None:
    limit = int(sys.argv[1]) * MIB
    resource.setrlimit(resource.RLIMIT_STACK, (MIB, MIB))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.execv(sys.executable, [sys.executable, "-m", "cli.main", "worker"])


if __name__ == "__main__":
    main()
