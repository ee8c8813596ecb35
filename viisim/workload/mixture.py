"""Several workloads at once, each with its own classes, tenants, priorities and deadlines."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from heapq import merge
from zlib import crc32

import numpy as np

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload.interface import Labels, SharedPrefix, Workload
from viisim.workload.request import Request

MOST_PARTS = 64

_PART = crc32(b"part")


class Labelled:
    """A workload whose requests carry other labels; those not given stay as they are."""

    def __init__(self, workload: Workload, labels: Labels) -> None:
        self.workload = workload
        self.labels = labels

    @property
    def total_requests(self) -> int:
        """See `Workload.total_requests`."""
        return self.workload.total_requests

    @property
    def cut_outputs(self) -> int:
        """See `Workload.cut_outputs`."""
        return self.workload.cut_outputs

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`."""
        return map(partial(rewritten, self._labelled), self.workload.requests(seed))

    def _labelled(self, request: Request) -> Request:
        view, labels = request.view, self.labels
        due_s = labels.due_s(view.arrived_s)
        marked = replace(
            view,
            traffic_class=labels.traffic_class or view.traffic_class,
            tenant=labels.tenant or view.tenant,
            priority=labels.priority or view.priority,
            deadline_s=view.deadline_s if due_s is None else due_s,
        )
        return replace(request, view=marked)


class Mixture:
    """The requests of several workloads, merged by arrival.

    Each part draws from streams of its own, by its place in the list: what is added behind it
    changes nothing. Request `r12` of part 0 becomes `p0-r12`, session `s3` `p0-s3`. Parts share
    no content but prefixes of the same name.
    """

    def __init__(self, parts: Sequence[Workload]) -> None:
        """Raises InputError without parts, or with more than 64."""
        if not 1 <= len(parts) <= MOST_PARTS:
            raise InputError(f"parts: there are {len(parts)}; give 1 to {MOST_PARTS}")
        self.parts = tuple(parts)

    @property
    def total_requests(self) -> int:
        """See `Workload.total_requests`."""
        return sum(part.total_requests for part in self.parts)

    @property
    def cut_outputs(self) -> int:
        """See `Workload.cut_outputs`."""
        return sum(part.cut_outputs for part in self.parts)

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`. Of parts that arrive together, the first comes first."""
        Streams(seed)  # refuses a negative seed at once
        streams = [
            map(partial(rewritten, partial(_of_part, index)), part.requests(_seed(seed, index)))
            for index, part in enumerate(self.parts)
        ]
        return merge(*streams, key=_arrived_ns)


def rewritten(rewrite: Callable[[Request], Request], request: Request) -> Request:
    """The request as `rewrite` changes it, and so all later turns of its session."""
    changed = rewrite(request)
    if request.next_turn is not None:
        changed.next_turn = partial(_rewritten_turn, rewrite, request.next_turn)
    return changed


def _rewritten_turn(
    rewrite: Callable[[Request], Request], next_turn: Callable[[int], Request], now_ns: int
) -> Request:
    return rewritten(rewrite, next_turn(now_ns))


def _seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, _PART, index]).generate_state(1, np.uint64)[0])


def _arrived_ns(request: Request) -> int:
    return request.arrived_ns


def _of_part(index: int, request: Request) -> Request:
    """A request with names, segments and prefix blocks that no other part uses."""
    output = request.output_segment
    return replace(
        request,
        view=_view_of_part(index, request.view),
        prompt=tuple((_segment(index, segment), tokens) for segment, tokens in request.prompt),
        output_segment=None if output is None else _segment(index, output),
    )


def _view_of_part(index: int, view: RequestView) -> RequestView:
    return replace(
        view,
        id=f"p{index}-{view.id}",
        session=view.session and f"p{index}-{view.session}",
        # Blocks of named prefixes, below 0, mean the same in every part.
        prefix_blocks=tuple(
            [block if block < 0 else block * MOST_PARTS + index for block in view.prefix_blocks]
        ),
    )


def _segment(index: int, segment: Hashable) -> Hashable:
    return segment if isinstance(segment, SharedPrefix) else (index, segment)
