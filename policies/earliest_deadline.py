"""Earliest deadline first."""

from math import inf
from typing import Any

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Shed, Verdict
from policies.slots import checked_max_inflight, lightest, with_slot
from policies.step_model import StepModel


class EarliestDeadline(Policy):
    """Hold requests while replicas are full; the earliest `deadline_s` goes first (Liu, Layland).

    C. L. Liu and J. W. Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time
    Environment", JACM 20(1), 1973: optimal on one server while all deadlines can be met, and
    poor under overload, where it serves first who is about to be late. Requests without
    a deadline come last, by arrival; with `patience_s`, they count as due so long after arrival
    and so cannot starve.

    `shed_late`: refuse (`late`) a request whose prompt alone would take until after its deadline
    on every ready replica, by their step costs; without it a request stays queued until the
    core sheds it at its deadline. Dispatch goes to the replica with the fewest outstanding tokens
    of those with a free slot; `max_inflight` as in `policies.slots.with_slot`.
    """

    def __init__(
        self,
        *,
        patience_s: float | None = None,
        shed_late: bool = False,
        max_inflight: int | None = None,
    ) -> None:
        if patience_s is not None and not (isinstance(patience_s, (int, float)) and patience_s > 0):
            raise ValueError(
                f"patience_s is {patience_s!r}: give a number of seconds above 0, or leave it "
                "out to serve requests without a deadline last"
            )
        if not isinstance(shed_late, bool):
            raise ValueError(f"shed_late is {shed_late!r}: give true or false")
        self._patience_s = patience_s
        self._shed_late = shed_late
        self._max_inflight = checked_max_inflight(max_inflight)

    def rank(self, request: RequestView) -> Any:
        """The deadline; ties, and those without one, by arrival."""
        due_s = request.deadline_s
        if due_s is None:
            due_s = inf if self._patience_s is None else request.arrived_s + self._patience_s
        return due_s, request.arrived_s

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The lightest replica with a free slot."""
        ready = view.ready(request.model)
        if self._shed_late and ready and self._is_late(request, view):
            return Shed(request.id, "late")
        free = with_slot(request, ready, self._max_inflight)
        return Dispatch(request.id, lightest(free).id) if free else Hold()

    @staticmethod
    def _is_late(request: RequestView, view: ClusterView) -> bool:
        """Of a replica with unknown step costs nothing can be said: it might be in time."""
        if request.deadline_s is None:
            return False
        spare_s = request.deadline_s - view.now_s
        return all(
            replica.step_costs.decode_sequences
            and StepModel(replica.step_costs).prefill_s(request.prompt_tokens, 0) > spare_s
            for replica in view.ready(request.model)
        )
