"""What the proxy counts and remembers: a core, its watch, and events by hand."""

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    Failed,
    Finished,
    Hold,
    Limits,
    Policy,
    Preempt,
    ReplicaChanged,
    RequestView,
    Tick,
    Verdict,
)
from policies.least_loaded import LeastLoaded
from policies.testing import request
from runtime.proxy_metrics import ProxyMetrics
from runtime.watch import Distribution, Watch


def watched(*events: Event, policy: Policy | None = None, limits: Limits | None = None) -> Watch:
    """A watch of a core with two workers, after the events."""
    watch = Watch(SchedulerCore(policy or LeastLoaded(), limits=limits))
    told(watch, [ReplicaChanged(0.0, name, "ready", model="m") for name in ("r0", "r1")])
    told(watch, events)
    return watch


def told(watch: Watch, events: Iterable[Event]) -> None:
    """Report events, as a driver does."""
    for event in events:
        watch.handling()
        watch.record(event, watch.core.handle(event))


def arrived(now_s: float, name: str = "q", prompt_tokens: int = 100) -> Arrived:
    """100 tokens of prompt and 50 of output are 150 outstanding."""
    return Arrived(now_s, request(id=name, arrived_s=now_s, prompt_tokens=prompt_tokens))


def scraped(watch: Watch) -> dict[str, float]:
    """Samples by name and labels."""
    registry = CollectorRegistry()
    registry.register(ProxyMetrics(watch))
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


class TestDecisions:
    def test_candidates_are_shown_as_they_were_before_the_decision(self):
        watch = watched(arrived(1.0, "a"), arrived(2.0, "b"))
        decision = watch.decisions[-1]
        assert (decision.request_id, decision.worker) == ("b", "r1")
        assert decision.candidates == [("r0", 150, 1), ("r1", 0, 0)]

    def test_several_decisions_of_one_event_are_shown_one_after_the_other(self):
        class Gate(LeastLoaded):
            """Holds everything until three wait."""

            def place(self, request: RequestView, view: ClusterView) -> Verdict:
                waiting = view.queued_requests + sum(r.inflight_requests for r in view.replicas)
                return Hold() if waiting < 3 else super().place(request, view)

        watch = watched(*(arrived(1.0 + i, f"q{i}") for i in range(3)), policy=Gate())
        before = [[tokens for _, tokens, _ in d.candidates] for d in watch.decisions]
        assert [d.worker for d in watch.decisions] == ["r0", "r1", "r0"]
        assert before == [[0, 0], [150, 0], [150, 150]]

    def test_a_refusal_is_shown_with_its_reason(self):
        watch = watched(ReplicaChanged(0.0, "r0", "gone"), ReplicaChanged(0.0, "r1", "gone"))
        watch.core.limits = Limits(max_queued=0)
        told(watch, [arrived(1.0)])
        assert [(d.kind, d.reason) for d in watch.decisions] == [("Shed", "queue_full")]

    def test_a_worker_that_takes_nothing_is_no_candidate(self):
        watch = watched(ReplicaChanged(0.5, "r0", "draining"), arrived(1.0))
        assert [name for name, _, _ in watch.decisions[-1].candidates] == ["r1"]

    def test_where_it_failed_is_no_candidate_of_a_retry(self):
        watch = watched(arrived(1.0), Failed(2.0, "q", 1, "down", retryable=True))
        decision = watch.decisions[-1]
        assert (decision.worker, decision.candidates) == ("r1", [("r1", 0, 0)])

    def test_a_worker_on_trial_is_a_candidate_of_its_one_request(self):
        down = [arrived(1.0), Failed(2.0, "q", 1, "down", retryable=False)]
        alone = ReplicaChanged(0.5, "r1", "gone")
        limits = Limits(eject_after=1, eject_s=1.0)
        watch = watched(alone, *down, Tick(3.0), arrived(4.0, "again"), limits=limits)
        assert watch.decisions[-1].candidates == [("r0", 0, 0)]


class TestLatencies:
    def test_a_streamed_answer_has_all_three(self):
        watch = watched(arrived(1.0))
        watch.began("q", 1.5)
        told(watch, [Finished(3.5, "q", 1, output_tokens=5)])
        (end,) = watch.ended
        assert (end.ttft_s, end.tpot_s, end.e2e_s) == (0.5, 0.5, 2.5)

    def test_one_token_has_no_time_per_further_token(self):
        watch = watched(arrived(1.0))
        watch.began("q", 1.5)
        told(watch, [Finished(1.5, "q", 1, output_tokens=1)])
        assert watch.ended[0].tpot_s is None

    def test_a_plain_answer_has_only_its_end(self):
        watch = watched(arrived(1.0), Finished(3.0, "q", 1, output_tokens=5))
        (end,) = watch.ended
        assert (end.ttft_s, end.e2e_s) == (None, 2.0)


class TestCounts:
    def test_a_retry_is_counted_once_and_the_failure_against_its_worker(self):
        failed = Failed(2.0, "q", 1, "down", retryable=True)
        watch = watched(arrived(1.0), failed, Finished(3.0, "q", 2, 7))
        assert (watch.totals.retries, watch.totals.failures) == (1, {"r0": 1})
        assert watch.totals.output_tokens == {"r1": 7}

    def test_an_ejection_is_counted_when_it_begins(self):
        failures = [
            event
            for i in range(3)
            for event in (arrived(1.0 + i, f"q{i}"), Failed(1.5 + i, f"q{i}", 1, "down", False))
        ]
        watch = watched(*failures, limits=Limits(eject_after=2))
        assert watch.totals.ejections == {"r0": 1}

    def test_a_preempted_request_is_no_retry(self):
        class Second(Policy):
            """Takes the first request back for the second."""

            preempts = True

            def place(self, request: RequestView, view: ClusterView) -> Verdict:
                if request.id == "b" and any(view.inflight("r0")):
                    return Preempt("a")
                return Dispatch(request.id, "r0")

            def rank(self, request: RequestView) -> int:
                return -ord(request.id)

        watch = watched(
            arrived(1.0, "a"), arrived(2.0, "b"), Cancelled(3.0, "a", 1), policy=Second()
        )
        assert [d.kind for d in watch.decisions] == ["Dispatch", "Preempt", "Dispatch", "Dispatch"]
        assert watch.totals.retries == 0

    @pytest.mark.parametrize(
        "end",
        [
            [Finished(2.0, "q", 1, 5)],
            [Failed(2.0, "q", 1, "bad", retryable=False)],
            [Cancelled(2.0, "q", 0), Cancelled(2.5, "q", 1)],
            [Cancelled(2.0, "q", 0), Failed(2.5, "q", 1, "late", retryable=True)],
            [Cancelled(2.0, "q", 0), Finished(2.5, "q", 1, 5)],
        ],
    )
    def test_nothing_is_remembered_of_a_request_that_has_ended(self, end: list[Event]):
        watch = watched(arrived(1.0), *end)
        assert watch._inside == {}

    def test_a_client_that_leaves_the_queue_is_forgotten(self):
        drained = [ReplicaChanged(0.5, name, "draining") for name in ("r0", "r1")]
        watch = watched(*drained, arrived(1.0), Cancelled(2.0, "q", 0))
        assert watch._inside == {}


class TestPrometheus:
    def test_workers_and_queue_are_read_when_scraped(self):
        found = scraped(watched(arrived(1.0), ReplicaChanged(2.0, "r1", "draining")))
        assert found['viisim_inflight_requests{model="m",worker="r0"}'] == 1
        assert found['viisim_outstanding_tokens{model="m",worker="r0"}'] == 150
        assert found['viisim_worker_ready{model="m",worker="r1"}'] == 0
        assert found["viisim_queued_requests"] == 0

    def test_answers_are_counted_by_model_and_status(self):
        watch = watched()
        for model, status in (("m", 200), ("m", 200), ("", 404)):
            watch.answered(model, status)
        found = scraped(watch)
        assert found['viisim_requests_total{model="m",status="200"}'] == 2
        assert found['viisim_requests_total{model="",status="404"}'] == 1

    def test_histograms_are_cumulative(self):
        watch = watched(arrived(1.0), Finished(1.3, "q", 1, 5))
        found = scraped(watch)
        buckets = {
            bound: found[f'viisim_e2e_seconds_bucket{{le="{bound}",model="m"}}']
            for bound in ("0.25", "0.5", "+Inf")
        }
        assert buckets == {"0.25": 0, "0.5": 1, "+Inf": 1}

    def test_every_event_of_the_core_is_timed(self):
        assert scraped(watched(arrived(1.0)))["viisim_handle_seconds_count"] == 3

    def test_a_value_on_a_bound_is_within_it(self):
        distribution = Distribution((1.0, 2.0))
        distribution.observe(1.0)
        assert distribution.buckets() == [("1.0", 1), ("2.0", 1), ("+Inf", 1)]

    def test_half_of_the_values_do_not_exceed_the_median_bound(self):
        distribution = Distribution((1.0, 2.0, 3.0))
        assert distribution.median_bound() is None
        for value in (0.5, 1.5, 9.0):
            distribution.observe(value)
        assert distribution.median_bound() == 2.0
