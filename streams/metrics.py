"""Every metric of the worker: its name, unit and meaning (design, section 11).

Counts are plain numbers on `Meter`s, written per batch; a collector reads them when it is scraped. So a delivery costs
a few additions, and no `labels()` look-up. Labels come from bounded sets: `code` from the kinds' closed lists, the
tenant's label from `TENANT_LABEL`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.ids import TenantRef, Vendor, base32, digest, parts

BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LATENESS_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
SLOW_FACTOR: Final = 2.0
SLOW_AFTER: Final = 20
AVERAGE_WEIGHT: Final = 0.05
OTHER: Final = "other"

TenantLabel = Literal["tag", "tenant", "none"]


class Histogram:
    """Counts by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        running = 0
        out: list[tuple[str, float]] = []
        for bound, count in zip([*map(repr, self.bounds), "+Inf"], self.counts, strict=True):
            running += count
            out.append((bound, float(running)))
        return out


class Average:
    """A moving average of delivery seconds, for one tenant and event type."""

    __slots__ = ("count", "seconds", "slow")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.slow = 0

    def observe(self, seconds: float) -> None:
        count = self.count
        if count >= SLOW_AFTER and seconds > SLOW_FACTOR * self.seconds:
            self.slow += 1
        weight = AVERAGE_WEIGHT if count >= 1 / AVERAGE_WEIGHT else 1 / (count + 1)
        self.seconds += (seconds - self.seconds) * weight
        self.count = count + 1


class Meter:
    """What is counted for one (vendor, tenant label, destination type)."""

    __slots__ = ("attempt_s", "attempts", "dead", "delivery_s", "dropped", "ends", "parked")

    def __init__(self) -> None:
        self.ends: dict[tuple[str, str], int] = {}
        self.attempts: dict[tuple[str, str, str], int] = {}
        self.parked: dict[str, int] = {}
        self.dead: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.delivery_s: dict[str, Histogram] = {}
        self.attempt_s = Histogram()


def bump(counts: dict[str, int], name: str, by: int = 1) -> None:
    counts[name] = counts.get(name, 0) + by


class Metrics:
    """All of a worker's counts, and the gauges that are asked for when it is scraped."""

    def __init__(self, *, tenant_label: TenantLabel, type_label: bool, version: str) -> None:
        self.tenant_label = tenant_label
        self.type_label = type_label
        self.version = version
        self._meters: dict[tuple[str, str, str], Meter] = {}
        self._events: dict[tuple[str, str], dict[str, int]] = {}
        self._averages: dict[tuple[TenantRef, str], tuple[str, Average]] = {}
        self.lateness = Histogram(LATENESS_S)
        self.ledger_errors = 0
        self.unread_records = 0
        self.egress_blocked = 0
        self.gauges: dict[str, Callable[[], float]] = {}
        self.lag: Callable[[], Iterable[tuple[str, int, float, float]]] = lambda: ()
        self.lanes: Callable[[], Iterable[tuple[str, str, str, int, int, bool]]] = lambda: ()

    def label(self, tenant: TenantRef, tag: str) -> str:
        match self.tenant_label:
            case "tenant":
                return tenant.tenant
            case "tag":
                return tag
            case "none":
                return ""

    def meter(self, tenant: TenantRef, tag: str, destination_type: str) -> Meter:
        """The meter of a lane; kept by the lane, so that it is looked up once."""
        key = (tenant.vendor, self.label(tenant, tag), destination_type)
        found = self._meters.get(key)
        if found is None:
            found = self._meters[key] = Meter()
        return found

    def events(self, vendor: Vendor, label: str) -> dict[str, int]:
        """Counts of `headgate_events_total` by result, for one tenant label."""
        return self._events.setdefault((vendor, label), {})

    # ---------------------------------------------------------------- averages, kept over restarts

    def average(self, tenant: TenantRef, tag: str, event_type: str) -> Average:
        """`event_type` is one that a route of the tenant names, or `other`."""
        found = self._averages.get((tenant, event_type))
        if found is None:
            found = self._averages[(tenant, event_type)] = (self.label(tenant, tag), Average())
        return found[1]

    def averages_to_keep(self) -> dict[str, str]:
        """For Redis: hashed name -> `count seconds`."""
        return {
            _average_name(tenant, event_type): f"{average.count} {average.seconds:.6f}"
            for (tenant, event_type), (_, average) in self._averages.items()
            if average.count
        }

    def unknown_averages(self) -> list[tuple[str, Average]]:
        """Those that were never read back: hashed name, and where to put what was kept."""
        return [
            (_average_name(tenant, event_type), average)
            for (tenant, event_type), (_, average) in self._averages.items()
            if average.count < SLOW_AFTER
        ]

    def restore_averages(self, kept: Mapping[str, bytes | None]) -> None:
        for name, average in self.unknown_averages():
            raw = kept.get(name)
            if raw is None:
                continue
            try:
                count, seconds = raw.decode().split(" ")
                if int(count) > average.count and isfinite(float(seconds)):
                    average.count, average.seconds = int(count), float(seconds)
            except ValueError:
                continue  # not of our writing: it is learnt anew


def _average_name(tenant: TenantRef, event_type: str) -> str:
    return base32(digest(parts(tenant.vendor, tenant.tenant, event_type)))


class Scrape(Collector):
    """Turns the plain numbers into families."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        metrics = self._metrics
        base = ["vendor", "tenant", "destination_type"]
        ends = CounterMetricFamily("headgate_deliveries", "Deliveries that ended.", labels=[*base, "end", "code"])
        attempts = CounterMetricFamily(
            "headgate_attempts", "Attempts that ended.", labels=[*base, "verdict", "fault", "code"]
        )
        parked = CounterMetricFamily("headgate_parked", "Deliveries parked.", labels=[*base, "reason"])
        dead = CounterMetricFamily("headgate_dead_letters", "Dead letters written.", labels=[*base, "code"])
        dropped = CounterMetricFamily("headgate_dropped", "Deliveries dropped on purpose.", labels=[*base, "reason"])
        typed = ["event_type"] if metrics.type_label else []
        delivery_s = HistogramMetricFamily(
            "headgate_delivery_seconds",
            "From the append at ingress to the settling; of what was retried or parked, from the first failure or park "
            "on; of what was replayed, from the replay on.",
            labels=[*base, *typed],
        )
        attempt_s = HistogramMetricFamily("headgate_attempt_seconds", "From the start of an attempt.", labels=base)
        for key, meter in list(metrics._meters.items()):
            for (end, code), count in meter.ends.items():
                ends.add_metric([*key, end, code], count)
            for (verdict, fault, code), count in meter.attempts.items():
                attempts.add_metric([*key, verdict, fault, code], count)
            for family, counts in ((parked, meter.parked), (dead, meter.dead), (dropped, meter.dropped)):
                for name, count in counts.items():
                    family.add_metric([*key, name], count)
            for event_type, histogram in meter.delivery_s.items():
                labels = [*key, event_type] if typed else list(key)
                delivery_s.add_metric(labels, histogram.buckets(), histogram.total)
            attempt_s.add_metric(list(key), meter.attempt_s.buckets(), meter.attempt_s.total)
        events = CounterMetricFamily("headgate_events", "Records of ingress.", labels=["vendor", "tenant", "result"])
        for (vendor, tenant), results in list(metrics._events.items()):
            for result, count in results.items():
                events.add_metric([vendor, tenant, result], count)
        yield from (ends, attempts, parked, dead, dropped, delivery_s, attempt_s, events)
        yield from self._averages()
        yield from self._lanes(base)
        yield from self._lags()
        for name, ask in metrics.gauges.items():
            yield GaugeMetricFamily(name, GAUGES[name], value=ask())
        lateness = HistogramMetricFamily("headgate_retry_lateness_seconds", "From due to handed over.")
        lateness.add_metric([], metrics.lateness.buckets(), metrics.lateness.total)
        yield lateness
        yield CounterMetricFamily(
            "headgate_ledger_errors", "Redis calls that failed or were not made.", value=metrics.ledger_errors
        )
        yield CounterMetricFamily(
            "headgate_egress_blocked", "Dials that the guard refused.", value=metrics.egress_blocked
        )
        yield CounterMetricFamily(
            "headgate_unread_records",
            "Retry records of a version that this worker does not read, written again for one that does.",
            value=metrics.unread_records,
        )
        info = GaugeMetricFamily("headgate_build_info", "1; the version as a label.", labels=["version"])
        info.add_metric([metrics.version], 1)
        yield info

    def _averages(self) -> Iterable[Metric]:
        labels = ["vendor", "tenant", "event_type"]
        mean = GaugeMetricFamily("headgate_delivery_average_seconds", "Moving average of delivery time.", labels=labels)
        slow = CounterMetricFamily(
            "headgate_slow_deliveries", "Deliveries that took over twice the moving average.", labels=labels
        )
        sums: dict[tuple[str, str, str], list[float]] = {}
        for (tenant, event_type), (label, average) in list(self._metrics._averages.items()):
            into = sums.setdefault((tenant.vendor, label, event_type), [0.0, 0.0, 0.0])
            into[0] += average.count
            into[1] += average.count * average.seconds
            into[2] += average.slow
        for key, (count, seconds, slows) in sums.items():
            mean.add_metric(list(key), seconds / count if count else 0.0)
            slow.add_metric(list(key), slows)
        yield from (mean, slow)

    def _lanes(self, base: list[str]) -> Iterable[Metric]:
        depth = GaugeMetricFamily("headgate_lane_depth", "Deliveries waiting in lanes.", labels=base)
        flying = GaugeMetricFamily("headgate_in_flight", "Attempts under way.", labels=base)
        broken = GaugeMetricFamily("headgate_breaker_open", "Destinations whose breaker is open.", labels=base)
        sums: dict[tuple[str, str, str], list[int]] = {}
        for vendor, tenant, kind, waiting, in_flight, is_open in self._metrics.lanes():
            into = sums.setdefault((vendor, tenant, kind), [0, 0, 0])
            into[0] += waiting
            into[1] += in_flight
            into[2] += is_open
        for key, (waiting, in_flight, opened) in sums.items():
            depth.add_metric(list(key), waiting)
            flying.add_metric(list(key), in_flight)
            broken.add_metric(list(key), opened)
        yield from (depth, flying, broken)

    def _lags(self) -> Iterable[Metric]:
        labels = ["topic", "partition"]
        lag = GaugeMetricFamily("headgate_consumer_lag", "Records not yet settled.", labels=labels)
        age = GaugeMetricFamily("headgate_consumer_lag_seconds", "Age of the oldest record not settled.", labels=labels)
        for topic, partition, records, seconds in self._metrics.lag():
            lag.add_metric([topic, str(partition)], records)
            age.add_metric([topic, str(partition)], seconds)
        yield from (lag, age)


GAUGES: Final = {
    "headgate_held_bytes": "Event bytes that the worker holds.",
    "headgate_retry_due": "Retries that are due or wait in memory.",
    "headgate_control_offset": "How far the tenant registry has read headgate.control.",
}


def registry_for(metrics: Metrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Scrape(metrics))
    return registry
