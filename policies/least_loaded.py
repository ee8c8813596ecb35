"""Fewest outstanding tokens."""

from operator import attrgetter

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict

_outstanding_tokens = attrgetter("outstanding_tokens")


class LeastLoaded(Policy):
    """Send each request to the ready replica with the fewest outstanding tokens."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The lightest ready replica; ties go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        best = min(ready, key=_outstanding_tokens)
        return Dispatch(request.id, best.id)
