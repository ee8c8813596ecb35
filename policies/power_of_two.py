"""The power of two choices."""

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict


class PowerOfTwo(Policy):
    """Look at two ready replicas chosen at random and take the lighter (Mitzenmacher 2001).

    M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE Transactions
    on Parallel and Distributed Systems 12(10), 2001. Lighter means fewer outstanding tokens.
    """

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The two are distinct; a tie goes to the one drawn first."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        if len(ready) == 1:
            return Dispatch(request.id, ready[0].id)
        first = int(self.rng.integers(len(ready)))
        second = int(self.rng.integers(len(ready) - 1))
        second += second >= first  # skips the first, so that all pairs are equally likely
        lighter = min(ready[first], ready[second], key=lambda replica: replica.outstanding_tokens)
        return Dispatch(request.id, lighter.id)
