"""Several workloads at once."""

from typing import Any

import numpy as np
import pytest

from tests.test_workload_sessions import conversation, sessions
from viisim.errors import InputError
from viisim.workload.interface import Labels, Workload
from viisim.workload.mixture import Labelled, Mixture
from viisim.workload.prefixes import Prefixes
from viisim.workload.request import Request
from viisim.workload.synthetic import Synthetic

CHAT = Labels(traffic_class="chat", tenant="acme", priority=0, deadline_s=9.0)
BATCH = Labels(traffic_class="batch", tenant="emca", priority=5)


def synthetic(rate_per_s: float = 10.0, **changes: Any) -> Synthetic:
    defaults: dict[str, Any] = {
        "requests": 200,
        "rate_per_s": rate_per_s,
        "prompt_tokens": 700,
        "output_tokens": {"geometric": 20},
        "model": "m",
        "prefixes": Prefixes(share=0.5, groups=4, tokens=256),
    }
    return Synthetic(**(defaults | changes))


def mixed(*parts: Workload, seed: int = 1) -> list[Request]:
    return list(Mixture(parts).requests(seed))


def of_part(requests: list[Request], index: int) -> list[Request]:
    return [request for request in requests if request.view.id.startswith(f"p{index}-")]


def segments(requests: list[Request]) -> set[Any]:
    turns = [turn for request in requests for turn in conversation(request)]
    return {segment for turn in turns for segment, _ in turn.prompt}


def blocks(requests: list[Request]) -> set[int]:
    turns = [turn for request in requests for turn in conversation(request)]
    return {block for turn in turns for block in turn.view.prefix_blocks}


def content(requests: list[Request]) -> list[Any]:
    return [(r.view, r.arrived_ns, r.prompt, r.output_tokens) for r in requests]


def test_all_requests_of_all_parts_come_in_order_of_arrival():
    requests = mixed(synthetic(), synthetic(3.0, requests=50))
    arrived = [request.arrived_ns for request in requests]
    assert len(arrived) == 250 == Mixture([synthetic(), synthetic(3.0, requests=50)]).total_requests
    assert arrived == sorted(arrived)


def test_ids_say_the_part_and_differ():
    ids = [request.view.id for request in mixed(synthetic(), synthetic())]
    assert {"p0-r0", "p1-r0", "p1-r199"} <= set(ids)
    assert len(set(ids)) == len(ids)


def test_equal_seeds_give_equal_mixtures():
    assert content(mixed(synthetic(), sessions())) == content(mixed(synthetic(), sessions()))


def test_equal_parts_draw_from_streams_of_their_own():
    requests = mixed(synthetic(), synthetic())
    first, second = ([r.arrived_ns for r in of_part(requests, part)] for part in (0, 1))
    assert first != second


def test_another_part_changes_nothing_in_those_before_it():
    two = mixed(synthetic(), sessions())
    three = mixed(synthetic(), sessions(), synthetic(2.0))
    for part in (0, 1):
        assert content(of_part(three, part)) == content(of_part(two, part))


def test_the_share_of_a_part_is_that_of_its_rate():
    requests = mixed(synthetic(30.0, requests=9000), synthetic(10.0, requests=9000))
    both = [r for r in requests if r.arrived_ns < 250 * 10**9]
    share = len(of_part(both, 0)) / len(both)
    # Of n arrivals of two Poisson processes, each is of the first with chance 3/4.
    assert abs(share - 0.75) <= 4 * np.sqrt(0.75 * 0.25 / len(both))


def test_parts_share_no_content():
    requests = mixed(synthetic(), synthetic(), sessions())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        parts = of_part(requests, first), of_part(requests, second)
        assert not segments(parts[0]) & segments(parts[1])
        assert not blocks(parts[0]) & blocks(parts[1])


def test_prefixes_of_the_same_name_are_the_same():
    named = Prefixes(share=1.0, groups=1, tokens=256, name="system")
    requests = mixed(sessions(prefixes=named), sessions(prefixes=named))
    parts = of_part(requests, 0), of_part(requests, 1)
    assert len(segments(parts[0]) & segments(parts[1])) == 1
    assert len(blocks(parts[0]) & blocks(parts[1])) == 256 // 64


def test_inside_a_part_content_is_shared_as_without_the_mixture():
    alone = list(synthetic().requests(1))
    parts = of_part(mixed(synthetic()), 0)
    assert len(blocks(parts)) == len(blocks(alone)) == 4
    assert len(segments(parts)) == len(segments(alone))


def test_later_turns_belong_to_the_part_too():
    for first in mixed(sessions(), sessions(), seed=3):
        part = first.view.id[:3]
        for before, turn in zip([None, *conversation(first)], conversation(first), strict=False):
            assert turn.view.id.startswith(part)
            assert turn.view.session == first.view.session
            assert turn.view.session.startswith(part)
            if before is not None:
                answer = (before.output_segment, before.output_tokens)
                assert turn.prompt[: len(before.prompt) + 1] == (*before.prompt, answer)


def test_every_part_keeps_its_labels():
    requests = mixed(synthetic(labels=CHAT), synthetic(labels=BATCH))
    for part, labels in enumerate((CHAT, BATCH)):
        for request in of_part(requests, part):
            view = request.view
            assert (view.traffic_class, view.tenant) == (labels.traffic_class, labels.tenant)
            assert view.priority == labels.priority
            assert view.deadline_s == labels.due_s(view.arrived_s)


def test_cut_answers_are_counted_over_all_parts():
    mixture = Mixture([synthetic(max_output_tokens=5), synthetic(max_output_tokens=9)])
    outputs = [(r.view.max_output_tokens, r.output_tokens) for r in mixture.requests(1)]
    assert mixture.cut_outputs == sum(part.cut_outputs for part in mixture.parts) > 0
    assert all(tokens <= limit for limit, tokens in outputs)


def test_relabelling_keeps_what_is_not_given():
    workload = Labelled(synthetic(labels=CHAT), Labels(priority=7))
    for request in workload.requests(1):
        view = request.view
        assert (view.traffic_class, view.tenant, view.priority) == ("chat", "acme", 7)
        assert view.deadline_s == view.arrived_s + 9.0


def test_relabelling_reaches_later_turns():
    first = next(Labelled(sessions(turns=3), BATCH).requests(1))
    assert [turn.view.traffic_class for turn in conversation(first)] == 3 * ["batch"]


@pytest.mark.parametrize("parts", [0, 65])
def test_too_few_or_too_many_parts_are_refused(parts: int):
    with pytest.raises(InputError, match=f"parts: there are {parts}; give 1 to 64"):
        Mixture([synthetic()] * parts)


def test_a_negative_seed_is_refused_at_once():
    with pytest.raises(InputError, match="seed: -1 is negative"):
        Mixture([synthetic()]).requests(-1)
