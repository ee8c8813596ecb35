"""The simulator against queueing theory, and against a timeline computed by hand.

A replica with one seat, prompts of one token and steps of one constant length is a single server
whose service takes as many steps as a request has output tokens. So the lengths are the service
times, and their exact discrete moments are known.

Tolerances. Waits of successive requests are correlated, so the standard error of a mean is taken
from the means of 40 batches of successive requests: their standard deviation over the square root
of 40. A batch of 1,000 is many times the relaxation time of these queues (about 12 arrivals at a
load of 0.6), so batch means are as good as independent. Theory has to lie within 4 standard
errors: with 39 degrees of freedom that fails once in 3,600 seeds, and the seed is fixed. Each test
also demands that 4 standard errors are less than a quarter of the value, or it would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, factorial

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict
from policies.testing import request
from tests.random_scenarios import GaugeReader
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.records import SeedResult
from viisim.simulation import ReplicaSpec, Simulation
from viisim.streams import Streams
from viisim.workload.request import Request

REQUESTS = 40_000
BATCHES = 40
STANDARD_ERRORS = 4.0
STEP_S = 1e-6


class CentralQueue(Policy):
    """First come first served from one queue, to whichever replica is idle."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The first idle replica, or none."""
        idle = (r for r in view.ready(request.model) if not r.inflight_requests)
        replica = next(idle, None)
        return Hold() if replica is None else Dispatch(request.id, replica.id)


def served(
    lengths: NDArray[np.int64],
    arrivals_per_s: float,
    policy: Policy,
    replicas: int = 1,
    seats: int = 1,
    scrape_s: float = 1.0,
    priorities: NDArray[np.int64] | None = None,
) -> SeedResult:
    """Poisson arrivals of requests with these output lengths; each step takes STEP_S. Engines
    schedule by `priorities`, where there are any."""
    gaps_s = Streams(7)["arrivals"].exponential(1 / arrivals_per_s, len(lengths))
    arrived_ns = np.round(np.cumsum(gaps_s) * 1e9).astype(np.int64)
    engine = SchedulerSettings(
        num_kv_blocks=4_000,
        max_num_seqs=seats,
        max_num_batched_tokens=64,
        max_model_len=60_000,
        prefix_caching=False,
        scheduling_policy="fcfs" if priorities is None else "priority",
    )
    if priorities is None:
        priorities = np.zeros_like(lengths)
    step_time = StepTime([DecodePoint(1, STEP_S, 0.0)], seats, STEP_S, 0.0)
    requests = (
        Request(
            request(
                id=f"q{number}",
                arrived_s=at_ns / 1e9,
                prompt_tokens=1,
                streamed=False,
                priority=priority,
            ),
            at_ns,
            ((number, 1),),
            length,
        )
        for number, (at_ns, length, priority) in enumerate(
            zip(arrived_ns.tolist(), lengths.tolist(), priorities.tolist(), strict=True)
        )
    )
    specs = [ReplicaSpec(f"r{n}", "m", (f"gpu{n}",), engine, step_time) for n in range(replicas)]
    return Simulation(specs, policy, requests, scrape_s=scrape_s).run()


def waits_s(result: SeedResult) -> NDArray[np.float64]:
    """From arrival to the start of service, by request."""
    return (result.requests["started_ns"] - result.requests["arrived_ns"]) / 1e9


def agrees(values: NDArray[np.float64], theory: float) -> None:
    """The mean of the values is the theory's, as closely as their number allows."""
    means = values[: len(values) // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    tolerance = STANDARD_ERRORS * means.std(ddof=1) / BATCHES**0.5
    assert tolerance < theory / 4, "too few requests to tell"
    assert means.mean() == pytest.approx(theory, abs=tolerance)


def geometric(mean_tokens: float) -> tuple[NDArray[np.int64], float]:
    """Lengths 1, 2, ... that are whole parts of exponential ones, and their success chance.

    Their mean is 1 / p and their second moment (2 - p) / p^2, an exponential's but for p.
    """
    chance = 1 - exp(-1 / mean_tokens)
    return Streams(7)["lengths"].geometric(chance, REQUESTS), chance


def pollaczek_khinchine_s(arrivals_per_s: float, mean_s: float, second_s2: float) -> float:
    """Mean wait of M/G/1."""
    return arrivals_per_s * second_s2 / (2 * (1 - arrivals_per_s * mean_s))


def erlang_c_wait_s(arrivals_per_s: float, mean_s: float, servers: int) -> float:
    """Mean wait of M/M/c."""
    offered = arrivals_per_s * mean_s
    load = offered / servers
    queued = offered**servers / factorial(servers) / (1 - load)
    waiting = queued / (sum(offered**k / factorial(k) for k in range(servers)) + queued)
    return waiting * mean_s / (servers * (1 - load))


def test_mean_wait_of_one_server_is_that_of_m_m_1() -> None:
    """W = rho / (1 - rho) / mu; lengths of 1,000 tokens in the mean make the discrete service
    exponential to within 0.05 % of the wait, far below the tolerance."""
    lengths, chance = geometric(1_000)
    mean_s = STEP_S / chance
    result = served(lengths, 0.6 / mean_s, GaugeReader())
    agrees(waits_s(result), 0.6 / (1 - 0.6) * mean_s)


@pytest.mark.parametrize("servers", [2, 3])
def test_mean_wait_behind_a_central_queue_is_that_of_m_m_c(servers: int) -> None:
    """Erlang's C formula; a policy that holds unless a replica is idle makes one queue of many."""
    lengths, chance = geometric(1_000)
    mean_s = STEP_S / chance
    arrivals_per_s = 0.6 * servers / mean_s
    result = served(lengths, arrivals_per_s, CentralQueue(), servers)
    agrees(waits_s(result), erlang_c_wait_s(arrivals_per_s, mean_s, servers))


def _constant(rng: np.random.Generator) -> NDArray[np.int64]:
    return np.full(REQUESTS, 30)


def _bimodal(rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.choice([5, 5, 5, 60], REQUESTS)


def _short_geometric(rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.geometric(0.2, REQUESTS)


@pytest.mark.parametrize(
    ("draw", "mean_tokens", "second_tokens2"),
    [
        (_constant, 30.0, 900.0),
        (_bimodal, (3 * 5 + 60) / 4, (3 * 25 + 3600) / 4),
        (_short_geometric, 1 / 0.2, (2 - 0.2) / 0.2**2),
    ],
)
def test_mean_wait_of_one_server_follows_pollaczek_and_khinchine(
    draw: Callable[[np.random.Generator], NDArray[np.int64]],
    mean_tokens: float,
    second_tokens2: float,
) -> None:
    """Exact discrete moments, so that nothing but the sample is approximate."""
    arrivals_per_s = 0.6 / (mean_tokens * STEP_S)
    result = served(draw(Streams(7)["lengths"]), arrivals_per_s, GaugeReader())
    theory_s = pollaczek_khinchine_s(
        arrivals_per_s, mean_tokens * STEP_S, second_tokens2 * STEP_S**2
    )
    agrees(waits_s(result), theory_s)


def test_mean_waits_by_priority_in_an_engine_follow_cobham() -> None:
    """Of a policy that says nothing of priorities: requests keep their own, and the urgent ones
    overtake those that wait, not the one that is served (Cobham 1954, two classes)."""
    lengths, chance = geometric(1_000)
    mean_s, load = STEP_S / chance, 0.6
    priorities = Streams(7)["priorities"].integers(2, size=REQUESTS)
    result = served(lengths, load / mean_s, GaugeReader(), priorities=priorities)
    waits, residual_s = waits_s(result), load * mean_s  # of the one in service
    agrees(waits[priorities == 0], residual_s / (1 - load / 2))
    agrees(waits[priorities == 1], residual_s / (1 - load / 2) / (1 - load))


@pytest.mark.parametrize(("replicas", "seats"), [(1, 1), (2, 8)])
def test_littles_law_joins_what_gauges_sample_and_what_requests_spend(
    replicas: int, seats: int
) -> None:
    """L = lambda W: the mean of `running + waiting` over the scrapes is the time that all requests
    spend in the engines, per second. The scrape interval is not a multiple of the step, so that
    scrapes meet all phases of a step alike."""
    lengths, chance = geometric(100)
    mean_s = STEP_S / chance
    arrivals_per_s = 0.7 * replicas * seats / mean_s
    result = served(
        lengths, arrivals_per_s, GaugeReader("inflight_requests"), replicas, seats, 1.37 * mean_s
    )
    rows, samples = result.requests, result.samples
    last_ns = int(rows["arrived_ns"].max())
    spent_ns = np.minimum(rows["finished_ns"], last_ns) - rows["dispatched_ns"]
    counted = (samples["running"] + samples["waiting"]).astype(np.float64)
    by_scrape = counted.reshape(-1, replicas).sum(axis=1)
    by_scrape = by_scrape[samples["time_ns"][::replicas] <= last_ns]
    agrees(by_scrape, float(spent_ns.sum()) / last_ns)


def test_a_small_batch_keeps_a_timeline_computed_by_hand() -> None:
    """Two seats, 8 tokens a step. A prefill alone takes 4 ms, one decode 10 ms and 0.1 ms for
    every token it attends to, every prefill token 1 ms more (decode's base covers prefill's).

    A arrives at 0 ms with 6 tokens and wants 3; B at 1 ms with 10, wants 2; C at 2 ms with 2,
    wants 1.

        step  starts   computes                       takes              ends
        1      0.0 ms  A 6 of 6                       4 + 6              10.0 ms   A's 1st token
        2     10.0     A (7 tokens), B 7 of 10        10 + 0.7 + 7       27.7      A's 2nd
        3     27.7     A (8), B 3 more, C: no seat    10 + 0.8 + 3       41.5      A's 3rd, B's 1st
        4     41.5     B (11), C 2 of 2               10 + 1.1 + 2       54.6      B's 2nd, C's 1st
    """
    engine = SchedulerSettings(
        num_kv_blocks=100, block_tokens=4, max_num_seqs=2, max_num_batched_tokens=8
    )
    points = [DecodePoint(1, 0.010, 0.0001), DecodePoint(2, 0.012, 0.0001)]
    step_time = StepTime(points, 2, prefill_base_s=0.004, prefill_per_token_s=0.001)
    requests = [
        Request(
            request(id=name, arrived_s=at_ms / 1e3, prompt_tokens=prompt_tokens),
            at_ms * 10**6,
            ((name, prompt_tokens),),
            output_tokens,
        )
        for name, at_ms, prompt_tokens, output_tokens in (
            ("A", 0, 6, 3),
            ("B", 1, 10, 2),
            ("C", 2, 2, 1),
        )
    ]
    specs = [ReplicaSpec("r0", "m", ("gpu0",), engine, step_time)]

    result = Simulation(specs, GaugeReader(), requests).run()

    rows, totals = result.requests, result.replicas[0]
    assert rows["started_ns"].tolist() == [0, 10_000_000, 41_500_000]
    assert rows["first_token_ns"].tolist() == [10_000_000, 41_500_000, 54_600_000]
    assert rows["finished_ns"].tolist() == [41_500_000, 54_600_000, 54_600_000]
    assert (totals.steps, totals.busy_ns) == (4, 54_600_000)
    assert (totals.prefill_tokens, totals.decode_tokens) == (18, 3)
    assert totals.itl_counts.sum() == 3
