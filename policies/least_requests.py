"""Fewest requests in flight."""

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict


class LeastRequests(Policy):
    """Send each request to the ready replica with the fewest requests in flight."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Whatever the requests' lengths; ties go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        best = min(ready, key=lambda replica: replica.inflight_requests)
        return Dispatch(request.id, best.id)
