"""Metrics for Prometheus, by the names and shapes of vLLM's, with the prefix `chameleon:` and a label `modality`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus-client: the folder in which replicas of a machine share their values."""

disable_created_metrics()


class Metrics:
    """Counters, histograms and gauges of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.prompt_tokens = Counter("chameleon:prompt_tokens", "Prefilled tokens.", ["modality"], **common)
        self.generation_tokens = Counter("chameleon:generation_tokens", "Generated tokens.", ["modality"], **common)
        self.requests = Counter("chameleon:request_success", "Requests by how they ended.", ["finished_reason"], **common)
        self.responses = Counter(
            "chameleon:http_responses", "Responses by route and status.", ["route", "status"], **common
        )
        self.first_token = Histogram(
            "chameleon:time_to_first_token_seconds", "Seconds to the first token.", buckets=SECONDS, **common
        )
        self.per_token = Histogram(
            "chameleon:inter_token_latency_seconds", "Seconds between tokens.", buckets=SECONDS, **common
        )
        self.whole = Histogram("chameleon:e2e_request_latency_seconds", "Seconds of a request.", buckets=SECONDS, **common)
        self.prefix_queries = Counter("chameleon:prefix_cache_queries", "Tokens looked up in the prefix cache.", **common)
        self.prefix_hits = Counter("chameleon:prefix_cache_hits", "Tokens found there.", **common)
        gauge: dict[str, Any] = common | {"multiprocess_mode": "livesum"}
        self.running = Gauge("chameleon:num_requests_running", "Requests being served.", **gauge)
        self.waiting = Gauge("chameleon:num_requests_waiting", "Requests in the queue.", **gauge)
        share = common | {"multiprocess_mode": "livemax"}
        self.cache_use = Gauge("chameleon:kv_cache_usage_perc", "Share of the KV cache's sequences in use.", **share)

    def text(self) -> bytes:
        """Return all values in Prometheus' text format, those of all replicas of this machine."""
        registry = self.registry
        if MULTIPROCESS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)


class RequestClock:
    """Measures one request: time to its first token, between tokens, and in all."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self.metrics, self.clock = metrics, clock
        self.start = clock()
        self.latest: float | None = None

    def count(self, num_tokens: int) -> None:
        """Note that so many tokens arrived together."""
        now = self.clock()
        if self.latest is None:
            self.metrics.first_token.observe(now - self.start)
        else:
            for _ in range(num_tokens):
                self.metrics.per_token.observe((now - self.latest) / num_tokens)
        self.latest = now

    def end(self, reason: str) -> None:
        """Note how the request ended: stop, length, abort or error."""
        self.metrics.requests.labels(reason).inc()
        self.metrics.whole.observe(self.clock() - self.start)
