"""Ports and patience: what the embedded services share."""

import random
import socket
import time
from collections.abc import Callable
from typing import Final

POLL_S: Final = 0.02
# Below the range from which systems take the local ports of outgoing connections (from 32768 on Linux, 49152
# elsewhere): else a client's connection could sit on a broker's port while that broker restarts.
PORTS: Final = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on at this moment."""
    held: list[socket.socket] = []
    try:
        for port in random.sample(PORTS, len(PORTS)):
            listener = socket.socket()
            held.append(listener)
            if _bound(listener, port):
                listener.listen()
            else:
                held.pop().close()
            if len(held) == count:
                return [one.getsockname()[1] for one in held]
        raise OSError(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")
    finally:
        for one in held:
            one.close()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return _bound(probe, port)


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _bound(listener: socket.socket, port: int) -> bool:
    # as servers do: connections of the last one that still linger do not count
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
