"""`python -m dev`: fetch and prepare what the embedded stack needs, so that the first `headgate dev up` is quick."""

import sys

from dev import broker, jars


def main() -> int:
    cache = jars.cache_dir()
    try:
        broker.prepare(cache, lambda line: print(line, file=sys.stderr))
    except (broker.BrokerError, jars.JarError) as fault:
        print(f"Error: {fault}", file=sys.stderr)
        return 1
    print(f"Kafka {broker.kafka_version()} is ready to start, from {cache}", file=sys.stderr)
    return 0


sys.exit(main())
