"""Writes docs/validation_aibrix.md: two ways of routing to eight A100, measured and simulated.

    python experiments/validation/aibrix.py

Three set-ups of AIBrix's multi-round benchmark differ in their routing only. Four figures are
fitted to their calm runs; the rest is published of the servers and the client, or comes from the
catalogues. No figure on the page is written by hand; the same code gives the same bytes.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policies.interface import (
    ClusterView,
    Dispatch,
    Event,
    Finished,
    Hold,
    Policy,
    RequestView,
    Verdict,
)
from policies.prefix_hash import PrefixHash
from policies.random import Random
from policies.round_robin import RoundRobin
from viisim.config import shared_folder
from viisim.errors import InputError
from viisim.memory import DEFAULTS
from viisim.profile import CalibratedRange, DecodeTime, PrefillTime, Profile, StepTime
from viisim.report import markdown_table
from viisim.roofline import roofline_profile
from viisim.simulation import ReplicaSpec, Simulation
from viisim.step_costs import step_costs_of, step_time_of
from viisim.workload.request import Request

PAGE = Path(__file__).resolve().parents[2] / "docs" / "validation_aibrix.md"
DATA = "data/calibration/aibrix_multi_round_qa_v0.2.1.csv.gz"
NAIVE, FLOOR, SESSION = SETUPS = ("naive", "aibrix_naive_7", "ps_naive")

CALM_PER_S = 0.5
"""Runs up to this rate are fitted to; the others are not looked at."""
SEEDS = range(1, 21)

REPLICAS = 8
MAX_TOKENS = 32_000
"""--max-model-len of the servers; vLLM 0.7 without chunked prefill computes as many a step."""
WATERMARK = 0.01
"""Share of the blocks that vLLM 0.7 leaves free when it admits a prompt."""
IDLE_S = 5.0
"""After which httpx, and uvicorn in vLLM, close an idle connection."""

SYSTEM_TOKENS, CONTEXT_TOKENS, QUESTION_TOKENS = 1000, 20_041, 32
"""Of a prompt: what all users share; a user's own 20,000 and the template's; the question."""
FIRST_TOKENS = SYSTEM_TOKENS + CONTEXT_TOKENS + QUESTION_TOKENS
ANSWER_TOKENS, NEXT_TOKENS = 100, 29
"""What a second round adds: the answer before it, and the next question."""
WARM_USERS, WARM_GAP_S = 400, 0.5
"""The benchmark's warm-up: so often comes a new user, who asks twice."""
LAST_OLD_USER = 320
"""Users up to this one begin a run in the middle of their conversation, so never with the first
question, which is what the warm-up asked."""
DRAIN_S = 200.0
"""Between runs, for every queue to empty. Caches do not age, so its length does not matter."""
HIT_S = 0.2
"""A first token within this time can only come from a cached prompt."""

Floats: TypeAlias = NDArray[np.float64]
Router: TypeAlias = Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Asked:
    """One measured request. Times in seconds, of the client."""

    user: int
    round: int
    launch_s: float
    prompt_tokens: int
    ttft_s: float
    generation_s: float

    @property
    def first_s(self) -> float:
        """When the first token came."""
        return self.launch_s + self.ttft_s

    @property
    def end_s(self) -> float:
        """When the last one came."""
        return self.first_s + self.generation_s


Runs: TypeAlias = dict[float, list[Asked]]
"""Of one set-up, by rate (requests/s)."""


def read(path: Path) -> dict[str, Runs]:
    """The measured runs by set-up. Raises InputError if the file is absent."""
    if not path.exists():
        raise InputError(f"{path}: no such file; set VIISIM_SHARED to the folder of shared data")
    found: dict[str, Runs] = {name: {} for name in SETUPS}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row["experiment"] in found:
                run = found[row["experiment"]].setdefault(float(row["qps"]), [])
                run.append(_asked(row))
    for runs in found.values():
        for run in runs.values():
            run.sort(key=lambda asked: asked.launch_s)
    return found


def _asked(row: Mapping[str, str]) -> Asked:
    return Asked(
        user=int(row["user_id"]),
        round=int(row["question_id"]),
        launch_s=float(row["launch_s"]),
        prompt_tokens=int(row["prompt_tokens"]),
        ttft_s=float(row["ttft_s"]),
        generation_s=float(row["generation_time_s"]),
    )


# --------------------------------------------------------------------------------------
# What is fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What calm runs show: medians, in seconds, and of how many requests."""

    hit_s: float
    """To the first token of a cached prompt."""
    hits: int
    miss_s: float
    """The same of one that is not."""
    misses: int
    token_s: float
    """Between tokens of a request that is alone."""
    sequence_s: float
    """What another sequence adds to that."""
    pairs: int


def alone(run: Sequence[Asked]) -> Iterator[Asked]:
    """Requests that had all replicas for themselves."""
    for asked in run:
        if not any(
            other is not asked and other.launch_s < asked.end_s and asked.launch_s < other.end_s
            for other in run
        ):
            yield asked


def fit(setups: Mapping[str, Runs]) -> Fitted:
    """From the calm runs of all set-ups. Raises StatisticsError if they show too little."""
    calm = [run for runs in setups.values() for rate, run in runs.items() if rate <= CALM_PER_S]
    single = [asked for run in calm for asked in alone(run)]
    hits = [asked.ttft_s for asked in single if asked.ttft_s < HIT_S]
    # A few prompts are cached in part, and faster than a miss: no matter to a median.
    misses = [asked.ttft_s for asked in single if asked.ttft_s >= HIT_S]
    hit_s, miss_s = median(hits), median(misses)
    token_s = median(asked.generation_s for asked in single) / (ANSWER_TOKENS - 1)
    added_s = [
        added
        for run in calm
        for first, second in pairwise(run)
        if (added := _added_s(first, second, miss_s - hit_s, token_s)) is not None
    ]
    return Fitted(
        hit_s=hit_s,
        hits=len(hits),
        miss_s=miss_s,
        misses=len(misses),
        token_s=token_s,
        sequence_s=median(added_s),
        pairs=len(added_s),
    )


def _added_s(first: Asked, second: Asked, prefill_s: float, token_s: float) -> float | None:
    """How much longer a step of both takes than one of the first alone; None unless they met.

    They met if the first waited for the prefill of the second, as long as one takes, and
    both were slower afterwards by the same time.
    """
    steps = ANSWER_TOKENS - 1
    slower_s = second.generation_s - steps * token_s
    waited_s = first.generation_s - steps * token_s - slower_s
    together = steps - int((second.first_s - prefill_s - first.first_s) / token_s)
    met = 0 < together <= steps and slower_s > 2 * token_s
    if not met or abs(waited_s - prefill_s) > 0.1 * prefill_s:
        return None
    return slower_s / together


def profile_of(fitted: Fitted) -> Profile:
    """The catalogue's profile of the card and the model, with step times as fitted.

    One prompt length cannot tell what a token costs from what a pair of tokens does: their
    ratio is the catalogue's.
    """
    settings = replace(DEFAULTS, max_num_batched_tokens=MAX_TOKENS)
    known = roofline_profile(
        "a100_80gb", "llama-3.1-8b", max_model_len=MAX_TOKENS, settings=settings
    )
    prompt, new = SYSTEM_TOKENS + CONTEXT_TOKENS, CONTEXT_TOKENS
    pairs = new * SYSTEM_TOKENS + new * (new + 1) / 2
    old = known.step_time.prefill
    factor = (fitted.miss_s - fitted.hit_s) / (
        new * old.per_token_s + pairs * old.per_token_context_s
    )
    base_s = fitted.token_s - fitted.sequence_s
    return known.model_copy(
        update={
            "engine": known.engine.model_copy(
                update={"enable_chunked_prefill": False, "watermark": WATERMARK, "version": "0.7.0"}
            ),
            "step_time": StepTime(
                decode=(
                    DecodeTime(
                        sequences=1,
                        base_s=base_s,
                        per_context_token_s=fitted.sequence_s / prompt,
                    ),
                ),
                prefill=PrefillTime(
                    base_s=base_s,
                    per_token_s=factor * old.per_token_s,
                    per_token_context_s=factor * old.per_token_context_s,
                ),
            ),
            "range": CalibratedRange(
                decode_sequences=(1, 2), context_tokens=(0, prompt), prefill_tokens=(1, prompt)
            ),
            "source": f"client's times of AIBrix 0.2.1, up to {CALM_PER_S} requests/s",
        }
    )


def front_s(fitted: Fitted, profile: Profile) -> float:
    """What a first token takes outside of the engine: the way there and back, and tokenisation.
    A step that finds its prompt cached takes its base only."""
    return fitted.hit_s - profile.step_time.prefill.base_s


# --------------------------------------------------------------------------------------
# How requests are routed


class KeepAlive(Policy):
    """An HTTP client behind a balancer of connections, as Kubernetes has it.

    A request takes the oldest connection that is idle, and so its replica; where none is, a new
    one, to a replica at random or (`in_turn`) the next. One idle for `IDLE_S` is closed.
    """

    def __init__(self, *, in_turn: bool = False) -> None:
        self.in_turn = in_turn
        self._opened = 0
        self._replicas: dict[int, str] = {}
        """Of every open connection, oldest first."""
        self._idle_since_s: dict[int, float] = {}
        self._carries: dict[str, int] = {}
        """Of every request in flight, its connection."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Replicas are never full: the engines queue."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        self._close_idle(view.now_s)
        connection = min(self._idle_since_s, default=None)
        if connection is None:
            connection = self._opened
            self._opened += 1
            which = connection if self.in_turn else int(self.rng.integers(len(ready)))
            self._replicas[connection] = ready[which % len(ready)].id
        else:
            del self._idle_since_s[connection]
        self._carries[request.id] = connection
        return Dispatch(request.id, self._replicas[connection])

    def _close_idle(self, now_s: float) -> None:
        for connection, since_s in list(self._idle_since_s.items()):
            if now_s - since_s >= IDLE_S:
                del self._idle_since_s[connection], self._replicas[connection]

    def observe(self, event: Event, view: ClusterView) -> None:
        """An answer that is whole leaves its connection idle."""
        if isinstance(event, Finished):
            self._idle_since_s[self._carries.pop(event.request_id)] = event.now_s


BY_SESSION: Router = partial(PrefixHash, prefix_tokens=2 * SYSTEM_TOKENS, load_factor=1e9)
"""A hash ring of users without bounds on loads: the second block of a prompt is the user's."""
BALANCERS: dict[str, Router] = {
    "connections kept alive, new ones at random": KeepAlive,
    "connections kept alive, new ones in turn": partial(KeepAlive, in_turn=True),
    "every request at random": Random,
    "every request in turn": RoundRobin,
}
"""What the Kubernetes service may do; the first is what the page predicts with."""


# --------------------------------------------------------------------------------------
# What is simulated


class Times(NamedTuple):
    """Of the requests of one run, in their order."""

    ttft_s: Floats
    generation_s: Floats


def prompt_of(user: int, first: bool, rounds: int) -> tuple[tuple[Hashable, int], ...]:
    """The content of a user's prompt of round `rounds`. `first`: the conversation began with
    the benchmark's first question."""
    said = (user, first)
    pieces: list[tuple[Hashable, int]] = [
        ("system", SYSTEM_TOKENS),
        (("context", user), CONTEXT_TOKENS),
        (("asks", *said, 1), QUESTION_TOKENS),
    ]
    for later in range(2, rounds + 1):
        pieces.append((("answers", *said, later - 1), ANSWER_TOKENS))
        pieces.append((("asks", *said, later), NEXT_TOKENS))
    return tuple(pieces)


def request_of(name: str, user: int, first: bool, rounds: int, now_ns: int, ring: int) -> Request:
    """One request. The scheduler sees a block that all share and one of the user's; another
    `ring` gives all users other places on a hash ring."""
    prompt = prompt_of(user, first, rounds)
    view = RequestView(
        id=name,
        model="model",
        arrived_s=now_ns / 1e9,
        prompt_tokens=sum(tokens for _, tokens in prompt),
        max_output_tokens=ANSWER_TOKENS,
        streamed=True,
        prefix_blocks=(0, 1000 * ring + user),
        prefix_block_tokens=SYSTEM_TOKENS,
        session=str(user),
    )
    return Request(view, now_ns, prompt, ANSWER_TOKENS, ("answers", user, first, rounds))


def warm_up(ring: int) -> Iterator[Request]:
    """Every user asks, and again when answered."""
    for user in range(1, WARM_USERS + 1):
        began_ns = round((user - 1) * WARM_GAP_S * 1e9)
        request = request_of(f"warm{user}", user, True, 1, began_ns, ring)
        request.next_turn = partial(_second, user, began_ns, ring)
        yield request


def _second(user: int, began_ns: int, ring: int, answered_ns: int) -> Request:
    now_ns = max(answered_ns, began_ns + round(WARM_GAP_S * 1e9))
    return request_of(f"warm{user}-2", user, True, 2, now_ns, ring)


def requests_of(runs: Runs, ring: int) -> Iterator[Request]:
    """The warm-up; then all runs by rising rate, requests sent when they were measured to be."""
    yield from warm_up(ring)
    begins_s = WARM_USERS * WARM_GAP_S + DRAIN_S
    for rate, run in sorted(runs.items()):
        for number, asked in enumerate(run):
            first = asked.user > LAST_OLD_USER
            now_ns = round((begins_s + asked.launch_s) * 1e9)
            yield request_of(f"{rate}-{number}", asked.user, first, asked.round, now_ns, ring)
        begins_s += run[-1].launch_s + DRAIN_S


def simulate(profile: Profile, router: Router, runs: Runs, seed: int) -> dict[float, Times]:
    """Times of the runs by rate, to the first token from the arrival at an engine."""
    settings = profile.engine
    replicas = [
        ReplicaSpec(
            f"r{number}",
            "model",
            (f"gpu{number}",),
            settings.scheduler_settings(),
            step_time_of(profile, settings.max_num_seqs),
            step_costs=step_costs_of(profile, settings.max_num_batched_tokens),
        )
        for number in range(REPLICAS)
    ]
    result = Simulation(replicas, router(), requests_of(runs, seed), seed=seed).run().requests
    rates = sorted(runs)
    ends = np.cumsum([len(runs[rate]) for rate in rates])
    # The warm-up is over before the first run begins.
    order = np.argsort(result["arrived_ns"], kind="stable")[-int(ends[-1]) :]
    arrived, first, finished = (
        result[f"{name}_ns"][order].astype(np.int64)
        for name in ("arrived", "first_token", "finished")
    )
    parts = zip(
        np.split((first - arrived) / 1e9, ends[:-1]),
        np.split((finished - first) / 1e9, ends[:-1]),
        strict=True,
    )
    return {rate: Times(*part) for rate, part in zip(rates, parts, strict=True)}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One set-up, simulated with every seed."""

    seeds: tuple[dict[float, Times], ...]

    def each(self, rate: float, figure: Callable[[Times], float]) -> Floats:
        """A figure of one rate, by seed."""
        return np.array([figure(seed[rate]) for seed in self.seeds])

    def mean(self, rate: float, figure: Callable[[Times], float]) -> float:
        """Its mean."""
        return float(self.each(rate, figure).mean())


def predict(
    fitted: Fitted, profile: Profile, router: Router, runs: Runs, seeds: Sequence[int] = SEEDS
) -> Prediction:
    """What clients of these runs would see. With another seed, chance and the ring differ."""
    outside_s = front_s(fitted, profile)
    return Prediction(
        tuple(
            {
                rate: times._replace(ttft_s=times.ttft_s + outside_s)
                for rate, times in simulate(profile, router, runs, seed).items()
            }
            for seed in seeds
        )
    )


def measured(run: Sequence[Asked]) -> Times:
    """The same of a measured run."""
    return Times(
        np.array([asked.ttft_s for asked in run]), np.array([asked.generation_s for asked in run])
    )


class Crossing(NamedTuple):
    """Where one curve rises above another."""

    step: int
    """Index of the first rate at which it is above."""
    rate: float
    """By a straight line from the rate before."""


def crossing(rates: Sequence[float], upper: Floats, lower: Floats) -> Crossing | None:
    """Where `lower` first reaches `upper`; None if it never does."""
    above = lower - upper
    for step, gap in enumerate(above.tolist()):
        if gap >= 0:
            if step == 0:
                return Crossing(0, rates[0])
            before = float(above[step - 1])
            share = before / (before - gap)
            return Crossing(step, rates[step - 1] + share * (rates[step] - rates[step - 1]))
    return None


# --------------------------------------------------------------------------------------
# The page

HEAD = """\
# Routing on eight A100: AIBrix's benchmark, predicted

The regression runs of AIBrix 0.2.1 ask {replicas} replicas of Llama 3.1 8B (vLLM 0.7.0 on A100 80
GB, prefix cache, no chunked prefill) for answers of {answer} tokens to prompts of 21,073, of which
a user's own context is 20,000. Three set-ups differ in their routing only: `naive` and
`aibrix_naive_7` go through a Kubernetes service, `ps_naive` through a router that hashes the user
id. This page is written by `python experiments/validation/aibrix.py`; the data
(`{data}`) are derived from the results in AIBrix's repository.

## What was fitted

Four figures, to the {calm_runs} runs of at most {calm:g} requests/s: the first three to requests that had
the whole cluster for themselves, the last to pairs that met on a replica. **All runs above {calm:g}
requests/s are prediction.**
"""

REST = """\
The rest is not fitted. Arrivals are the client's recorded times. Memory for keys and values
({blocks:,} blocks of 16 tokens, {prompts:.1f} prompts a replica) and how the cost of prefill divides
between tokens and pairs of tokens are the catalogue's. The servers' flags are in AIBrix's
repository, the client with its prompts and its warm-up (400 users, two questions each, before the
first run) in that of vLLM's production-stack; runs follow each other by rising rate over one warm
cache. Outside of the engine a request takes {front:.1f} ms, the time of a hit less one step.

`ps_naive` is `prefix_hash` without bounds on loads. Where users lie on the real ring depends on the
addresses of its pods, which nobody recorded, so each of {seeds} seeds lays them out anew. `naive` is a
client that keeps connections alive (httpx and vLLM's server: {idle:g} s) behind a balancer that gives new
ones a random replica, Kubernetes' default. **Nothing in that rule was fitted, but it was chosen after
the data were seen**; what other rules give stands below. A prediction is the mean over seeds, in
brackets the least and the most.
"""

MISSING = """\
## What is missing

- **The balancer.** Which replica a connection went to was not recorded, nor whether the service
  gives connections out in turn or at random. One measured run is one draw of it: the largest error
  of `naive`, like the largest difference between the two measured set-ups, is at 3.7 requests/s.
- **The ring.** How evenly it lays out users decides how many prompts their replicas can keep, and
  how long their queues are. One real ring is one draw.
- **vLLM 0.7's scheduler.** viisim models that of vLLM V1: without chunked prefill it also advances
  running answers by one token in the step of a prompt; V0 computes prompts alone, before all else.
  The two differ by a token for every prompt that passes. Generation times err more than TTFT at
  high loads; this is a likely part of it, not an established one.
- **A batch of hits.** Cached prompts whose last question is new take 20 ms longer than prompts that
  are cached to the end, where the model says 2; why is not known. Both count as hits here.
- **The client's own ten short requests** before each run, which open connections, are left out.
- From 3.3 requests/s on some users ask again in a run; they are replayed at their recorded times, not
  after their simulated answers.
"""


def ttft(times: Times) -> float:
    """Mean time to first token."""
    return float(times.ttft_s.mean())


def hits(times: Times) -> float:
    """Share of first tokens that only a cached prompt explains."""
    return float((times.ttft_s < HIT_S).mean())


def generation(times: Times) -> float:
    """Mean time from the first token to the last."""
    return float(times.generation_s.mean())


def quantile(share: float) -> Callable[[Times], float]:
    """Of times to first token."""
    return lambda times: float(np.quantile(times.ttft_s, share))


class Report:
    """Everything measured and predicted, and the page's tables of it."""

    def __init__(self, setups: Mapping[str, Runs], seeds: Sequence[int] = SEEDS) -> None:
        self.setups, self.seeds = setups, seeds
        self.rates = sorted(setups[NAIVE])
        self.fitted = fit(setups)
        self.profile = profile_of(self.fitted)
        self.seen = {
            name: {rate: measured(run) for rate, run in runs.items()}
            for name, runs in setups.items()
        }
        self.balanced = {name: self.predict(self.profile, of) for name, of in BALANCERS.items()}
        self.naive = next(iter(self.balanced.values()))
        self.session = self.predict(self.profile, BY_SESSION, SESSION)

    def predict(self, profile: Profile, router: Router, setup: str = NAIVE) -> Prediction:
        """One set-up's requests under a router."""
        return predict(self.fitted, profile, router, self.setups[setup], self.seeds)

    def curve(self, of: Prediction | str) -> Floats:
        """Mean time to first token by rate: predicted, or of a measured set-up."""
        if isinstance(of, str):
            return np.array([ttft(self.seen[of][rate]) for rate in self.rates])
        return np.array([of.mean(rate, ttft) for rate in self.rates])

    def crossing(self, naive: Prediction | str, session: Prediction | str) -> Crossing | None:
        """Where sessions stop paying."""
        return crossing(self.rates, self.curve(naive), self.curve(session))

    def fitted_table(self) -> str:
        """What was fitted."""
        known = self.fitted
        rows = [
            ["first token of a cached prompt", f"{known.hit_s * 1e3:.1f} ms", str(known.hits)],
            ["first token of another", f"{known.miss_s * 1e3:.1f} ms", str(known.misses)],
            ["token of a request alone", f"{known.token_s * 1e3:.2f} ms",
             str(known.hits + known.misses)],
            ["what a second sequence adds to it", f"{known.sequence_s * 1e3:.2f} ms",
             f"{known.pairs} pairs"],
        ]  # fmt: skip
        return markdown_table(["figure", "median", "of requests"], rows)

    def ttft_table(self) -> str:
        """Mean times to first token."""
        rows = []
        for rate in self.rates:
            naive, twin, session = (ttft(self.seen[name][rate]) for name in SETUPS)
            rows.append(
                [f"{rate:g}", f"{naive:.2f}", f"{twin:.2f}", f"{twin / naive - 1:+.0%}",
                 *_predicted(self.naive.each(rate, ttft), naive),
                 f"{session:.2f}", *_predicted(self.session.each(rate, ttft), session)]
            )  # fmt: skip
        headings = ["requests/s", "`naive`", "`aibrix_naive_7`", "noise floor", "predicted",
                    "error", "`ps_naive`", "predicted", "error"]  # fmt: skip
        return markdown_table(headings, rows)

    def detail_table(self) -> str:
        """Signed errors of quantiles and of generation, and hits."""
        figures = [quantile(0.5), quantile(0.9), quantile(0.99), generation]
        rows = []
        for rate in self.rates:
            row = [f"{rate:g}"]
            for name, of in ((NAIVE, self.naive), (SESSION, self.session)):
                seen = self.seen[name][rate]
                row += [f"{of.mean(rate, figure) / figure(seen) - 1:+.0%}" for figure in figures]
                row.append(f"{hits(seen):.0%}, {of.mean(rate, hits):.0%}")
            rows.append(row)
        names = ["p50", "p90", "p99", "generation", "hits"]
        headings = [f"`{of}` {name}" for of in (NAIVE, SESSION) for name in names]
        return markdown_table(["requests/s", *headings], rows)

    def balancer_table(self) -> str:
        """Errors of `naive` under every rule, and where sessions stop paying."""
        rows = []
        for name, of in self.balanced.items():
            errors = self.curve(of) / self.curve(NAIVE) - 1
            rows.append([name, *(f"{e:+.0%}" for e in errors), self.place(of, self.session)])
        rates = [f"{rate:g}" for rate in self.rates]
        return markdown_table(["rule", *rates, "`ps_naive` no longer better"], rows)

    def memory_table(self) -> str:
        """The same with more and less memory for keys and values."""
        rows = []
        for factor in (0.9, 0.95, 1.05, 1.1):
            blocks = round(factor * self.profile.engine.num_kv_blocks)
            engine = self.profile.engine.model_copy(update={"num_kv_blocks": blocks})
            profile = self.profile.model_copy(update={"engine": engine})
            naive = self.predict(profile, KeepAlive)
            session = self.predict(profile, BY_SESSION, SESSION)
            rows.append([f"{blocks:,}", f"{factor - 1:+.0%}", self.place(naive, session)])
        return markdown_table(
            ["KV blocks", "of the catalogue's", "`ps_naive` no longer better"], rows
        )

    def place(self, naive: Prediction | str, session: Prediction | str) -> str:
        """Where sessions stop paying, in words."""
        found = self.crossing(naive, session)
        if found is None:
            return "never"
        if found.step == 0:
            return f"at {self.rates[0]:g} already"
        return (
            f"from {self.rates[found.step - 1]:g} to {self.rates[found.step]:g} ({found.rate:.2f})"
        )

    def verdict(self) -> str:
        """The crossover, predicted and measured, and how sure it is."""
        seen, found = self.crossing(NAIVE, SESSION), self.crossing(self.naive, self.session)
        assert seen is not None, "measured: they do cross"
        apart = "never" if found is None else f"{abs(found.step - seen.step)} load steps away"
        pairs = [
            crossing(self.rates, naive, session)
            for naive in self._by_seed(self.naive)
            for session in self._by_seed(self.session)
        ]
        steps = [99 if pair is None else abs(pair.step - seen.step) for pair in pairs]
        return (
            "Mean TTFT of `ps_naive` is below that of `naive` at low loads, where users come back "
            "to a replica that has their prompt. It stops being so\n\n"
            f"- measured: {self.place(NAIVE, SESSION)} requests/s; against `aibrix_naive_7`: "
            f"{self.place(FLOOR, SESSION)};\n"
            f"- predicted: {self.place(self.naive, self.session)} requests/s, {apart}.\n\n"
            "Single seeds differ as single clusters would: of the "
            f"{len(steps)} pairs of one of either set-up, {steps.count(0)} cross in the measured "
            f"step, {sum(step <= 1 for step in steps)} within one of it.\n"
        )

    def _by_seed(self, of: Prediction) -> list[Floats]:
        columns = [of.each(rate, ttft) for rate in self.rates]
        return list(np.stack(columns, axis=1))

    def summary(self) -> str:
        """Errors over the runs that are prediction."""
        lines = []
        ahead = [rate for rate in self.rates if rate > CALM_PER_S]
        for name, of in ((NAIVE, self.naive), (SESSION, self.session)):
            each = [of.each(rate, ttft) for rate in ahead]
            seen = [ttft(self.seen[name][rate]) for rate in ahead]
            errors = [float(e.mean()) / s - 1 for e, s in zip(each, seen, strict=True)]
            inside = sum(e.min() <= s <= e.max() for e, s in zip(each, seen, strict=True))
            lines.append(
                f"- `{name}`: errors of the mean from {min(errors):+.0%} to {max(errors):+.0%}, "
                f"mean of their sizes {np.mean(np.abs(errors)):.0%}; measured within the range of "
                f"seeds at {inside} of {len(ahead)} loads."
            )
        floor = [abs(ttft(self.seen[FLOOR][r]) / ttft(self.seen[NAIVE][r]) - 1) for r in ahead]
        lines.append(
            f"- noise floor (`aibrix_naive_7` against `naive`): mean size {np.mean(floor):.0%}, "
            f"at most {max(floor):.0%}."
        )
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """The whole page."""
        engine = self.profile.engine
        calm_runs = sum(rate <= CALM_PER_S for runs in self.setups.values() for rate in runs)
        prompts = (engine.num_kv_blocks - 1) * engine.block_tokens / FIRST_TOKENS
        parts = [
            HEAD.format(
                replicas=REPLICAS, answer=ANSWER_TOKENS, data=DATA, calm=CALM_PER_S,
                calm_runs=calm_runs,
            ),
            self.fitted_table() + "\n",
            REST.format(
                blocks=engine.num_kv_blocks, prompts=prompts, seeds=len(self.seeds), idle=IDLE_S,
                front=front_s(self.fitted, self.profile) * 1e3,
            ),
            f"## Mean time to first token, seconds\n\n{self.ttft_table()}\n",
            f"Loads that are prediction, above {CALM_PER_S:g} requests/s:\n\n{self.summary()}",
            f"## The load at which sessions stop paying\n\n{self.verdict()}",
            "## More of the distribution\n\nSigned errors of quantiles of TTFT and of the mean time "
            "from first token to last; share of prompts answered within "
            f"{HIT_S:g} s, measured and predicted. Where about half are, the median is that of a hit "
            f"or of a miss, and its error says little.\n\n{self.detail_table()}\n",
            "## If the service balanced in another way\n\nErrors of `naive`'s mean TTFT by load.\n\n"
            f"{self.balancer_table()}\n",
            f"## If the cache were larger or smaller\n\n{self.memory_table()}\n",
            MISSING,
        ]  # fmt: skip
        return "\n".join(parts)


def _predicted(seeds: Floats, seen: float) -> list[str]:
    mean = float(seeds.mean())
    return [f"{mean:.2f} [{seeds.min():.2f}, {seeds.max():.2f}]", f"{mean / seen - 1:+.0%}"]


if __name__ == "__main__":
    report = Report(read(shared_folder() / DATA))
    PAGE.write_text(report.page(), encoding="utf-8", newline="\n")
