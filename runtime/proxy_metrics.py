"""What a `Watch` has seen, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from runtime.watch import Distribution, Watch


class ProxyMetrics(Collector):
    """A watch's numbers as Prometheus metrics, made when they are scraped."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        watch, totals = self._watch, self._watch.totals
        answers = {(model, str(status)): n for (model, status), n in totals.answers.items()}
        yield _counter("requests", "HTTP answers", answers, "model", "status")
        yield _counter("decisions", "actions of the scheduler", totals.decisions, "action")
        yield _counter("retries", "requests sent to another worker", {(): totals.retries})
        yield _counter("broken_streams", "streams cut short", {(): totals.broken_streams})
        yield _counter("attempt_failures", "failed attempts", totals.failures, "worker")
        yield _counter("ejections", "workers taken out", totals.ejections, "worker")
        yield _counter("output_tokens", "tokens answered", totals.output_tokens, "worker")
        queued = {(): float(watch.core.queued_requests)}
        yield _gauge("queued_requests", "requests held centrally", queued)
        by_worker = {
            "inflight_requests": ("requests sent and not ended", "inflight_requests"),
            "outstanding_tokens": ("prompt and expected output in flight", "outstanding_tokens"),
            "worker_ready": ("whether the worker takes requests", "takes_requests"),
        }
        for name, (text, attribute) in by_worker.items():
            values = {(r.id, r.model): float(getattr(r, attribute)) for r in watch.replicas}
            yield _gauge(name, text, values, "worker", "model")
        yield _histogram("ttft_seconds", "from arrival to first byte", watch.ttft_s)
        yield _histogram("e2e_seconds", "from arrival to the whole answer", watch.e2e_s)
        yield _histogram("handle_seconds", "of the scheduler core, an event", watch.handle_s)


def _key(labels: str | tuple[str, ...]) -> tuple[str, ...]:
    return (labels,) if isinstance(labels, str) else labels


def _counter(name: str, text: str, values: Any, *labels: str) -> Metric:
    family = CounterMetricFamily(f"viisim_{name}", text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(_key(key), value)
    return family


def _gauge(name: str, text: str, values: Any, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"viisim_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(_key(key), value)
    return family


def _histogram(name: str, text: str, values: Distribution | dict[str, Distribution]) -> Metric:
    if isinstance(values, Distribution):
        family = HistogramMetricFamily(f"viisim_{name}", text)
        family.add_metric((), values.buckets(), values.total)
        return family
    family = HistogramMetricFamily(f"viisim_{name}", text, labels=("model",))
    for model, found in sorted(values.items()):
        family.add_metric((model,), found.buckets(), found.total)
    return family
