"""Chance alone: the baseline every other policy has to beat."""

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict


class Random(Policy):
    """Send each request to a ready replica chosen uniformly at random."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """One draw from the policy's own generator."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        return Dispatch(request.id, ready[int(self.rng.integers(len(ready)))].id)
