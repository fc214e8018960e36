"""What Prometheus may read: requests as they end, and the cluster as rank 0 last told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lockstep.engine.wire import ClusterStatus
from lockstep.observe.inference_log import RequestRecord

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """`cluster` tells the present state: (ready, restarts, status or None)."""

    def __init__(self, cluster: Callable[[], tuple[bool, int, ClusterStatus | None]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Cluster(cluster))
        self._requests = self._counter("requests", "HTTP requests that have ended.", "route", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the prefix cache.")
        self._tokens = self._counter("generated_tokens", "Tokens generated.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From request to first token.", SECONDS)
        self._tpot = self._histogram("time_per_output_token_seconds", "After the first.", TOKEN_SECONDS)
        self._queue = self._histogram("queue_seconds", "From arrival at rank 0 to the first step.", SECONDS)
        self._duration = self._histogram("request_duration_seconds", "From request to last byte.", SECONDS)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, str(record.status)).inc()
        if record.prompt_tokens is None:
            return
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens or 0)
        self._tokens.inc(record.completion_tokens or 0)
        for histogram, seconds in (
            (self._ttft, record.ttft_s),
            (self._tpot, record.tpot_s),
            (self._queue, record.queue_s),
            (self._duration, record.duration_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"lockstep_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lockstep_{name}", what, buckets=buckets, registry=self._registry)


class _Cluster:
    """Reads the cluster's state when Prometheus asks."""

    def __init__(self, cluster: Callable[[], tuple[bool, int, ClusterStatus | None]]) -> None:
        self._cluster = cluster

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        ready, restarts, status = self._cluster()
        yield _gauge("engine_ready", "1 when the model is loaded and the ring whole.", int(ready))
        yield CounterMetricFamily("lockstep_engine_restarts", "Engines that came after the first.", restarts)
        if status is None:
            return
        yield _gauge("requests_waiting", "Requests without a slot.", status.waiting)
        yield _gauge("requests_running", "Requests being computed.", status.running)
        yield _gauge("kv_tokens", "Tokens in KV caches of running requests.", status.kv_tokens)
        yield _gauge("kv_tokens_capacity", "Tokens that fit.", status.kv_tokens_capacity)
        yield _gauge("prompt_cache_tokens", "Tokens in the prefix cache.", status.prompt_cache_tokens)
        yield CounterMetricFamily("lockstep_steps", "Steps since the engine started.", status.steps)
        for name in ("weight_bytes", "active_bytes", "peak_bytes", "last_step"):
            what = f"{name.replace('_', ' ').capitalize()} of each rank."
            family = GaugeMetricFamily(f"lockstep_rank_{name}", what, labels=["rank", "host"])
            for rank in status.ranks:
                family.add_metric([str(rank.rank), rank.host], getattr(rank, name))
            yield family


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lockstep_{name}", what, value)
