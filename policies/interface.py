"""What a policy sees and what it may answer.

Theory of operation. A driver (the simulator or the proxy) reports *events* to a
`SchedulerCore`; the core asks the policy one question at a time and returns *actions* for the
driver to perform. Everything here is data: no clock, no I/O. Times are seconds on the driver's
own monotonic clock and reach a policy only as `view.now_s` and as fields of events.

Verdicts of `Policy.place`: `Dispatch`, `Hold`, `Shed`, `Preempt`.
Actions of `Policy.plan`: `Dispatch`, `Shed`, `Preempt`, `Launch`, `Retire`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from numpy.random import Generator

from policies.frozen import frozen

# --------------------------------------------------------------------------------------
# Facts about a request


@frozen
class RequestView:
    """What a scheduler may know of a request. Never its true output length (invariant I8)."""

    id: str
    model: str
    arrived_s: float
    prompt_tokens: int
    max_output_tokens: int
    streamed: bool = True
    priority: int = 0
    """Smaller is more urgent, as in vLLM."""
    tenant: str = ""
    traffic_class: str = ""
    deadline_s: float | None = None
    """Absolute time by which a request still in the central queue is shed."""
    prefix_blocks: tuple[int, ...] = ()
    """Chained content hashes of the prompt's blocks: equal values mean equal prefixes."""
    prefix_block_tokens: int = 0
    """Tokens per prefix block (512 Mooncake, 64 Weka, 16 Qwen); bytes in the proxy."""
    predicted_output_tokens: int | None = None
    """A length predictor's guess; None without a predictor."""
    session: str = ""
    """Whose conversation it belongs to; empty for a request on its own."""

    @property
    def expected_tokens(self) -> int:
        """Prompt plus predicted output (the output limit without a predictor)."""
        predicted = self.predicted_output_tokens
        return self.prompt_tokens + (self.max_output_tokens if predicted is None else predicted)


# --------------------------------------------------------------------------------------
# Facts about a replica


@frozen
class StepCosts:
    """How long an engine step takes: the figures of the replica's profile, empty where none is
    known. Both drivers read them from the same file, so they are no privileged information."""

    decode_sequences: tuple[int, ...] = ()
    """The batch sizes that were measured, rising; the two below are by batch size."""
    decode_base_s: tuple[float, ...] = ()
    decode_per_context_token_s: tuple[float, ...] = ()
    prefill_base_s: float = 0.0
    prefill_per_token_s: float = 0.0
    prefill_per_pair_s: float = 0.0
    """By (token, attended token) pairs: n * c + n * (n + 1) / 2 for n tokens behind c others."""
    host_overhead_s: float = 0.0
    max_batched_tokens: int = 0
    """Most tokens that one step computes."""


# --------------------------------------------------------------------------------------
# Events: what a driver reports


@frozen
class Arrived:
    """A client sent a request."""

    now_s: float
    request: RequestView


@frozen
class FirstToken:
    """The first byte of a streamed answer reached the client. Plain requests have none."""

    now_s: float
    request_id: str
    attempt: int


@frozen
class Finished:
    """The attempt produced a whole answer of `output_tokens`."""

    now_s: float
    request_id: str
    attempt: int
    output_tokens: int


@frozen
class Failed:
    """The attempt ended in an error.

    `retryable`: no byte reached the client, so another worker may try. `worker_fault`: it
    counts against the replica (a refused bad request does not).
    """

    now_s: float
    request_id: str
    attempt: int
    reason: str
    retryable: bool
    worker_fault: bool = True


@frozen
class Cancelled:
    """Attempt `attempt` was aborted; or, with `attempt` 0, the client has left."""

    now_s: float
    request_id: str
    attempt: int


@frozen
class ReplicaChanged:
    """A replica appeared, changed state or went away.

    States: `starting`, `ready`, `draining` (finishes what it has, takes no more), `gone`.
    The descriptive fields matter when the replica is first seen.
    """

    now_s: float
    replica_id: str
    state: str
    model: str = ""
    devices: tuple[str, ...] = ()
    max_num_seqs: int = 0
    kv_blocks: int = 0
    block_tokens: int = 16
    step_costs: StepCosts = StepCosts()


@frozen
class Gauges:
    """A scrape of one replica's metrics, sampled at `sampled_s`, delivered at `now_s`."""

    now_s: float
    replica_id: str
    sampled_s: float
    running: int
    waiting: int
    kv_usage: float
    """Share of the KV blocks in use, 0 to 1."""
    power_w: float | None = None
    """Of all its devices together; None where nobody measures it."""
    temperature_c: float | None = None
    """The junction of its hottest device."""


@frozen
class LaunchFailed:
    """A `Launch` came to nothing."""

    now_s: float
    replica_id: str
    reason: str


@frozen
class Limits:
    """The operator's limits, applied by the core whatever the policy."""

    max_queued: int | None = None
    """Requests held centrally beyond this are shed as `queue_full`."""
    queue_timeout_s: float | None = None
    """A request held longer than this is shed as `timeout`."""
    eject_after: int = 3
    """Consecutive failures after which a replica takes no requests."""
    eject_s: float = 10.0
    """How long; afterwards a single request tries it again (half-open)."""
    max_attempts: int = 2
    """Dispatches of one request, counting retries after a failure (not after a Preempt)."""


@frozen
class ConfigChanged:
    """The operator changed the limits, or the policy as well, while running."""

    now_s: float
    limits: Limits
    policy: dict[str, Any] | None = None
    """As in an experiment: `name` or `class`, and the parameters. None: the policy stays."""


@frozen
class Tick:
    """The time `SchedulerCore.next_timer_s` asked for has come."""

    now_s: float


Event: TypeAlias = (
    Arrived
    | FirstToken
    | Finished
    | Failed
    | Cancelled
    | ReplicaChanged
    | Gauges
    | LaunchFailed
    | ConfigChanged
    | Tick
)

# --------------------------------------------------------------------------------------
# Verdicts and actions: what a policy answers and a driver performs


@frozen
class Dispatch:
    """Send the request to the replica. The core numbers the attempt."""

    request_id: str
    replica_id: str
    engine_priority: int | None = None
    """Priority inside the engine (vLLM's `--scheduling-policy priority`; smaller first); None: the
    request's own."""
    attempt: int = 1

    def priority_of(self, request: RequestView) -> int:
        """What the engine is told of the request."""
        return request.priority if self.engine_priority is None else self.engine_priority


@frozen
class Hold:
    """Keep the request, and its lane, waiting until the next event."""


@frozen
class Shed:
    """Refuse the request. The core's own reasons: `queue_full`, `timeout`, `deadline`,
    `failed: ...`."""

    request_id: str
    reason: str


@frozen
class Preempt:
    """Withdraw a dispatched request and put it back in the queue.

    Legal only before its first byte reached the client: a real vLLM can only be aborted from
    outside, and what the client has seen cannot be taken back.
    """

    request_id: str
    attempt: int = 0


@frozen
class Launch:
    """Start a replica of `model` on `devices`; the tensor-parallel degree is their number."""

    model: str
    devices: tuple[str, ...]
    replica_id: str = ""
    """Given by the core."""


@frozen
class Retire:
    """Drain the replica, then stop it."""

    replica_id: str


Verdict: TypeAlias = Dispatch | Hold | Shed | Preempt
Action: TypeAlias = Dispatch | Shed | Preempt | Launch | Retire

# --------------------------------------------------------------------------------------
# Views: read-only windows on the core's live state


class ReplicaView(Protocol):
    """One replica as the scheduler knows it.

    `inflight_requests` and `outstanding_tokens` are the driver's own counts and exact. The
    gauges (`running`, `waiting`, `kv_usage`, `power_w`, `temperature_c`) are as old as `age_s`
    says. Before the first scrape they are 0 and `age_s` is infinite; the last two are None then,
    and wherever nobody measures the cards.
    """

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def devices(self) -> tuple[str, ...]: ...
    @property
    def state(self) -> str: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def kv_blocks(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def step_costs(self) -> StepCosts: ...
    @property
    def inflight_requests(self) -> int: ...
    @property
    def outstanding_tokens(self) -> int:
        """Prompt + predicted output of what is in flight, charged at dispatch."""

    @property
    def unscraped_tokens(self) -> int:
        """Prompt tokens dispatched since the last gauges were sampled."""

    @property
    def withdrawing_requests(self) -> int:
        """Requests in flight that a `Preempt` is taking back; their slots are not free yet."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def power_w(self) -> float | None: ...
    @property
    def temperature_c(self) -> float | None: ...
    @property
    def age_s(self) -> float: ...


class LaneView(Protocol):
    """One lane of the central queue."""

    @property
    def key(self) -> Hashable: ...
    @property
    def head(self) -> RequestView: ...
    @property
    def rank(self) -> Any:
        """`Policy.rank` of the head."""

    def __len__(self) -> int: ...


class ClusterView(Protocol):
    """The cluster at the moment of a question. Valid during that call only."""

    @property
    def now_s(self) -> float: ...
    @property
    def replicas(self) -> Sequence[ReplicaView]:
        """All replicas, whatever their state, ordered by id."""

    @property
    def queued_requests(self) -> int: ...
    def ready(self, model: str) -> Sequence[ReplicaView]:
        """Replicas of `model` that take requests now (not ejected, not draining, and not the
        one where this request just failed), ordered by id."""

    def replica(self, replica_id: str) -> ReplicaView:
        """One replica. Raises KeyError for an unknown id."""

    def request(self, request_id: str) -> RequestView:
        """A request in the queue or in flight. Raises KeyError for an unknown id."""

    def inflight(self, replica_id: str) -> Iterator[RequestView]:
        """Requests in flight on the replica, in the order of their dispatch."""


# --------------------------------------------------------------------------------------
# The policy


class Policy(ABC):
    """Answers one scheduling question at a time.

    `place` and `plan` are functions of their arguments, of `rng`, and of what `observe`
    remembered: no clock, no I/O, no global randomness. So the simulator and the proxy can ask
    the same object the same questions and get the same answers.
    """

    rng: Generator
    """The driver gives each policy its own stream before the first question."""
    tick_s: float | None = None
    """Ask for `plan` this often; None: never."""
    preempts: bool = False
    """Whether the policy may answer `Preempt`. Only then, or with an `observe` of its own, do
    drivers report `FirstToken`; events nobody observes are not built."""

    def lane(self, request: RequestView) -> Hashable:
        """Which lane of the central queue. A held head blocks its own lane only."""
        return request.model

    def rank(self, request: RequestView) -> Any:
        """Sort key within the lane, smallest first. Asked once, on arrival."""
        return request.arrived_s

    def next_lane(self, lanes: Mapping[Hashable, LaneView], view: ClusterView) -> Hashable:
        """The lane whose head is asked about next, of those not held at the moment."""
        return min(lanes.values(), key=lambda lane: (lane.rank, lane.head.arrived_s)).key

    @abstractmethod
    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Decide for the request at the head of a lane.

        Asked after every event until it answers Hold or the lane is empty. After a Preempt it
        is asked again about the same request once the victim's slot is free.
        """

    def plan(self, queue: Iterable[RequestView], view: ClusterView) -> Iterable[Action]:
        """Every `tick_s` seconds: launch, retire, preempt, or dispatch a whole batch.

        `queue` is a lazy view of the central queue, lane by lane, in rank order.
        """
        return ()

    def observe(self, event: Event, view: ClusterView) -> None:
        """Remember what matters. Called once per event, before any question."""


# --------------------------------------------------------------------------------------
# Errors, by whose fault they are


class PolicyError(Exception):
    """The policy's author must repair something."""


class InvalidAction(PolicyError):  # noqa: N818 - named after what is invalid, as in h11
    """The policy gave an answer that cannot be performed; says which and why."""
