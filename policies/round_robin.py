"""Taking turns."""

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict


class RoundRobin(Policy):
    """Send each request to the ready replica whose turn it is, one turn after another a model."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The next ready replica by id after the one that served the model last.

        The id is remembered, not a position: replicas may come and go between turns.
        """
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        last = self._last.get(request.model, "")
        turn = next((replica for replica in ready if replica.id > last), ready[0])
        self._last[request.model] = turn.id
        return Dispatch(request.id, turn.id)
